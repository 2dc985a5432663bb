"""Every ready recipe runs: two short steps on the real model, on its own data (ARC from the shared folder)."""

from __future__ import annotations

from pathlib import Path

import pytest

from smore_cli.recipe import load_recipe
from smore_cli.training.loop import train

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SHORT = ["train.max_steps=2", "train.per_device_batch_size=2", "data.max_length=96", "eval.batch_size=8"]


@pytest.mark.usefixtures("smollm2")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_ready_recipe_trains(path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    overrides = [*SHORT, f"output_dir={tmp_path / 'run'}"]
    if path.stem.startswith("arc-easy"):
        rows = request.getfixturevalue("shared_data") / "arc_easy_train.jsonl"
        overrides.append(f"data.train=[{{path: {rows}, format: multiple_choice, split: 'train[:16]'}}]")
    values = train(load_recipe(path, overrides), path.read_text())
    assert values["finished"]
    assert values["result"]["steps"] == 2


@pytest.mark.parametrize("suffix", ["", "-ranking"])
def test_compared_recipes_have_equal_trainable_parameters(suffix: str) -> None:
    """Within 1 %, over the linear maps of a SmolLM2-135M layer."""
    from smore_cli.methods import Site

    wide, narrow, hidden = 1536, 192, 576
    shapes = [(hidden, hidden)] * 2 + [(hidden, narrow)] * 2 + [(hidden, wide)] * 2 + [(wide, hidden)]
    sizes = []
    for method in ("lora", "smore"):
        adapter = load_recipe(RECIPES[0].with_name(f"arc-easy-{method}{suffix}.yaml")).adapter
        sizes.append(sum(adapter.num_parameters(Site("x", d_in, d_out)) for d_in, d_out in shapes))
    assert abs(sizes[1] / sizes[0] - 1) < 0.01
