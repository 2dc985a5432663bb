"""Finding targets, putting adapters on and taking them off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from smore_cli.errors import AdapterError
from smore_cli.methods.lora import LoRAConfig
from smore_cli.nn import AdaptedModule, adapted_modules, attach, detach, set_active
from smore_cli.nn.attach import find_targets
from tests.nn.models import add_random, llama, logits, small_smore, token_ids

if TYPE_CHECKING:
    from pathlib import Path

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FFN = ["gate_proj", "up_proj", "down_proj"]


def small_llama(**settings: Any) -> nn.Module:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **settings
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def lora(*targets: str) -> LoRAConfig:
    return LoRAConfig(rank=2, target_modules=list(targets))


# Which modules.


def test_all_linear_is_every_linear_map_but_the_output_head(tiny_llama: Path) -> None:
    model = llama(tiny_llama)
    paths = attach(model, LoRAConfig(rank=2))
    expected = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ATTENTION]
    expected += [f"model.layers.{i}.mlp.{name}" for i in range(2) for name in FFN]
    assert sorted(paths) == sorted(expected) == sorted(adapted_modules(model))
    assert type(model.lm_head) is nn.Linear


def test_a_tied_output_head_stays_tied_and_plain() -> None:
    model = small_llama(tie_word_embeddings=True)
    paths = attach(model, LoRAConfig(rank=2))
    assert len(paths) == 14 and type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_name_matches_the_end_of_a_path_at_a_dot() -> None:
    model = small_llama()
    assert list(find_targets(model, ["mlp.up_proj"])) == [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    assert len(find_targets(model, "up_proj")) == 2
    with pytest.raises(AdapterError):
        find_targets(model, ["proj"])  # the end of `up_proj`, but not a part of its path


def test_targets_come_in_the_models_order_however_they_are_named() -> None:
    model = small_llama()
    in_order = [path for path, _ in model.named_modules() if path.endswith(("q_proj", "up_proj"))]
    assert list(find_targets(model, ["up_proj", "q_proj"])) == in_order
    assert list(find_targets(model, ["q_proj", "up_proj", "mlp.up_proj"])) == in_order


def test_an_unknown_name_lists_what_the_model_has_and_leaves_the_model_alone() -> None:
    model = small_llama()
    with pytest.raises(AdapterError, match="target_modules: 'upproj' matches no linear map") as caught:
        attach(model, lora("q_proj", "upproj"))
    assert caught.value.hint == "this model has: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    assert adapted_modules(model) == {}
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["embed_tokens", "input_layernorm", "mlp"])
def test_what_is_no_linear_map_inside_the_model_is_no_target(name: str) -> None:
    with pytest.raises(AdapterError, match=f"'{name}' matches no linear map"):
        attach(small_llama(), lora(name))


def test_a_name_that_only_some_layers_have_is_refused() -> None:
    model = small_llama()
    model.model.layers[1].mlp.extra = nn.Linear(16, 16)
    with pytest.raises(AdapterError, match=r"'extra' is missing in 1 of 2 layers of model\.layers") as caught:
        attach(model, lora("extra"))
    assert "first layer without it: 0" in caught.value.hint
    assert len(attach(model, LoRAConfig(rank=2))) == 15  # all-linear takes what there is


def test_a_full_path_may_name_one_layer() -> None:
    model = small_llama()
    assert attach(model, lora("model.layers.1.mlp.up_proj")) == ["model.layers.1.mlp.up_proj"]


class CountingLinear(nn.Linear):
    """A linear map of another type, as quantised ones are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


def test_subclasses_of_linear_are_adapted_and_still_used() -> None:
    net = nn.Sequential(CountingLinear(3, 4), nn.Tanh(), CountingLinear(4, 2))
    assert attach(net, LoRAConfig(rank=2)) == ["0", "2"]
    net(torch.randn(5, 3))
    assert [net[i].base.calls for i in (0, 2)] == [1, 1]


def test_the_transposed_linear_maps_of_gpt2_are_adapted() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    model, ids = GPT2LMHeadModel(config).eval(), torch.randint(0, 50, (2, 7))
    before = logits(model, ids)
    attach(model, small_smore(target_modules=["c_attn", "c_fc", "mlp.c_proj"]))
    assert torch.equal(logits(model, ids), before)
    shapes = {path: tuple(m.adapters["default"].P.shape) for path, m in adapted_modules(model).items()}
    assert len(shapes) == 6
    assert shapes["transformer.h.0.attn.c_attn"][0] == 48 and shapes["transformer.h.1.mlp.c_fc"][0] == 64
    add_random(model, LoRAConfig(rank=2), "other")
    assert len(adapted_modules(model)) == 8  # attn.c_proj too
    assert not torch.allclose(logits(model, ids), before, atol=1e-3)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(m.adapters["other"].lora_A.grad.any() for m in adapted_modules(model).values())


# Attach, switch, detach.


