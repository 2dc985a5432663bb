"""How the rows of an epoch share forward passes, so that little of these is padding.

    rows      one a line, padded to the longest of the pass            p p a a . . .
                                                                       p p p p a a a
    packs     several a line, of at most max_length tokens:            p p a a | p p p p a a a | p a a .
              best fit, longest rows first
    groups    one a line, those of similar length in the same pass

Documents in a line do not see one another. Nothing but `position_ids` says where they begin: positions restart at 0,
and with `attention_mask=None` transformers builds each layer's mask from that (sliding windows counted within a
document), or has variable-length kernels take the documents one by one. Padding is one more document.

All of it is a pure function of the order the rows come in and of their lengths.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smore_cli.data.mixing import permutation

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Padding", "group_rows", "pack_rows", "padding_of"]

WINDOW = 50
"""Passes among which rows of similar length are brought together: enough for lengths to be alike within a pass, few
enough for the rows of a pass to be others in every epoch."""


def pack_rows(rows: Sequence[int], lengths: Sequence[int], max_length: int, seed: int, epoch: int) -> list[list[int]]:
    """Returns packs of rows, best fit decreasing (which needs at most 11/9 of the fewest packs, plus one), shuffled.

    Args:
        rows: numbers of rows, in the epoch's order, which breaks ties between rows of the same length.
        lengths: tokens of each row, by its number.
        max_length: of a pack; a longer row (all choices of a question count) has a line to itself.
        seed: of the order of the packs.
        epoch: likewise.
    """
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # packs by how many tokens they still take
    rooms: list[int] = []  # the keys of `with_room`, sorted
    for row in sorted(rows, key=lambda row: -lengths[row]):
        length = lengths[row]
        place = bisect_left(rooms, length)
        if place == len(rooms):
            pack, room = len(packs), max(max_length, length)
            packs.append([])
        else:
            room = rooms[place]
            pack = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        packs[pack].append(row)
        if (left := room - length) > 0:
            if left not in with_room:
                insort(rooms, left)
            with_room[left].append(pack)
    return [packs[i] for i in permutation(len(packs), seed, epoch)]


def group_rows(rows: Sequence[int], lengths: Sequence[int], per_pass: int, seed: int, epoch: int) -> list[int]:
    """Returns the rows of an epoch so that each `per_pass` of them in a row are of similar length.

    Rows are sorted within windows of `WINDOW` passes; then all passes are shuffled. What does not fill a pass comes
    last.
    """
    whole = len(rows) // per_pass * per_pass
    passes = []
    for start in range(0, whole, WINDOW * per_pass):
        window = sorted(rows[start : min(start + WINDOW * per_pass, whole)], key=lambda row: lengths[row])
        passes += [window[i : i + per_pass] for i in range(0, len(window), per_pass)]
    order = permutation(len(passes), seed, epoch)
    return [row for i in order for row in passes[i]] + list(rows[whole:])


@dataclass(frozen=True)
class Padding:
    """How much of some forward passes is padding.

    Attributes:
        share: padding among all places, 0..1.
        lines: of a pass, on average.
        width: of a line in places, on average over passes.
        tokens: real tokens.
    """

    share: float
    lines: float
    width: float
    tokens: int

    def line(self) -> str:
        """Returns it in a few words."""
        return f"{100 * self.share:.0f} % of passes of {self.lines:.3g} x {self.width:.0f}"

    def as_dict(self) -> dict[str, Any]:
        """Returns it as plain values, for JSON."""
        return {"share": round(self.share, 4), "lines": round(self.lines, 2), "width": round(self.width, 1)}


def padding_of(passes: Iterable[Sequence[Sequence[int]]], lengths: Sequence[int], *, flat: bool = False) -> Padding:
    """Counts the padding of passes.

    Args:
        passes: of each the packs, of each its rows.
        lengths: tokens of each row, by its number.
        flat: all packs of a pass are laid in one line.
    """
    count = lines = places = tokens = width = 0
    for packs in passes:
        widths = [sum(lengths[row] for row in pack) for pack in packs]
        shape = (1, sum(widths)) if flat else (len(widths), max(widths))
        count, lines, places = count + 1, lines + shape[0], places + shape[0] * shape[1]
        tokens, width = tokens + sum(widths), width + shape[1]
    return Padding(1 - tokens / max(places, 1), lines / max(count, 1), width / max(count, 1), tokens)
