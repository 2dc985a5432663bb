from __future__ import annotations

import math
from typing import Any

import pytest

from smore_cli.recipe.reading import read_value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-4", 1e-4),
        ("1e5", 1e5),
        ("1E-4", 1e-4),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("5.", 5.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("12", 12),
        ("+12", 12),
        ("010", 10),
        ("0o17", 15),
        ("0xff", 255),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("!!float 3", 3.0),
        ("!!str 3", "3"),
        ("yes", "yes"),
        ("No", "No"),
        ("on", "on"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("0b11", "0b11"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, expected: Any) -> None:
    value, wrong = read_value(text)
    assert wrong == []
    assert value == expected
    assert type(value) is type(expected)


def test_not_a_number_is_read_as_one() -> None:
    value, wrong = read_value(".nan")
    assert wrong == []
    assert math.isnan(value)


def test_an_integer_too_long_to_compute_with_is_an_infinite_number() -> None:
    assert read_value("9" * 5000) == (math.inf, [])
