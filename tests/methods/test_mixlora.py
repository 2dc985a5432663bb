"""MixLoRA: where it sits, what it refuses, what it computes in a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from smore_cli.errors import AdapterError
from smore_cli.methods import Site, config_from_dict
from smore_cli.methods.lora import LoRAConfig
from smore_cli.methods.mixlora import MixLoRAConfig
from smore_cli.nn import AdapterContext, adapted_modules, attach
from smore_cli.nn.attach import find_targets, sites_of
from smore_cli.nn.gated_mlp import GatedExperts
from smore_cli.nn.low_rank import LowRank
from tests.nn.models import adapter_gradients, add_random, llama, logits, token_ids

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

SMALL: dict[str, Any] = {"num_experts": 4, "rank": 2, "dropout": 0.0}
ROUTERS: dict[str, dict[str, Any]] = {
    "top_k": {},
    "top_k as it is": {"renormalise": False},
    "top_p": {"router": "top_p"},
    "top_p renormalised": {"router": "top_p", "renormalise": True, "temperature": 2.0},
    "switch": {"router": "switch", "capacity": 3},
}


@pytest.fixture(params=ROUTERS)
def config(request: pytest.FixtureRequest) -> MixLoRAConfig:
    return MixLoRAConfig(**SMALL, **ROUTERS[request.param])


def site(kind: Any = "gated_mlp", d: int = 12, hidden: int = 20) -> Site:
    return Site("site", d, d if kind == "gated_mlp" else 9, kind, hidden=hidden if kind == "gated_mlp" else 0)


# Where it sits.


def test_targets_without_a_gated_mlp_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(AdapterError, match="names no gated MLP, so there is nothing to mix"):
        attach(llama(tiny_llama), MixLoRAConfig(target_modules=["q_proj", "v_proj"]))


def test_llama_2_7b_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32000,
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
            )
        )
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    config = MixLoRAConfig()
    sites = sites_of(model, find_targets(model, config.target_modules, config.sites))
    assert [each.kind for each in sites.values()].count("gated_mlp") == 32 and len(sites) == 32 * 5
    assert sum(config.num_parameters(each) for each in sites.values()) == 203_423_744


@pytest.mark.parametrize("kind", ["linear", "gated_mlp"])
def test_the_parameter_formula_counts_the_parameters(kind: str) -> None:
    config = MixLoRAConfig(num_experts=3, rank=5)
    built = config.build(site(kind))
    assert type(built) is (GatedExperts if kind == "gated_mlp" else LowRank)
    assert config.num_parameters(site(kind)) == sum(p.numel() for p in built.parameters())


def test_all_linear_is_every_mlp_as_a_whole_and_lora_elsewhere(tiny_llama: Path) -> None:
    model = llama(tiny_llama)
    attach(model, MixLoRAConfig(**SMALL))
    kinds = {path.rsplit(".", 1)[1]: type(module.adapter("default")) for path, module in adapted_modules(model).items()}
    assert kinds == {"q_proj": LowRank, "k_proj": LowRank, "v_proj": LowRank, "o_proj": LowRank, "mlp": GatedExperts}
    only = llama(tiny_llama)
    assert attach(only, MixLoRAConfig(**SMALL, target_modules=["mlp"])) == [f"model.layers.{i}.mlp" for i in range(2)]


def test_a_mixture_around_maps_that_another_adapter_wraps_leaves_them_plain(tiny_llama: Path) -> None:
    config, ids = MixLoRAConfig(**SMALL), token_ids(2, 7)
    alone = logits(add_random(llama(tiny_llama), config), ids)
    model = add_random(llama(tiny_llama), LoRAConfig(rank=2), "lora")
    assert torch.equal(logits(add_random(model, config), ids), alone)


def test_part_of_an_mlp_and_the_whole_of_it_cannot_both_be_adapted(tiny_llama: Path) -> None:
    with pytest.raises(AdapterError, match="part of a gated MLP that is adapted as a whole"):
        attach(llama(tiny_llama), MixLoRAConfig(**SMALL, target_modules=["mlp", "up_proj"]))


# What it refuses.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 9}, "top_k: 9 experts cannot be picked from 8"),
        ({"router": "top_p", "top_k": 3}, "top_k: only router top_k has it, and the router is top_p"),
        ({"top_p": 0.5}, "top_p: only router top_p has it, and the router is top_k"),
        ({"router": "top_p", "capacity": 8}, "capacity: only router switch has it"),
        ({"jitter": 0.0}, "jitter: only router switch has it"),
        ({"z_loss_coefficient": 0.0}, "z_loss_coefficient: only router switch has it"),
        ({"router": "switch", "renormalise": True}, "renormalise: a single expert's weight would always be 1"),
        ({"top_k": 1}, "renormalise: a single expert's weight would always be 1"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MixLoRAConfig(**fields)


def test_settings_survive_the_trip_through_a_dictionary(config: MixLoRAConfig) -> None:
    assert config_from_dict(config.model_dump()) == config
    MixLoRAConfig(top_k=1, renormalise=False)
    MixLoRAConfig(top_k=1, num_experts=1)


def test_settings_reach_what_they_set() -> None:
    def built(**fields: Any) -> Any:
        return MixLoRAConfig(**fields).build(site())

    switch = built(router="switch", capacity=5, jitter=0.2, z_loss_coefficient=0.3, aux_loss_coefficient=0.0)
    assert (switch.router.capacity, switch.router.jitter, switch.picks) == (5, 0.2, 1)
    assert [loss.coefficient for loss in switch.losses] == [0.3]
    assert built(router="switch", capacity=0).router.capacity is None
    plain = built(alpha=8.0, rank=4, dropout=0.1, temperature=3.0)
    assert (plain.scale, plain.dropout, plain.router.temperature, plain.picks) == (2.0, 0.1, 3.0, 2)
    assert (plain.router.capacity, plain.router.jitter) == (None, 0.0)
    assert [loss.coefficient for loss in plain.losses] == [1e-3]
    assert plain.router.select.renormalise and not built(router="top_p").router.select.renormalise
    assert built(router="top_p", top_p=0.4).router.select.p == 0.4 and built(router="top_p").picks is None


def test_the_router_starts_with_the_papers_deviation() -> None:
    weight = MixLoRAConfig().build(site(d=4096, hidden=8)).get_parameter("router.weight")
    assert weight.std().item() == pytest.approx(0.02, rel=0.02) and abs(weight.mean().item()) < 5e-4


# What it computes.


def test_a_fresh_adapter_gives_exactly_the_backbones_logits(tiny_llama: Path, config: MixLoRAConfig) -> None:
    for training in (False, True):
        model, ids = llama(tiny_llama).train(training), token_ids(2, 7)
        before = logits(model, ids)
        attach(model, config)
        assert torch.equal(logits(model, ids), before)


def test_two_passes_in_evaluation_are_identical(tiny_llama: Path, config: MixLoRAConfig) -> None:
    model, ids = add_random(llama(tiny_llama), config.model_copy(update={"dropout": 0.5})), token_ids(2, 7)
    assert torch.equal(logits(model, ids), logits(model, ids))
    training = model.train()
    assert not torch.equal(logits(training, ids), logits(training, ids))


def test_padding_changes_neither_real_tokens_nor_the_losses(tiny_llama: Path, config: MixLoRAConfig) -> None:
    """In training mode, where a capacity counts tokens; without the jitter, which differs from token to token."""
    if config.router == "switch":
        config = config.model_copy(update={"jitter": 0.0})
    model = add_random(llama(tiny_llama), config).double().train()
    row = token_ids(1, 9)[0].tolist()
    found = []
    for before, after in ((0, 0), (4, 0), (0, 4)):
        ids = torch.tensor([[9] * before + row + [9] * after])
        mask = torch.tensor([[0] * before + [1] * len(row) + [0] * after])
        positions = torch.tensor([[0] * before + list(range(len(row))) + [0] * after])
        with AdapterContext(token_mask=mask) as context:
            out = logits(model, ids, attention_mask=mask, position_ids=positions)
        found.append((out[0, before : before + len(row)], context.aux_loss()))
    assert found[0][1] > 0
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-6)


def test_decoding_with_a_cache_equals_full_passes(tiny_llama: Path, config: MixLoRAConfig) -> None:
    model, ids = add_random(llama(tiny_llama), config).double(), token_ids(2, 9)
    with torch.no_grad():
        out = model(input_ids=ids[:, :5], use_cache=True)
        for step in range(5, 9):
            out = model(input_ids=ids[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
            expected = logits(model, ids[:, : step + 1])[:, -1]
            torch.testing.assert_close(out.logits[:, -1], expected, rtol=1e-6, atol=1e-6)


def test_a_4_bit_backbone_starts_as_it_was_and_trains(tiny_llama: Path, config: MixLoRAConfig) -> None:
    from smore_cli.models.load import load_backbone
    from smore_cli.recipe.schema import ModelConfig, QuantizationConfig

    model: nn.Module = load_backbone(
        ModelConfig(name_or_path=str(tiny_llama)), QuantizationConfig(), torch.device("cpu")
    ).model
    ids = token_ids(2, 7)
    before = logits(model, ids)
    attach(model, config)
    assert torch.equal(logits(model, ids), before)
    with AdapterContext(token_mask=torch.ones(2, 7)) as context:
        loss = model.train()(input_ids=ids, labels=ids).loss
    (loss + context.aux_loss()).backward()
    gradients = adapter_gradients(model)
    assert all(g.isfinite().all() for g in gradients.values())
    assert all(
        gradients[f"model.layers.{i}.mlp.adapters.default.{name}_B"].any()
        for i in (0, 1)
        for name in ("gate", "up", "down")
    )
