"""pydantic's findings, said in the words of a recipe and put where they belong in the file."""

from __future__ import annotations

import copy
import difflib
import re
from collections import defaultdict
from functools import reduce
from typing import Any, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from smore_cli.methods import available_methods
from smore_cli.recipe.document import Document, Loc
from smore_cli.recipe.reading import CORE_SCALARS
from smore_cli.recipe.schema import Recipe
from smore_cli.recipe.unknown_keys import known_keys, unknown_key

__all__ = ["explain", "explain_removed", "without_unknown_keys"]

_NOUNS = {
    "string_type": "a string",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section of key: value lines",
    "finite_number": "a finite number",
    "greater_than": "greater than {gt:.10g}",
    "greater_than_equal": "at least {ge:.10g}",
    "less_than": "less than {lt:.10g}",
    "less_than_equal": "at most {le:.10g}",
    "string_too_short": "at least {min_length} character long",
    "string_pattern_mismatch": "a name or path, on one line and without white space around it",
}
_PATTERNS = {name: pattern for name, pattern, _ in CORE_SCALARS}


def explain(error: ValidationError, document: Document, values: dict[str, Any], root: type[BaseModel] = Recipe) -> None:
    """Adds each of pydantic's findings to the document's problems, once.

    Args:
        error: what `root.model_validate(values)` raised.
        document: where the values stand.
        values: the values as they were checked.
        root: what they were checked by.
    """
    unions: dict[Loc, list[tuple[Loc, ErrorDetails]]] = defaultdict(list)
    for detail in error.errors(include_url=False):
        loc, tags = _split(detail["loc"], values)
        kind = detail["type"]
        if kind == "missing":
            section = f" in {_dotted(loc)}" if loc else " at the top level"
            also = f": one of {', '.join(available_methods())}" if (*loc, *tags) == ("adapter", "method") else ""
            document.add((*loc, *tags), f"missing key '{tags[0]}'{section}{also}")
        elif kind == "extra_forbidden":
            document.add(loc, unknown_key(loc, values, root), key=True)
        elif tags and tags[-1] != "[key]":
            # pydantic names the member of a union between the field and what is wrong in it.
            unions[detail["loc"][: detail["loc"].index(tags[0])]].append((loc, detail))
        elif kind == "value_error":
            message = str(detail["ctx"]["error"])
            document.add(_named_in(message, loc, values), message)
        elif kind in ("unknown_method", "bare_method"):
            document.add(loc, detail["msg"])
        else:
            document.add(loc, _wrong_value(loc, [detail]))
    for field_loc, members in unions.items():
        # A wrong entry of a list says more than "neither a list nor a number".
        inner = [(loc, detail) for loc, detail in members if len(loc) > len(field_loc)]
        for loc, detail in inner:
            document.add(loc, _wrong_value(loc, [detail]))
        if not inner:
            document.add(field_loc, _wrong_value(field_loc, [detail for _, detail in members]))


def without_unknown_keys(error: ValidationError, values: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of the checked values without the keys that no section knows."""
    known: Any = copy.deepcopy(values)
    for detail in error.errors(include_url=False):
        if detail["type"] == "extra_forbidden":
            *section, key = _split(detail["loc"], values)[0]
            reduce(lambda inside, part: inside[part], section, known).pop(key)
    return cast("dict[str, Any]", known)


def explain_removed(document: Document, values: dict[str, Any]) -> None:
    """Adds a problem for each key that an override removes and no recipe can have."""
    for loc in document.removed:
        for depth, part in enumerate(loc):
            known = known_keys(loc[:depth], values)
            if known and part not in known:
                document.add(loc, unknown_key(loc[: depth + 1], values))
                break


def _split(loc: Loc, values: Any) -> tuple[Loc, Loc]:
    """Returns the parts of pydantic's location that lead through the values, and those that do not."""
    inside: list[str | int] = []
    other: list[str | int] = []
    for part in loc:
        in_list = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if in_list or (isinstance(values, dict) and part in values):
            values = values[part]
            inside.append(part)
        else:
            other.append(part)
    return tuple(inside), tuple(other)


def _named_in(message: str, loc: Loc, values: Any) -> Loc:
    """Returns the place of the first key of the section at `loc` that a validator's message names, else the section."""
    for part in loc:
        values = values[part]
    words = re.findall(r"[a-z_0-9]+", message) if isinstance(values, dict) else []
    return next(((*loc, word) for word in words if word in values), loc)


def _wrong_value(loc: Loc, details: list[ErrorDetails]) -> str:
    value, name = details[0]["input"], _dotted(loc)
    if value is None:
        return f"'{name}' has no value: give one or remove the line"
    wanted = " or ".join(dict.fromkeys(_wanted(detail) for detail in details))
    return f"'{name}' must be {wanted}, got {_shown(value)}{_advice(value, wanted, details)}"


def _wanted(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "too_short":
        return f"a list of at least {context['min_length']}"
    if kind == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ")
        return f"one of {choices}" if "," in choices else str(choices)
    if kind in _NOUNS:
        return _NOUNS[kind].format(**context)
    return detail["msg"].removeprefix("Input should be ").removeprefix("Value should be ")


def _advice(value: Any, wanted: str, details: list[ErrorDetails]) -> str:
    """Returns what to do about the usual slips, or nothing."""
    if isinstance(value, str):
        if wanted == "true or false" and value.lower() in ("yes", "no", "on", "off", "y", "n"):
            return f": write {'true' if value.lower() in ('yes', 'on', 'y') else 'false'} (YAML 1.2)"
        if "number" in wanted:
            number = _PATTERNS["int" if wanted == "a whole number" else "float"]
            if number.match(value):
                return ": remove the quotes"
            if number.match(re.sub("[_,]", "", value)):
                return ": write it without separators"
        choices = re.findall(r"'([^']*)'", str(details[0].get("ctx", {}).get("expected", "")))
        if near := difflib.get_close_matches(value.lower(), choices, n=1, cutoff=0.5):
            return f": did you mean '{near[0]}'?"
        if wanted.startswith("a list"):
            return ": remove the line" if value.lower() in ("none", "null") else f": write [{value}]"
    elif wanted.startswith("a list") and isinstance(value, dict):
        return ": begin the entry with '- '"
    elif wanted == "a string" and isinstance(value, bool | int | float):
        return ": put it in quotes"
    return ""


def _shown(value: Any) -> str:
    if isinstance(value, str):
        short = value if len(value) <= 60 else value[:57] + "..."
        return "the string '{}'".format(short.replace("\n", "\\n"))
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return "an empty list" if not value else "a list"
    return str(value)


def _dotted(loc: Loc) -> str:
    return ".".join(map(str, loc))
