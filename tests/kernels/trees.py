"""Trees of every form that kernels have or leave to PyTorch, and a training step of one."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import torch

from smore_cli.methods import Site
from smore_cli.methods.smore import SMoREConfig
from smore_cli.nn import AdapterContext
from tests.nn.trees import randomise_

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from smore_cli.nn.tree import Tree

FORMS: dict[str, dict[str, Any]] = {
    "as by default": {},
    "one level": {"rank": [3], "num_experts": [5], "fanout": [2]},
    "three levels": {"rank": [8, 4, 3], "num_experts": [4, 3, 5], "fanout": [2, 3, 2], "alpha": [4.0, 2.0, 9.0]},
    "four levels": {"rank": [2, 1, 2, 1], "num_experts": [3, 2, 4, 2], "fanout": [2, 1, 2, 2]},
    "relu, tanh in the router": {"activation": "relu", "router_activation": "tanh"},
    "identity": {"activation": "identity", "router_activation": "identity"},
    "dense": {"gate": "dense", "num_experts": [3, 2]},
    "pool weights": {"gate_weights": "pool"},
    "single children": {"fanout": [1, 1]},
    "a single child on top": {"fanout": [2, 1]},
    "selected weights": {"gate_weights": "selected", "fanout": [2, 1]},
    "odd widths": {"fanout": [1, 2], "rank": [3, 5], "router_dim": 7, "key_dim": 13},
    "shared pool": {"shared_pool": True, "rank": [2, 2, 2], "num_experts": [4, 4, 4], "fanout": [2, 2, 2]},
    "one expert": {"num_experts": [4, 1], "fanout": [2, 1]},
}
OTHER_FORMS: dict[str, dict[str, Any]] = {
    "noise": {"gate": "noisy_topk"},
    "cosine": {"score": "cosine"},
    "star": {"activation_position": "child_v2"},
    "prelu": {"activation": "prelu"},
    "prelu in the router": {"router_activation": "prelu"},
    "many experts": {"num_experts": [4, 17]},
    "many nodes": {"rank": [1, 1, 1], "num_experts": [5, 5, 5], "fanout": [5, 5, 3]},
}


def make(**fields: Any) -> Tree:
    torch.manual_seed(0)
    tree = cast("Tree", SMoREConfig(init="normal", **fields).build(Site("site", 24, 20)))
    randomise_(tree)
    return tree


def step(tree: Tree, latent: Tensor, slope: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the state, the balance loss and all gradients; and how often each expert was picked."""
    latent = latent.clone().requires_grad_()
    with AdapterContext(token_mask=mask) as context:
        state = tree.middle(latent)
    aux = context.aux_loss()
    parameters = [attrgetter(name)(tree) for name in tree.core_names]
    found = torch.autograd.grad((state * slope).sum() + 30 * aux, [latent, *parameters])
    return [state.detach(), aux.detach(), *found], [each.load for each in context.loads]


def assert_close(found: Mapping[str, Tensor], exact: Sequence[Tensor]) -> None:
    """Values in float32, by name, are those in float64."""
    for (name, a), b in zip(found.items(), exact, strict=True):
        assert a.dtype == torch.float32
        scale = max(float(b.abs().max()), 0.1)  # gradients that nearly vanish are sums of larger terms
        assert float((a - b).abs().max()) < 5e-5 * scale, name
