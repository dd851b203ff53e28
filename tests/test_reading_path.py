"""The core can be read in an afternoon: the reading path and its import closure, in lines.

The path is README's "Read QLoRA in this order". Its closure is every file of the path and every
file of lorax that importing them runs: module-level imports, transitively, with each package's
__init__. An import inside a function (a Triton operator, a checkpoint's names) runs later and does
not count.
"""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATH = (
    *("quant/codebooks", "quant/blockwise", "quant/double", "quant/four_bit", "quant/tensor"),
    *("quant/linear", "adapters/layer", "adapters/lora", "adapters/config", "adapters/inject"),
    *("models/llama", "training/loss"),
)
MOST_PATH_LINES = 1500
MOST_CLOSURE_LINES = 2500
MOST_QUANT_LINES = 605


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


def named_files(path):
    """The files of lorax that the module-level imports of `path` name."""
    for node in module_level_imports(ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            yield from (file_of(alias.name) for alias in node.names if is_lorax(alias.name))
        elif is_lorax(node.module or ""):
            for alias in node.names:  # a module of that package, or a name in that module
                yield file_of(f"{node.module}.{alias.name}") or file_of(node.module)


def is_lorax(module):
    return module.split(".")[0] == "lorax"


def packages_of(path):
    """The __init__ files that Python runs before a module of lorax."""
    inits = [
        parent / "__init__.py" for parent in path.parents if (parent / "__init__.py").is_file()
    ]
    return {ROOT / "lorax" / "__init__.py", *(init for init in inits if init.is_file())}


def closure(paths):
    """`paths` and all files that importing them runs."""
    found, waiting = set(), list(paths)
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += [*named_files(path), *packages_of(path)]
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


BESIDE = {  # a file that is loaded when a config asks for it: the fields that ask
    "adapters.expressions": {"target_modules": "[01]"},
    "adapters.modules_to_save": {"target_modules": ["0"], "modules_to_save": ["1"]},
    "adapters.trainable_tokens": {"target_modules": ["0"], "trainable_token_indices": {"2": [3]}},
}


def test_what_lies_beside_is_loaded_when_a_config_asks_for_it():
    """A plain LoRA loads none of them; a config with the fields above does."""
    code = (
        "import sys, torch, lorax\n"
        "def model():\n"
        "    parts = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Embedding(5, 4)\n"
        "    return torch.nn.Sequential(*parts)\n"
        "def loaded(fields):\n"
        "    lorax.add_adapter(model(), lorax.LoRAConfig(r=2, **fields))\n"
        f"    print(sorted(set({[f'lorax.{name}' for name in BESIDE]}) & set(sys.modules)))\n"
        f"loaded(dict(target_modules=['0'])); loaded({BESIDE['adapters.expressions']})\n"
        f"loaded({BESIDE['adapters.modules_to_save']})\n"
        f"loaded({BESIDE['adapters.trainable_tokens']})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    none, expressions, *both = done.stdout.splitlines()
    assert none == "[]"
    assert expressions == "['lorax.adapters.expressions']"
    assert both[-1] == str(sorted(f"lorax.{name}" for name in BESIDE))
