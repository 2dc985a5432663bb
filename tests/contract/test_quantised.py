"""Every method on a backbone in 4 and in 8 bits: the numbers, the gradients, the files, recomputed activations."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch

from smore_cli.methods import MethodConfig, available_methods
from smore_cli.models.adapter_files import load_adapter, save_adapter
from smore_cli.nn import checkpoint_contexts, set_active
from smore_cli.nn.adapted import dense_weight
from smore_cli.recipe.schema import ModelConfig
from tests.contract.models import (
    VARIANTS,
    attached,
    backbone,
    batch,
    default_config,
    gradients,
    logits,
    loss_of,
    on,
    randomised,
    rows,
    token_ids,
)
from tests.contract.quantised import SETTINGS, RoundedInput, dequantised, quantised
from tests.contract.test_gradients import step

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

IDS = token_ids(2, 9)
METHODS = [*available_methods(), *VARIANTS]
# 4 bits are exact in the weight. 8 bits round x as well: where a value lies between two steps, the last bit of float32
# decides, all that follows moves by a step, and a token near a tie goes to another expert.
CLOSE = {"nf4": (1e-5, 1e-4), "int8": (2e-2, 0.2)}


def settings(method: str) -> MethodConfig:
    """Returns the method's settings for a Llama, without dropout."""
    config = on("llama", default_config(method))
    return config.model_copy(update={"dropout": 0.0} if "dropout" in type(config).model_fields else {})


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    """Returns |a - b| / |b| over all tensors."""
    error = torch.stack([(x - y).square().sum() for x, y in zip(a, b, strict=True)]).sum()
    return float((error / torch.stack([y.square().sum() for y in b]).sum()).sqrt())


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_backbone_computes_trains_and_reloads_as_its_dequantised_twin(
    method: str, kind: str, tmp_path: Path
) -> None:
    config, bare = settings(method), copy.deepcopy(quantised(kind))
    plain = logits(bare, IDS)
    model = attached(bare, config)
    assert torch.equal(logits(model, IDS), plain) is config.starts_as_backbone
    pair = [randomised(each) for each in (model, attached(copy.deepcopy(dequantised(kind)), config))]
    found, expected = (logits(each, IDS) for each in pair)
    near, near_slopes = CLOSE[kind]
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert (error.amax() if kind == "nf4" else error.median()) < near
    slopes = []
    for each in pair:
        loss_of(each, batch(4)).backward()
        slopes.append(gradients(each))
    assert slopes[0].keys() == slopes[1].keys()
    assert apart(list(slopes[0].values()), list(slopes[1].values())) < near_slopes

    save_adapter(model, config, tmp_path, base=ModelConfig(name_or_path="tiny"))
    again, full = copy.deepcopy(quantised(kind)), copy.deepcopy(backbone("llama"))
    for each in (again, full):
        load_adapter(each, tmp_path)
    assert torch.equal(logits(again, IDS), found)
    on_full = logits(full, IDS)  # fits, and says something else: `smore eval --full-precision` says how much
    assert on_full.isfinite().all() and not torch.allclose(on_full, found, atol=1e-2)
    set_active(model, None)
    assert torch.equal(logits(model, IDS), plain)


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_recomputed_activations_of_a_quantised_backbone_pass_the_same_gradients(method: str, kind: str) -> None:
    model = randomised(attached(copy.deepcopy(quantised(kind)), settings(method))).train()
    plain, expected = step(model, [rows(4)])
    model.activation_checkpointing_enable(  # type: ignore[operator]
        activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": checkpoint_contexts}
    )
    again, found = step(model, [rows(4)])
    assert torch.equal(again.loss, plain.loss) and torch.equal(again.aux, plain.aux)
    for name, value in found.items():
        assert value.isfinite().all()
        assert torch.equal(value, expected[name]), name
    first = [value for name, value in found.items() if ".layers.0." in name]
    assert any(value.any() for value in first)  # a frozen embedding does not cut the first layer off


def test_an_8_bit_map_is_the_rounded_product_with_its_dequantised_weight_before_and_after_its_first_use() -> None:
    linear = copy.deepcopy(quantised("int8")).get_submodule("model.layers.0.mlp.up_proj")
    weight = dense_weight(linear)
    original: nn.Module = backbone("llama").get_submodule("model.layers.0.mlp.up_proj")
    assert 0 < apart([weight], [dense_weight(original)]) < 0.01
    twin = RoundedInput(*reversed(weight.shape), bias=False)
    twin.weight.data = weight
    x = 3 * torch.randn(7, weight.shape[1], generator=torch.Generator().manual_seed(0))  # some values are above 6
    results = []
    for module in (linear, twin):
        own = x.clone().requires_grad_()
        y = module(own)
        (y * torch.arange(y.numel()).view_as(y) / y.numel()).sum().backward()
        assert own.grad is not None
        results.append((y.detach(), own.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    assert linear.state.SCB is not None and linear.weight.SCB is None  # moved by the first use
    assert torch.equal(dense_weight(linear), weight)
    assert torch.equal(dense_weight(copy.deepcopy(linear)), weight)
