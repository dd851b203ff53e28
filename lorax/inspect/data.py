"""The data doctor: what a recipe's rows become, token by token, and what is wrong with them.

    <|user|>What is 2 + 2?</s><|assistant|>4</s>
    ..............................................  read, not trained
                                            ^^^^^^  trained: the answer and its end token

Nothing of the model is loaded but its tokenizer. Found by position, never by searching text:

    empty answers           rows whose trained tokens are end tokens alone: an error
    a double BOS            two of them open a row: an error
    an untrained end        an end token right behind an answer that is not trained: an error, since
                            the model would never learn to stop
    truncated answers       rows cut at data.max_length inside an answer: an error above a share

Where the recipe packs, the first forward pass is shown as well, with its seams: in front of each
document, of which none sees another and no first token is learned from the one before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from rich.table import Table
from rich.text import Text

from lorax.data.batches import fill
from lorax.data.examples import Example, load_examples
from lorax.data.tokenizer import Tokenizer
from lorax.errors import UsageError
from lorax.formats.disk import write_report
from lorax.formats.huggingface import load_tokenizer
from lorax.training.packing import Packing, first_epoch, packing_of
from lorax.training.plan import held_out
from lorax.training.recipe import Recipe

MAX_TRUNCATED = 0.1  # the share of rows whose answers may be cut before that is an error
_BINS = 12


@dataclass(frozen=True)
class Piece:
    """A token as it is shown: its text, its id, whether it is trained and whether it is special."""

    text: str
    id: int
    trained: bool
    special: bool


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with some rows: what, how many, the first one's number (from 1)."""

    what: str
    rows: int
    first: int
    is_error: bool


@dataclass(frozen=True)
class PackReport:
    """What packing does to an epoch, and the first forward pass of training.

    rows: the numbers (from 1) of the rows in that pass; tokens: of each. room: tokens that fit in.
    shown: the first of these rows, in pieces.
    """

    epoch: Packing
    saved: float
    room: int
    rows: list[int]
    tokens: list[int]
    shown: list[list[Piece]]


@dataclass(frozen=True)
class DataReport:
    """What there is to say about a recipe's rows.

    lengths: tokens of each row; trained: those that are trained. shown: the first rows, in pieces.
    packed: None where the recipe does not pack.
    """

    path: str
    kind: str
    template: str
    rows: int
    dropped: int
    truncated: int
    lengths: list[int]
    trained: list[int]
    findings: list[Finding]
    shown: list[list[Piece]]
    packed: PackReport | None = None

    @property
    def holds(self) -> bool:
        """Whether nothing is an error."""
        return not any(finding.is_error for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "holds": self.holds}


def inspect_data(recipe: Recipe, show: int = 3, max_truncated: float = MAX_TRUNCATED) -> DataReport:
    """Encode a recipe's rows as training would, and look at them.

    Args:
        show: how many rows to give token by token.
        max_truncated: the share of rows that may be cut inside an answer.

    Raises:
        UsageError: a share that is none. DataError, FormatError: rows or tokenizer cannot be read.
    """
    if not 0 <= max_truncated <= 1 or show < 0:
        raise UsageError(f"max_truncated {max_truncated}, show {show}; expected 0 to 1, 0 or more")
    tokenizer = load_tokenizer(recipe.model.path, revision=recipe.model.revision)
    data = recipe.data
    found = load_examples(Path(data.path), tokenizer, data.max_length, data.columns)
    special = special_ids(tokenizer)
    return DataReport(
        path=data.path,
        kind=found.kind,
        template="the tokenizer's" if tokenizer.chat_template is not None else "none",
        rows=len(found),
        dropped=found.dropped,
        truncated=found.truncated,
        lengths=[len(row.ids) for row in found.rows],
        trained=[row.tokens for row in found.rows],
        findings=findings(found.rows, tokenizer, max_truncated, data.max_length),
        shown=[pieces(row, tokenizer, special) for row in found.rows[:show]],
        packed=_packed(recipe, found.rows, tokenizer, show) if data.packing else None,
    )


def _packed(recipe: Recipe, rows: list[Example], tokenizer: Tokenizer, show: int) -> PackReport:
    """The first forward pass as training packs it, over the rows that are not held out."""
    apart = set(held_out(len(rows), recipe))
    train = [row for index, row in enumerate(rows) if index not in apart]
    number = {id(row): index for index, row in enumerate(rows, 1)}
    assert recipe.room is not None
    (step, *_) = first_epoch(recipe, train)
    (first, *_) = fill(step, recipe.room)
    special = special_ids(tokenizer)
    epoch = packing_of(recipe, train)
    return PackReport(
        epoch=epoch,
        saved=epoch.saved,
        room=recipe.room,
        rows=[number[id(row)] for row in first],
        tokens=[len(row.ids) for row in first],
        shown=[pieces(row, tokenizer, special) for row in first[:show]],
    )


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """The ids of all special tokens."""
    added = tokenizer.backend.get_added_tokens_decoder()
    return {index for index, token in added.items() if token.special}


