"""The core of a tree is computed twice and kept once: same numbers, same picks, next to no memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from smore_cli.nn import AdapterContext, tree
from tests.nn.trees import FixedNoise, random_tree, rows

SHAPES: dict[str, dict[str, Any]] = {
    "two levels": {"rank": [2, 3], "num_experts": [4, 4], "fanout": [2, 2]},
    "three levels": {"rank": [2, 1, 2], "num_experts": [3, 4, 3], "fanout": [2, 1, 2]},
    "star": {"rank": [2, 2], "num_experts": [4, 3], "fanout": [2, 2], "activation_position": "child_v2"},
}
GATES = ["dense", "switch", "noisy_topk"]
N = 11
LATENTS = 2 * 4 + 3 * 4 + 3  # r_l s_l of both levels, and d_down


def step(module: tree.Tree, x: Tensor) -> list[Tensor]:
    """Returns the output, the balance loss, and all gradients."""
    FixedNoise(module)
    mask = torch.arange(N) % 4 > 0
    with AdapterContext(token_mask=mask) as context:
        out = module(x, x.new_zeros(N, 5))
    aux = context.aux_loss()
    inputs = [x, *module.parameters()]
    found = torch.autograd.grad(out.square().sum() + aux, inputs, allow_unused=True)
    return [out, aux, *(torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True))]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", SHAPES)
def test_recomputing_changes_nothing(shape: str, gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = random_tree(gate=gate, **SHAPES[shape]).train()
    found = step(module, rows(N, 6).requires_grad_())
    monkeypatch.setattr(tree, "recomputed", lambda module, latent, names: module.core(latent))
    for a, b in zip(found, step(module, rows(N, 6).requires_grad_()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_only_the_latents_and_the_picks_are_kept(gate: str) -> None:
    module = random_tree(gate=gate, **SHAPES["two levels"]).train()
    FixedNoise(module)
    kept, weights = dict[int, int](), {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module.middle(rows(N, LATENTS).requires_grad_())
    ids, noise = 2 + 2 * 2, 4 + 4 * 2  # the children of all parents; a draw for every expert of each
    each = {"dense": 0, "switch": ids, "noisy_topk": ids + noise}[gate]
    assert sum(kept.values()) <= 8 * (N * (LATENTS + each) + 8)  # 8: the numbers of a pool, which a dense gate keeps


def test_a_parameter_changed_between_the_passes_is_an_error() -> None:
    module = random_tree(**SHAPES["two levels"])
    out = module(rows(N, 6).requires_grad_(), rows(N, 5))
    with torch.no_grad():
        module.W[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
