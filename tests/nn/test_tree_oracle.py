from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from smore_cli.methods.smore import SMoREConfig
from smore_cli.nn import AdapterContext
from tests.nn.oracle import Oracle
from tests.nn.trees import SMALL, FixedNoise, build, rows, with_picks

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.nn.tree import Tree

TOKENS = 4
SHAPES: dict[int, dict[str, list[int]]] = {
    1: {"rank": [3], "num_experts": [4], "fanout": [2]},
    2: {"rank": [2, 3], "num_experts": [4, 3], "fanout": [2, 2]},
    3: {"rank": [1, 2, 2], "num_experts": [3, 4, 3], "fanout": [2, 1, 2]},
}
GATES = ["dense", "switch", "noisy_train", "noisy_eval"]
POSITIONS = ["all", "child_v2", "child"]


def assert_equals_oracle(tree: Tree, config: SMoREConfig, *, training: bool, mask: list[int] | None) -> None:
    """Compares output, ids, weights, aux and every gradient, in float64."""
    x = rows(TOKENS, 6).requires_grad_()
    cotangent = rows(TOKENS, 5, seed=2)
    tree.train(training)
    noise = FixedNoise(tree)
    with AdapterContext(token_mask=None if mask is None else torch.tensor(mask)) as context:
        update, picks = with_picks(tree, x)
    aux = context.aux_loss()
    ((update * cotangent).sum() + aux).backward()

    params = {name: p.detach().clone().requires_grad_() for name, p in tree.named_parameters()}
    x_oracle = x.detach().clone().requires_grad_()
    oracle = Oracle(config, params)
    if training:
        oracle.noise = lambda token, level, path: noise.drawn[level][token, oracle.paths(level).index(path)]
    expected = oracle(x_oracle)
    expected_aux = oracle.aux([True] * TOKENS if mask is None else [value != 0 for value in mask])
    ((expected * cotangent).sum() + expected_aux).backward()

    assert_close(update, expected, "output")
    assert_close(aux.double(), expected_aux, "aux")
    for level, picked in enumerate(picks):
        ids = oracle.table(level, lambda node: torch.tensor(node.ids), TOKENS)
        weights = oracle.table(level, lambda node: torch.stack(node.weights), TOKENS)
        assert torch.equal(picked.ids, ids), f"ids of level {level}"
        assert_close(picked.weights, weights, f"weights of level {level}")
    assert_close(x.grad, x_oracle.grad, "grad of x")
    for name, parameter in tree.named_parameters():
        actual, wanted = parameter.grad, params[name].grad
        zero = torch.zeros_like(parameter)
        assert_close(zero if actual is None else actual, zero if wanted is None else wanted, f"grad of {name}")


def assert_close(actual: Tensor | None, expected: Tensor | None, what: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11, msg=lambda text: f"{what}: {text}")


def fields_of(levels: int, gate: str) -> dict[str, Any]:
    return {**SMALL, **SHAPES[levels], "gate": "noisy_topk" if gate.startswith("noisy") else gate}


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_equals_the_equations(levels: int, gate: str, position: str) -> None:
    config = SMoREConfig(**fields_of(levels, gate), activation_position=position)
    mask = [1, 0, 1, 1] if position == "all" else None
    assert_equals_oracle(build(config), config, training=gate == "noisy_train", mask=mask)


@pytest.mark.parametrize("weights", ["released", "selected", "pool"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("fanout", [1, 2])
def test_every_rule_for_weights_equals_the_equations(gate: str, weights: str, fanout: int) -> None:
    config = SMoREConfig(**fields_of(2, gate) | {"fanout": [fanout, fanout]}, gate_weights=weights)
    assert_equals_oracle(build(config), config, training=gate == "noisy_train", mask=None)


@pytest.mark.parametrize("score", ["dot", "cosine"])
@pytest.mark.parametrize("gate", GATES)
def test_every_score_equals_the_equations(gate: str, score: str) -> None:
    config = SMoREConfig(**fields_of(3, gate), score=score)
    assert_equals_oracle(build(config), config, training=gate == "noisy_train", mask=[2, 1, 0, 3])


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("activation", ["tanh", "relu", "identity", "prelu"])
def test_every_activation_equals_the_equations(activation: str, position: str) -> None:
    fields = fields_of(3, "switch")
    config = SMoREConfig(**fields, activation=activation, router_activation=activation, activation_position=position)
    assert_equals_oracle(build(config), config, training=True, mask=None)


@pytest.mark.parametrize("init", ["w_final_zero", "eq_1_layer", "b_zero", "bw_zero", "normal"])
@pytest.mark.parametrize("shared", [False, True])
def test_freshly_initialised_trees_equal_the_equations(init: str, shared: bool) -> None:
    shape = {"rank": [2, 2], "num_experts": [3, 3], "fanout": [2, 1]}
    config = SMoREConfig(**SMALL, **shape, init=init, shared_pool=shared, alpha=[3.0, 0.5])
    assert_equals_oracle(build(config, randomise=False), config, training=True, mask=None)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_shared_pool_with_a_scale_for_each_level_equals_the_equations(levels: int, gate: str) -> None:
    shape = {"rank": [2] * levels, "num_experts": [3] * levels, "fanout": [2, 1, 2][:levels]}
    alpha = [4.0, 1.0, 3.0][:levels]
    config = SMoREConfig(**fields_of(levels, gate) | shape, shared_pool=True, alpha=alpha)
    assert_equals_oracle(build(config), config, training=gate == "noisy_train", mask=None)


@pytest.mark.parametrize("seed", range(30))
def test_random_configurations_equal_the_equations(seed: int) -> None:
    draw = random.Random(seed)
    gate, shared = draw.choice(["dense", "switch", "noisy_topk"]), draw.random() < 0.3
    levels = draw.choice([1, 2, 3])
    experts = [draw.choice([2, 3, 4]) for _ in range(levels)]
    ranks = [draw.choice([1, 2, 3]) for _ in range(levels)]
    if shared:
        experts, ranks = experts[:1] * levels, ranks[:1] * levels
    config = SMoREConfig(
        **SMALL,
        gate=gate,
        rank=ranks,
        num_experts=experts,
        fanout=[draw.randint(1, max(1, min(2, s - 1))) for s in experts],
        shared_pool=shared,
        activation=draw.choice(["tanh", "relu", "identity", "prelu"]),
        router_activation=draw.choice(["tanh", "relu", "identity", "prelu"]),
        activation_position=draw.choice(POSITIONS),
        gate_weights=draw.choice(["released", "selected", "pool"]),
        score=draw.choice([None, "dot", "cosine"]),
        alpha=draw.choice([None, [draw.uniform(0.5, 4) for _ in range(levels)]]),
        aux_loss_coefficient=draw.choice([0.01, 1.0]),
    )
    mask = draw.choice([None, [draw.choice([0, 1, 2]) for _ in range(TOKENS)]])
    assert_equals_oracle(build(config, seed=seed), config, training=draw.random() < 0.5, mask=mask)
