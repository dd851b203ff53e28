"""Where a model's chat templates lie: in files of their own, or inside tokenizer_config.json.

    chat_template.jinja                    the usual one, "default"
    additional_chat_templates/NAME.jinja   others, as "tool_use"
    tokenizer_config.json: chat_template   a text, or [{"name", "template"}, ...]
    chat_template.json: chat_template      of older processors; taken where nothing else is

Files win over tokenizer_config.json, as in transformers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax.errors import FormatError
from lorax.files import read_bounded
from lorax.formats.json_files import read_json

FILE = "chat_template.jinja"
OLD_FILE = "chat_template.json"
DIRECTORY = "additional_chat_templates"
MAX_BYTES = 2**20


def read_chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The templates by name; "default" is the one for plain chat.

    Raises:
        FormatError: a file is too large or no UTF-8, or a template is no text.
    """
    files = {"default": directory / FILE}
    files |= {path.stem: path for path in sorted((directory / DIRECTORY).glob("*.jinja"))}
    found = {name: _read(path) for name, path in files.items() if path.is_file()}
    if found:
        return found
    found = _named(config.get("chat_template"), directory / "tokenizer_config.json")
    if not found and (directory / OLD_FILE).is_file():
        old = read_json(directory / OLD_FILE, constants=True)
        found = _named(old.get("chat_template"), directory / OLD_FILE)
    return found


def write_chat_templates(templates: Mapping[str, str], directory: Path) -> None:
    """Write each into its file."""
    for name, template in templates.items():
        if name != Path(name).name:
            raise FormatError(
                f"a chat template called {name!r} cannot be a file; give it a name without folders"
            )
        path = directory / (FILE if name == "default" else f"{DIRECTORY}/{name}.jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(template, encoding="utf-8")


def _read(path: Path) -> str:
    try:
        text = read_bounded(path, MAX_BYTES).decode("utf-8")
        return text.replace("\r\n", "\n").replace("\r", "\n")  # as text files are read
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path}: not UTF-8 ({error}); save it as UTF-8, or get it anew"
        ) from None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error}); get it anew, or remove it") from None


def _named(found: Any, path: Path) -> dict[str, str]:
    if isinstance(found, list) and all(isinstance(row, dict) for row in found):
        found = {row.get("name"): row.get("template") for row in found}
    elif found is None or isinstance(found, str):
        found = {} if found is None else {"default": found}
    if not isinstance(found, dict) or not all(
        isinstance(part, str) for pair in found.items() for part in pair
    ):
        raise FormatError(
            f"{path}: chat_template is neither a text nor a list of named texts; "
            "mend it there, or leave it out"
        )
    return found
