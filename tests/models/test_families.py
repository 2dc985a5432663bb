"""Families of backbones, each as a tiny random model: adapted, trained, saved, decoded with a cache, recomputed."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from smore_cli.data.batch import Row, collate
from smore_cli.errors import AdapterError
from smore_cli.methods import MethodConfig, load_method
from smore_cli.methods.lora import LoRAConfig
from smore_cli.methods.mixlora import MixLoRAConfig
from smore_cli.methods.smore import SMoREConfig
from smore_cli.models.adapter_files import load_adapter, save_adapter
from smore_cli.models.forward import target_logprobs
from smore_cli.nn import adapted_modules, attach, checkpoint_contexts
from smore_cli.nn.targets import find_targets, fused_experts
from smore_cli.recipe.schema import ModelConfig
from tests.contract.models import PAD, VOCABULARY, gradients, logits, randomised, rows, token_ids
from tests.contract.test_gradients import step

if TYPE_CHECKING:
    from pathlib import Path

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_GATED = {"gate_proj", "up_proj", "down_proj"}
FAMILIES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "llama": (_SIZES, _ATTENTION | _GATED),
    "mistral": (_SIZES | {"sliding_window": 4}, _ATTENTION | _GATED),
    "qwen2": (_SIZES, _ATTENTION | _GATED),
    "qwen3": (_SIZES, _ATTENTION | _GATED),
    "gemma2": (_SIZES | _MIXED | {"query_pre_attn_scalar": 8}, _ATTENTION | _GATED),
    "gemma3_text": (_SIZES | _MIXED | {"query_pre_attn_scalar": 8}, _ATTENTION | _GATED),
    "phi3": (_SIZES, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "gpt2": (_SIZES | _NO_DROPOUT, {"c_attn", "c_proj", "c_fc"}),
    "gpt_neox": (
        _SIZES | {"hidden_dropout": 0.0, "attention_dropout": 0.0},
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    ),
    "mixtral": (_SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}, _ATTENTION),
}
SMALL_TREE: dict[str, Any] = {"rank": [2, 2], "router_dim": 4, "key_dim": 4}
CONFIGS: list[MethodConfig] = [
    LoRAConfig(rank=2, target_modules="all-linear"),
    SMoREConfig(target_modules="all-linear", **SMALL_TREE),
]
WINDOWED = ["mistral", "gemma2", "gemma3_text"]


@functools.cache
def family(name: str) -> Any:
    """Returns the bare model, frozen; nobody changes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**FAMILIES[name][0]))
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_adapted_trained_saved_and_decoded(name: str, config: MethodConfig, tmp_path: Path) -> None:
    model, ids = copy.deepcopy(family(name)), token_ids(2, 9)
    before = logits(model, ids)
    targets = attach(model, config)
    assert {path.rsplit(".", 1)[-1] for path in targets} == FAMILIES[name][1]
    assert torch.equal(logits(model, ids), before)

    randomised(model)
    result, plain = step(model.train(), [rows(4)])
    assert all(each.isfinite().all() for each in plain.values())
    assert {path for path, m in adapted_modules(model).items() if m.active} == set(targets)
    reached = {key.split(".adapters.")[0] for key, gradient in plain.items() if gradient.any()}
    assert len(reached) == len(targets)
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    again, recomputed = step(model, [rows(4)])
    assert torch.equal(again.loss, result.loss)
    for key, gradient in plain.items():
        torch.testing.assert_close(recomputed[key], gradient, rtol=1e-5, atol=1e-6)
    model.activation_checkpointing_disable()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05 / float(torch.stack([g.norm() for g in plain.values()]).norm()))
    for key, parameter in model.named_parameters():
        parameter.grad = plain.get(key)
    optimizer.step()
    gradients(model)
    assert step(model, [rows(4)])[0].loss < result.loss

    model.eval()
    expected = logits(model, ids)
    save_adapter(model, config, tmp_path, base=ModelConfig(name_or_path=name))
    other = copy.deepcopy(family(name))
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other, ids), expected)

    out = other.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False,
        use_cache=True, return_dict_in_generate=True, output_logits=True, pad_token_id=PAD,
    )  # fmt: skip
    whole = logits(other, out.sequences)
    decoded = torch.stack(out.logits, 1)  # (2, 6, vocabulary)
    torch.testing.assert_close(decoded, whole[:, ids.shape[1] - 1 : -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WINDOWED)
def test_answers_that_share_a_prompt_see_it_through_the_models_sliding_window(name: str) -> None:
    prompt, answers = token_ids(7).tolist(), [token_ids(n, seed=n).tolist() for n in (2, 4, 3)]
    shared = Row(prompt, answers, [[True] * len(answer) for answer in answers])
    alone = [Row(prompt, [answer], [[True] * len(answer)]) for answer in answers]
    with torch.no_grad():
        found = target_logprobs(family(name), collate([shared], pad_token_id=PAD))
        single = [target_logprobs(family(name), collate([row], pad_token_id=PAD)) for row in alone]
    torch.testing.assert_close(found, torch.cat(single), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_gated_mlps_are_found_by_their_parts_and_their_absence_is_refused(name: str) -> None:
    whole = load_method("mixlora").sites
    if FAMILIES[name][1] >= _GATED:
        model = copy.deepcopy(family(name))
        targets = find_targets(model, "all-linear", whole)
        assert {path for path in targets if path.endswith(".mlp")} == {f"model.layers.{i}.mlp" for i in range(2)}
        ids, before = token_ids(2, 9), logits(model, token_ids(2, 9))
        attach(model, MixLoRAConfig(rank=2))
        assert torch.equal(logits(model, ids), before)  # and the experts are the family's own activation and product
    else:
        with pytest.raises(AdapterError, match="gated MLP"):
            find_targets(family(name), "all-linear", whole)


@pytest.mark.parametrize("target", ["experts", "gate_up_proj", "down_proj"])
def test_the_fused_experts_of_a_native_mixture_are_refused_by_name_and_counted(target: str) -> None:
    model = family("mixtral")
    with pytest.raises(AdapterError, match=f"'{target}' matches no linear map") as caught:
        find_targets(model, [target])
    assert "all experts of a layer in one 3-D tensor" in caught.value.hint
    assert fused_experts(model) == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert fused_experts(family("llama")) == []


def test_the_router_of_a_native_mixture_can_be_trained_whole() -> None:
    model = copy.deepcopy(family("mixtral"))
    attach(model, LoRAConfig(rank=2, modules_to_save=["mlp.gate"]))
    _, found = step(model.train(), [rows(4)])
    assert sum(gradient.any() for key, gradient in found.items() if ".mlp.gate." in key) == 2
