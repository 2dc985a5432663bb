"""Every parameter learns at the rate its part was given, with every optimiser, and a resumed run is the same run."""

from __future__ import annotations

import io
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from smore_cli.errors import AdapterError, UsageError
from smore_cli.methods import available_methods, load_method
from smore_cli.nn import attach
from smore_cli.recipe.checks import find_contradictions
from smore_cli.recipe.schema import Recipe, TrainConfig
from smore_cli.training.loop import train
from smore_cli.training.optim import build_optimizer, parameter_groups, require_optimizer

OPTIMIZERS = ["adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "adafactor"]


def adapted(method: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    attach(model, load_method(method).model_validate({"method": method}), seed=0)
    return model


@pytest.mark.parametrize("method", available_methods())
def test_every_method_tells_its_routers_up_projections_and_biases_apart(method: str) -> None:
    model = adapted(method)
    train = TrainConfig(learning_rate=1.0, loraplus_lr_ratio=16.0, router_learning_rate=0.5, weight_decay=0.1)
    groups = parameter_groups(model, train)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(found) == sorted(id(p) for _, p in trainable)
    assert sum(len(group["params"]) for group in groups) == len(trainable)
    assert groups[0]["lr"] == 1.0  # the rate that is logged
    rates = {rate for rate, _ in found.values()}
    assert rates == {1.0, 16.0, 0.5} if load_method(method).routed else {1.0, 16.0}
    for name, parameter in trainable:
        rate, decay = found[id(parameter)]
        path = name.split(".adapters.default.")[-1].split(".")
        router, bias = "router" in path, path[0] in ("a", "b", "w", "p") or parameter.dim() < 2
        assert (rate == 0.5) == router, name
        assert decay == (0.0 if router or bias else 0.1), name
        if rate == 16.0:
            assert path[-1].endswith("B") or path == ["P"], name


def test_the_default_is_torchs_adamw_to_the_last_bit() -> None:
    ours, theirs = adapted("smore"), adapted("smore")
    theirs.load_state_dict(ours.state_dict())
    plain = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=2e-4, weight_decay=0, fused=True)
    optimizers = [build_optimizer(ours, TrainConfig()), plain]
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            torch.manual_seed(1)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_learns_and_goes_on_bit_for_bit_from_its_saved_state(name: str) -> None:
    train = TrainConfig(optim=name, learning_rate=0.05)  # type: ignore[arg-type]
    target = torch.randn(96, 64)

    def steps(layer: nn.Linear, optimizer: torch.optim.Optimizer, count: int) -> float:
        for _ in range(count):
            loss = (layer.weight - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    with warnings.catch_warnings():  # of the paged ones on a CPU, which `require_optimizer` says in a line
        whole = nn.Linear(64, 96)  # 6144 numbers: enough for an 8-bit state
        optimizer = build_optimizer(whole, train)
        first = steps(whole, optimizer, 3)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        broken = nn.Linear(64, 96)
        broken.load_state_dict(whole.state_dict())
        again = build_optimizer(broken, train)
        file.seek(0)
        again.load_state_dict(torch.load(file, weights_only=True))
        assert steps(whole, optimizer, 5) < first
        steps(broken, again, 5)
    assert torch.equal(whole.weight, broken.weight)
    eight_bits = any(t.dtype == torch.uint8 for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))
    assert eight_bits == name.endswith("8bit")


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "adamw_bnb_8bit", "loraplus_lr_ratio": 4.0, "router_learning_rate": 1e-3, "neftune_noise_alpha": 5.0},
        {"optim": "adafactor", "lr_scheduler": "wsd", "warmup_steps": 1, "decay_ratio": 0.5, "weight_decay": 0.01},
    ],
    ids=["adamw_bnb_8bit", "adafactor"],
)
def test_a_resumed_run_ends_where_an_undisturbed_one_does(
    recipe: Callable[..., Recipe], tmp_path: Path, settings: dict[str, object]
) -> None:
    values = {**settings, "save_steps": 3, "max_steps": 6, "gradient_census": False}
    train(recipe(train=values, output_dir=str(tmp_path / "whole")), "")
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    run = json.loads((tmp_path / "broken/run.json").read_text())
    (tmp_path / "broken/run.json").write_text(json.dumps(run | {"finished": False}))
    (tmp_path / "broken/adapter_model.safetensors").unlink()
    after = train(recipe(train=values, output_dir=str(tmp_path / "broken")), "", resume=True)
    assert after["resumed_from"] == 3
    assert (tmp_path / "broken/adapter_model.safetensors").read_bytes() == (
        tmp_path / "whole/adapter_model.safetensors"
    ).read_bytes()


def test_what_cannot_run_is_said_before_any_work() -> None:
    said: list[str] = []
    require_optimizer(TrainConfig(optim="paged_adamw_8bit"), torch.device("cpu"), said.append)
    assert "nothing is paged on a CPU" in said[0]
    with pytest.raises(UsageError, match="optim adamw_torch_fused does not run on meta here: "):
        require_optimizer(TrainConfig(), torch.device("meta"), said.append)
    with pytest.raises(AdapterError, match="no up-projection"):
        parameter_groups(nn.Linear(2, 2), TrainConfig(loraplus_lr_ratio=2.0))
    values = {"adapter": {"method": "lora"}, "train": {"router_learning_rate": 1e-3}}
    assert [c.message for c in find_contradictions(values)] == [
        "'train.router_learning_rate' is set, but 'lora' has no router: remove the line"
    ]
