"""Rows of a json, jsonl, csv or parquet file, each with the place where it stands."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorax.errors import DataError, EnvironmentProblem
from lorax.files import as_text, read_bounded, require, why_unreadable

Row = tuple[dict[str, Any], str]  # the row, and "file:line"


def read_rows(path: Path) -> list[Row]:
    """All rows of a file; what it holds is told by its ending, in capitals or not.

    Raises:
        DataError: no such file, another kind of file, no rows, or a row that is no object; with
            the file and the line. EnvironmentProblem: a parquet file, and no pyarrow.
    """
    path = require(path)
    ending = path.suffix.lower()
    other = why_unreadable(path, "") if ending in (*_READERS, ".parquet", *_PACKED) else ""
    if other:
        raise DataError(f"{path}: cannot be read ({other}); expected the rows themselves")
    if ending == ".parquet":
        rows = list(_parquet(path))
    elif ending in _READERS:
        rows = list(_READERS[ending](_read_text(path), str(path)))
    else:
        raise DataError(
            f"{path}: expected a .jsonl, .json, .csv or .parquet file; rename it if it is one of "
            "these, or convert it, for example with the datasets package"
        )
    if not rows:
        raise DataError(f"{path}: no rows; expected at least one; give another file")
    return rows


def _read_text(path: Path) -> str:
    try:
        return as_text(read_bounded(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error})"
            "; expected a text file in UTF-8; save it so, or give another path"
        ) from None


def _json_rows(text: str, path: str) -> Iterator[Row]:
    """An array of objects, or objects one after another, whatever the file is called."""
    reader = _json if text[_skip(text, 0) :][:1] == "[" else _objects
    return reader(text, path)


def _json_lines(text: str, path: str) -> Iterator[Row]:
    reader = _json if text[_skip(text, 0) :][:1] == "[" else _jsonl
    return reader(text, path)


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise EnvironmentProblem(
            f"{path}: reading parquet needs pyarrow: pip install pyarrow"
        ) from None
    try:
        if not path.is_file():
            raise OSError("it is no regular file")
        values = parquet.read_table(path, partitioning=None).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: no UTF-8
        first = str(error).split("\n")[0]
        raise DataError(
            f"{path}: cannot be read ({first})"
            "; expected a Parquet file; save it anew, or give another path"
        ) from None
    for number, row in enumerate(values, 1):
        yield {name: _without_nulls(value) for name, value in row.items()}, f"{path}:{number}"


def _without_nulls(value: Any) -> Any:
    """A value as JSON lines have it: every struct of a column has the keys of all, null or not.

    Left in, they would be words of a template that writes tools or arguments. As TRL does.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _jsonl(text: str, path: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield _object(json.loads(line), where), where
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: not valid JSON ({error}); mend the row, or remove it"
            ) from None


def _json(text: str, path: str) -> Iterator[Row]:
    """One array of objects, decoded element by element so that each knows its line."""
    decoder = json.JSONDecoder()
    position = _skip(text, 0)
    if text[position : position + 1] != "[":
        raise DataError(f"{path}:1: expected a JSON array of rows; write [ before the first")
    position = _skip(text, position + 1)
    line, counted = 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: not valid JSON ({error}); mend the row, or remove it"
            ) from None
        yield _object(value, where), where
        position = _skip(text, position)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise DataError(
                f"{where}: expected a comma or the end of the array behind this row; mend it there"
            )
    end = _skip(text, position + 1)
    if end < len(text):
        line = 1 + text.count("\n", 0, end)
        raise DataError(
            f"{path}:{line}: something stands behind the end of the array"
            "; remove it, or write one object a line"
        )


def _objects(text: str, path: str) -> Iterator[Row]:
    """Objects one after another, each on a line or on several."""
    decoder = json.JSONDecoder()
    position, line, counted = _skip(text, 0), 1, 0
    while position < len(text):
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: not valid JSON ({error}); mend the row, or remove it"
            ) from None
        yield _object(value, where), where
        position = _skip(text, position)


def _csv(text: str, path: str) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    line = 1  # where a row begins; a quoted text may take several
    try:
        for values in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not values:
                continue
            if not header:
                header = values
                if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
                    raise DataError(
                        f"{where}: one column, {header[0]!r}; expected commas between columns; "
                        "save the file anew with commas"
                    )
                if len(set(header)) != len(header):
                    raise DataError(f"{where}: a column's name stands twice; rename one of the two")
                continue
            if len(values) != len(header):
                raise DataError(
                    f"{where}: the row has another number of columns than the header"
                    f": {len(values)}, expected {len(header)}; mend the row, or quote its commas"
                )
            yield dict(zip(header, values, strict=True)), where
    except csv.Error as error:
        raise DataError(
            f"{path}:{line}: not valid CSV ({error}); mend the row, or save the file anew"
        ) from None


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


_PACKED = (".gz", ".zip", ".zst", ".xz", ".bz2")
_READERS = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json_rows, ".csv": _csv}


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: expected an object, found {type(value).__name__}; "
            'write each row as {"column": value, ...}, or remove it'
        )
    return value
