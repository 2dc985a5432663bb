from __future__ import annotations

import io

import pytest
from rich.console import Console, RenderableType

from smore_cli.routing.view import bars, dead_lines, detail, detail_line, heat_tables, level_name, summary_table
from tests.routing.traces import router


def path(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{name}"


def printed(*parts: RenderableType, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    for part in parts:
        console.print(part)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("load", "picked", "shown", "colour"),
    [
        ([0.5, 0.5, 0.5, 0.5], 2, "▄▄▄▄", "green"),
        ([1, 1, 0, 0], 2, "██··", "red"),
        ([1, 0.75, 0.22, 0.03], 2, "█▆▂▁", "dark_orange"),
        ([0.125] * 8, 1, "▄▄▄▄▄▄▄▄", "green"),
        ([1, 0, 0, 0, 0, 0, 0, 0], 1, "█·······", "red"),
    ],
)
def test_half_a_bar_is_an_even_share_and_a_dot_is_a_dead_expert(
    load: list[float], picked: int, shown: str, colour: str
) -> None:
    found = bars(router(load, picked=picked))
    assert (found.plain, found.style) == (shown, colour)


def test_the_table_has_a_row_a_layer_and_a_column_a_projection() -> None:
    even, collapsed = [0.5] * 4, [1.0, 1, 0, 0]
    routers = [
        router(even, module=path(2, "q_proj")),
        router(collapsed, module=path(2, "up_proj")),
        router(even, module=path(10, "q_proj")),  # layer 10 has no up_proj
    ]
    assert printed(*heat_tables(routers, 80)) == [
        "layer  effective  q     up",
        "    2       3.00  ▄▄▄▄  ██··",
        "   10       4.00  ▄▄▄▄",
    ]


@pytest.mark.parametrize(
    ("experts", "width", "tables"), [(4, 80, 1), (4, 60, 1), (4, 40, 3), (16, 80, 3), (16, 200, 1)]
)
def test_projections_that_do_not_fit_side_by_side_go_into_further_tables(experts: int, width: int, tables: int) -> None:
    names = ("q", "k", "v", "o", "gate", "up", "down")
    routers = [router([2 / experts] * experts, module=path(0, f"{name}_proj")) for name in names]
    found = list(heat_tables(routers, width))
    assert len(found) == tables
    lines = printed(*found, width=width)
    assert len(lines) == 2 * tables  # nothing was wrapped
    assert " ".join(lines[::2]).replace("layer  effective", "").split() == list(names)
    assert "".join(lines).count("▄" * experts) == len(names)
    assert "…" not in "".join(lines)


def test_the_summary_fits_80_columns_and_says_where_dead_experts_are() -> None:
    routers = [
        router([1, 1, 0, 0] if layer < 10 else [0.5] * 4, module=path(layer, "gate_proj"), level=level)
        for layer in range(30)
        for level in (1, 0)
    ]
    lines = printed(summary_table(routers))
    assert [line.split() for line in lines[1:]] == [
        ["1", "(root)", "30", "3.33", "of", "4", "2.00", "0.gate", "4.00", "10.gate", "0.500", "20", "of", "120"],
        ["0", "(leaves)", "30", "3.33", "of", "4", "2.00", "0.gate", "4.00", "10.gate", "0.500", "20", "of", "120"],
    ]
    named = ", ".join(f"{layer}.gate (2, 3)" for layer in range(8))
    assert dead_lines(routers) == [f"dead in level {level}: {named} and 2 more routers" for level in (1, 0)]


def test_nothing_is_said_about_dead_experts_where_there_are_none() -> None:
    assert dead_lines([router([0.5] * 4)]) == []


def test_one_router_in_full() -> None:
    found = router([1, 0.75, 0.25, 0])
    assert printed(detail(found)) == [
        "expert    load  gate weight",
        "     0  1.0000       0.5000  ████████████████████",
        "     1  0.7500       0.3750  ███████████████",
        "     2  0.2500       0.1250  █████",
        "     3  0.0000       0.0000  dead",
    ]
    assert detail_line(found) == "100 decisions, each takes 2 of 4 experts; effective 2.649, entropy 0.5000"


@pytest.mark.parametrize(
    ("levels", "names"),
    [([0], ["0"]), ([1, 0], ["1 (root)", "0 (leaves)"]), ([2, 1, 0], ["2 (root)", "1", "0 (leaves)"])],
)
def test_levels_are_named(levels: list[int], names: list[str]) -> None:
    assert [level_name(level, levels) for level in levels] == names
