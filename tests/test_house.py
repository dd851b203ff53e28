"""The house's own rules: floors, the name `kernels`, nothing started by an import."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from test_reading_path import named_files

ROOT = Path(__file__).parent.parent
FLOORS = {
    "kernels": 0, "errors": 0, "version": 0, "backend": 0, "heap": 0, "files": 0, "plugins": 0,
    "moved": 0, "text": 0, "models": 0, "data": 0,
    "quant": 1, "adapters": 2, "optim": 2,
    "console": 3, "formats": 3, "training": 4, "inference": 4,
    "parity": 5, "merging": 5, "inspect": 5, "progress": 5, "demo": 6, "cli": 7,
}  # fmt: skip
FILES = sorted((ROOT / "lorax").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def floor(module):
    parts = module.split(".")
    if parts[0] != "lorax" or len(parts) == 1 or parts[1] in ("__init__", "__main__"):
        return None
    return FLOORS[parts[1]]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_from_floors_below_or_its_own(path):
    relative = path.relative_to(ROOT)
    name = "lorax.kernels" if relative.parts[0] == "kernels" else ".".join(relative.parts)
    module = name.removesuffix(".py")
    mine = floor(module)
    for other in imports(path):
        assert other.split(".")[0] != "kernels", "say lorax.kernels"
        theirs = floor(other)
        if mine is None or theirs is None:
            continue
        own_room = other.split(".")[1] == module.split(".")[1]
        assert own_room or theirs < mine or (theirs == mine == 0), f"{module} imports {other}"


def circles(edges):
    """The strongly connected groups of more than one file: {file: files it imports}."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in edges[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            group, stack[at:] = stack[at:], []
            if len(group) > 1:
                found.append(sorted(group))

    for node in edges:
        if node not in index:
            visit(node)
    return found


def test_no_files_import_each_other_in_a_circle():
    """Module-level imports, by the file that each one names; TYPE_CHECKING does not count."""
    names = {path: str(path.relative_to(ROOT)) for path in FILES}
    edges = {names[path]: {names[other] for other in named_files(path)} for path in FILES}
    assert circles(edges) == []


def test_a_circle_would_be_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


@pytest.mark.parametrize("room", ["models", "quant", "adapters", "kernels"])
def test_these_rooms_run_on_a_bare_gpu_machine(room):
    allowed = {"torch", "triton", "numpy", "safetensors", "lorax"} | set(sys.stdlib_module_names)
    folder = ROOT / "kernels" if room == "kernels" else ROOT / "lorax" / room
    for path in folder.rglob("*.py"):
        for module in imports(path):
            assert module.split(".")[0] in allowed, f"{path.name} imports {module}"


def test_transformers_does_not_take_our_folder_for_the_kernels_package():
    """Run from the repository, `import kernels` finds ours; its version says it is too old."""
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert printed_by(code) == "False"


def test_importing_lorax_starts_nothing():
    code = (
        "import sys, lorax; heavy = {'torch', 'triton', 'transformers', 'pydantic', 'numpy'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert printed_by(code) == "[]"


def printed_by(code):
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.strip()


def test_every_public_name_is_there():
    import lorax

    for name in lorax.__all__:
        assert getattr(lorax, name) is not None
    assert lorax.errors.LoraxError is lorax.LoraxError
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lorax.no_such_name


def test_type_checkers_read_the_same_names():
    """__init__.pyi imports what __init__.py gives, each from the module that defines it."""
    import lorax

    tree = ast.parse((ROOT / "lorax" / "__init__.pyi").read_text())
    stated = {node.names[0].name: node.module for node in tree.body[1:]}
    assert sorted(stated) == sorted([*lorax.__all__, "__version__"])
    for name, module in stated.items():
        assert getattr(import_module(module), name) is getattr(lorax, name)
