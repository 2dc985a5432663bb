"""A recipe file as plain values, with the place of every key and value, and the problems found in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from smore_cli.errors import RecipeError

__all__ = ["Document", "Loc", "Mark", "Problem", "order"]

Loc = tuple[str | int, ...]
"""Where something stands in a recipe, as in ("data", "train", 0, "path")."""

_SHOWN_COLUMNS = 120


@dataclass(frozen=True, order=True)
class Mark:
    """A place in the file, both counted from 1."""

    line: int
    column: int


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where: a place in the file or the text of an override."""

    where: Mark | str
    message: str


@dataclass
class Document:
    """What a recipe file says, and where it says it.

    Attributes:
        name: the file as the user named it.
        lines: its text.
        values: mappings, lists and scalars.
        keys: place of each mapping key, by location.
        places: place of each value, by location; `()` is the whole recipe.
        overrides: the override that set or removed a location, as the user wrote it.
        removed: locations that an override removed though the file does not have them.
        unreadable: locations whose value could not be read; of them, nothing more is said.
        problems: what was found so far.
    """

    name: str
    lines: list[str]
    values: Any = None
    keys: dict[Loc, Mark] = field(default_factory=dict)
    places: dict[Loc, Mark] = field(default_factory=dict)
    overrides: dict[Loc, str] = field(default_factory=dict)
    removed: list[Loc] = field(default_factory=list)
    unreadable: set[Loc] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    def where(self, loc: Loc, *, key: bool = False) -> Mark | str:
        """Returns the place of the value at `loc` (or of its key); of its section if it is not there."""
        first = self.keys if key else self.places
        if loc not in self.overrides and loc in first:
            return first[loc]
        for depth in range(len(loc), -1, -1):
            part = loc[:depth]
            if part in self.overrides:
                return self.overrides[part]
            mark = self.keys.get(part) or self.places.get(part)
            if mark is not None:
                return mark
        return Mark(1, 1)

    def add(self, loc: Loc, message: str, *, key: bool = False) -> None:
        """Notes a problem with the value (or the key) at `loc`, once."""
        problem = Problem(self.where(loc, key=key), message)
        if (loc not in self.unreadable or loc in self.overrides) and problem not in self.problems:
            self.problems.append(problem)

    def fail_if_any(self) -> None:
        """Raises RecipeError with every problem found so far, in the order of the file, those of overrides last."""
        if self.problems:
            self.problems.sort(key=lambda problem: order(problem.where))
            raise RecipeError([self._show(problem) for problem in self.problems])

    def _show(self, problem: Problem) -> str:
        where = problem.where
        if isinstance(where, str):
            return f"--set {where}: {problem.message}"
        head = f"{self.name}:{where.line}:{where.column}: {problem.message}"
        text = self.lines[where.line - 1] if where.line <= len(self.lines) else ""
        if not text.strip():
            return head
        start = 0 if len(text) <= _SHOWN_COLUMNS else max(0, where.column - _SHOWN_COLUMNS // 2)
        shown, before = text[start : start + _SHOWN_COLUMNS], text[start : where.column - 1]
        # Tabs are kept, so that the caret stands under its character however wide they are shown.
        indent = "".join("\t" if character == "\t" else " " for character in before)
        return f"{head}\n{where.line:>6} | {shown.rstrip()}\n{'':>6} | {indent}^"


def order(where: Mark | str) -> tuple[bool, Mark]:
    """Returns what sorts places: those in the file as they stand in it, then overrides."""
    return isinstance(where, str), Mark(0, 0) if isinstance(where, str) else where
