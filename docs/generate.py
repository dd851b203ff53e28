"""Two pages of docs/ that are made from the code: recipe.md and cli.md.

    python docs/generate.py          writes them anew

recipe.md asks the recipe's sections (names, types, defaults, descriptions) and the docstrings of
the adapters' configs; cli.md asks the command line's own commands. A test holds that the pages say
what the code says.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import docstring_parser
from cyclopts import App
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lorax.adapters import variants
from lorax.cli import app
from lorax.quant import names
from lorax.training import recipe

PAGES = Path(__file__).parent
NOTE = "<!-- made by docs/generate.py: edit the code, then run it -->"


# --- the recipe -----------------------------------------------------------------------------------


def own_methods() -> dict[str, variants.Variant]:
    """lorax's own methods, whatever else this process has registered."""
    return {
        name: variant
        for name, variant in variants.methods().items()
        if variant.config is None or variant.config.__module__.startswith("lorax.")
    }


def recipe_page() -> str:
    """Every key of a recipe, section by section, and of [adapter] method by method."""
    parts = [NOTE, RECIPE_HEAD]
    plugins = {"plugins": recipe.Recipe.model_fields["plugins"]}
    parts.append(section_table("Above the tables", plugins, {}))
    for name, section in (("model", recipe.ModelSection), ("data", recipe.DataSection)):
        parts.append(section_table(f"`[{name}]`", section.model_fields, {}))
    parts += adapter_tables()
    parts.append(section_table("`[train]`", recipe.TrainSection.model_fields, {}))
    parts.append(HOOKS)
    parts.append(section_table("`[runtime]`", recipe.RuntimeSection.model_fields, {}))
    return "\n\n".join(parts) + "\n"


RECIPE_HEAD = """# The recipe

A recipe is a TOML file with five tables, and one for each step hook that has settings. Every key
is checked; an unknown one is an error that names the nearest. On the command line any key can be
given by its path, and then wins over the file:

```sh
lorax train configs/lora.toml --train.learning_rate 5e-4 --adapter.r 8
```

A value there is read as TOML: `--adapter.target_modules '["q_proj", "v_proj"]'`. The recipes in
[configs/](../configs) are there to start from; `lorax train RECIPE --dry-run` prints the resolved
one with every default. A default of "-" is a key that is left out."""


HOOKS = """## `[hooks.NAME]`

What the step hook NAME takes, one of those that train.hooks names: the parameters of its
constructor beside the model are the keys, with their types and defaults, and they are as strict as
all others ([extending.md](extending.md#a-step-hook))."""


def adapter_tables() -> Iterator[str]:
    """A table for each method of [adapter]; those of LoRA's keys that others share stand once."""
    shared = type(checked("lora").adapter).model_fields
    for method in own_methods():
        made = checked(method)
        fields = {k: f for k, f in type(made.adapter).model_fields.items() if k != "method"}
        head = f'`[adapter]` with `method = "{method}"`'
        if method != "lora":
            kept = [k for k in fields if k in shared and same(fields[k], shared[k])]
            fields = {k: f for k, f in fields.items() if k not in kept}
            head = section_head(head, kept)
        meanings = meanings_of(made.adapter_config(total_steps=100))
        yield section_table(head, fields, meanings) if fields else f"## {head}\n\nNo further keys."


def section_head(head: str, kept: list[str]) -> str:
    """The heading, and a line that says which keys are as in "lora"."""
    if not kept:
        return head
    return f'{head}\n\nAs with "lora": {", ".join(f"`{key}`" for key in kept)}.'


def checked(method: str) -> recipe.Recipe:
    """A recipe of that method with as little as it takes."""
    needed = {"num_virtual_tokens": 1} if method == "prompt-tuning" else {}
    return recipe.Recipe.from_dict(
        {
            "model": {"path": "model"},
            "adapter": {"method": method, **needed},
            "data": {"path": "rows.jsonl"},
            "train": {"output_dir": "run"},
        }
    )


def same(one: FieldInfo, other: FieldInfo) -> bool:
    """Whether two fields take the same values and have the same default."""
    return one.annotation == other.annotation and one.default == other.default


