"""Every refusal of lorax says, beside what it found, what it expected or what to do about it.

The messages are read where they are built: every call of LoraxError or one of its subclasses in the
package, with the texts of the names it uses (a local variable, a helper function, a constant).
"""

import ast
import re
from pathlib import Path

import pytest

import lorax
from lorax import errors

PACKAGE = Path(lorax.__file__).parent
REFUSALS = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.LoraxError)
}

# A remedy is an imperative: one of these verbs where a clause begins.
VERBS = (
    "add|begin|build|call|change|choose|convert|copy|create|free|get|give|go on|install|keep|leave|"
    "let|load|make|mend|merge|move|name|pass|pip|put|quantize|raise|register|remove|rename|resize|"
    "resume|run|save|say|set|shorten|split|start|take|train|try|turn|unload|unmerge|use|wait|write"
)
REMEDY = re.compile(
    rf"(?:^|[;:,.(]|\b(?:and|or|so|it|then))\s*(?:{VERBS})(?:_\w+)?\b", re.IGNORECASE
)
EXPECTATION = re.compile(
    r"\bexpected\b|\bmust (?:be|have|hold|name)\b|\bat most\b|\bdid you mean\b"
)


# Refusals whose text is not written where they are raised, and who writes it.
EXCEPTIONS = {
    "adapters/inject.py: ": "missing_targets and unmatched_patterns write the lines",
    "adapters/targets.py: ": "missing_targets writes the line",
    "adapters/arithmetic.py: ": "the variant's no_matrix, in its own file",
    "data/template_worker.py": "raise_exception: the chat template's own words",
    "data/kinds.py: : column :": "the advice stands in _REFUSED",
    "formats/adapter_data.py: :": "a variant's no_matrix_alone",
    "merging/laboratory.py: : peft_type :": "a variant's no_merge",
    "formats/export.py: :": "a variant's no_merge",
    "training/recipe.py: :": "a variant's own refusal of a recipe",
}


def helps(message: str) -> bool:
    """Whether a message has a remedy or an expectation."""
    return bool(REMEDY.search(message) or EXPECTATION.search(message))


def refusals(path: Path) -> list[tuple[int, str]]:
    """(line, text) of the refusals that a file builds; those handed on from below are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in tree.body:
        for call in ast.walk(node):
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Name)
                and call.func.id in REFUSALS
                and call.args
                and not _hands_on(call.args[0])
            ):
                found.append((call.lineno, _text(call.args[0], node, tree)))
    return found


def _own_text(node: ast.AST) -> str:
    return " ".join(
        part.value
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    )


def _hands_on(message: ast.AST) -> bool:
    """Whether it is another error's message, with no more than a place before it."""
    names = {part.id for part in ast.walk(message) if isinstance(part, ast.Name)}
    return "error" in names and not re.search(r"[a-z]{2,} [a-z]", _own_text(message))


def _text(message: ast.AST, function: ast.AST, tree: ast.Module) -> str:
    """The texts of a message; of a variable and of a helper, those that it can have."""
    names = {part.id for part in ast.walk(message) if isinstance(part, ast.Name)}
    texts = [_own_text(message)]
    for node in ast.walk(function):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id in names for target in targets):
            texts.append(_own_text(node.value))
            names |= {part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)}
    for node in tree.body:
        if isinstance(node, ast.Assign) and names & {getattr(t, "id", "") for t in node.targets}:
            texts.append(_own_text(node.value))
        if isinstance(node, ast.FunctionDef) and node.name in names:
            texts += [_own_text(part) for part in ast.walk(node) if isinstance(part, ast.Return)]
    return " ".join("; ".join(filter(str.strip, texts)).split())


FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}


def test_all_refusals_say_what_was_expected_or_what_to_do():
    found = [(name, line, text) for name, path in FILES.items() for line, text in refusals(path)]
    mute = [(name, line, text) for name, line, text in found if not helps(text)]
    used = {key for key in EXCEPTIONS for name, _, text in mute if key in (name, f"{name}: {text}")}
    left = [f"{n}:{line}: {t}" for n, line, t in mute if not {n, f"{n}: {t}"} & used]
    assert not left, "\n".join(left)
    assert used == set(EXCEPTIONS), "an exception that nothing needs any more"
    assert len(found) > 250


@pytest.mark.parametrize(
    "message",
    [
        "a.json: r is -1; expected 1 or more",
        "OUT: is not empty; choose another directory or remove it",
        "data: loss is nan. Try a lower train.learning_rate",
        "the adapter is merged; unmerge_adapter(model) and save it then",
    ],
)
def test_a_message_that_helps(message):
    assert helps(message)


@pytest.mark.parametrize(
    "message",
    [
        "a.json: r is negative",
        "--original BASE: is quantized too",
        "the state has an entry 7 that is in no group",
        "a.json: what PEFT would save is not covered by lorax",
    ],
)
def test_a_message_that_does_not(message):
    assert not helps(message)
