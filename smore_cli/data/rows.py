"""Tokenised rows as three flat arrays instead of Python lists: 4 bytes a token, in memory or mapped from a file.

    tokens  (T,) int32     all tokens, row by row; a learned one is stored as its complement ~id, which is negative
    ends    (P,) int64     where each part ends in `tokens`: of every row its prompt, then its branches
    heads   (n, 3) int64   of each row: where its parts end in `ends`, its right branch, its group (-1: none)

A list of the same rows takes about ten times the memory, and every process would hold its own.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from smore_cli.data.batch import Row

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["FlatRows", "RowView", "RowWriter", "row_lengths"]

_ARRAYS = ("tokens", "ends", "heads")


class _Rows(Sequence[Row]):
    """What both kinds of rows share: slices are lists, and rows are equal where each of them is."""

    @abstractmethod
    def row(self, index: int) -> Row:
        """Returns one row, counted from 0."""

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self.row(i) for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"there are {len(self)} rows, not one numbered {index}")
        return self.row(place)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class FlatRows(_Rows):
    """Rows in flat arrays; see the top of the module.

    Attributes:
        tokens: (T,) int32.
        ends: (P,) int64.
        heads: (n, 3) int64.
    """

    tokens: NDArray[np.int32]
    ends: NDArray[np.int64]
    heads: NDArray[np.int64]

    def __len__(self) -> int:
        """Returns how many rows there are."""
        return len(self.heads)

    def row(self, index: int) -> Row:
        """Returns row `index` from 0."""
        first = int(self.heads[index - 1, 0]) if index else 0
        last, gold, group = (int(number) for number in self.heads[index])
        start = int(self.ends[first - 1]) if first else 0
        parts = []
        for end in self.ends[first:last].tolist():
            parts.append(self.tokens[start:end])
            start = end
        prompt, *branches = parts
        return Row(
            prompt=prompt.tolist(),
            branches=[np.where(branch < 0, ~branch, branch).tolist() for branch in branches],
            supervised=[(branch < 0).tolist() for branch in branches],
            gold=gold,
            group=None if group < 0 else group,
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(n,) tokens of each row."""
        if not len(self):
            return np.zeros(0, np.int64)
        lengths: NDArray[np.int64] = np.diff(self.ends[self.heads[:, 0] - 1], prepend=0)
        return lengths

    def save(self, folder: Path) -> None:
        """Writes the arrays into an empty folder."""
        for name in _ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> FlatRows:
        """Maps the arrays of a folder; what is not used is not read, and processes share what is."""
        # np.load cannot map an array of no bytes.
        paths = [folder / f"{name}.npy" for name in _ARRAYS]
        try:
            return cls(*(np.load(path, mmap_mode="r", allow_pickle=False) for path in paths))
        except ValueError:
            return cls(*(np.load(path, allow_pickle=False) for path in paths))


@dataclass(frozen=True, eq=False)
class RowView(_Rows):
    """Some of the rows of another sequence.

    Attributes:
        rows: the others.
        indices: which of them, in order.
    """

    rows: Sequence[Row]
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        """Returns how many rows there are."""
        return len(self.indices)

    def row(self, index: int) -> Row:
        """Returns row `index` from 0."""
        return self.rows[int(self.indices[index])]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(n,) tokens of each row."""
        return row_lengths(self.rows)[self.indices]


class RowWriter:
    """Collects rows into flat arrays."""

    def __init__(self) -> None:
        self._tokens, self._ends, self._heads = array("i"), array("q"), array("q")

    def add(self, row: Row) -> None:
        """Appends a row; its group is left to `finish`."""
        self._tokens.extend(row.prompt)
        self._ends.append(len(self._tokens))
        for branch, mask in zip(row.branches, row.supervised, strict=True):
            self._tokens.extend(~token if learned else token for token, learned in zip(branch, mask, strict=True))
            self._ends.append(len(self._tokens))
        self._heads.extend((len(self._ends), row.gold, -1))

    def finish(self, groups: Sequence[int | None]) -> FlatRows:
        """Returns all rows, each with its group."""
        heads = np.array(self._heads, dtype=np.int64).reshape(-1, 3)
        heads[:, 2] = [-1 if group is None else group for group in groups]
        return FlatRows(np.array(self._tokens, dtype=np.int32), np.array(self._ends, dtype=np.int64), heads)


def row_lengths(rows: Sequence[Row]) -> NDArray[np.int64]:
    """Returns (n,) the tokens of each row, without reading rows that know their lengths."""
    known: Any = getattr(rows, "lengths", None)
    lengths: NDArray[np.int64] = np.array([row.length for row in rows], dtype=np.int64) if known is None else known
    return lengths
