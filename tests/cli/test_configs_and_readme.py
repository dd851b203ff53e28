"""What a new user copies: the recipes in configs/ and the code blocks of README and docs/ run.

And what the two say of the code is true: tables, links, the tree, the reading order, references.
"""

import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest
from command_line import complete_lorax

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
README = (ROOT / "README.md").read_text()


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def lorax(*arguments, cwd=ROOT):
    return complete_lorax(*arguments, cwd=cwd)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_recipe_resolves_and_its_head_tells_command_memory_and_time(path, tmp_path):
    head = path.read_text().split("[model]")[0]
    assert f"lorax train configs/{path.name}" in head
    assert "GB" in head
    result = lorax("train", str(path), "--dry-run", "--train.learning_rate", "1.25e-4")
    assert result.returncode == 0, result.stderr
    resolved = tomllib.loads(result.stdout.split("\n#")[0])
    assert resolved["train"]["learning_rate"] == 1.25e-4
    written = tomllib.loads(path.read_text())
    for section, values in written.items():
        for key, value in values.items():
            assert resolved[section][key] == value or key == "learning_rate"


def test_the_readme_shows_the_tree_that_is_there():
    block = re.search(r"```\n(lorax/ .*?)```", README, re.DOTALL).group(1)
    wings = [line for line in block.splitlines() if re.match(r"  [A-Z]+ ", line)]
    rooms = {room for line in wings for room in re.findall(r"\w+/", line)}
    assert rooms == {f"{p.parent.name}/" for p in (ROOT / "lorax").glob("*/__init__.py")}


def test_the_reading_order_is_as_long_as_the_readme_says():
    part = README.partition("## Read QLoRA in this order")[2].partition("\n## ")[0]
    files = [ROOT / name for name in re.findall(r"\]\((lorax/[\w/]+\.py)\)", part)]
    lines = sum(len(path.read_text().splitlines()) for path in files)
    said = int(re.search(r"about\s+([\d,]+) lines", README).group(1).replace(",", ""))
    assert len(files) == 12
    assert abs(lines - said) <= 0.1 * said


def imported(name, folder):
    """A module of a folder that is no package."""
    sys.path.insert(0, str(ROOT / folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


@each_page
def test_tables_are_made_from_the_results(page):
    text = page.read_text()
    assert imported("readme_tables", "benchmarks").filled(text) == text


def test_every_table_stands_somewhere():
    shown = [
        name for page in PAGES for name in re.findall(r"<!-- table: (\w+) -->", page.read_text())
    ]
    assert sorted(shown) == sorted(imported("readme_tables", "benchmarks").TABLES)


def test_the_first_lines_say_what_was_measured():
    assert imported("readme_tables", "benchmarks").claim() in " ".join(README.split())


@pytest.mark.parametrize("name", ["recipe.md", "cli.md"])
def test_references_say_what_the_code_says(name):
    made = imported("generate", "docs").TEXTS[name]()
    assert (ROOT / "docs" / name).read_text() == made, "run: python docs/generate.py"


def test_every_key_of_a_recipe_has_a_meaning():
    rows = re.findall(
        r"^\| `(\w+)` \|.*\| ([^|]*) \|$", (ROOT / "docs/recipe.md").read_text(), re.M
    )
    assert len(rows) > 50
    assert [key for key, meaning in rows if not meaning.strip()] == []


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("name", ["parity.md", "promises.md"])
def test_named_tests_are_there(name):
    named = re.findall(r"tests/[\w/]+\.py", (ROOT / "docs" / name).read_text())
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).is_file()] == []


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def python_pages():
    return [page for page in PAGES if blocks(page, "python")]


@pytest.mark.slow
@pytest.mark.parametrize("page", python_pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, tmp_path, monkeypatch, smollm2_short):
    """One after the other in one namespace, with a directory in the place of the Hub's name."""
    code = "\n".join(blocks(page, "python"))
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", smollm2_short)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page.name, "exec"), {"__name__": page.stem})  # noqa: S102 - the page's own


def options_of(command):
    """What cli.md says that a command takes: that page is made from the code, see above."""
    part = (ROOT / "docs" / "cli.md").read_text().partition(f"\n## `lorax {command}`\n")[2]
    assert part, f"there is no lorax {command}"
    return re.findall(r"`(--[\w-]+)`", part.partition("\n## ")[0])


@each_page
def test_commands_exist(page):
    """Each lorax command that is shown is one, with the options that it is shown with."""
    commands = [
        line.split("#")[0].split()
        for block in blocks(page, "sh")
        for line in block.splitlines()
        if line.startswith("lorax ")
    ]
    if page == PAGES[0]:
        assert {c[1] for c in commands} >= {"train", "generate", "evaluate", "merge", "verify"}
    for command in commands:
        words = command[1:3] if command[1] in ("inspect", "adapter") else command[1:2]
        known = options_of(" ".join(words))
        for option in re.findall(r"--[\w.-]+", " ".join(command[2:])):
            is_key = words == ["train"] and re.match(r"--\w+\.\w+", option)
            assert is_key or option in known, command
