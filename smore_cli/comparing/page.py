"""A comparison as one HTML page: tables, and for each objective two plots, with nothing loaded from anywhere."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from smore_cli.comparing.report import LEGEND, headers, lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smore_cli.comparing.summary import Row, Summary

__all__ = ["page"]

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #667; --line: #d9dce1; --paper: #fff; --mark: #2f6fb4;
  --sure: #b4432f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7ea; --soft: #9aa; --line: #3a3d44; --paper: #17181b;
  --mark: #7fb2e8; --sure: #e8907f; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 74rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; }
p, .note { color: var(--soft); max-width: 60rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; font-size: 13px; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.plots { display: flex; flex-wrap: wrap; gap: 2rem; align-items: flex-start; margin-top: 1rem; }
svg { width: 34rem; max-width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 11px; }
svg .soft { fill: var(--soft); } .axis { stroke: var(--line); } .zero { stroke: var(--soft); stroke-dasharray: 3 3; }
.mark { stroke: var(--mark); fill: var(--mark); } .sure { stroke: var(--sure); fill: var(--sure); }
.curve { fill: none; stroke-width: 1.6; }
"""
WIDTH, LEFT, RIGHT, TOP = 560, 110, 70, 26


def page(summary: Summary) -> str:
    """Returns the page."""
    parts = [
        f"<h1>Comparison: {escape(summary.title)}</h1>",
        f"<p>{summary.seeds} seeds, {summary.tokens:,.0f} tokens a run.</p>",
    ]
    for objective, rows in summary.rows.items():
        parts += [f"<h2>{escape(objective)}</h2>", '<div class="wide">', _table(summary, objective), "</div>"]
        parts += ['<div class="plots">', _differences(rows, summary.baseline), _curves(rows), "</div>"]
    parts.append(f'<p class="note">{escape(LEGEND.format(baseline=summary.baseline))}</p>')
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{escape(summary.title)}</title>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _table(summary: Summary, objective: str) -> str:
    def row(columns: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{escape(text)}</{kind}>" for text in columns) + "</tr>"

    return (
        "<table>"
        + row(headers(summary), "th")
        + "".join(row(line, "td") for line in lines(summary, objective))
        + "</table>"
    )


def _differences(rows: Sequence[Row], baseline: str) -> str:
    """Returns the differences of the mean score to the baseline with their intervals, a line a method."""
    shown = []
    for row in rows:
        name = "mean" if "mean" in row.scores else next(iter(row.scores), None)
        if name is not None and (above := row.scores[name].above) is not None:
            shown.append((row.label, above))
    if not shown:
        return ""
    low, high = min(0.0, *(a.low for _, a in shown)), max(0.0, *(a.high for _, a in shown))
    scale = _Scale(low, high, LEFT, WIDTH - RIGHT)
    height = TOP + 22 * len(shown) + 24
    parts = [_title(f"score above {baseline}, points"), *_ticks(scale, height - 20, 100)]
    parts.append(f'<line class="zero" x1="{scale(0):.1f}" x2="{scale(0):.1f}" y1="{TOP}" y2="{height - 20}"/>')
    for i, (label, above) in enumerate(shown):
        y = TOP + 22 * i + 12
        kind = "sure" if above.sure else "mark"
        tip = f"{100 * above.value:+.1f} [{100 * above.low:+.1f}, {100 * above.high:+.1f}]"
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(label)}</text><g class="{kind}">'
            f"<title>{escape(label)}: {tip}</title>"
            f'<line x1="{scale(above.low):.1f}" x2="{scale(above.high):.1f}" y1="{y}" y2="{y}" stroke-width="2"/>'
            f'<circle cx="{scale(above.value):.1f}" cy="{y}" r="4"/></g>'
        )
    return _svg(height, parts)


def _curves(rows: Sequence[Row]) -> str:
    """Returns the held-out loss against the tokens, a line a method."""
    rows = [row for row in rows if row.curve]
    if not rows:
        return ""
    losses = [loss for row in rows for _, loss in row.curve]
    height = 280
    x = _Scale(0.0, max(tokens for row in rows for tokens, _ in row.curve), LEFT - 60, WIDTH - RIGHT)
    y = _Scale(min(losses), max(losses), height - 30, TOP + 6)
    parts = [_title("held-out loss after so many tokens"), *_ticks(x, height - 20, 1)]
    for loss in (min(losses), max(losses)):
        parts.append(f'<text class="soft" x="{LEFT - 66}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.2f}</text>')
    ends = sorted(rows, key=lambda row: row.curve[-1][1])
    below = float("inf")
    for i, row in enumerate(reversed(ends)):  # the worst on top; labels keep a line's distance
        colour = f"hsl({360 * rows.index(row) / len(rows):.0f} 60% 50%)"
        points = " ".join(f"{x(tokens):.1f},{y(loss):.1f}" for tokens, loss in row.curve)
        place = y(row.curve[-1][1]) if i == 0 else max(y(row.curve[-1][1]), below + 11)
        below = place
        parts.append(
            f'<polyline class="curve" style="stroke:{colour}" points="{points}">'
            f"<title>{escape(row.label)}</title></polyline>"
            f'<text x="{WIDTH - RIGHT + 4}" y="{place + 4:.1f}" style="fill:{colour}">{escape(row.label)}</text>'
        )
    return _svg(max(height, round(below) + 20), parts)


class _Scale:
    """Maps [low, high] to [start, end], with some room at both ends."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        room = 0.05 * (high - low) or 0.5
        self.low, self.high = low - room, high + room
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _ticks(scale: _Scale, y: float, times: float) -> list[str]:
    """Returns an axis with a few round numbers, each multiplied for showing."""
    parts = [f'<line class="axis" x1="{scale.start}" x2="{scale.end}" y1="{y}" y2="{y}"/>']
    low, high = times * scale.low, times * scale.high
    rough = (high - low) / 7
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    for number in range(math.ceil(low / step), math.floor(high / step) + 1):
        value = number * step
        shown = f"{value:,.0f}" if step >= 1 else f"{value:.{-math.floor(math.log10(step))}f}"
        place = scale(value / times)
        parts.append(f'<text class="soft" x="{place:.1f}" y="{y + 14}" text-anchor="middle">{shown}</text>')
    return parts


def _title(text: str) -> str:
    return f'<text x="0" y="12" font-weight="600">{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">' + "".join(parts) + "</svg>"
