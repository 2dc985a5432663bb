"""Adapters on a real model: saving, switching, precision, quantised bases (dossier, section 8: 13)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from smore_cli.methods.lora import LoRAConfig
from smore_cli.models.load import load_backbone
from smore_cli.nn import AdapterContext, adapted_modules, attach, detach, set_active
from smore_cli.recipe.schema import ModelConfig, QuantizationConfig
from tests.nn.models import adapter_gradients, add_random, llama, logits, small_smore, token_ids
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


def test_a_model_with_the_adapters_of_another_gives_the_same_logits(tiny_llama: Path, config: MethodConfig) -> None:
    ids = token_ids(2, 7)
    trained = add_random(llama(tiny_llama), config)
    state = {name: p for name, p in trained.state_dict().items() if ".adapters." in name}
    fresh = llama(tiny_llama)
    attach(fresh, config, seed=5)
    assert not torch.equal(logits(fresh, ids), logits(trained, ids))
    missing, unexpected = fresh.load_state_dict(state, strict=False)
    assert not unexpected and not any(".adapters." in name for name in missing)
    assert torch.equal(logits(fresh, ids), logits(trained, ids))


def test_switching_off_and_detaching_leave_the_backbone_bit_identical(tiny_llama: Path, config: MethodConfig) -> None:
    model, ids = llama(tiny_llama), token_ids(2, 7)
    before, parameters = logits(model, ids), copy.deepcopy(model.state_dict())
    modules = {name: type(module) for name, module in model.named_modules()}
    add_random(model, config)
    with_adapter = logits(model, ids)
    assert not torch.allclose(with_adapter, before, atol=1e-3)
    set_active(model, None)
    assert torch.equal(logits(model, ids), before)
    set_active(model, "default")
    assert torch.equal(logits(model, ids), with_adapter)
    detach(model)
    assert torch.equal(logits(model, ids), before)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert list(model.state_dict()) == list(parameters)
    assert all(torch.equal(value, parameters[name]) for name, value in model.state_dict().items())


def test_two_adapters_on_one_model_switch_independently(tiny_llama: Path) -> None:
    ids, model = token_ids(2, 7), llama(tiny_llama)
    alone = {}
    for name, config, seed in (("a", CONFIGS["smore"], 1), ("b", LoRAConfig(target_modules=["q_proj"]), 2)):
        single = add_random(llama(tiny_llama), config, name, seed)
        alone[name] = logits(single, ids)
        add_random(model, config, name, seed)
    for name in ("a", "b", "a"):
        set_active(model, name)
        assert torch.equal(logits(model, ids), alone[name])
        trainable = {key.split(".adapters.")[1].split(".")[0] for key, p in model.named_parameters() if p.requires_grad}
        assert trainable == {name}
    detach(model, "a")
    assert set(adapted_modules(model)) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    set_active(model, "b")
    assert torch.equal(logits(model, ids), alone["b"])


# Precision.


def test_bfloat16_inputs_meet_float32_parameters(tiny_llama: Path, config: MethodConfig) -> None:
    ids = token_ids(2, 7)
    model = add_random(llama(tiny_llama, dtype=torch.bfloat16), config).train()
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if ".adapters." in name)
    with AdapterContext() as context:
        out = model(input_ids=ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    assert all(record.sums.dtype == torch.float32 for record in context.records)
    (out.loss + context.aux_loss()).backward()
    gradients = adapter_gradients(model)
    assert gradients and all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())


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
