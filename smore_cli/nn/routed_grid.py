"""Rank-one experts in a grid, weighed by the token and by what is known of its sequence.

    p = softmax(z)       g = a p + b s             y_j = sum_i g_ij h_i             s: the prior of the token's sequence
    a = c gam lam        b = c' gam (1 - lam)      lam = sigmoid(kappa omega)       gam = sigmoid(kappa nu)

omega and nu are learned numbers, the same for all tokens. Where a kernel is known (`smore_cli.kernels`), all of it is
one node of the autograd graph, without a gradient of s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Form",
    "Given",
    "Kernel",
    "Prior",
    "find_kernel",
    "grid",
    "kernel_of",
    "no_kernel",
    "prior_gates",
    "routed_grid",
]


class Prior(NamedTuple):
    """What is known of the sequences of N tokens.

    Attributes:
        of_sequences: (B, K).
        documents: (N,) int64, which of them each token belongs to, below 0 on padding, which takes the first; None:
            they are of equal length, one after another.
    """

    of_sequences: Tensor
    documents: Tensor | None


class Form(NamedTuple):
    """What is computed.

    Attributes:
        down: r1.
        token_scale: c.
        prior_scale: c'.
        sharpness: kappa.
        prior: of the sequences, in the latent's dtype and on its device; None: s = 0.
    """

    down: int
    token_scale: float
    prior_scale: float
    sharpness: float
    prior: Prior | None


class Given(NamedTuple):
    """What a kernel is given, in both passes: nothing else is kept.

    Attributes:
        latent: (N, r1 + K) what the down vectors gave, then the router's logits.
        omega: (1,) logit of the mix.
        nu: (1,) logit of the scale.
    """

    latent: Tensor
    omega: Tensor
    nu: Tensor


class Kernel(Protocol):
    """A compiled form of both passes."""

    def forward(self, given: Given, form: Form) -> tuple[Tensor, Tensor, Tensor]:
        """Returns y (N, r2), probabilities and gates (N, K)."""
        ...

    def backward(
        self, given: Given, form: Form, dy: Tensor | None, dp: Tensor | None, dg: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of what was given from those of y, probabilities and gates."""
        ...


def no_kernel(latent: Tensor, form: Form) -> Kernel | None:
    """Finds none."""
    return None


find_kernel: Callable[[Tensor, Form], Kernel | None] = no_kernel
"""Finds the kernel for latents and a form; set by `smore_cli.kernels.use`."""


def kernel_of(latent: Tensor, form: Form) -> Kernel | None:
    """Returns the kernel for latents and a form, if there is one."""
    return find_kernel(latent, form)


def grid(latent: Tensor, gates: Tensor) -> Tensor:
    """Grid core, y_j = sum_i g_ij h_i: latent (N, r1) and gates (N, 1, r1 r2), row by row, to (N, r2)."""
    pairs = gates.view(len(latent), latent.shape[1], -1)  # (N, r1, r2)
    return (latent[:, :, None] * pairs).sum(1)


def prior_gates(p: Tensor, omega: Tensor, nu: Tensor, form: Form) -> Tensor:
    """Returns g (N, 1, K) of probabilities (N, 1, K)."""
    lam, gam = torch.sigmoid(form.sharpness * omega), torch.sigmoid(form.sharpness * nu)
    g = form.token_scale * lam * p
    if form.prior is not None:
        sequences, documents = form.prior
        share = form.prior_scale * (1 - lam) * sequences  # (B, K); of sequences of one length never made for a token
        if documents is None:
            g = (g.view(len(share), -1, g.shape[-1]) + share[:, None]).view_as(g)
        else:
            g = g + share[documents.clamp_min(0)][:, None]
    return gam * g


def routed_grid(kernel: Kernel, given: Given, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y (N, r2), and probabilities and gates (N, 1, K) of the K = r1 r2 experts, by a kernel that was found."""
    if torch.is_grad_enabled():
        y, p, g = _RoutedGrid.apply(*given, kernel, form)
    else:
        y, p, g = kernel.forward(given, form)
    return y, p[:, None], g[:, None]


class _RoutedGrid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, omega: Tensor, nu: Tensor, kernel: Kernel, form: Form
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = Given(latent, omega, nu)
        ctx.save_for_backward(*given)
        ctx.set_materialize_grads(False)
        ctx.kernel, ctx.form = kernel, form
        return kernel.forward(given, form)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        return *ctx.kernel.backward(Given(*ctx.saved_tensors), ctx.form, *slopes), None, None
