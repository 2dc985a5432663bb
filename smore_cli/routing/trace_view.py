"""One text on a terminal: a line a token, a character a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from smore_cli.routing.layout import places
from smore_cli.routing.view import grid, that_fit

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from smore_cli.routing.trace import RouterTrace, TextTrace

__all__ = ["TRACE_LEGEND", "trace_detail", "trace_line", "trace_tables"]

SYMBOLS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
MANY = "+"
"""What stands for an expert that has no symbol of its own."""
COLOURS = ("blue", "dark_orange", "green", "magenta", "cyan", "yellow", "red", "white")
TOKEN_WIDTH = 16
TRACE_LEGEND = (
    "One character a layer, from the first on: the expert of the largest gate weight, 0-9, then a-z and A-Z; bold "
    "where it is more than twice an even share."
)


def trace_line(trace: TextTrace) -> str:
    """Returns what was traced."""
    return f"trace of {len(trace.ids):,} tokens, {trace.style}"


def trace_tables(trace: TextTrace, routers: Sequence[RouterTrace], width: int) -> Iterator[Table]:
    """Yields tables of the routers of one tree level, one row a token and one column a projection."""
    found = places(router.module for router in routers)
    columns: dict[str, list[RouterTrace]] = {}
    for router in routers:
        columns.setdefault(found[router.module].projection, []).append(router)
    widths = {name: 2 + max(len(name), len(members)) for name, members in columns.items()}
    shown = {name: _lines(members) for name, members in columns.items()}
    for names in that_fit(widths, width - TOKEN_WIDTH - 2):
        table = grid()
        table.add_column("token", no_wrap=True)
        for name in names:
            table.add_column(name, no_wrap=True)
        for number, token in enumerate(trace.tokens):
            table.add_row(_token(token), *(shown[name][number] for name in names))
        yield table


def trace_detail(trace: TextTrace, router: RouterTrace) -> Table:
    """Returns every pick of one router: one row a token, parents side by side."""
    table = grid()
    table.add_column("token", no_wrap=True)
    parents = router.gates.shape[1]
    for parent in range(parents):
        table.add_column(f"parent {parent}" if parents > 1 else "experts", no_wrap=True)
    for token, picks in zip(trace.tokens, router.picks(), strict=True):
        table.add_row(_token(token), *("  ".join(f"{e}: {w:.3f}" for e, w in parent) for parent in picks))
    return table


def _lines(routers: Sequence[RouterTrace]) -> list[Text]:
    """Returns for each token the heaviest expert of every router, one character each."""
    columns = []
    for router in routers:
        gates = router.mean_gates.abs()
        weights, experts = gates.max(-1)
        even = gates.sum(-1) / gates.shape[-1]
        columns.append([_mark(*values) for values in zip(experts.tolist(), (weights / even).tolist(), strict=True)])
    return [Text.assemble(*marks) for marks in zip(*columns, strict=True)]


def _mark(expert: int, share: float) -> tuple[str, str]:
    """Returns an expert's symbol and how it is written, by its share of the weight where 1 is an even one."""
    style = f"{'bold ' if share > 2 else ''}{COLOURS[expert % len(COLOURS)]}"
    return SYMBOLS[expert] if expert < len(SYMBOLS) else MANY, style


def _token(text: str) -> Text:
    """Returns a token's text with its white space made visible, cut to what fits."""
    shown = "".join({" ": "·", "\n": "⏎", "\t": "→"}.get(c, c if c.isprintable() else "�") for c in text)
    return Text(shown if len(shown) <= TOKEN_WIDTH else f"{shown[: TOKEN_WIDTH - 1]}…")
