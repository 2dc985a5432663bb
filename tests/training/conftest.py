"""Runs on a tiny random Llama and a few hundred made-up questions."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from smore_cli.recipe import load_recipe
from smore_cli.recipe.schema import Recipe

SMORE = {
    "method": "smore",
    "target_modules": ["q_proj", "up_proj", "down_proj"],
    "rank": [2, 2],
    "num_experts": [4, 4],
    "fanout": [2, 2],
    "router_dim": 4,
    "key_dim": 4,
}
MakeRecipe = Callable[..., Path]


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 sums with three choices each, of different lengths."""
    path = tmp_path_factory.mktemp("questions") / "sums.jsonl"
    dice = random.Random(1)
    with path.open("w") as file:
        for number in range(240):
            a, b = dice.randrange(1, 60), dice.randrange(1, 60)
            story = "Anna has" if number % 3 else "There are, after a long and rainy day in the village,"
            choices = [f"{a + b} apples", f"{a + b + 1} apples", f"{abs(a - b)}"]
            row = {"question": f"{story} {a} and {b}. How many?", "choices": choices, "label": 0}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def make_recipe(tiny_llama: Path, questions: Path, tmp_path: Path) -> MakeRecipe:
    """Writes a recipe for the tiny model; keyword arguments replace whole sections or update their keys."""

    def write(name: str = "recipe.yaml", **sections: dict[str, Any] | str | int) -> Path:
        values: dict[str, Any] = {
            "version": 1,
            "model": {"name_or_path": str(tiny_llama)},
            "adapter": SMORE,
            "data": {"train": [{"path": str(questions), "format": "multiple_choice"}], "max_length": 128},
            "train": {"learning_rate": 1e-2, "max_steps": 6, "per_device_batch_size": 4, "logging_steps": 1},
            "output_dir": str(tmp_path / "run"),
        }
        for key, value in sections.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) and key != "adapter" else value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> Callable[..., Recipe]:
    """The same, loaded."""
    return lambda **sections: load_recipe(make_recipe(**sections))
