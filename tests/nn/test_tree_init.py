"""Initialisations (dossier, section 2), and what a fresh adapter does to a real model: nothing, until its first
step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from smore_cli.methods.smore import SMoREConfig
from smore_cli.nn import AdapterContext, adapted_modules, attach
from tests.nn.trees import random_tree, rows, update_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

SHAPE: dict[str, Any] = {"rank": [2, 3], "num_experts": [3, 4], "fanout": [2, 2]}
ZERO_INITS = ["w_final_zero", "eq_1_layer", "b_zero", "bw_zero"]


def kaiming_bound_reached(weight: Tensor, fan_in: int) -> bool:
    """Uniform in +-1/sqrt(fan_in): nothing outside, and something near the border."""
    bound = 1 / math.sqrt(fan_in)
    return 0.8 * bound < weight.abs().max().item() <= bound


@pytest.mark.parametrize("init", [*ZERO_INITS, "normal"])
def test_what_each_initialisation_sets(init: str) -> None:
    tree = random_tree(16, 9, randomise=False, init=init, **SHAPE)
    assert all(not bias.any() for bias in (*tree.a, *tree.b, *tree.w, tree.p))
    assert all(kaiming_bound_reached(A, 16) for A in tree.A)
    if init in ("w_final_zero", "normal"):
        assert all(kaiming_bound_reached(B, r) for B, r in zip(tree.B, [2, 3], strict=True))
        assert kaiming_bound_reached(tree.W[0], 6)
    assert all(not B.any() for B in tree.B) == (init in ("b_zero", "bw_zero"))
    assert (not tree.W[0].any()) == (init == "bw_zero")
    assert (not tree.P.any()) == (init in ("w_final_zero", "eq_1_layer"))
    if tree.P.any():
        assert kaiming_bound_reached(tree.P, 18)
    for level in tree.router.levels:
        assert level.keys.min() >= 0 and 0.5 < level.keys.max() <= 1  # uniform in [0, 1): all positive
        assert kaiming_bound_reached(level.mlp[0].weight, level.mlp[0].in_features)
    assert kaiming_bound_reached(tree.router.down.weight, 16)


def test_noise_weights_start_at_zero() -> None:
    tree = random_tree(randomise=False, gate="noisy_topk", **SHAPE)
    assert all(not level.noise.any() for level in tree.router.levels)


@pytest.mark.parametrize("shared", [False, True])
def test_eq_1_layer_selects_blocks(shared: bool) -> None:
    shape = SHAPE | ({"rank": [2, 2], "num_experts": [3, 3]} if shared else {})
    tree = random_tree(randomise=False, init="eq_1_layer", shared_pool=shared, **shape)
    for B in tree.B:
        s, d, r = B.shape
        for n in range(s):
            expected = torch.zeros(d, r, dtype=B.dtype)
            expected[n * r : (n + 1) * r] = torch.eye(r)
            assert torch.equal(B[n], expected)
    d_below, d_above = tree.widths[1], tree.widths[2]
    expected = torch.zeros(d_above, d_below, dtype=torch.float64)
    expected[d_above - d_below :] = torch.eye(d_below)
    assert torch.equal(tree.W[0], expected)


@pytest.mark.parametrize("activation", ["tanh", "relu", "identity", "prelu"])
@pytest.mark.parametrize("position", ["all", "child_v2", "child"])
@pytest.mark.parametrize("init", ZERO_INITS)
def test_a_fresh_update_is_exactly_zero(init: str, position: str, activation: str) -> None:
    tree = random_tree(randomise=False, init=init, activation=activation, activation_position=position, **SHAPE)
    assert not update_of(tree, rows(7, 6)).any()


def test_normal_does_not_start_at_zero() -> None:
    assert update_of(random_tree(randomise=False, init="normal", **SHAPE), rows(7, 6)).abs().min() > 0


def adapted_llama(folder: Path, **fields: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """Returns a model with fresh adapters, its inputs, and the logits it gave without them."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(3, 512, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=ids).logits
    attach(model, SMoREConfig(target_modules=["up_proj", "gate_proj", "down_proj"], **fields))
    return model, ids, before


def moved(module: nn.Module) -> set[str]:
    """Names of the parameters that have a gradient other than zero."""
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("gate", ["dense", "switch", "noisy_topk"])
@pytest.mark.parametrize("init", ZERO_INITS)
def test_a_model_with_fresh_adapters_gives_exactly_the_backbones_logits(tiny_llama: Path, init: str, gate: str) -> None:
    model, ids, before = adapted_llama(tiny_llama, init=init, gate=gate)
    for training in (False, True):
        model.train(training)
        assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("init", ["w_final_zero", "eq_1_layer"])
def test_with_a_zero_projection_the_first_step_moves_only_it_and_the_router_through_the_balance_loss(
    tiny_llama: Path, init: str
) -> None:
    model, ids, _ = adapted_llama(tiny_llama, init=init)
    with AdapterContext() as context:
        loss = model(input_ids=ids, labels=ids).loss
    trees = {path: module.adapters["default"] for path, module in adapted_modules(model).items()}
    loss.backward(retain_graph=True)
    for path, tree in trees.items():
        assert moved(tree) == {"P", "p"}, path
    context.aux_loss().backward()
    for path, tree in trees.items():
        names = moved(tree)
        assert names >= {"P", "p", "router.down.weight", "router.levels.0.keys", "router.levels.1.keys"}, path
        assert all(name in ("P", "p") or name.startswith("router.") for name in names), path
    assert all(p.grad is None for name, p in model.named_parameters() if ".adapters." not in name)


def test_with_b_zero_the_first_step_moves_only_the_up_projections(tiny_llama: Path) -> None:
    model, ids, _ = adapted_llama(tiny_llama, init="b_zero")
    model(input_ids=ids, labels=ids).loss.backward()
    for module in adapted_modules(model).values():
        assert moved(module.adapters["default"]) == {"B.0", "B.1", "b.0", "b.1", "w.0", "p"}


@pytest.mark.parametrize("init", ["w_final_zero", "eq_1_layer", "b_zero", "bw_zero", "normal"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gate": "dense"},
        {"gate": "noisy_topk", "fanout": [1, 2]},
        {"aux_loss_coefficient": 0.0},
        {"fanout": [1, 3]},  # all experts of the upper pool: its balance loss is constant
        {"fanout": [3, 1]},
        {"shared_pool": True, "rank": [2, 2]},
        {"rank": [1, 2, 2], "num_experts": [3, 3, 3], "fanout": [2, 2, 2], "activation": "prelu"},
        {"activation_position": "child_v2"},
        {"activation_position": "child"},
    ],
)
def test_the_parameters_without_a_first_gradient_are_those_declared(init: str, fields: dict[str, Any]) -> None:
    shape: dict[str, Any] = {"rank": [1, 2], "num_experts": [3, 3], "fanout": [2, 2], "router_activation": "tanh"}
    if init == "eq_1_layer" and "rank" not in fields:
        shape["rank"] = [2, 2]
    tree = random_tree(randomise=False, init=init, **{**shape, **fields}).train()
    x = rows(64, 6)
    torch.manual_seed(0)
    with AdapterContext() as context:
        out = tree(x, x.new_zeros(64, 5))
    ((out * rows(64, 5, seed=7)).sum() + context.aux_loss()).backward()
    # Where everything is picked, the gradient of the constant balance loss is 0 up to rounding.
    silent = {name for name, p in tree.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-15}
    assert silent == tree.silent_at_start()