def test_a_second_adapter_of_the_same_name_is_refused() -> None:
    model = small_llama()
    attach(model, lora("q_proj"))
    with pytest.raises(AdapterError, match="already has an adapter named 'default'"):
        attach(model, lora("q_proj", "up_proj"))
    assert set(adapted_modules(model)) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}


def test_a_second_adapter_sits_beside_the_first_not_inside_it() -> None:
    model = small_llama()
    attach(model, small_smore())
    paths = attach(model, LoRAConfig(rank=2), name="second")
    assert paths == list(adapted_modules(model)) and len(paths) == 14
    assert not any("adapters" in path or path.endswith("base") for path in paths)
    assert all(list(module.adapters) == ["default", "second"] for module in adapted_modules(model).values())


def test_only_the_active_adapter_trains() -> None:
    model = small_llama()
    attach(model, lora("q_proj"), name="a")
    attach(model, lora("q_proj"), name="b")

    def trainable() -> set[str]:
        return {name.split(".adapters.")[-1] for name, p in model.named_parameters() if p.requires_grad}

    assert trainable() == {"b.lora_A", "b.lora_B"}
    set_active(model, "a")
    assert trainable() == {"a.lora_A", "a.lora_B"}
    set_active(model, None)
    assert trainable() == set()


def test_an_unknown_adapter_cannot_be_made_active() -> None:
    model = small_llama()
    with pytest.raises(AdapterError, match="no adapter named 'x'") as caught:
        set_active(model, "x")
    assert caught.value.hint == "it has: none"
    attach(model, lora("q_proj"), name="a")
    with pytest.raises(AdapterError, match="no adapter named 'x'") as caught:
        set_active(model, "x")
    assert caught.value.hint == "it has: a"


@pytest.mark.parametrize("training", [False, True])
def test_adapters_take_over_the_models_mode(training: bool) -> None:
    model = small_llama().train(training)
    attach(model, small_smore())
    assert all(module.training == training for module in model.modules())


def test_detaching_the_last_adapter_restores_the_very_same_modules() -> None:
    model = small_llama()
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    attach(model, small_smore(), name="a")
    attach(model, lora("q_proj"), name="b")
    detach(model, "a")
    assert len(adapted_modules(model)) == 2
    detach(model, "b")
    restored = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert restored.keys() == linears.keys()
    assert all(restored[path] is linears[path] for path in linears)


def test_an_adapted_module_shows_the_weight_and_bias_of_its_base() -> None:
    base = nn.Linear(3, 4)
    adapted = AdaptedModule(base)
    assert adapted.weight is base.weight and adapted.bias is base.bias
    assert AdaptedModule(nn.Linear(3, 4, bias=False)).bias is None


# Seeds.


def state_after_attach(seed: int) -> dict[str, torch.Tensor]:
    model = small_llama()
    attach(model, small_smore(), seed=seed)
    return {name: value for name, value in model.state_dict().items() if ".adapters." in name}


def test_the_seed_alone_decides_the_initialisation() -> None:
    torch.manual_seed(1)
    first = state_after_attach(7)
    torch.manual_seed(2)
    torch.randn(3)
    second = state_after_attach(7)
    assert all(torch.equal(second[name], value) for name, value in first.items())
    other = state_after_attach(8)
    drawn = [name for name, value in first.items() if value.unique().numel() > 1]
    assert any(name.endswith("keys") for name in drawn)
    assert not any(torch.equal(other[name], first[name]) for name in drawn)


def test_every_site_starts_from_other_random_numbers() -> None:
    state = state_after_attach(0)
    queries = [value for name, value in state.items() if name.endswith("q_proj.adapters.default.A.0")]
    assert len(queries) == 2 and not torch.equal(*queries)


def test_attaching_leaves_the_global_random_state_alone() -> None:
    model = small_llama()
    torch.manual_seed(5)
    expected = torch.randn(4)
    torch.manual_seed(5)
    attach(model, small_smore(), seed=9)
    assert torch.equal(torch.randn(4), expected)


@pytest.mark.gpu
def test_attaching_leaves_the_random_state_of_the_gpu_alone() -> None:
    torch.cuda.manual_seed(5)
    expected = torch.randn(4, device="cuda")
    torch.cuda.manual_seed(5)
    attach(small_llama().cuda(), small_smore(), seed=9)
    assert torch.equal(torch.randn(4, device="cuda"), expected)


def test_the_logits_of_the_backbone_are_there_after_all_of_this(tiny_llama: Path) -> None:
    model, ids = llama(tiny_llama), token_ids(1, 5)
    before = logits(model, ids)
    for name in ("a", "b"):
        add_random(model, LoRAConfig(rank=2), name)
    set_active(model, "a")
    detach(model, "a")
    assert torch.equal(logits(model, ids), before)  # nothing is active now
    detach(model, "b")
    assert torch.equal(logits(model, ids), before)
