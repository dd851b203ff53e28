"""The config of a model by a path or a name: no weights are read, and no network is asked.

configs.json beside this file holds the sizes of some public models, as their config.json state
them; keys that bear on nothing here are left out.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lorax.errors import EnvironmentProblem
from lorax.formats.gguf_files import open_gguf
from lorax.formats.json_files import read_json
from lorax.formats.model_config import read_config
from lorax.models.config import ModelConfig

_ENDINGS = ("-hf", "-instruct", "-chat", "-base", "-v0.1")


@cache
def known() -> dict[str, dict[str, Any]]:
    """The configs that come with lorax, by their names on the Hub without the owner."""
    path = Path(__file__).with_name("configs.json")
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True)
class Known:
    """A model's config, and what its weights are stored in.

    dtype: "float32", "float16" or "bfloat16". quantization: a format's name, where bitsandbytes
    has quantized them.
    """

    config: ModelConfig
    dtype: str = "float32"
    quantization: str | None = None


def find_config(path: str) -> Known:
    """What is known behind a directory, a config.json, a .gguf file or a known name.

    path: a name may carry its owner ("meta-llama/Llama-2-7b-hf") and is taken in any case.

    Raises:
        EnvironmentProblem: neither a path nor a known name; the nearest is named.
        FormatError, UnsupportedModel: a config that cannot be read, or is not covered.
    """
    local = Path(path).expanduser()
    if local.suffix == ".gguf" and local.is_file():
        return Known(open_gguf(local).config)
    file = local / "config.json" if local.is_dir() else local
    if local.exists():
        found = read_json(file)
        return _known(found, str(file))
    name = _known_name(path)
    return _known(dict(known()[name]), name)


def _known(found: dict[str, Any], where: str) -> Known:
    stated = str(found.get("dtype") or found.get("torch_dtype"))
    dtype = stated if stated in ("float16", "bfloat16") else "float32"
    return Known(read_config(found, where), dtype, _quantization(found.get("quantization_config")))


def _quantization(stated: Any) -> str | None:
    """The format's name for what bitsandbytes has written."""
    if not isinstance(stated, dict):
        return None
    if stated.get("load_in_8bit"):
        return "int8"
    second = "-dq" if stated.get("bnb_4bit_use_double_quant") else ""
    return f"{stated.get('bnb_4bit_quant_type', 'nf4')}{second}"


def _plain(name: str) -> str:
    """A name without its owner, its case and the endings that change no size."""
    plain = name.rpartition("/")[2].lower()
    for ending in (*_ENDINGS, *_ENDINGS):
        plain = plain.removesuffix(ending)
    return plain.removeprefix("meta-")


def _known_name(path: str) -> str:
    names = {_plain(name): name for name in known()}
    if _plain(path) in names:
        return names[_plain(path)]
    near = difflib.get_close_matches(_plain(path), names, 1)
    hint = f"did you mean {names[near[0]]}" if near else f"known are {', '.join(known())}"
    raise EnvironmentProblem(
        f"{path}: no such path, and no model of that name is known offline; {hint}; or give a "
        "directory or a config.json"
    )
