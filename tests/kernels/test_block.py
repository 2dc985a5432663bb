"""The compiled core of a flat method is that of `nn/routed_block.py`, which has oracle tests of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from smore_cli import kernels
from smore_cli.kernels import block as block_kernel
from smore_cli.kernels import compiled
from smore_cli.nn.entropy import Entropy, EntropyHybrid
from smore_cli.nn.routed_block import Form, routed_block
from smore_cli.nn.selection import All, TopK, TopP

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.nn.selection import Selector

pytestmark = pytest.mark.skipif(compiled.library("block") is None, reason="no C compiler on this machine")

SELECTORS: dict[str, Selector] = {
    "all": All(),
    "top-1": TopK(1),
    "top-2": TopK(2),
    "all by top-k": TopK(9),
    "top-k, not renormalised": TopK(2, renormalise=False),
    "top-p": TopP(0.6),
    "top-p, renormalised": TopP(0.6, renormalise=True),
    "top-p, left out": TopP(0.6, min_k=2, crossing=False),
    "top-p of everything": TopP(1.0),
    "hybrid": EntropyHybrid(TopP(0.6, renormalise=True), Entropy(), 0.8),
    "hybrid, q": EntropyHybrid(TopP(0.75, 2, crossing=False), Entropy(1.1, eps=1e-5), 0.7),
    "hybrid, q, not normalised": EntropyHybrid(TopP(0.75), Entropy(0.5, normalised=False), 1.5),
    "hybrid, sure": EntropyHybrid(TopP(0.75), Entropy(2.0), 1.0),
    "hybrid, Renyi": EntropyHybrid(TopP(0.75), Entropy(2.0, "renyi"), 0.6),
}
"""The last one goes to the kernel with PyTorch's picks."""
SIZES = [(1, 8, 4), (300, 8, 4), (33, 3, 8), (33, 5, 3), (33, 64, 1), (33, 1, 5)]
"""Tokens, experts, rank; 4 and 8 have code of their own."""


def latent_of(tokens: int, experts: int, rank: int, fan: bool) -> tuple[Tensor, int]:
    rows = rank if fan else experts * rank
    generator = torch.Generator().manual_seed(tokens + experts)
    return 3 * torch.randn(tokens, rows + experts, generator=generator), rows


def step(latent: Tensor, rows: int, select: Selector, fan: bool, used: tuple[float, ...]) -> list[Tensor]:
    """Returns mixed latent, probabilities, gates and the gradient of a sum of those that are used."""
    latent = latent.clone().requires_grad_()
    *found, picked = routed_block(latent, rows, select, fan=fan)
    weights = [torch.cos(torch.arange(float(each.numel()))).view(each.shape).to(each) for each in found]
    loss = sum((each * w).sum() * on for each, w, on in zip(found, weights, used, strict=True) if on)
    (slope,) = torch.autograd.grad(loss, latent)  # type: ignore[arg-type]
    return [each.detach() for each in found] + [slope] + ([] if picked is None else [picked])


@pytest.mark.parametrize("fan", [False, True], ids=["block", "fan"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", SELECTORS)
def test_the_kernel_computes_what_pytorch_does_in_float64(name: str, size: tuple[int, int, int], fan: bool) -> None:
    (latent, rows), select = latent_of(*size, fan=fan), SELECTORS[name]
    kernels.use()
    assert block_kernel.find(latent, Form(size[1], size[2], fan, select)) is not None
    for used in ((1.0, 0.0, 0.0), (1.0, 0.5, 2.0), (0.0, 0.0, 1.0), (0.0, 1.0, 0.0)):
        found, exact = (step(x, rows, select, fan, used) for x in (latent, latent.double()))
        assert len(found) == len(exact) and found[0].dtype == torch.float32
        for a, b in zip(found, exact, strict=True):
            if a.dtype == torch.bool:
                assert torch.equal(a, b)
            else:
                torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)


def test_of_equal_experts_the_first_goes_first() -> None:
    latent = torch.zeros(5, 4 * 2 + 4)
    kernels.use()
    for select in (TopK(2), TopP(0.4), TopP(0.5, crossing=False)):
        *_, picked = routed_block(latent, 8, select)
        assert picked is not None and picked.tolist() == [[True, True, False, False]] * 5


@pytest.mark.parametrize("select", [SELECTORS[name] for name in ("all", "top-2", "top-p", "hybrid")], ids=repr)
def test_a_latent_that_is_no_number_gives_none(select: Selector) -> None:
    latent = torch.ones(3, 4 * 2 + 4)
    latent[1, -1] = float("nan")
    kernels.use()
    mixed, probabilities, *_ = routed_block(latent, 8, select)
    assert mixed.isnan().any(1).tolist() == probabilities.isnan().any(-1).flatten().tolist() == [False, True, False]


def test_latents_may_lie_among_others() -> None:
    wide = torch.randn(20, 40)
    kernels.use()
    for latent in (wide[:, 3:15], wide.t()[:12].t(), wide[:12, :20].t()):
        found, alone = (step(x, 8, TopK(2), False, (1.0, 1.0, 1.0)) for x in (latent, latent.contiguous()))
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def test_what_the_kernel_cannot_read_goes_by_pytorch() -> None:
    def kernel_of(latent: Tensor, **changes: Any) -> block_kernel.BlockKernel | None:
        return block_kernel.find(latent, Form(4, 2, False, All())._replace(**changes))

    latent = torch.randn(4, 12)
    assert kernel_of(latent) is not None
    assert kernel_of(latent[:0]) is None
    assert kernel_of(latent.double()) is None
    assert kernel_of(latent.to("meta")) is None
    assert kernel_of(torch.randn(4, 65 * 3), experts=65) is None
