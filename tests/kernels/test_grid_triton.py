"""The Triton kernels of the grid give what PyTorch gives: on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

from smore_cli.nn.routed_grid import Form, Given, Prior, grid, prior_gates

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; PyTorch for CUDA brings it"
)

SIZES = [(1, 4, 8), (150, 4, 8), (33, 1, 1), (33, 3, 5), (9, 16, 16)]
"""Tokens, down and up vectors."""


@pytest.fixture(scope="module")
def kernel() -> Any:
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
    from smore_cli.kernels.grid_triton import TritonGrid

    return TritonGrid()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["none", "rows", "documents"])
def test_the_kernel_computes_what_pytorch_does(kind: str, size: tuple[int, int, int], kernel: Any) -> None:
    tokens, down, up = size
    generator = torch.Generator().manual_seed(tokens)
    sequences = 3 if kind == "documents" or tokens % 3 == 0 else 1
    shapes = [(tokens, down + down * up), (sequences, down * up), (tokens, up), *[(tokens, down * up)] * 2]
    latent, s, dy, dp, dg = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    documents = (torch.arange(tokens) % 4 - 1).to(DEVICE) if kind == "documents" else None
    form, exact = (
        Form(down, 8.0, 4.0, 10.0, Prior(each, documents) if kind != "none" else None) for each in (s, s.double())
    )
    omega, nu = torch.tensor([0.05, -0.03], device=DEVICE).split(1)
    given = Given(latent, omega, nu)
    leaves = [each.double().requires_grad_() for each in (latent, omega, nu)]
    p = leaves[0][:, None, down:].softmax(-1)
    gates = prior_gates(p, *leaves[1:], exact)
    outputs = (grid(leaves[0][:, :down], gates), p[:, 0], gates[:, 0])
    for ours, wanted in zip(kernel.forward(given, form), outputs, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=4e-6, atol=4e-6)
    for slopes in ((dy, dp, dg), (dy, None, None), (None, dp, None), (None, None, dg), (dy, None, dg)):
        loss = sum(
            (out * slope.double()).sum() for out, slope in zip(outputs, slopes, strict=True) if slope is not None
        )
        wanted = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        for ours, each in zip(kernel.backward(given, form, *slopes), wanted, strict=True):
            torch.testing.assert_close(ours.double(), each, rtol=5e-5, atol=5e-5)


def test_a_latent_that_is_no_number_gives_none(kernel: Any) -> None:
    latent = torch.ones(3, 4 + 32, device=DEVICE)
    latent[1, -1] = float("nan")
    nothing = torch.zeros(1, device=DEVICE)
    mixed, p, _ = kernel.forward(Given(latent, nothing, nothing), Form(4, 32.0, 4.0, 100.0, None))
    assert mixed.isnan().any(1).tolist() == p.isnan().any(1).tolist() == [False, True, False]


def test_it_is_tried_before_it_is_used(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel.works(torch.device(DEVICE))
    right = type(kernel).backward
    monkeypatch.setattr(type(kernel), "backward", lambda *args: [2 * each for each in right(*args)])
    assert not kernel.works(torch.device(DEVICE))
