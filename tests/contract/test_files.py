"""An adapter on disk is the adapter, and a training that stops there goes on from there."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from smore_cli.models.adapter_files import CONFIG_FILE, WEIGHTS_FILE, load_adapter, load_adapter_state, save_adapter
from smore_cli.nn import adapted_modules
from smore_cli.recipe.schema import ModelConfig
from tests.contract.models import Case, adapters, assert_same, batch, logits, loss_of, token_ids

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

BASE = ModelConfig(name_or_path="tiny")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{key}": value for path, part in adapters(model).items() for key, value in part.state_dict().items()
    }


def test_a_saved_adapter_loads_as_the_same_tensors_and_saves_as_the_same_bytes(case: Case, tmp_path: Path) -> None:
    model, other, ids = case.random(), case.bare(), token_ids(2, 7)
    save_adapter(model, case.config, tmp_path / "a", base=BASE)
    config = load_adapter(other, tmp_path / "a")
    assert_same(state(other), state(model))
    assert torch.equal(logits(other, ids), logits(model, ids))
    save_adapter(other, config, tmp_path / "b", base=BASE)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_training_restored_midway_goes_on_identically(case: Case, tmp_path: Path) -> None:
    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for number in steps:
            torch.manual_seed(number)
            loss_of(model.train(), batch(4)).backward()
            optimizer.step()
            optimizer.zero_grad()

    model = case.fresh()
    optimizer = optimizer_of(model)
    run(model, optimizer, range(2))
    halfway = {name: value.clone() for name, value in state(model).items()}
    save_adapter(model, case.config, tmp_path, base=BASE)
    moments = copy.deepcopy(optimizer.state_dict())  # its tensors are those that go on changing
    resumed = case.fresh(seed=7)
    load_adapter_state(resumed, tmp_path)
    optimizer_again = optimizer_of(resumed)
    optimizer_again.load_state_dict(moments)
    run(resumed, optimizer_again, range(2, 3))
    run(model, optimizer, range(2, 3))
    assert_same(state(resumed), state(model))
    assert any(not torch.equal(value, halfway[name]) for name, value in state(model).items())
    assert adapted_modules(model).keys() == adapted_modules(resumed).keys()
