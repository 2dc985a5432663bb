"""What a line of training shows of the experts' load."""

from __future__ import annotations

from smore_cli.training.progress import MOST_BARS, load_bar


def test_levels_are_drawn_root_first_and_full_height_is_everything() -> None:
    routing = {"0": {"load": [0.5, 0.25, 0.25, 0.0]}, "1": {"load": [1.0, 0.0]}}
    assert load_bar(routing) == "█▁ ▅▃▃▁"


def test_of_hundreds_of_experts_only_the_busiest_are_drawn() -> None:
    assert load_bar({"0": {"load": [1 / 600] * 600}}) == "▁" * MOST_BARS + f"+{600 - MOST_BARS}"
    assert "+" not in load_bar({"0": {"load": [1 / MOST_BARS] * MOST_BARS}})
