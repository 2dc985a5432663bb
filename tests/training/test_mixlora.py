"""Training MixLoRA: runs of every router, and steps that do not depend on how they are computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smore_cli.data.batch import collate
from smore_cli.recipe import load_recipe
from smore_cli.training.loop import train
from smore_cli.training.setup import prepare
from smore_cli.training.step import accumulate_gradients

MakeRecipe = Callable[..., Path]
SMALL = {"method": "mixlora", "num_experts": 4, "rank": 2}
ROUTERS: dict[str, dict[str, Any]] = {
    "top_k": {},
    "top_p": {"router": "top_p"},
    "switch": {"router": "switch", "capacity": 3, "jitter": 0.0},
}


@pytest.mark.parametrize("name", ROUTERS)
def test_a_run_trains(make_recipe: MakeRecipe, tmp_path: Path, name: str) -> None:
    path = make_recipe(adapter=SMALL | ROUTERS[name], train={"max_steps": 3})
    values = train(load_recipe(path), path.read_text())
    assert values["finished"] and values["targets"] == 10
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(
        line["aux_loss"] > 0 and sum(line["routing"]["0"]["load"]) == pytest.approx(1, abs=1e-3) for line in lines
    )


@pytest.mark.parametrize("name", ROUTERS)
def test_a_step_does_not_depend_on_its_split_or_on_recomputation(make_recipe: MakeRecipe, name: str) -> None:
    adapter = SMALL | ROUTERS[name] | {"dropout": 0.0, "aux_loss_coefficient": 0.1}
    results = []
    for checkpointing, size in ((False, 8), (False, 3), (True, 8), (True, 3)):
        recipe = load_recipe(make_recipe(adapter=adapter, train={"gradient_checkpointing": checkpointing}))
        setup = prepare(recipe, lambda _: None)
        setup.model.double()
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for parameter in (p for p in setup.model.parameters() if p.requires_grad):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        rows = setup.train_rows[:8]
        batches = [collate(rows[i : i + size], pad_token_id=2) for i in range(0, 8, size)]
        found = accumulate_gradients(
            setup.model, batches, setup.objective, device=torch.device("cpu"), backward=Tensor.backward
        )
        gradients = {key: p.grad for key, p in setup.model.named_parameters() if p.requires_grad}
        results.append((found.loss, found.aux, gradients))
    assert results[0][1] > 0 and all(g is not None and g.any() for g in results[0][2].values())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
