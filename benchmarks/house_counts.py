"""How much there is to read, and in how many places a thing is named: a tree of lorax, counted.

    python benchmarks/house_counts.py                     this tree
    python benchmarks/house_counts.py OLD .               two trees beside each other

OLD is another version's directory (git worktree add OLD COMMIT). Lines are counted with docstrings
and blank lines. "Files that name X" is about code: names, attributes and strings, docstrings left
out; a thing that registers itself is named in its own file and where the table lists it.
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE / "tests"))

import test_house  # noqa: E402
import test_reading_path  # noqa: E402

PATHS = (  # the reading path, by the names that its files have or had
    ("quant/codebooks",), ("quant/blockwise",), ("quant/double",), ("quant/four_bit", "quant/nf4"),
    ("quant/tensor",), ("quant/linear",), ("adapters/layer",), ("adapters/lora",),
    ("adapters/config",), ("adapters/inject",), ("models/llama",), ("training/loss",),
)  # fmt: skip
WHOLE_WAY = (  # from a weight file to an adapter file
    ("formats/huggingface",), ("formats/peft",), ("optim/adamw",), ("training/loss",),
)  # fmt: skip
THINGS = {
    "a variant, AdaLoRA": re.compile(r"adalora", re.I),
    "a variant, DoRA": re.compile(r"\b(use_)?dora(Linear)?\b", re.I),
    "a codebook, FP4": re.compile(r"\bfp4\b", re.I),
    "a family, GPT-2": re.compile(r"gpt2", re.I),
}
LONG_FILE, LONG_FUNCTION = 450, 40
FLOORS = test_house.FLOORS | {"verify": 5}


class Tree:
    """One version's files and what they hold."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        test_reading_path.ROOT = self.root  # its functions look there
        folders = (self.root / "lorax", self.root / "kernels")
        self.files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
        self.parsed = {path: ast.parse(path.read_text()) for path in self.files}

    def named(self, groups: tuple[tuple[str, ...], ...]) -> list[Path]:
        """The file of each group: the first of its names that is there."""
        candidates = ([self.root / "lorax" / f"{name}.py" for name in names] for names in groups)
        return [next(path for path in paths if path.is_file()) for paths in candidates]

    def functions(self) -> list[int]:
        """Lines of each function, decorators left out."""
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = (node for tree in self.parsed.values() for node in ast.walk(tree))
        return [n.end_lineno - n.lineno + 1 for n in nodes if isinstance(n, kinds)]  # type: ignore

    def circles(self) -> list[list[Path]]:
        """Groups of files that import each other, at module level."""
        edges = {path: set(test_reading_path.named_files(path)) - {None} for path in self.files}
        return test_house.circles(edges)

    def upward(self) -> int:
        """Imports from a floor above one's own, or of the whole package's face."""
        return sum(self._upward(path) for path in self.files)

    def _upward(self, path: Path) -> int:
        parts = path.relative_to(self.root).parts
        room = "kernels" if parts[0] == "kernels" else parts[1].removesuffix(".py")
        mine = FLOORS.get(room, 9)
        count = 0
        for module in test_house.imports(path):
            parts = module.split(".")
            if parts[0] == "lorax" and mine < 9:
                count += len(parts) == 1 or FLOORS.get(parts[1], 0) > mine
        return count

    def naming(self, pattern: re.Pattern[str]) -> list[str]:
        """The files whose code has such a word."""
        return [
            str(path.relative_to(self.root))
            for path, tree in self.parsed.items()
            if any(pattern.search(word) for word in words(tree))
        ]


def words(tree: ast.Module) -> Iterator[str]:
    """Names, attributes, imported modules and strings of a file; no docstrings."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.alias | ast.keyword):
            yield getattr(node, "name", None) or getattr(node, "arg", None) or ""
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield "" if id(node) in prose else node.value


def lines(paths: list[Path] | set[Path]) -> str:
    count = sum(len(path.read_text().splitlines()) for path in paths)
    return f"{count:,} in {len(paths)} files"


def rows(tree: Tree) -> dict[str, str]:
    """What is counted, as texts for a table."""
    path, way = tree.named(PATHS), tree.named(WHOLE_WAY)
    functions = tree.functions()
    long = sum(n > LONG_FUNCTION for n in functions)
    sizes = [len(path.read_text().splitlines()) for path in tree.files]
    ignores = sum(path.read_text().count("# type: ignore") for path in tree.files)
    return {
        "lines, all of lorax/ and kernels/": lines(tree.files),
        "lines of the reading path": lines(path),
        "lines that importing it runs": lines(test_reading_path.closure(path)),
        "lines that importing adapters/lora.py runs": lines(
            test_reading_path.closure([tree.root / "lorax" / "adapters" / "lora.py"])
        ),
        "lines from weight file to adapter file, imports included": lines(
            test_reading_path.closure([*path, *way])
        ),
        **{f"files that name {thing}": str(len(tree.naming(p))) for thing, p in THINGS.items()},
        "import circles": str(len(tree.circles())),
        "arrows upward": str(tree.upward()),
        "`type: ignore`": str(ignores),
        f"files over {LONG_FILE} lines": str(sum(n > LONG_FILE for n in sizes)),
        f"functions over {LONG_FUNCTION} lines": f"{long} of {len(functions)} "
        f"({100 * long / len(functions):.1f} %)",
        "median function, lines": f"{statistics.median(functions):g}",
    }


def main() -> None:
    """Print a table with a column for each tree."""
    given = sys.argv[1:] or [str(HERE)]
    columns = [rows(Tree(Path(root))) for root in given]
    print(f"| | {' | '.join(Path(root).resolve().name for root in given)} |")
    print("|---|" + "---|" * len(columns))
    for key in columns[0]:
        print(f"| {key} | {' | '.join(column[key] for column in columns)} |")


if __name__ == "__main__":
    main()
