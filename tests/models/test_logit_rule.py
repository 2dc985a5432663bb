"""What a model does to its head's logits is found by asking it, whatever its family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from smore_cli.data.batch import Row, collate
from smore_cli.methods.smore import SMoREConfig
from smore_cli.models.forward import target_logits, target_logprobs, target_scores
from smore_cli.models.logit_rule import LogitRule, logit_rule
from smore_cli.nn import attach

if TYPE_CHECKING:
    from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.5, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, tuple[Any, Any, dict[str, Any], LogitRule]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}, LogitRule()),
    "cohere": (CohereConfig, CohereForCausalLM, {"logit_scale": 0.25}, LogitRule("multiply", 0.25)),
    "granite": (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 8.0}, LogitRule("divide", 8.0)),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"final_logit_softcapping": 5.0}, LogitRule("cap", 5.0)),
}
ROWS = [Row([11, 12, 13], [[21, 22], [31]], [[True, True], [True]]), Row([5], [[6, 7, 8]], [[True] * 3])]


def model_of(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    config, kind, settings, _ = MODELS[name]
    torch.manual_seed(0)
    model: nn.Module = kind(config(**SIZES, **settings)).to(dtype).requires_grad_(False).eval()
    attach(model, SMoREConfig(init="normal", router_dim=4, key_dim=4, target_modules="all-linear"))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_each_family_is_matched(name: str, dtype: torch.dtype) -> None:
    model = model_of(name, dtype)
    assert logit_rule(model) == MODELS[name][3]


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_gradients_are_those_of_the_models_own_logits(name: str) -> None:
    model, batch = model_of(name), collate(ROWS, pad_token_id=0)
    trained = [p for p in model.parameters() if p.requires_grad]

    def own() -> Tensor:
        return target_logits(model, batch).float().log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]

    found, expected = target_logprobs(model, batch), own()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ours, plain = (torch.autograd.grad(each.sum(), trained, allow_unused=True) for each in (found, expected))
    assert any(g is not None and bool(g.any()) for g in ours)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_model_with_a_rule_of_its_own_uses_its_own_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of("llama"), collate(ROWS, pad_token_id=0)
    forward = model.forward

    def squared(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits.square()
        return out

    monkeypatch.setattr(model, "forward", squared)
    assert logit_rule(model) is None
    found = target_scores(model, batch, best=True)
    logits = target_logits(model, batch).float()
    torch.testing.assert_close(found.logprobs, logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0])
    assert found.best is not None and torch.equal(found.best, logits.argmax(-1) == batch.targets)


def test_a_model_is_asked_once_and_anew_when_its_setting_changes() -> None:
    model, calls = model_of("gemma2"), list[int]()
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert logit_rule(model) == logit_rule(model) == LogitRule("cap", 5.0)
    assert len(calls) == 1
    model.config.final_logit_softcapping = 7.0  # type: ignore[union-attr]
    assert logit_rule(model) == LogitRule("cap", 7.0)
    assert len(calls) == 2


def test_asking_draws_no_random_number_and_leaves_the_modes_as_they_were() -> None:
    model = model_of("llama").train()
    torch.manual_seed(4)
    before = torch.get_rng_state()
    logit_rule(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
