"""The mixed core against the mixed matrix of every token, written out."""

from __future__ import annotations

import torch

from smore_cli.nn.mix_core import MixCore
from tests.nn.trees import rows


def test_every_token_goes_through_its_own_mixture_of_the_matrices() -> None:
    core = MixCore(3, 4).double()
    latent, gates = rows(7, 4), torch.softmax(rows(7, 3, seed=2), -1)
    out = core(latent, gates[:, None])
    for t in range(7):
        mixed = sum(gates[t, e] * core.M[e] for e in range(3))
        torch.testing.assert_close(out[t], mixed.T @ latent[t], rtol=1e-12, atol=1e-12)


def test_gradients_equal_finite_differences() -> None:
    core, latent, gates = MixCore(2, 3).double(), rows(3, 3).requires_grad_(), rows(3, 2, seed=2).requires_grad_()
    matrices = core.M.detach().clone().requires_grad_()

    def mixed(latent: torch.Tensor, gates: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(core, {"M": matrices}, (latent, gates[:, None]))  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(mixed, (latent, gates, matrices), fast_mode=True)


def test_every_matrix_starts_as_a_linear_map_of_its_own_width_does() -> None:
    torch.manual_seed(0)
    matrices = MixCore(50, 16).M.detach()
    assert matrices.abs().max() <= 1 / 16**0.5 < 1.01 * matrices.abs().max()
    torch.testing.assert_close(matrices.std().item(), (1 / (3 * 16)) ** 0.5, rtol=0.02, atol=0)
