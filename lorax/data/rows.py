"""Rows of a json, jsonl or csv file, each with the place where it stands."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorax.errors import DataError, require

Row = tuple[dict[str, Any], str]  # the row, and "file:line"


def read_rows(path: Path) -> list[Row]:
    """All rows of a file.

    Raises:
        EnvironmentProblem: no such file. DataError: another kind of file, no rows, or a row that
            is no object; with the file and the line.
    """
    path = require(path)
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}
    if path.suffix not in readers:
        raise DataError(f"{path}: expected a .jsonl, .json or .csv file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    rows = list(readers[path.suffix](text, str(path)))
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def _jsonl(text: str, path: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield _object(json.loads(line), where), where
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON ({error})") from None


def _json(text: str, path: str) -> Iterator[Row]:
    """One array of objects, decoded element by element so that each knows its line."""
    decoder = json.JSONDecoder()
    position = _skip(text, 0)
    if text[position : position + 1] != "[":
        raise DataError(f"{path}:1: expected a JSON array of rows")
    position = _skip(text, position + 1)
    line, counted = 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON ({error})") from None
        yield _object(value, where), where
        position = _skip(text, position)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise DataError(f"{where}: expected a comma or the end of the array behind this row")
    end = _skip(text, position + 1)
    if end < len(text):
        line = 1 + text.count("\n", 0, end)
        raise DataError(f"{path}:{line}: something stands behind the end of the array")


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
                if len(set(header)) != len(header):
                    raise DataError(f"{where}: a column's name stands twice")
                continue
            if len(values) != len(header):
                raise DataError(f"{where}: the row has another number of columns than the header")
            yield dict(zip(header, values, strict=True)), where
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not valid CSV ({error})") from None


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, found {type(value).__name__}")
    return value
