"""What became of the data on its way to rows: how much there is, how much of it is learned, what was cut or dropped."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from smore_cli.data.batch import Row

__all__ = ["DataReport", "SourceReport", "content_hash", "name_rows"]

NAMED_ROWS = 10
"""How many row numbers a message lists."""
MANY = 0.05
"""Share of rows cut off by max_length, above which a warning says so."""


@dataclass(frozen=True)
class SourceReport:
    """Counts of one source, or of all together.

    Attributes:
        origin: the source.
        rows: rows that are used.
        truncated: how many of these lost tokens to max_length.
        dropped: numbers (from 1) of the rows that had nothing to learn and are not used.
        tokens: tokens of the rows, every branch counted.
        supervised: how many of these are learned.
        longest: tokens of the longest row, every branch counted.
        notices: what the rows hold and is not read, or is written in another way, one line each.
    """

    origin: str
    rows: int
    truncated: int
    dropped: tuple[int, ...]
    tokens: int
    supervised: int
    longest: int
    notices: tuple[str, ...] = ()

    def line(self) -> str:
        """Returns the counts as one line."""
        line = (
            f"{self.origin}: {_count(self.rows, 'row')}, {_count(self.tokens, 'token')}, "
            f"{self.supervised:,} supervised, longest row {self.longest:,}, "
            f"{self.truncated:,} truncated, {len(self.dropped):,} dropped"
        )
        return f"{line} ({name_rows(self.dropped)}: nothing to learn)" if self.dropped else line

    def cut(self, max_length: int) -> str | None:
        """Returns a warning where many rows lost their ends to `max_length`, so that a model learns to break off."""
        if self.truncated <= MANY * self.rows:
            return None
        share = 100 * self.truncated / self.rows
        return (
            f"warning: {self.truncated:,} of {_count(self.rows, 'training row')} ({share:.0f} %) end early, after "
            f"{max_length:,} tokens: raise data.max_length"
        )


@dataclass(frozen=True)
class DataReport:
    """Counts per source and a hash of what is learned.

    Attributes:
        sources: one report a source, in the recipe's order.
        content_hash: sha256 over token ids, masks, right branches and groups, in order; equal hashes mean equal data.
    """

    sources: tuple[SourceReport, ...]
    content_hash: str

    @property
    def total(self) -> SourceReport:
        """The counts of all sources together; dropped rows keep their number in their own source."""
        return SourceReport(
            origin="all sources",
            rows=sum(source.rows for source in self.sources),
            truncated=sum(source.truncated for source in self.sources),
            dropped=tuple(number for source in self.sources for number in source.dropped),
            tokens=sum(source.tokens for source in self.sources),
            supervised=sum(source.supervised for source in self.sources),
            longest=max((source.longest for source in self.sources), default=0),
        )

    def lines(self) -> list[str]:
        """Returns the report for people: one line a source, and one for each thing to know about its rows."""
        return [line for source in self.sources for line in (source.line(), *source.notices)]

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataReport:
        """Returns the report that `as_dict` gave, back from JSON."""
        sources: list[dict[str, Any]] = [
            {key: tuple(value) if isinstance(value, list) else value for key, value in source.items()}
            for source in values["sources"]
        ]
        return cls(tuple(SourceReport(**source) for source in sources), values["content_hash"])


def name_rows(numbers: Sequence[int]) -> str:
    """Returns row numbers for a message, the first ten of them: 'rows 3, 8, 21'."""
    named = ", ".join(str(number) for number in numbers[:NAMED_ROWS])
    more = f" and {len(numbers) - NAMED_ROWS:,} more" if len(numbers) > NAMED_ROWS else ""
    return f"{'row' if len(numbers) == 1 else 'rows'} {named}{more}"


def content_hash(rows: Iterable[Row]) -> str:
    """Returns the sha256 (hex) of rows: the same on every platform, another for other tokens, masks or order."""
    digest = hashlib.sha256()
    for row in rows:
        parts = [[row.gold, len(row.branches)], row.prompt]
        if row.group is not None:
            parts[0].append(row.group)
        for branch, mask in zip(row.branches, row.supervised, strict=True):
            parts += [branch, [int(learned) for learned in mask]]
        for part in parts:
            digest.update(np.asarray([len(part), *part], dtype="<i8").tobytes())
    return digest.hexdigest()


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
