"""JSON and JSON lines, read strictly: what Python's parser lets pass in silence is said here.

It keeps the last of two equal keys; here that is an error. NaN is read, as files that pandas wrote hold it in columns
that nobody needs; where a text is wanted, it is refused by name.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from smore_cli.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["json_line", "object_row", "parse_json", "read_json", "read_json_lines"]

RawRow = dict[str, Any]


_BETWEEN = re.compile(r"[\s,]*")


class RepeatedKey(ValueError):
    """A JSON object holds a key twice."""


def parse_json(text: str) -> Any:
    """Returns what a JSON text says.

    Raises:
        ValueError: it is not valid, is nested too deeply, or an object holds a key twice; the message says which.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json_lines(text: str, origin: str) -> list[RawRow]:
    """Returns the objects of a text that has one a line; empty lines do not count.

    Raises:
        DataError: a line is not one JSON object; names the line.
    """
    rows = []
    # Not splitlines(): it also splits at U+2028 and its kind, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            rows.append(json_line(line, f"{origin}:{number}"))
    return rows


def json_line(line: str, place: str) -> RawRow:
    """Returns the object on one line.

    Raises:
        DataError: it is not one JSON object.
    """
    try:
        row = parse_json(line)
    except json.JSONDecodeError as error:
        problem = f"{place}:{error.colno}: not valid JSON: {error.msg}"
        raise DataError(problem, "there must be one JSON object a line") from error
    except ValueError as error:
        raise DataError(f"{place}: not usable JSON: {_short(error)}", "mend the line") from error
    return object_row(row, place)


def read_json(text: str, origin: str) -> list[RawRow]:
    """Reads a list of objects, one object, or (many files called .json are that) one object a line.

    Raises:
        DataError: it is none of these; names line and column, or the row.
    """
    if not text.strip():
        return []
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return read_json_lines(text, origin)
        hint = "mend the file at this place; a file with one object a line is named .jsonl"
        raise DataError(f"{origin}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}", hint) from error
    except ValueError as error:
        raise DataError(f"{origin}{_row_of(text)}: not usable JSON: {_short(error)}", "mend this row") from error
    rows = content if isinstance(content, list) else [content]
    return [object_row(row, f"{origin}, row {number}") for number, row in enumerate(rows, 1)]


def object_row(row: Any, place: str) -> RawRow:
    """Returns a row that is an object.

    Raises:
        DataError: it is something else.
    """
    if isinstance(row, dict):
        return row
    problem = f"{place}: a row must be a JSON object, this is a {type(row).__name__}"
    raise DataError(problem, "write {column: value, ...} for every row")


def _unique(pairs: Sequence[tuple[str, Any]]) -> RawRow:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise RepeatedKey(f"the key '{repeated}' stands twice in one object")
    return found


def _row_of(text: str) -> str:
    """Returns where in a list the first row stands that cannot be used, by reading the rows one after another."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    place, number = text.find("[") + 1, 1
    while 0 < place < len(text):
        place = _BETWEEN.match(text, place).end()  # type: ignore[union-attr]
        try:
            _, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return f", row {number}"
        number += 1
    return ""


def _short(error: ValueError) -> str:
    """Returns a message without Python's advice to raise its limits."""
    return str(error).partition(";")[0]
