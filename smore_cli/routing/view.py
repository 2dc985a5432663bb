"""Routing on a terminal: heat tables, a summary, and one router in full."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from smore_cli.routing.layout import places
from smore_cli.routing.statistics import DEAD_BELOW, levels_of, summarise

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from smore_cli.routing.layout import Place
    from smore_cli.routing.statistics import LevelSummary, RouterStatistics

__all__ = [
    "LEGEND",
    "bars",
    "dead_lines",
    "detail",
    "detail_line",
    "grid",
    "heat_tables",
    "level_name",
    "summary_table",
    "that_fit",
]

BLOCKS = "▁▂▃▄▅▆▇█"
DEAD = "·"
HEAT = ((0.9, "green"), (0.7, "green_yellow"), (0.5, "yellow"), (0.25, "dark_orange"), (0.0, "red"))
"""Colour of a router from this `balance` upwards."""
NAMED_DEAD = 8
"""How many routers with dead experts the summary names, a level."""

LEGEND = (
    f"One bar an expert: {BLOCKS[3]} its even share of the picks (of the gate weight, where all are picked), "
    f"{BLOCKS[-1]} twice that or more, {DEAD} dead (under {100 * DEAD_BELOW:g} % of it).",
    "effective: exp(entropy of the shares); so many experts, evenly used, are as diverse.",
    "entropy: how undecided the router is over one token; 1: all experts alike, 0: certain.",
)


def bars(router: RouterStatistics) -> Text:
    """Returns a router's experts as bars, coloured by its balance; half height is an even share."""
    dead = set(router.dead)
    heights = [part * router.num_experts / 2 for part in router.usage]
    text = "".join(DEAD if expert in dead else _block(height) for expert, height in enumerate(heights))
    return Text(text, _colour(router.balance))


def heat_tables(routers: Sequence[RouterStatistics], width: int) -> Iterator[Table]:
    """Yields tables of the routers of one tree level, one row a layer and one column a projection.

    Args:
        routers: of one level.
        width: columns of the terminal; there is more than one table where the projections do not fit side by side.
    """
    found = places(router.module for router in routers)
    cells = {(found[router.module].layer, found[router.module].projection): router for router in routers}
    layers = sorted({layer for layer, _ in cells}, key=lambda layer: (layer is None, layer or 0))
    widths = {name: 2 + max(len(name), router.num_experts) for (_, name), router in cells.items()}
    for names in that_fit(widths, width - len("layer  effective  ")):
        table = grid()
        for title in ("layer", "effective"):
            table.add_column(title, justify="right")
        for name in names:
            table.add_column(name, no_wrap=True)
        for layer in layers:
            row = [cells[layer, name] for name in widths if (layer, name) in cells]
            balance = sum(router.balance for router in row) / len(row)
            effective = f"{sum(router.effective_experts for router in row) / len(row):.2f}"
            shown = [bars(cells[layer, name]) if (layer, name) in cells else Text() for name in names]
            table.add_row("-" if layer is None else str(layer), Text(effective, _colour(balance)), *shown)
        yield table


def summary_table(routers: Sequence[RouterStatistics]) -> Table:
    """Returns one line a tree level: how many experts are in use, the extremes, entropy, dead experts."""
    found = places(router.module for router in routers)
    table = grid()
    table.add_column("level")
    for title in ("routers", "effective", "lowest", "highest", "entropy", "dead experts"):
        table.add_column(title, justify="right")
    for level in summarise(routers):
        table.add_row(
            level_name(level.level, levels_of(routers)),
            f"{level.routers:,}",
            f"{level.effective_experts:.2f} of {level.least_balanced.num_experts}",
            *(_extreme(router, found) for router in (level.least_balanced, level.most_balanced)),
            f"{level.entropy:.3f}",
            Text(f"{_dead_count(level):,} of {level.experts:,}", "red" if level.dead else ""),
        )
    return table


def dead_lines(routers: Sequence[RouterStatistics]) -> list[str]:
    """Returns where dead experts are, one line a level that has any: `dead in level 0: 3.q (2, 3), 4.down (0)`."""
    found = places(router.module for router in routers)
    lines = []
    for level in summarise(routers):
        named = [f"{found[path]} ({', '.join(map(str, dead))})" for path, dead in level.dead.items()]
        more = f" and {len(named) - NAMED_DEAD:,} more routers" if len(named) > NAMED_DEAD else ""
        if named:
            lines.append(f"dead in level {level.level}: {', '.join(named[:NAMED_DEAD])}{more}")
    return lines


def detail(router: RouterStatistics) -> Table:
    """Returns every number of one router, one line an expert."""
    table = grid()
    for title in ("expert", "load", "gate weight"):
        table.add_column(title, justify="right")
    table.add_column("")
    for expert, (load, share, part) in enumerate(zip(router.load, router.share, router.usage, strict=True)):
        length = round(40 * part)
        mark = Text("dead", "red") if expert in router.dead else Text("█" * length, _colour(router.balance))
        table.add_row(str(expert), f"{load:.4f}", f"{share:.4f}", mark)
    return table


def detail_line(router: RouterStatistics) -> str:
    """Returns what one router does as a whole."""
    taken = f"{router.picked} of {router.num_experts}" if router.selects else f"all {router.num_experts}"
    return (
        f"{router.decisions:,} decisions, each takes {taken} experts; effective {router.effective_experts:.3f}, "
        f"entropy {router.entropy:.4f}"
    )


def level_name(level: int, levels: Sequence[int]) -> str:
    """Returns `1 (root)`, `0 (leaves)`, or the bare number where there is but one level, or one between these."""
    if len(levels) == 1:
        return str(level)
    return f"{level} (root)" if level == max(levels) else f"{level} (leaves)" if level == 0 else str(level)


def grid() -> Table:
    """Returns a table without lines."""
    return Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")


def _block(height: float) -> str:
    """Returns the bar of a height in [0, 1], the nearest of eight."""
    return BLOCKS[min(max(round(height * len(BLOCKS)), 1), len(BLOCKS)) - 1]


def _colour(balance: float) -> str:
    return next((colour for least, colour in HEAT if balance >= least), HEAT[-1][1])


def that_fit(widths: dict[str, int], room: int) -> Iterator[list[str]]:
    """Yields the names in groups whose widths add up to at most `room`, or that are a single name."""
    names: list[str] = []
    for name, width in widths.items():
        if names and sum(widths[other] for other in names) + width > room:
            yield names
            names = []
        names.append(name)
    yield names


def _extreme(router: RouterStatistics, found: dict[str, Place]) -> str:
    return f"{router.effective_experts:.2f} {found[router.module]}"


def _dead_count(level: LevelSummary) -> int:
    return sum(len(dead) for dead in level.dead.values())
