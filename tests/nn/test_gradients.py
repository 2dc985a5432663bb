"""Gradients against finite differences.

The inputs are away from routing ties: a step that changed a pick would make the finite difference jump, and fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from smore_cli.nn import AdapterContext
from smore_cli.nn.balance import ImportanceLoadLoss, SwitchBalanceLoss
from smore_cli.nn.low_rank import LowRank
from tests.nn.trees import FixedNoise, random_tree, randomise_, rows

if TYPE_CHECKING:
    from torch import Tensor, nn

STEP = 1e-6
SHAPE: dict[str, Any] = {"rank": [1, 2], "num_experts": [3, 3], "fanout": [2, 1], "router_dim": 2, "key_dim": 3}
TREES: dict[str, dict[str, Any]] = {
    "switch": {"gate": "switch"},
    "dense": {"gate": "dense"},
    "noisy": {"gate": "noisy_topk"},
    "star": {"gate": "switch", "activation_position": "child_v2"},
    "ungated": {"gate": "switch", "activation_position": "child"},
    "shared": {"gate": "switch", "rank": [2, 2], "shared_pool": True, "alpha": [3.0, 1.0]},
    "prelu": {"gate": "switch", "activation": "prelu"},
    "three levels": {"gate": "switch", "rank": [1, 1, 1], "num_experts": [2, 2, 2], "fanout": [1, 1, 2]},
}


def gradcheck(module: nn.Module, x: Tensor) -> None:
    """Checks the update and the balance loss in x and in every parameter."""
    names, values = zip(*module.named_parameters(), strict=True)
    y = rows(len(x), 3, seed=5)

    def outputs(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        with AdapterContext(token_mask=torch.tensor([1, 0, 1])) as context:
            out = torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, y))
        return out, context.aux_loss()

    inputs = (x.requires_grad_(), *(value.detach().clone().requires_grad_() for value in values))
    if not outputs(*inputs)[1].requires_grad:  # no balance loss: gradcheck wants outputs that depend on the inputs
        torch.autograd.gradcheck(
            lambda *args: outputs(*args)[0], inputs, eps=STEP, atol=1e-7, rtol=1e-5, fast_mode=True
        )
    else:
        torch.autograd.gradcheck(outputs, inputs, eps=STEP, atol=1e-7, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", TREES)
def test_gradients_of_a_tree_equal_finite_differences(name: str, training: bool) -> None:
    tree = random_tree(4, 3, seed=1, **{**SHAPE, "router_activation": "tanh", **TREES[name]}).train(training)
    FixedNoise(tree)
    gradcheck(tree, rows(3, 4))


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_gradients_of_lora_equal_finite_differences(scale: float) -> None:
    lora = LowRank(4, 3, rank=2, scale=scale).double()
    randomise_(lora)
    gradcheck(lora, rows(3, 4))


@pytest.mark.parametrize("loss", [SwitchBalanceLoss(0.3), ImportanceLoadLoss(0.3)])
def test_gradients_of_balance_losses_equal_finite_differences(loss: SwitchBalanceLoss | ImportanceLoadLoss) -> None:
    sums = rows(3, 4).abs().add(1.5).requires_grad_()  # above 1: the count of decisions is clamped there
    torch.autograd.gradcheck(loss, (sums,))
