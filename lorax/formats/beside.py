"""What lies beside a model's weights and config: the names of such files, and copies of them.

A copy of a model (merged, quantized, saved) keeps them byte for byte: the tokenizer's, how to
generate, the licence and the card. Whose they are does not change with the numbers.
"""

import json
import shutil
from collections.abc import Collection
from pathlib import Path

from lorax.formats.json_files import read_json

TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
TEMPLATES = "additional_chat_templates"  # a folder of *.jinja
GENERATION = "generation_config.json"
PAPERS = ("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def copy_papers(source: Path, target: Path) -> None:
    """Copy the licence and the card from one directory into another, as they are."""
    for pattern in PAPERS:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def copy_generation(source: Path, target: Path, ends: Collection[int] | None = None) -> None:
    """Copy generation_config.json as it is.

    ends: the end tokens of the tokenizer that goes along. If they lack one that the file names, the
    tokenizer is not this model's own, and they take the place of the file's.
    """
    if not (source / GENERATION).is_file():
        return
    shutil.copyfile(source / GENERATION, target / GENERATION)
    settings = read_json(target / GENERATION)
    stated = settings.get("eos_token_id")
    stated = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if ends is not None and not all(token in ends for token in stated):
        settings["eos_token_id"] = list(ends)
        (target / GENERATION).write_text(json.dumps(settings, indent=2) + "\n")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files from one directory into another, as they are."""
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for file in sorted((source / TEMPLATES).glob("*.jinja")):
        (target / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(file, target / TEMPLATES / file.name)
