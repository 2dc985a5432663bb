"""The merged weight is W + s B A, or m (W + s B A) / ||W + s B A|| for DoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from smore_cli.errors import UsageError
from smore_cli.merging.dense import add_update, fold
from smore_cli.merging.merge import merge
from smore_cli.methods import MethodConfig
from smore_cli.methods.lora import LoRAConfig
from smore_cli.methods.smore import SMoREConfig
from smore_cli.models.adapter_files import save_adapter
from smore_cli.models.load import load_backbone
from smore_cli.nn import adapted_modules, attach
from smore_cli.recipe.schema import ModelConfig, QuantizationConfig

IDS = torch.arange(3, 43).view(2, 20)


def _attach(model: Any, config: MethodConfig) -> None:
    attach(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def _assert_merge_is_exact(model: Any, config: LoRAConfig, count: int) -> None:
    plain = _logits(model)
    _attach(model, config)
    adapted = _logits(model)
    assert fold(model) == count
    assert adapted_modules(model) == {}
    assert (adapted - plain).abs().max() > 0.01
    torch.testing.assert_close(_logits(model), adapted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_merging_keeps_the_logits(tiny_llama: Path, use_dora: bool, use_rslora: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    config = LoRAConfig(rank=3, alpha=4.0, dropout=0.3, use_dora=use_dora, use_rslora=use_rslora)
    _assert_merge_is_exact(model, config, 14)


@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_into_transposed_weights_keeps_the_logits(use_dora: bool) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    _assert_merge_is_exact(model, LoRAConfig(rank=2, target_modules=["c_attn", "c_proj"], use_dora=use_dora), 6)


def test_merging_into_a_tied_head_leaves_the_embedding_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()
    embedding = model.transformer.wte.weight.clone()
    assert model.lm_head.weight is model.transformer.wte.weight
    attach(model, LoRAConfig(rank=2, target_modules=["c_fc"]))  # `lm_head` itself is no target: adapt it by hand
    model.lm_head = _adapted_head(model)
    adapted = _logits(model)
    fold(model)
    assert torch.equal(model.transformer.wte.weight, embedding)
    assert not torch.equal(model.lm_head.weight, embedding)
    torch.testing.assert_close(_logits(model), adapted, rtol=0, atol=2e-5)
    model.save_pretrained(tmp_path)
    reopened = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(_logits(reopened), adapted, rtol=0, atol=2e-5)


def _adapted_head(model: Any) -> Any:
    from smore_cli.nn import AdaptedModule
    from smore_cli.nn.low_rank import LowRank

    head = AdaptedModule(model.lm_head)
    head.adapters["default"] = LowRank(16, 64, rank=2, scale=1.0)
    torch.nn.init.normal_(head.adapters["default"].lora_B)
    head.active = "default"
    return head.eval()


def test_the_weight_is_rounded_once(tiny_llama: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    _attach(model, LoRAConfig(rank=2, target_modules=["q_proj"]))
    layer = adapted_modules(model)["model.layers.0.self_attn.q_proj"]
    adapter: Any = layer.adapters["default"]
    exact = layer.weight.double() + 2.0 * adapter.lora_B.double() @ adapter.lora_A.double()
    fold(model)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, exact.to(torch.bfloat16))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_old_weight_is_let_go_and_not_written_over(kind: str) -> None:
    """It is a piece of the backbone's mapped file: changed pages would stay in memory."""
    base = torch.nn.Linear(4, 3) if kind == "linear" else Conv1D(3, 4)
    old = base.weight.data
    kept, D = old.clone(), torch.ones(3, 4, dtype=torch.float64)
    add_update(base, D)
    torch.testing.assert_close(base.weight.data, kept + 1)
    assert torch.equal(old, kept) and base.weight.is_contiguous()


def test_doras_weight_is_normalised_in_float64_and_rounded_once(tiny_llama: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    _attach(model, LoRAConfig(rank=2, target_modules=["q_proj"], use_dora=True))
    layer = adapted_modules(model)["model.layers.0.self_attn.q_proj"]
    adapter: Any = layer.adapters["default"]
    direction = layer.weight.double() + 2.0 * adapter.lora_B.double() @ adapter.lora_A.double()
    exact = adapter.lora_magnitude_vector.double()[:, None] * direction / direction.norm(dim=1, keepdim=True)
    fold(model)
    merged = model.model.layers[0].self_attn.q_proj.weight
    # Two orders of float64 operations may fall on two sides of a rounding boundary, no more than that.
    assert (merged != exact.to(torch.bfloat16)).float().mean() < 0.01
    torch.testing.assert_close(merged, exact.to(torch.bfloat16), rtol=2**-8, atol=0)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True, "alpha": 3.0}], ids=["dora", "rslora"])
def test_an_adapter_folder_becomes_an_ordinary_model_folder(
    tiny_llama: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    config = LoRAConfig(rank=3, **settings)
    _attach(model, config)
    save_adapter(model, config, tmp_path / "adapter", base=ModelConfig(name_or_path=str(tiny_llama)))
    merged = merge(tmp_path / "adapter", tmp_path / "merged", device=torch.device("cpu"))
    assert merged.difference.mean_kl < 1e-9
    assert merged.difference.top1_agreement == 1
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(_logits(plain), _logits(model), rtol=0, atol=5e-5)


def test_a_routed_adapter_is_refused_and_nothing_changes(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    _attach(model, SMoREConfig(rank=[2], num_experts=[3], fanout=[2]))
    before = _logits(model)
    with pytest.raises(UsageError, match="depends on the token"):
        fold(model)
    assert torch.equal(_logits(model), before)


def test_quantised_weights_are_refused(tiny_llama: Path) -> None:
    model = load_backbone(ModelConfig(name_or_path=str(tiny_llama)), QuantizationConfig(), torch.device("cpu")).model
    _attach(model, LoRAConfig(rank=2))
    with pytest.raises(UsageError, match="quantised"):
        fold(model)
