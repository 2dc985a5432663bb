"""The page of a comparison: round numbers on the axes, nothing loaded, labels as text."""

from __future__ import annotations

import re

import pytest

from smore_cli.comparing.bootstrap import Interval
from smore_cli.comparing.page import _Scale, _ticks, page
from smore_cli.comparing.report import markdown
from smore_cli.comparing.summary import Backbone, Row, Score, Summary


@pytest.mark.parametrize(
    ("low", "high", "times", "shown"),
    [
        (-0.036, 0.062, 100, ["-2", "0", "2", "4", "6"]),
        (0.0, 3100.0, 1, ["0", "1,000", "2,000", "3,000"]),
        (-0.004, 0.001, 100, ["-0.4", "-0.3", "-0.2", "-0.1", "0.0", "0.1"]),
    ],
)
def test_axes_have_round_numbers(low: float, high: float, times: float, shown: list[str]) -> None:
    text = "".join(_ticks(_Scale(low, high, 0, 100), 0, times))
    found = re.findall(r">([^<>]+)</text>", text)
    assert set(shown) <= set(found) and len(found) <= 8


def test_labels_are_text_and_every_figure_is_in_both_views() -> None:
    scores = {"arc": Score(0.5, [0.5], None)}
    rows = [
        Row(
            "lora", "LoRA", 6_000_000, 6_000_000, {}, scores,
            2.5, [(9, 3.0), (18, 2.5)], 1.0, 1.0, 1.0, 30.0, None, 1e-3, [],
        ),
        Row(
            "<b>x", "X", 6_000_000, 3_000_000, {}, {"arc": Score(0.6, [0.6], Interval(0.1, 0.05, 0.15))},
            2.25, [(9, 2.8), (18, 2.25)], 0.5, 1.25, 0.9, 31.0, None, 3e-3, [(1e-3, 2.5), (3e-3, 2.25)],
        ),
    ]  # fmt: skip
    summary = Summary(
        "arc", "lora", {"arc": "acc"}, {"arc": 10}, 1, 18, Backbone({"arc": 0.4}, 29.0), {"completion": rows}
    )
    for text in (page(summary), markdown(summary)):
        for figure in (
            "60.0 (+10.0 [+5.0, +15.0]*)",
            "2.250",
            "50 %",
            "1.25",
            "0.90",
            "31.00",
            "29.00",
            "40.0",
            "1.0e-03",
            "3.0e-03!",
        ):
            assert figure in text
    assert "<b>x" not in page(summary) and "&lt;b&gt;x" in page(summary) and "src=" not in page(summary)