def section_table(head: str, fields: dict[str, FieldInfo], meanings: dict[str, str]) -> str:
    """A heading and a table with a row for each key."""
    lines = [f"## {head}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in fields.items():
        stated = meanings.get(key, "")
        meaning = field.description or stated[:1].upper() + stated[1:]
        lines.append(f"| `{key}` | {type_of(key, field)} | {default_of(field)} | {cell(meaning)} |")
    return "\n".join(lines)


def meanings_of(config: Any) -> dict[str, str]:
    """What a config's docstring, and those of its bases, say of each field."""
    found: dict[str, str] = {}
    for base in reversed(type(config).__mro__):
        text = inspect.cleandoc(base.__doc__ or "").partition("\nRaises:")[0]
        # "name, name: text", and the text goes on in deeper lines
        for keys, meaning in re.findall(r"^([a-zA-Z0-9_, ]+): (.*(?:\n +.*)*)", text, re.MULTILINE):
            found |= {key.strip(): " ".join(meaning.split()) for key in keys.split(",")}
    return found


def type_of(key: str, field: FieldInfo) -> str:
    """A field's type, with the numbers it may lie between."""
    if key == "quantization":
        return ", ".join(f"`{name}`" for name in names.formats())
    bounds = [text for each in field.metadata for text in bound(each)]
    return cell(", ".join([type_name(field.annotation), *bounds]))


def bound(constraint: Any) -> Iterator[str]:
    """ "> 0" and the like, of one of pydantic's constraints."""
    for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
        if getattr(constraint, name, None) is not None:
            yield f"{sign} {getattr(constraint, name):g}"


TOML_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", Any: "any"}


def type_name(kind: Any) -> str:
    """A type in TOML's words; None, which TOML does not have, is left out."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is typing.Annotated:
        return type_name(inner[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner) if len(inner) < 9 else "string"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(each) for each in inner if each is not type(None))
    if origin is list:
        return f"list of {type_name(inner[0])}s"
    if origin is dict:
        return "table"
    return TOML_NAMES.get(kind, getattr(kind, "__name__", str(kind)))


def default_of(field: FieldInfo) -> str:
    """A field's default as TOML would have it; a dash where the key is left out."""
    if field.default_factory is not None and field.default_factory_takes_validated_data:
        return "see there"  # it follows from other keys
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return f'`"{value}"`' if isinstance(value, str) else cell(f"`{value}`")


def cell(text: str) -> str:
    """Text that may stand in a table's cell."""
    return " ".join(text.split()).replace("|", "\\|")


# --- the command line -----------------------------------------------------------------------------


def cli_page() -> str:
    """Every command with its arguments and options."""
    return "\n\n".join([NOTE, CLI_HEAD, *commands(app, "lorax")]) + "\n"


CLI_HEAD = """# The commands

`python -m lorax` is the same program. Results go to stdout, notes to stderr; `--json` prints one
object where a program may read. NO_COLOR is kept. Every command takes `--plugin FILE.py`: your own
file, executed first, which registers variants, codebooks and models.

| exit code | meaning |
|---|---|
| 0 | ok |
| 1 | a check does not hold (`verify`) |
| 2 | usage or recipe |
| 3 | environment or disk; a path that is not there |
| 4 | data or files |
| 5 | training met a loss or gradient that is not finite |
| 130, 143 | ended by SIGINT or SIGTERM, after saving |"""


def commands(parent: App, path: str) -> Iterator[str]:
    """The commands of an App, and theirs."""
    for name in parent:
        if name.startswith("-"):
            continue
        command = parent[name]
        if command.default_command is None:
            yield from commands(command, f"{path} {name}")
        else:
            yield command_text(command, f"{path} {name}")


def command_text(command: App, path: str) -> str:
    """A command's heading, its usage, what it does, and a table of what it takes."""
    stated = docstring_parser.parse(command.default_command.__doc__ or "")
    helps = {param.arg_name: param.description or "" for param in stated.params}
    arguments = [each for each in command.assemble_argument_collection() if each.show]
    usage = [path, *(word for each in arguments for word in usage_of(each)), "[OPTIONS]"]
    prose = [
        " ".join(part.split())
        for part in (stated.short_description, stated.long_description)
        if part
    ]
    lines = [f"## `{path}`", "", f"`{' '.join(usage)}`", ""]
    lines += [escaped("\n\n".join(prose)), "", "| | type | default | |", "|---|---|---|---|"]
    lines += [argument_row(each, helps) for each in arguments]
    return "\n".join(lines)


def is_positional(argument: Any) -> bool:
    """Whether it is given by its place."""
    return argument.field_info.kind != inspect.Parameter.KEYWORD_ONLY


def usage_of(argument: Any) -> Iterator[str]:
    """How an argument stands in the usage line: those by place, and options that must be given."""
    name = argument.names[0].removeprefix("--").upper()
    if argument.field_info.kind == inspect.Parameter.VAR_POSITIONAL:
        yield f"{name}..."
    elif is_positional(argument):
        yield name if argument.required else f"[{name}]"
    elif argument.required:
        yield f"{argument.names[0]} {name}"


def argument_row(argument: Any, helps: dict[str, str]) -> str:
    """An argument's names, type, default and meaning."""
    shown = [name for name in argument.names if not name.startswith("--empty-")]
    if is_positional(argument):
        shown = [argument.names[0].removeprefix("--").upper()]
    stated = default_text(argument.field_info.default)
    meaning = argument.parameter.help or helps.get(argument.field_info.name, "")
    cells = [", ".join(f"`{name}`" for name in shown), option_type(argument.hint), stated]
    return f"| {' | '.join([*cells, escaped(cell(meaning))])} |"


def option_type(hint: Any) -> str:
    """A hint in a reader's words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        return option_type(inner[0])
    if origin in (typing.Union, types.UnionType):
        return option_type(next(each for each in inner if each is not type(None)))
    if origin in (tuple, list):
        return f"{option_type(inner[0])}s"
    return {str: "text", int: "integer", float: "number", bool: "flag", Path: "path"}[hint]


def default_text(default: Any) -> str:
    """A default as it would be given; "" where there is none, or a flag is not set."""
    if default in (None, False, inspect.Parameter.empty, ()) and not is_number(default):
        return ""
    if default is True:
        return "yes"
    return f"`{' '.join(map(str, default)) if isinstance(default, tuple) else default}`"


def is_number(value: Any) -> bool:
    """0 is equal to False and yet a default."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def escaped(text: str) -> str:
    """Angle brackets are no HTML here."""
    return text.replace("<", "&lt;").replace(">", "&gt;")


TEXTS = {"recipe.md": recipe_page, "cli.md": cli_page}


def main() -> None:
    """Write both pages."""
    for name, text in TEXTS.items():
        (PAGES / name).write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
