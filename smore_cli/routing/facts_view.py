"""On a terminal: what routers tell of data sets and tokens, their experts' tokens, and other adapters beside them."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from smore_cli.routing.information import TOKEN_CLASSES
from smore_cli.routing.layout import places
from smore_cli.routing.statistics import levels_of
from smore_cli.routing.view import grid, level_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smore_cli.routing.session import RoutingProfile

__all__ = ["beside_table", "detail_lines", "detail_tables", "information_table"]

NAMES = {"dataset": "expert x data set", "token_class": "expert x kind of token"}


def information_table(profile: RoutingProfile) -> Table:
    """Returns one line a tree level and label: bits above chance, and how many routers tell more than chance does."""
    table = grid()
    table.add_column("level")
    for title in ("mutual information", "bits above chance, mean", "most", "of", "beyond 95 % of shuffles"):
        table.add_column(title, justify="left" if title.startswith("mutual") else "right")
    found = places(router.module for router in profile.routers)
    levels = levels_of(profile.routers)
    for level in levels:
        keys = [(router.module, router.level) for router in profile.routers if router.level == level]
        for label, name in NAMES.items():
            told = {key: profile.facts[key]["information"].get(label) for key in keys}
            if None in told.values():
                continue
            above = {key: one["above_chance"] for key, one in told.items()}
            best = max(above, key=lambda key: above[key])
            sure = sum(one["bits"] > one["high"] for one in told.values())
            table.add_row(
                level_name(level, levels),
                name,
                f"{fmean(above.values()):.4f}",
                f"{above[best]:.4f} {found[best[0]]}",
                f"{told[best]['most']:.2f}",
                f"{sure:,} of {len(keys):,}",
            )
    return table


def detail_lines(facts: dict[str, Any]) -> list[str]:
    """Returns what one router tells of each label, in words."""
    return [
        f"{NAMES[label]}: {one['bits']:.4f} bits of {one['most']:.2f}; by chance {one['chance']:.4f} "
        f"[{one['low']:.4f}, {one['high']:.4f}], p = {one['p']:.3f}"
        + (f" (kinds: {', '.join(TOKEN_CLASSES)})" if label == "token_class" else "")
        for label, one in facts["information"].items()
    ]


def detail_tables(facts: dict[str, Any]) -> list[Table]:
    """Returns the tokens of each expert with their places, and how alike the experts are."""
    tokens = grid()
    for title in ("expert", "token", "seen", "usage", "in context"):
        tokens.add_column(title, justify="right" if title in ("expert", "seen", "usage") else "left")
    for expert, top in enumerate(facts["top_tokens"]):
        for one in top:
            shown = Text()
            for place in one["contexts"][:1]:
                shown.append(_line(place["before"]) + "[", "dim").append(_line(place["token"]), "bold")
                shown.append("]" + _line(place["after"]), "dim")
            tokens.add_row(str(expert), Text(repr(one["token"])), f"{one['count']:,}", f"{one['usage']:.3f}", shown)
    return [tokens, *(_matrix("cosine of the updates", facts["similarity"]) if facts.get("similarity") else [])]


def _matrix(title: str, values: Sequence[Sequence[float]]) -> list[Table]:
    table = grid()
    table.add_column(title, justify="right")
    for expert in range(len(values)):
        table.add_column(str(expert), justify="right")
    for expert, line in enumerate(values):
        table.add_row(str(expert), *(f"{value:+.2f}" for value in line))
    return [table]


def _line(text: str) -> str:
    return " ".join(text.split("\n"))


def beside_table(profile: RoutingProfile) -> Table:
    """Returns one line for each checkpoint and the other run: how far from the run's routing theirs is."""
    found = places(router.module for router in profile.routers)
    table = grid()
    table.add_column("the same rows through")
    for title in ("total variation, mean", "farthest", "effective experts, mean"):
        table.add_column(title, justify="right")
    for beside in profile.beside:
        far = sorted(beside.variation.items(), key=lambda item: -item[1])[:1]
        table.add_row(
            Text(f"step {beside.step}" if beside.step is not None else str(beside.run)),
            "-" if beside.mean_variation is None else f"{beside.mean_variation:.4f}",
            *(f"{value:.4f} {found[key[0]]} level {key[1]}" for key, value in far),
            *([] if far else ["-"]),
            f"{fmean(router.effective_experts for router in beside.routers):.2f}",
        )
    return table
