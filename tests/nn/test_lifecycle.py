"""Trees and quantised bases; what holds for every method is in `tests/contract` (dossier, section 8: 13)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from smore_cli.methods.lora import LoRAConfig
from smore_cli.models.load import load_backbone
from smore_cli.nn import AdapterContext, adapted_modules, attach, detach
from smore_cli.recipe.schema import ModelConfig, QuantizationConfig
from tests.nn.models import adapter_gradients, add_random, logits, small_smore, token_ids
from tests.nn.trees import random_tree

if TYPE_CHECKING:
    from pathlib import Path

    from smore_cli.methods import MethodConfig

CONFIGS: dict[str, MethodConfig] = {
    "smore": small_smore(),
    "smore shared noisy": small_smore(shared_pool=True, gate="noisy_topk", num_experts=[3, 3], fanout=[1, 2]),
    "smore dense prelu": small_smore(gate="dense", activation="prelu", router_activation="prelu"),
    "lora": LoRAConfig(rank=4),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> MethodConfig:
    return CONFIGS[request.param]


@pytest.mark.parametrize("fields", [{}, {"shared_pool": True}, {"gate": "noisy_topk", "activation": "prelu"}])
def test_saving_and_loading_a_tree_gives_the_same_tensors_and_outputs(fields: dict[str, Any], tmp_path: Path) -> None:
    shape = {"rank": [2, 2], "num_experts": [3, 3], "fanout": [1, 2]}
    tree = random_tree(**shape, **fields)
    save_file(tree.state_dict(), tmp_path / "adapter.safetensors")
    other = random_tree(seed=1, **shape, **fields)
    other.load_state_dict(load_file(tmp_path / "adapter.safetensors"))
    x, y = torch.randn(3, 6).double(), torch.randn(3, 5).double()
    assert torch.equal(other(x, y), tree(x, y))
    assert {name for name, _ in other.named_parameters()} == set(other.state_dict())  # nothing hidden in buffers


# Precision.


@pytest.mark.parametrize("gate", ["dense", "switch"])
def test_a_bfloat16_tree_is_the_float32_tree_up_to_rounding(gate: str) -> None:
    tree = random_tree(16, 12, gate=gate, rank=[2, 2], num_experts=[3, 3], fanout=[2, 2]).float()
    x, y = torch.randn(64, 16), torch.randn(64, 12)
    exact = tree(x.bfloat16().float(), y.bfloat16().float())
    rounded = tree(x.bfloat16(), y.bfloat16())
    assert rounded.dtype == torch.bfloat16
    close = (rounded.float() - exact).abs().amax(1) < 0.03 * exact.abs().max()
    assert close.float().mean() >= (1.0 if gate == "dense" else 0.9)  # near a tie, rounding picks another expert


def four_bit(folder: Path) -> nn.Module:
    return load_backbone(ModelConfig(name_or_path=str(folder)), QuantizationConfig(), torch.device("cpu")).model


def test_a_4_bit_backbone_trains_its_adapters_and_stays_as_it_was(tiny_llama: Path, config: MethodConfig) -> None:
    model, ids = four_bit(tiny_llama), token_ids(2, 7)
    before, weights = logits(model, ids), {name: value.clone() for name, value in model.state_dict().items()}
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"  # type: ignore[union-attr]
    attach(model, config)
    assert torch.equal(logits(model, ids), before)
    bases = {path: module.base for path, module in adapted_modules(model).items()}
    assert bases["model.layers.0.mlp.down_proj"].in_features == 64 and len(bases) == 14
    add_random(model, config, "random")
    with AdapterContext() as context:
        loss = model(input_ids=ids, labels=ids).loss
    (loss + context.aux_loss()).backward()
    gradients = adapter_gradients(model)
    assert {name.split(".adapters.")[0] for name in gradients} == set(bases)
    assert all(g.isfinite().all() for g in gradients.values())
    detach(model, "random")
    detach(model)
    assert torch.equal(logits(model, ids), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_evaluating_a_4_bit_backbone_changes_neither_its_loss_nor_later_gradients(tiny_llama: Path) -> None:
    # bitsandbytes repacks weights for inference on CPUs with bfloat16 instructions, and has no backward pass for that.
    model, ids = add_random(four_bit(tiny_llama), CONFIGS["lora"]), token_ids(2, 7)
    results = []
    for _ in range(2):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), adapter_gradients(model)))
        with torch.no_grad():
            model.eval()(input_ids=ids)
    torch.testing.assert_close(results[0], results[1])


def test_the_update_of_a_4_bit_layer_is_that_of_its_dequantised_layer() -> None:
    import bitsandbytes as bnb

    torch.manual_seed(0)
    plain = nn.Linear(64, 32)
    base = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    base.load_state_dict(plain.state_dict())
    base = base.to("cpu")
    tree = random_tree(64, 32, rank=[2, 2], num_experts=[3, 3], fanout=[2, 2]).float()
    x = torch.randn(5, 64, requires_grad=True)
    out = tree(x, base(x))
    (grad,) = torch.autograd.grad(out.sum(), x)
    weight = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    expected = tree(x, nn.functional.linear(x, weight, base.bias))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), x)[0], rtol=1e-4, atol=1e-5)
