"""LoRA and DoRA layers by themselves; against PEFT and the equations they stand in tests/methods."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from smore_cli.nn.low_rank import LowRank, WeightDecomposed


def layers(dtype: torch.dtype) -> tuple[nn.Linear, list[LowRank]]:
    """A linear map and both kinds of adapter on it, every parameter random."""
    torch.manual_seed(0)
    base = nn.Linear(11, 7, dtype=dtype).requires_grad_(False)
    adapters = [
        LowRank(11, 7, rank=3, scale=1.5, dropout=0.4),
        WeightDecomposed(base, 11, 7, rank=3, scale=1.5, dropout=0.4),
    ]
    for adapter in adapters:
        adapter.eval()
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.5)
    return base, adapters


@pytest.mark.parametrize("index", [0, 1])
def test_the_merged_weight_is_the_one_map_that_base_and_adapter_are(index: int) -> None:
    base, adapters = layers(torch.float64)
    adapter, x = adapters[index].double(), torch.randn(5, 11, dtype=torch.float64)
    merged = nn.functional.linear(x, adapter.merged_weight(base.weight), base.bias)
    torch.testing.assert_close(adapter.adapted(x, base), merged, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("index", [0, 1])
def test_a_merged_weight_is_formed_in_float64_whatever_the_types(index: int) -> None:
    base, adapters = layers(torch.bfloat16)
    assert adapters[index].merged_weight(base.weight).dtype == torch.float64


def test_a_magnitude_that_bfloat16_cannot_tell_from_its_start_counts_all_the_same() -> None:
    """rho - 1 = 1e-3 is half a step of bfloat16 at 1, and is added to the output on its own."""
    torch.manual_seed(0)
    base = nn.Linear(64, 8, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    adapter = WeightDecomposed(base, 64, 8, rank=2, scale=1.0, dropout=0.0)
    with torch.no_grad():
        adapter.lora_magnitude_vector.mul_(1.001)
    ratio = adapter.magnitude_ratio(base)
    assert ratio.dtype == torch.float32
    torch.testing.assert_close(ratio, torch.full((8,), 1.001), rtol=1e-6, atol=0)


def test_autocast_does_not_touch_the_norm() -> None:
    base, adapters = layers(torch.float32)
    adapter = adapters[1]
    assert isinstance(adapter, WeightDecomposed)
    exact = adapter.magnitude_ratio(base)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(adapter.magnitude_ratio(base), exact)


def test_doras_update_alone_is_refused_because_it_needs_the_base() -> None:
    _, adapters = layers(torch.float32)
    with pytest.raises(TypeError, match=r"call adapted\(x, base\)"):
        adapters[1](torch.randn(2, 11), torch.randn(2, 7))


def test_the_frozen_weights_norm_is_not_saved() -> None:
    _, adapters = layers(torch.float32)
    assert set(adapters[1].state_dict()) == {"lora_A", "lora_B", "lora_magnitude_vector"}
