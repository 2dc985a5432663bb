"""What routing is worth, on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from smore_cli.routing.view import BLOCKS, grid, level_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from smore_cli.routing.causal import CausalImportance, Change, Effect
    from smore_cli.routing.dividend import Dividend

__all__ = ["CAUSAL_LEGEND", "causal_line", "causal_tables", "dividend_lines", "dividend_table"]

NOISE, HARMFUL = "·", "-"
CAUSAL_LEGEND = (
    f"One bar an expert, by the change of the loss without it (ablated), or with nothing but it (forced): {BLOCKS[-1]} "
    f"the largest of the table, {NOISE} within two standard errors of none, {HARMFUL} the loss falls."
)


def causal_line(causal: CausalImportance) -> str:
    """Returns what the changes are changes of."""
    where = "in all chosen routers of a layer at once" if len(causal.modules) > 1 else f"in {causal.modules[0]}"
    return (
        f"What an expert is worth: by how much its gate at 0 (ablated), or all gate weight on it (forced), {where}, "
        f"changes the loss of {causal.loss:.4f} nats a token (over {causal.supervised:,} supervised tokens)"
    )


def causal_tables(causal: CausalImportance, *, in_full: bool) -> Iterator[tuple[str, Table]]:
    """Yields the name and the table of each tree level, root first: one row a layer, or in full one an expert."""
    levels = sorted({effect.level for effect in causal.effects}, reverse=True)
    for level in levels:
        members = [effect for effect in causal.effects if effect.level == level]
        yield level_name(level, levels), _expert_rows(members) if in_full else _layer_rows(members)


def _layer_rows(effects: Sequence[Effect]) -> Table:
    table = grid()
    table.add_column("layer", justify="right")
    for kind in ("ablated", "forced"):
        table.add_column(kind, no_wrap=True)
        table.add_column("largest", justify="right")
        table.add_column("expert", justify="right")
    highest = [max(change.value for change in changes) for changes in _both(effects)]
    for layer in sorted({effect.layer for effect in effects}):
        row = [effect for effect in effects if effect.layer == layer]
        cells: list[str] = []
        for changes, top in zip(_both(row), highest, strict=True):
            values = [change.value for change in changes]
            bars = "".join(_bar(change, top) for change in changes)
            cells += [bars, f"{max(values):+.4f}", str(row[values.index(max(values))].expert)]
        table.add_row(str(layer), *cells)
    return table


def _expert_rows(effects: Sequence[Effect]) -> Table:
    table = grid()
    for title in ("expert", "ablated", "±", "forced", "±"):
        table.add_column(title, justify="right")
    for effect in effects:
        cells = [make(change) for change in (effect.ablated, effect.forced) for make in (_value, _error)]
        table.add_row(str(effect.expert), *cells)
    return table


def dividend_lines(dividend: Dividend, fitted_to: str) -> list[str]:
    """Returns the losses and what follows from them."""
    share = "the adapter gained nothing"
    if dividend.share is not None:
        share = f"{100 * dividend.share:.1f} % of the adapter's gain"
    fitted = f", fitted to {dividend.fitted:,} tokens of {fitted_to}" if dividend.fitted else ""
    return [
        f"loss in nats a token, over {dividend.supervised:,} supervised tokens: backbone {dividend.base:.4f}, best "
        f"static update {dividend.static:.4f}{fitted}, routed {dividend.routed:.4f}",
        f"routing dividend {dividend.value:+.4f} ± {dividend.stderr:.4f}: {share}",
    ]


def dividend_table(dividend: Dividend) -> Table:
    """Returns what each layer earns that was made static by itself."""
    table = grid()
    for title in ("layer", "static", "dividend", "±"):
        table.add_column(title, justify="right")
    for layer in dividend.layers:
        table.add_row(str(layer.layer), f"{layer.static:.4f}", f"{layer.value:+.4f}", f"{layer.stderr:.4f}")
    return table


def _both(effects: Sequence[Effect]) -> tuple[list[Change], list[Change]]:
    return [effect.ablated for effect in effects], [effect.forced for effect in effects]


def _bar(change: Change, top: float) -> str:
    if abs(change.value) <= 2 * change.stderr or top <= 0:
        return NOISE
    if change.value < 0:
        return HARMFUL
    return BLOCKS[min(max(round(change.value / top * len(BLOCKS)), 1), len(BLOCKS)) - 1]


def _value(change: Change) -> Text:
    known = abs(change.value) > 2 * change.stderr
    return Text(f"{change.value:+.4f}", "" if known else "dim")


def _error(change: Change) -> Text:
    return Text(f"{change.stderr:.4f}", "dim")
