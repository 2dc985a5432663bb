"""The Triton kernels give what `nn/routed_block.py` gives: on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

from smore_cli.nn import routed_block
from smore_cli.nn.entropy import Entropy, EntropyHybrid
from smore_cli.nn.routed_block import Form
from smore_cli.nn.selection import All, TopK, TopP

if TYPE_CHECKING:
    from smore_cli.nn.selection import Selector

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; PyTorch for CUDA brings it"
)

SELECTORS: dict[str, Selector] = {
    "all": All(),
    "top-1": TopK(1),
    "top-2": TopK(2),
    "top-k, not renormalised": TopK(2, renormalise=False),
    "top-p, renormalised": TopP(0.6, renormalise=True),
    "top-p, left out": TopP(0.6, min_k=2, crossing=False),
    "hybrid": EntropyHybrid(TopP(0.6, renormalise=True), Entropy(), 0.8),
    "hybrid, q": EntropyHybrid(TopP(0.75, 2, crossing=False), Entropy(1.1, eps=1e-5), 0.7),
    "hybrid, q, not normalised": EntropyHybrid(TopP(0.75), Entropy(0.5, normalised=False), 1.5),
    "hybrid, Renyi": EntropyHybrid(TopP(0.75), Entropy(2.0, "renyi"), 0.6),
}
SIZES = [(1, 8, 4), (70, 8, 4), (33, 3, 8), (33, 5, 3), (9, 64, 1), (9, 1, 5)]
"""Tokens, experts, rank."""


@pytest.fixture(scope="module")
def kernel() -> Any:
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
    from smore_cli.kernels.block_triton import TritonBlock

    return TritonBlock()


@pytest.mark.parametrize("fan", [False, True], ids=["block", "fan"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", SELECTORS)
def test_the_kernel_computes_what_pytorch_does(name: str, size: tuple[int, int, int], fan: bool, kernel: Any) -> None:
    tokens, experts, rank = size
    form = Form(experts, rank, fan, SELECTORS[name])
    generator = torch.Generator().manual_seed(tokens)
    rows = rank if fan else experts * rank
    shapes = [(tokens, rows + experts), (tokens, experts * rank), (tokens, experts), (tokens, experts)]
    latent, dy, dp, dg = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    mixed, kept = kernel.forward(latent, form)
    expected, exact = routed_block.forward(latent.double(), form)
    for a, b in zip([mixed, kept.p, kept.g], [expected, exact.p, exact.g], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)
    assert (kept.picked is None) == (exact.picked is None)
    assert kept.picked is None or torch.equal(kept.picked, exact.picked)
    for slopes in ((dy, dp, dg), (dy, None, None), (None, dp, None), (None, None, dg), (dy, None, dg)):
        found = kernel.backward(kept, form, *slopes)
        wide = [None if each is None else each.double() for each in slopes]
        torch.testing.assert_close(found.double(), routed_block.backward(exact, form, *wide), rtol=5e-6, atol=5e-6)


def test_it_is_tried_before_it_is_used(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel.works(torch.device(DEVICE))
    right = type(kernel).backward
    monkeypatch.setattr(type(kernel), "backward", lambda *args: 2 * right(*args))
    assert not kernel.works(torch.device(DEVICE))
