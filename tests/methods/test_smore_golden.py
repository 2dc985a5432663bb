"""The original S'MoRE layers' own numbers: outputs, routing, balance losses and every gradient."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open

from smore_cli.methods import Site
from smore_cli.methods.smore import SMoREConfig, from_original
from smore_cli.nn import AdapterContext, RoutingRecord
from smore_cli.nn.tree import Tree
from smore_cli.nn.tree_router import Picks

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

CASES = [
    "L1_switch_identity",
    "L2_dense_tanh",
    "L2_switch_tanh_mask",
    "L2_switch_relu_f1",
    "L2_noisy_eval",
    "L2_noisy_train_f1",
    "L3_noisy_train_tanh",
    "L2_child_ungated",
]


@dataclass(repr=False)
class Case:
    """Tensors by `section/name`, and the original's settings."""

    settings: dict[str, Any]
    num_trainable: int
    tensors: dict[str, Tensor]

    def section(self, name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}/"): t for key, t in self.tensors.items() if key.startswith(f"{name}/")}

    def config(self) -> SMoREConfig:
        s = self.settings
        assert len(set(s["key_dim"])) == 1
        return SMoREConfig(
            rank=s["rank"],
            num_experts=s["num_experts"],
            fanout=s["fanout"],
            gate=s["gate"],
            activation=s["expert_act"],
            router_activation=s["gate_act"],
            activation_position=s["activation_position"],
            shared_pool=s["shared_pool"],
            router_dim=s["d_down"],
            key_dim=s["key_dim"][0],
            aux_loss_coefficient=s["balance_coef"],
            alpha=[scale * rank for scale, rank in zip(s["scaling"], s["rank"], strict=True)],
        )


@dataclass(repr=False)
class Outcome:
    """What the package computes for a case."""

    tree: Tree
    x: Tensor
    y: Tensor
    picks: list[Picks]
    records: list[RoutingRecord]
    aux: Tensor


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, shared_golden: Path) -> Case:
    prefix = f"{request.param}/"
    with safe_open(shared_golden / "smore.safetensors", "pt") as file:
        info = json.loads(file.metadata()["cases"])[request.param]
        tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    return Case(info["config"], info["n_trainable"], tensors)


def test_no_case_of_the_file_is_left_out(shared_golden: Path) -> None:
    with safe_open(shared_golden / "smore.safetensors", "pt") as file:
        assert sorted(json.loads(file.metadata()["cases"])) == sorted(CASES)


def run(case: Case, dtype: torch.dtype) -> Outcome:
    """Builds the layer, loads the original's parameters, and runs forward and backward."""
    t = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in case.tensors.items()}
    base = torch.nn.Linear(8, 7).to(dtype)
    base.load_state_dict({"weight": t["base/weight"], "bias": t["base/bias"]})
    tree = case.config().build(Site("site", 8, 7)).to(dtype)
    assert isinstance(tree, Tree)
    tree.load_state_dict(from_original(case.section("params")))
    tree.train(case.settings["training"])
    draws = [noise for _, noise in sorted(case.section("noise").items(), reverse=True)]  # the top pool draws first
    tree.router.draw_noise = lambda like: draws.pop(0).reshape(like.shape).to(like.dtype)  # type: ignore[method-assign]
    caught: list[list[Picks]] = []
    tree.router.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    x = t["x"].clone().requires_grad_()
    with AdapterContext(token_mask=t.get("attention_mask")) as context:
        y = tree(x, base(x))
    assert not draws
    aux = context.aux_loss()
    ((y * t["cotangent"]).sum() + (aux if "aux" in t else 0)).backward()
    return Outcome(tree, x, y, caught[0], context.records, aux)


@pytest.fixture
def tolerance(case: Case) -> dict[str, Any]:
    """The original computes a noisy gate's softmax and balance loss in float32."""
    noisy = case.settings["gate"] == "noisy_topk"
    return {"rtol": 0, "atol": 1e-5 if noisy else 1e-9, "check_dtype": not noisy}


def test_output_equals_the_original(case: Case, tolerance: dict[str, Any]) -> None:
    torch.testing.assert_close(run(case, torch.float64).y, case.tensors["y"], **tolerance)


def test_routing_equals_the_original(case: Case, tolerance: dict[str, Any]) -> None:
    picks = run(case, torch.float64).picks
    ids, weights = case.section("ids"), case.section("weights")
    assert len(picks) == len(ids) == len(weights)
    for level, picked in enumerate(picks):
        assert torch.equal(picked.ids.flatten(), ids[str(level)].flatten())
        torch.testing.assert_close(picked.weights.flatten(), weights[str(level)].flatten(), **tolerance)


def test_balance_losses_and_their_statistics_equal_the_original(case: Case, tolerance: dict[str, Any]) -> None:
    outcome = run(case, torch.float64)
    aux, load, importance = case.section("layer_aux"), case.section("load"), case.section("importance")
    assert sorted(str(record.level) for record in outcome.records) == sorted(aux)
    for record in outcome.records:
        level = str(record.level)
        torch.testing.assert_close(record.loss(record.sums), aux[level], **tolerance)
        # A noisy gate's sums are importance and smooth load; a switch gate's first row counts picks.
        picked = record.sums[1] if level in importance else record.sums[0]
        torch.testing.assert_close(picked, load[level].double(), **tolerance)
        if level in importance:
            torch.testing.assert_close(record.sums[0], importance[level], **tolerance)
    torch.testing.assert_close(outcome.aux, case.tensors.get("aux", torch.zeros(())), **tolerance)


def assert_gradients(case: Case, outcome: Outcome, **tolerance: Any) -> None:
    expected = from_original(case.section("grads"))
    torch.testing.assert_close(outcome.x.grad, case.tensors["grad_x"].to(outcome.x.dtype), **tolerance)
    parameters = dict(outcome.tree.named_parameters())
    assert set(expected) <= set(parameters)
    for name, parameter in parameters.items():
        # The original stores no gradient where there is none: noise weights outside training.
        wanted = expected.get(name, torch.zeros_like(parameter)).to(parameter.dtype)
        actual = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(actual, wanted, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_every_gradient_equals_the_original(case: Case, tolerance: dict[str, Any]) -> None:
    assert_gradients(case, run(case, torch.float64), **tolerance)


def test_parameter_count_equals_the_original(case: Case) -> None:
    config = case.config()
    site = Site("site", 8, 7)
    assert config.num_parameters(site) == case.num_trainable
    assert sum(p.numel() for p in config.build(site).parameters()) == case.num_trainable


def test_float32_stays_within_rounding(case: Case) -> None:
    outcome = run(case, torch.float32)
    torch.testing.assert_close(outcome.y, case.tensors["y"].float(), rtol=2e-5, atol=2e-5)
    assert_gradients(case, outcome, rtol=2e-5, atol=2e-5)
    for level, picked in enumerate(outcome.picks):
        assert torch.equal(picked.ids.flatten(), case.tensors[f"ids/{level}"].flatten())
