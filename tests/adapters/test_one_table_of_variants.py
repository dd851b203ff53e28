"""No file names a variant but its own: the rest of the house asks the table."""

import ast
from pathlib import Path

import pytest

from lorax.adapters.variants import methods, resolved, variants

LORAX = Path(__file__).parents[2] / "lorax"
FILES = sorted(LORAX.rglob("*.py"))
# The base of all configs that pick modules, and of what a LoRA is loaded into, are no variants.
SHARED = {"LoRAConfig"}


def own_classes():
    """Class -> the files that may name it: where it stands, and the files of its package."""
    found = {}
    for variant in variants().values():
        for each in (variant.config, variant.layer, variant.embedding, variant.insert):
            kind = resolved(each)
            if kind is None or kind.__name__ in SHARED or not kind.__module__.startswith("lorax."):
                continue
            file = LORAX.parent / (kind.__module__.replace(".", "/") + ".py")
            package = file.parent if file.parent.name != "adapters" else file
            found.setdefault(kind.__name__, set()).add(package)
    return found


# LoRA's layer is what others derive from or turn into, by its constructor, never by isinstance.
BUILDING = {"LoRALinear": {"adapters"}, "LoRAEmbedding": {"adapters"}}
# What computes exactly W x + s B A x in a faster way, and leaves every other layer to itself.
FASTER = {"LoRALinear": {"training/fast", "inference"}}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(LORAX)))
def test_no_file_but_its_own_names_a_variant(path):
    if path == LORAX / "__init__.py":  # the public names, as they are looked up
        return
    names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
    for name, homes in own_classes().items():
        if name not in names or any(home == path or home in path.parents for home in homes):
            continue
        folders = {folder.as_posix() for folder in path.relative_to(LORAX).parents}
        rooms = BUILDING.get(name, set()) | FASTER.get(name, set())
        assert folders & rooms, f"{name} is named outside its own file"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(LORAX)))
def test_no_isinstance_asks_for_a_variant(path):
    for call in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(call, ast.Call) and getattr(call.func, "id", "") == "isinstance"):
            continue
        asked = {n.id for n in ast.walk(call.args[1]) if isinstance(n, ast.Name)}
        for name, homes in own_classes().items():
            own = any(home == path or home in path.parents for home in homes)
            assert own or name not in asked, f"isinstance(..., {name}) outside its own file"


@pytest.mark.parametrize(
    "room", ["training", "formats", "inspect", "merging", "parity", "inference"]
)
def test_no_room_compares_a_method_s_name(room):
    """`method == "full"` and the like are the table's to know."""
    known = {*methods(), *(v.peft_type for v in methods().values() if v.peft_type)} - {
        "lora",
        "LORA",
    }
    for path in sorted((LORAX / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                words = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)
                         and isinstance(c.value, str)}  # fmt: skip
                assert not words & known, f"{path.name}: compares with {words & known}"