def pieces(row: Example, tokenizer: Tokenizer, special: set[int]) -> list[Piece]:
    """A row token by token; each piece is what the text gains by it."""
    shown, before = [], ""
    for place, (token, trained) in enumerate(zip(row.ids, row.trained, strict=True)):
        text = tokenizer.decode(row.ids[: place + 1])
        is_last = place + 1 == len(row.ids)
        if text.endswith("\ufffd") and not is_last:
            gained = ""  # part of a character, which the token that completes it shows
        elif text.startswith(before):
            gained, before = text[len(before) :], text
        else:  # a decoder that changes what stands before
            gained, before = tokenizer.decode([token]), text
        shown.append(Piece(gained, token, trained, token in special))
    return shown


def findings(
    rows: list[Example], tokenizer: Tokenizer, max_truncated: float, max_length: int
) -> list[Finding]:
    """What is wrong with the rows, the errors first."""
    ends, bos = set(tokenizer.end_token_ids), tokenizer.bos_token_id
    seen: dict[str, list[int]] = {}
    for number, row in enumerate(rows, 1):
        for what in _faults(row, ends, bos, max_length):
            seen.setdefault(what, []).append(number)
    made = []
    for what, numbers in seen.items():
        cut = what == _CUT
        is_error = len(numbers) > max_truncated * len(rows) if cut else what in _ERRORS
        made.append(Finding(what, len(numbers), numbers[0], is_error))
    return sorted(made, key=lambda finding: not finding.is_error)


_EMPTY = "an empty answer: nothing but its end token is trained"
_DOUBLE = "two BOS tokens at the start"
_UNTRAINED = "an end token behind an answer that is not trained: the model would not learn to stop"
_CUT = "an answer cut at data.max_length: its end is never seen"
_ERRORS = (_EMPTY, _DOUBLE, _UNTRAINED)


def _faults(row: Example, ends: set[int], bos: int | None, max_length: int) -> Iterator[str]:
    said = [token for token, trained in zip(row.ids, row.trained, strict=True) if trained]
    if all(token in ends for token in said):
        yield _EMPTY
    if bos is not None and row.ids[:2] == [bos, bos]:
        yield _DOUBLE
    pairs = zip(row.ids[1:], row.trained[:-1], row.trained[1:], strict=True)
    if any(token in ends and before and not now for token, before, now in pairs):
        yield _UNTRAINED
    if len(row.ids) == max_length and row.trained[-1] and row.ids[-1] not in ends:
        yield _CUT


def histogram(lengths: list[int]) -> list[tuple[str, int]]:
    """Rows by their number of tokens: ("1-32", 5), ..., in at most a dozen equal steps."""
    step = max(1, -(-max(lengths) // _BINS))
    counts = Counter((length - 1) // step for length in lengths)
    return [
        (f"{bin * step + 1}-{(bin + 1) * step}", counts[bin])
        for bin in range(min(counts), max(counts) + 1)
    ]


def parts(report: DataReport) -> Iterator[str | Text | Table]:
    """The report for a terminal: lines, rows in colours, tables."""
    yield f"{report.path}: {report.rows} rows, kind: {report.kind}, template: {report.template}"
    for number, row in enumerate(report.shown, 1):
        yield f"row {number}: trained tokens are green, special ones underlined"
        yield _coloured(row)
    if report.packed is not None:
        yield from _packed_parts(report.packed)
    total, trained = sum(report.lengths), sum(report.trained)
    yield (
        f"{total:,} tokens, {trained:,} trained ({100 * trained / total:.1f} %); "
        f"{report.truncated} rows cut at data.max_length, {report.dropped} dropped"
    )
    yield _histogram(report)
    for finding in report.findings:
        word = "error" if finding.is_error else "note"
        yield f"{word}: {finding.what} ({finding.rows} rows, the first is row {finding.first})"
    if report.holds:
        yield "the rows hold: end tokens are trained, no answer is empty, no BOS stands twice"


def _packed_parts(packed: PackReport) -> Iterator[str | Text]:
    yield f"packing: {packed.epoch}"
    yield (
        f"the first forward pass: {len(packed.rows)} rows, {sum(packed.tokens)} of {packed.room} "
        "tokens; a line is a seam, which nothing sees across"
    )
    for number, tokens, row in zip(packed.rows, packed.tokens, packed.shown, strict=False):
        yield Text(f"━━━ row {number}: {tokens} tokens, positions from 0 ━━━", "bold cyan")
        yield _coloured(row)
    rest = len(packed.rows) - len(packed.shown)
    if rest > 0:
        yield f"━━━ and {rest} more: rows {', '.join(map(str, packed.rows[-rest:][:20]))} ━━━"


def _coloured(row: list[Piece]) -> Text:
    text = Text()
    for piece in row:
        style = "bold green" if piece.trained else "dim"
        text.append(piece.text, f"{style} underline" if piece.special else style)
    return text


def _histogram(report: DataReport) -> Table:
    table = Table("tokens", "rows", "", box=None)
    bins = histogram(report.lengths)
    most = max(count for _, count in bins)
    for label, count in bins:
        table.add_row(label, str(count), "█" * round(30 * count / most))
    return table


def write_html(report: DataReport, path: Path) -> None:
    """The report as one page that needs nothing else.

    Raises:
        EnvironmentProblem: it cannot be written.
    """
    loader = PackageLoader("lorax.inspect", "")
    env = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = env.get_template("data.html.jinja")
    text = page.render(report=report, histogram=histogram(report.lengths))
    write_report(path, text.encode())
