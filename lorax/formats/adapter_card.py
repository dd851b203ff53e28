"""The model card beside an adapter: README.md with the front matter that the Hub reads.

A README.md that is not such a card is its owner's, and stays. A card (its front matter says
`library_name: peft`) is replaced, unless it is PEFT's template with a title that somebody wrote.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from lorax.adapters.config_keys import AdapterConfig
from lorax.adapters.variants import variant_of

CARD = "README.md"
_OURS = "Trained with lorax: "
_PEFT_UNTITLED = "# Model Card for Model ID"  # the first line of PEFT's template, as it writes it
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)


def is_card(text: str) -> bool:
    """Whether a README.md is a card that lorax or PEFT wrote, and nobody's own text."""
    front = _FRONT_MATTER.match(text)
    if front is None or not re.search(r"^library_name: peft\s*$", front[1], re.MULTILINE):
        return False
    return _OURS in text or _PEFT_UNTITLED in text or not text[front.end() :].strip()


def may_write(directory: Path) -> bool:
    """Whether a card may be written there: nothing of that name, or a card."""
    path = directory / CARD
    if not path.is_file():
        return not path.exists()
    try:
        return is_card(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def card(config: AdapterConfig, base: str | None, task: str | None) -> str:
    """The card's text.

    base: the base model's name or path, if it has one; left out otherwise. task: PEFT's task_type.
    """
    tags = []
    if base is not None:
        tags.append(yaml_text(f"base_model:adapter:{base}"))
    variant = variant_of(config)
    tags += variant.tags
    front = [] if base is None else [f"base_model: {yaml_text(base)}"]
    front.append("library_name: peft")
    if task == "CAUSAL_LM":
        front.append("pipeline_tag: text-generation")
    front += ["tags:", *(f"- {tag}" for tag in [*tags, "lorax"])]
    who = "PEFT and lorax load it" if variant.in_peft else "lorax loads it, with its plugin"
    lines = ["---", *front, "---", "", f"# {variant.title} adapter", ""]
    lines += [f"{_OURS}{variant.summary(config)}. {who}:", ""]
    lines += [
        '    PeftModel.from_pretrained(model, "PATH")        lorax.load_adapter(model, "PATH")'
        if variant.in_peft
        else '    lorax.load_adapter(model, "PATH")'
    ]
    return "\n".join(lines) + "\n"


def yaml_text(text: str) -> str:
    """A string as YAML: as it stands where that cannot be read as anything else, else quoted."""
    if re.fullmatch(r"(base_model:adapter:)?/?[A-Za-z][\w.-]*(/[\w.-]+)+", text, re.ASCII):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())  # JSON's strings are YAML's
