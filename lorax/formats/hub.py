"""A model's or an adapter's directory, by its path or by its id on the Hugging Face Hub.

From the Hub come the files that lorax reads, and those that a copy of the model keeps; no second
copies of the weights (`original/`, `consolidated.safetensors`, `model.fp16.safetensors`), no
pickles, no other frameworks' files. huggingface_hub keeps them in its cache, which HF_HOME,
HF_HUB_CACHE and HF_HUB_OFFLINE steer as everywhere.
"""

import os
import re
from pathlib import Path

from lorax.errors import EnvironmentProblem, FormatError
from lorax.formats.beside import GENERATION, PAPERS, TEMPLATES, TOKENIZER

MODEL_FILES = [
    "config.json",
    GENERATION,
    "*.safetensors",
    "model.safetensors.index.json",
    *TOKENIZER,
    f"{TEMPLATES}/*.jinja",
    *PAPERS,
]


def _in_another_folder(name: str) -> list[str]:
    """Patterns for what lies in any folder but this; they know no "not", so letter by letter.

    Patterns match whole paths, and "*" a slash, too.
    """
    other = [f"{name[:i]}[!{letter}]*/*" for i, letter in enumerate(f"{name}/")]
    return other + [f"{name[:i]}/*" for i in range(1, len(name))]


NO_MODEL_FILES = [
    *_in_another_folder(TEMPLATES),
    "*/*.safetensors",
    "consolidated*",
    "adapter_*",
    "model.*.safetensors",
]
ADAPTER_FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "*/adapter_config.json",  # PEFT keeps an adapter with a name of its own one folder below
    "*/adapter_model.safetensors",
    *TOKENIZER,
    f"{TEMPLATES}/*.jinja",
]
NO_ADAPTER_FILES = ["checkpoint-*", "*/*/*"]


def find_model(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local directory or .gguf file behind a path or Hub id (downloaded if need be).

    Raises:
        EnvironmentProblem: no such path, or an id that the Hub does not give. FormatError: a file
            of another kind.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.suffix == ".gguf" or local.is_file():
        if not local.is_file():
            raise EnvironmentProblem(f"{local}: no such file; give the path of one that is there")
        if local.suffix != ".gguf":
            raise FormatError(f"{local}: expected a model directory, a .gguf file or a Hub id")
        return local
    return _download(os.fspath(path), revision, MODEL_FILES, NO_MODEL_FILES)


def find_adapter_dir(path_or_id: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local path behind an adapter's path or Hub id (downloaded if need be).

    What is here already is given back as it is, with `~` filled in. A model's id gives a directory
    without adapter_config.json, so that one can ask what an id is without fetching weights.

    Raises:
        EnvironmentProblem: no such path, or an id that the Hub does not give.
    """
    local = Path(path_or_id).expanduser()
    if local.exists():
        return local
    return _download(os.fspath(path_or_id), revision, ADAPTER_FILES, NO_ADAPTER_FILES)


def _download(name: str, revision: str | None, wanted: list[str], unwanted: list[str]) -> Path:
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise EnvironmentProblem(
            f"{os.path.expanduser(name)}: no such directory, and no Hub id; "
            "give a path that exists, or an id such as OWNER/NAME"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted
            )
        )
    except Exception as error:  # the hub client raises its own, httpx's and OSErrors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise EnvironmentProblem(
            f"{name}: no such directory here, and the Hub did not give it ({reason}); give the "
            "path of a directory, or mend the id or the connection"
        ) from None
