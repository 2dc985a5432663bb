"""The compiled grid is that of `nn/routed_grid.py`, which has oracle tests of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from smore_cli import kernels
from smore_cli.kernels import compiled
from smore_cli.kernels import grid as grid_kernel
from smore_cli.methods import Site
from smore_cli.methods.trex import TRexConfig
from smore_cli.nn import AdapterContext, prior
from smore_cli.nn.gate_edit import GateEdit
from smore_cli.nn.routed_grid import Form, Given, Prior, grid, prior_gates, routed_grid

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.skipif(compiled.library("grid") is None, reason="no C compiler on this machine")

SIZES = [(1, 4, 8), (300, 4, 8), (33, 1, 1), (33, 3, 5), (33, 16, 16)]
"""Tokens, down and up vectors; 4 x 8 has code of its own."""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def form_of(down: int, prior: Prior | None = None) -> Form:
    return Form(down, 32.0, 4.0, 100.0, prior)


def prior_of(kind: str, tokens: int, experts: int) -> Prior | None:
    if kind == "none":
        return None
    if kind == "documents":
        return Prior(numbers(5, experts, seed=1), torch.arange(tokens) % 6 - 1)
    return Prior(numbers(3 if tokens % 3 == 0 else 1, experts, seed=1), None)


def by_kernel(latent: Tensor, omega: Tensor, nu: Tensor, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    kernel = grid_kernel.find(latent, form)
    assert kernel is not None
    return routed_grid(kernel, Given(latent, omega, nu), form)


def by_pytorch(latent: Tensor, omega: Tensor, nu: Tensor, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    p = latent[:, None, form.down :].softmax(-1)
    g = prior_gates(p, omega, nu, form)
    return grid(latent[:, : form.down], g), p, g


def step(make: Any, latent: Tensor, form: Form, used: tuple[float, ...]) -> list[Tensor]:
    """Returns mixed latent, probabilities, gates and the gradients of a sum of those that are used."""
    inputs = [latent.clone().requires_grad_(), *(latent.new_full((1,), v).requires_grad_() for v in (0.003, -0.007))]
    found = make(*inputs, form)
    weights = [torch.cos(torch.arange(float(each.numel()))).view(each.shape).to(each) for each in found]
    loss = sum((each * w).sum() * on for each, w, on in zip(found, weights, used, strict=True) if on)
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return [*(each.detach() for each in found), *grads]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["none", "rows", "documents"])
def test_the_kernel_computes_what_pytorch_does_in_float64(kind: str, size: tuple[int, int, int]) -> None:
    tokens, rows, ups = size
    latent, known = 3 * numbers(tokens, rows + rows * ups), prior_of(kind, tokens, rows * ups)
    exact = None if known is None else Prior(known.of_sequences.double(), known.documents)
    for used in ((1.0, 0.0, 0.0), (1.0, 0.5, 2.0), (0.0, 0.0, 1.0), (0.0, 1.0, 0.0)):
        found = step(by_kernel, latent, form_of(rows, known), used)
        wanted = step(by_pytorch, latent.double(), form_of(rows, exact), used)
        for ours, each in zip(found, wanted, strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), each, rtol=2e-5, atol=2e-5)


def test_a_token_is_the_same_in_every_batch() -> None:
    latent, form = numbers(40, 4 + 32), form_of(4, Prior(numbers(1, 32, seed=1), None))
    whole = step(by_kernel, latent, form, (1.0, 1.0, 1.0))[:3]
    for part in (slice(0, 1), slice(7, 20)):
        found = step(by_kernel, latent[part], form, (1.0, 1.0, 1.0))[:3]
        assert all(torch.equal(a, b[part]) for a, b in zip(found, whole, strict=True))


def test_a_latent_that_is_no_number_gives_none() -> None:
    latent = torch.ones(3, 4 + 32)
    latent[1, -1] = float("nan")
    mixed, p, _ = by_kernel(latent, torch.zeros(1), torch.zeros(1), form_of(4))
    assert mixed.isnan().any(1).tolist() == p.isnan().any(-1).flatten().tolist() == [False, True, False]


def test_what_the_kernel_cannot_read_goes_by_pytorch() -> None:
    def known(latent: Tensor, down: int = 2, prior: Tensor | None = None) -> bool:
        return grid_kernel.find(latent, form_of(down, None if prior is None else Prior(prior, None))) is not None

    latent = torch.randn(4, 2 + 4)
    assert known(latent) and known(latent, prior=torch.randn(2, 4))
    assert not known(latent[:0])
    assert not known(latent.double())
    assert not known(torch.randn(6, 4).t())
    assert not known(latent.to("meta"))
    assert not known(torch.randn(4, 17 + 17 * 16), 17)
    assert not known(latent, prior=torch.randn(4, 2).t())
    assert not known(latent, prior=torch.randn(2, 4).requires_grad_())


@pytest.mark.parametrize("fields", [{}, {"router_input": "latent"}], ids=["router on x", "router on A x"])
def test_an_adapter_gives_the_same_with_it(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(prior, "routed_grid", lambda *given: calls.append(1) or routed_grid(*given))
    torch.manual_seed(0)
    adapter = TRexConfig(num_down=3, num_up=4, **fields).build(Site("a", 10, 6))
    torch.nn.init.normal_(adapter.get_parameter("B"))
    x, y, known = numbers(2, 5, 10), numbers(2, 5, 6, seed=1), numbers(2, 12, seed=2)

    def run(edit: GateEdit | None = None) -> list[Tensor]:
        traces: list[Any] = []
        adapter.zero_grad()
        with AdapterContext(prior=known, observe=traces.append, edit=edit) as context:
            out = adapter(x, y)
        out.square().sum().backward()
        grads = [parameter.grad for parameter in adapter.parameters() if parameter.grad is not None]
        return [out, traces[0].gates, traces[0].probabilities, context.loads[0].load, *grads]

    exact = run()
    kernels.use()
    found = run()
    assert len(calls) == (0 if fields else 1)
    for ours, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    run(GateEdit("ablate", (0,), frozenset()))
    assert len(calls) == (0 if fields else 1), "gates that somebody edits are not the kernel's"
