"""Pieces of a singular value decomposition, and the bank that starts from them."""

from __future__ import annotations

import pytest
import torch

from smore_cli.nn.svd_segments import svd_segments
from tests.nn.trees import rows


@pytest.mark.parametrize(("shape", "s", "r"), [((9, 12), 3, 2), ((12, 9), 3, 3), ((7, 7), 2, 1), ((8, 8), 1, 8)])
def test_every_expert_gets_the_first_triplets_of_its_stretch_of_the_spectrum(
    shape: tuple[int, int], s: int, r: int
) -> None:
    weight = rows(*shape)
    left, values, right = svd_segments(weight, s, r)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    stretch = min(shape) // s
    for i in range(s):
        for j in range(r):
            mine, whole = i * r + j, i * stretch + j
            torch.testing.assert_close(values[mine], S[whole])
            piece = values[mine] * torch.outer(left[:, mine], right[mine])
            torch.testing.assert_close(piece, S[whole] * torch.outer(U[:, whole], Vh[whole]), rtol=1e-10, atol=1e-12)


def test_one_expert_of_full_rank_gets_the_whole_weight() -> None:
    weight = rows(5, 7)
    left, values, right = svd_segments(weight, 1, 5)
    torch.testing.assert_close(left * values @ right, weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_weights_are_decomposed_in_float32(dtype: torch.dtype) -> None:
    assert {part.dtype for part in svd_segments(rows(6, 6).to(dtype), 2, 2)} == {torch.float32}
