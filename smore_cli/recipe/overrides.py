"""`--set train.learning_rate=2e-4`: changes to a recipe from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from smore_cli.recipe.document import Document, Loc, Problem
from smore_cli.recipe.reading import read_value

__all__ = ["apply_overrides"]


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Changes `document` in place; whatever is wrong with an override is noted in the document's problems.

    Args:
        document: the recipe as read.
        overrides: `path=value` each; the path is dotted, with list indices as in `data.train.0.path`; the value is
            YAML; `null` removes the key, or the list entry (those after it move up).
    """
    for override in overrides:
        path, equals, text = override.partition("=")
        if equals and all(path.split(".")):
            value, wrong = read_value(text)
        else:
            value, wrong = None, ["an override is written path=value, as in train.learning_rate=2e-4"]
        if not wrong:
            wrong = _apply(document, path.split("."), value, override)
        document.problems += [Problem(override, message) for message in wrong]


def _apply(document: Document, path: list[str], value: Any, override: str) -> list[str]:
    """Puts `value` at `path`, making sections on the way, or removes what is there; returns what is wrong."""
    current: Any = document.values
    loc: Loc = ()
    for depth, name in enumerate(path):
        key, wrong = _step(current, name, ".".join(path[:depth]))
        if wrong:
            return [wrong]
        loc = (*loc, key)
        here = None if isinstance(current, dict) and key not in current else current[key]
        if depth == len(path) - 1:
            _replace(document, current, loc, value, override)
        elif here is None and value is None:
            document.removed.append((*loc, *path[depth + 1 :]))
            document.overrides[document.removed[-1]] = override
            break
        elif here is None:
            _replace(document, current, loc, {}, override)
        current = current.get(key) if isinstance(current, dict) else here
    return []


def _step(current: Any, name: str, path: str) -> tuple[str | int, str]:
    """Returns the key or index that `name` means in `current`, and what is wrong with it."""
    if isinstance(current, dict):
        return name, ""
    if not isinstance(current, list):
        return name, f"'{path}' is a value, not a section, so '{name}' cannot be set in it"
    if name.isdecimal() and int(name) < len(current):
        return int(name), ""
    entries = f"the indices 0 to {len(current) - 1}" if current else "no entries"
    return name, f"'{path}' is a list with {entries}, not '{name}'"


def _replace(document: Document, parent: Any, loc: Loc, value: Any, override: str) -> None:
    """Sets the last part of `loc` in `parent`, its section or list, or removes it where `value` is None."""
    *section, key = loc
    _forget(document, loc)
    if value is None and isinstance(key, int):
        del parent[key]
        _move_up(document, tuple(section), key)
        return
    document.overrides[loc] = override
    if value is not None:
        parent[key] = value
    elif key in parent:
        del parent[key]
    else:
        document.removed.append(loc)


def _forget(document: Document, loc: Loc) -> None:
    """Drops the places of everything at and below `loc`: the file no longer says it."""
    for places in (document.keys, document.places, document.overrides):
        for known in [known for known in places if known[: len(loc)] == loc]:
            places.pop(known)


def _move_up(document: Document, entries: Loc, gone: int) -> None:
    """Renumbers the places of the entries of a list after the one that is gone."""

    def renumbered(loc: Loc) -> Loc:
        depth = len(entries)
        if len(loc) > depth and loc[:depth] == entries and isinstance(index := loc[depth], int) and index > gone:
            return (*entries, index - 1, *loc[depth + 1 :])
        return loc

    document.keys = {renumbered(loc): mark for loc, mark in document.keys.items()}
    document.places = {renumbered(loc): mark for loc, mark in document.places.items()}
    document.overrides = {renumbered(loc): text for loc, text in document.overrides.items()}
