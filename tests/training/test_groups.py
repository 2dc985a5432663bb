"""Training with groups of rows: LoRAMoE's localised balance loss, from the data's column to the router's gradient."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smore_cli.data.batch import collate
from smore_cli.errors import DataError
from smore_cli.nn import adapted_modules
from smore_cli.recipe import load_recipe
from smore_cli.training.loop import train
from smore_cli.training.setup import prepare
from smore_cli.training.step import accumulate_gradients

MakeRecipe = Callable[..., Path]
SMALL = {"method": "loramoe", "num_experts": 4, "rank": 2, "dropout": 0.0}


@pytest.fixture
def grouped(questions: Path, tmp_path: Path) -> str:
    """The questions, of two kinds in turn."""
    path = tmp_path / "grouped.jsonl"
    raw = [json.loads(line) for line in questions.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"task": f"kind {i % 2}"}) + "\n" for i, row in enumerate(raw)))
    return str(path)


def source(path: str) -> dict[str, Any]:
    return {"train": [{"path": path, "format": "multiple_choice", "columns": {"group": "task"}}]}


def test_a_run_with_groups_trains_its_routers(make_recipe: MakeRecipe, grouped: str, tmp_path: Path) -> None:
    path = make_recipe(adapter=SMALL, data=source(grouped) | {"eval_fraction": 0.1}, train={"max_steps": 2})
    values = train(load_recipe(path), path.read_text())
    assert values["finished"] and values["targets"] == 6
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["aux_loss"] > 0 for line in lines if "aux_loss" in line)
    assert any("eval_loss" in line for line in lines)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_does_not_depend_on_the_split_or_on_recomputation(
    make_recipe: MakeRecipe,
    grouped: str,
    checkpointing: bool,
) -> None:
    recipe = load_recipe(
        make_recipe(adapter=SMALL, data=source(grouped), train={"gradient_checkpointing": checkpointing})
    )
    setup = prepare(recipe, lambda _: None)
    setup.model.double()
    rows, results = setup.train_rows[:8], []
    for size in (8, 3, 1):
        setup.model.zero_grad()
        batches = [collate(rows[i : i + size], pad_token_id=2) for i in range(0, 8, size)]
        found = accumulate_gradients(
            setup.model, batches, setup.objective, device=torch.device("cpu"), backward=Tensor.backward
        )
        grads = [module.adapter("default").router.weight.grad for module in adapted_modules(setup.model).values()]
        results.append((found.aux, torch.stack([g.norm() for g in grads if g is not None])))
    assert results[0][0] > 0 and len(results[0][1]) == 6
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_data_without_groups_is_refused_before_training(make_recipe: MakeRecipe, grouped: str) -> None:
    with pytest.raises(DataError, match="240 of 240 rows name none"):
        prepare(load_recipe(make_recipe(adapter=SMALL)), lambda _: None)
    three = SMALL | {"num_experts": 6, "num_groups": 3}
    with pytest.raises(DataError, match=r"of 2 groups \(kind 0, kind 1\), and adapter.num_groups is 3"):
        prepare(load_recipe(make_recipe(adapter=three, data=source(grouped))), lambda _: None)
    prepare(load_recipe(make_recipe(adapter=SMALL | {"delta": 0.0})), lambda _: None)
