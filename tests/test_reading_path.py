"""The core can be read in an afternoon: the reading path and its import closure, in lines.

The path is README's "Read QLoRA in this order". Its closure is every file of the path and every
file of lorax that importing them runs: module-level imports, transitively, with each package's
__init__. An import inside a function (a Triton operator, a checkpoint's names) runs later and does
not count.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATH = (
    *("quant/codebooks", "quant/blockwise", "quant/double", "quant/four_bit", "quant/tensor"),
    *("quant/linear", "adapters/layer", "adapters/lora", "adapters/config", "adapters/inject"),
    *("models/llama", "training/loss"),
)
MOST_PATH_LINES = 1500
MOST_CLOSURE_LINES = 2500
MOST_QUANT_LINES = 600


def module_level_imports(body):
    """The import statements that run when the module is imported, TYPE_CHECKING left out."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If):
            taken = [] if "TYPE_CHECKING" in ast.unparse(node.test) else node.body
            yield from module_level_imports([*taken, *node.orelse])
        elif isinstance(node, ast.Try):
            handlers = [statement for handler in node.handlers for statement in handler.body]
            yield from module_level_imports([*node.body, *handlers, *node.orelse])
        elif isinstance(node, ast.ClassDef | ast.With):
            yield from module_level_imports(node.body)


def file_of(module):
    """The file of a module of lorax; None for another name, say that of a function."""
    parts = module.split(".")
    inside = parts[1:]
    base = ROOT.joinpath(*inside) if inside[:1] == ["kernels"] else ROOT.joinpath("lorax", *inside)
    for candidate in (base.with_suffix(".py") if inside else base, base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def imported_files(path):
    """The files of lorax that importing `path` runs next, packages' __init__ included."""
    found = set()
    for node in module_level_imports(ast.parse(path.read_text()).body):
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
        for name in names:
            parts = name.split(".")
            if parts[0] == "lorax":
                prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
                found |= {file_of(prefix) for prefix in prefixes}
    return found - {None, path}


def closure(paths):
    found, waiting = set(), list(paths)
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += imported_files(path)
    return found


def lines(path):
    return len(path.read_text().splitlines())


def counted(paths):
    """What a failed assertion shows: the sum, and each file's share, the longest first."""
    shares = sorted(((lines(path), str(path.relative_to(ROOT))) for path in paths), reverse=True)
    return sum(count for count, _ in shares), shares


def test_the_reading_path_is_short():
    total, shares = counted([ROOT / "lorax" / f"{name}.py" for name in PATH])
    assert total <= MOST_PATH_LINES, shares


def test_the_reading_path_of_quant_is_short():
    names = [name for name in PATH if name.startswith("quant/")]
    total, shares = counted([ROOT / "lorax" / f"{name}.py" for name in names])
    assert total <= MOST_QUANT_LINES, shares


def test_importing_the_reading_path_pulls_little_else():
    total, shares = counted(closure([ROOT / "lorax" / f"{name}.py" for name in PATH]))
    assert total <= MOST_CLOSURE_LINES, shares


def test_the_closure_is_what_python_imports():
    """The count above is honest: a fresh interpreter that imports the path loads these files."""
    import subprocess
    import sys

    modules = [f"lorax.{name.replace('/', '.')}" for name in PATH]
    code = (
        f"import sys, {', '.join(modules)}\n"
        "files = [m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'lorax']\n"
        "print('\\n'.join(files))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {Path(line).resolve() for line in done.stdout.split()}
    expected = {p.resolve() for p in closure([ROOT / "lorax" / f"{name}.py" for name in PATH])}
    assert loaded == expected
