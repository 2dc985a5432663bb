"""Targets x layers in a few columns: neighbouring layers that look the same share one."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["coverage_table"]

_LAYER = re.compile(r"^.*?\.(\d+)\.(.+)$")


def coverage_table(coverage: Mapping[str, tuple[int, int]]) -> list[str]:
    """Returns a table whose rows are targets and whose columns are ranges of layers.

    Args:
        coverage: reached and total, by module path; a path without a layer's number counts as layer 0.
    """
    rows: dict[str, dict[int, tuple[int, int]]] = defaultdict(dict)
    for path, counts in coverage.items():
        match = _LAYER.match(path)
        target, layer = (match[2], int(match[1])) if match else (path, 0)
        rows[target][layer] = counts
    ranges: list[list[int]] = []
    for layer in sorted({layer for row in rows.values() for layer in row}):
        same = ranges and all(row.get(layer) == row.get(ranges[-1][-1]) for row in rows.values())
        if same and layer == ranges[-1][-1] + 1:
            ranges[-1].append(layer)
        else:
            ranges.append([layer])
    header = ["reached", *(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in ranges)]
    lines = [header, *([target, *(_cell(row, layers) for layers in ranges)] for target, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]


def _cell(row: Mapping[int, tuple[int, int]], layers: list[int]) -> str:
    """Returns `reached/total` over some layers, nothing where the target is not in them."""
    counts = [row[layer] for layer in layers if layer in row]
    return f"{sum(c[0] for c in counts)}/{sum(c[1] for c in counts)}" if counts else ""
