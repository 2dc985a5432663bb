"""What is predicted without weights is what a real pass allocates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from smore_cli.data.batch import Row, collate
from smore_cli.methods import available_methods
from smore_cli.models.forward import target_logprobs
from smore_cli.nn import AdapterContext, attach, checkpoint_contexts
from smore_cli.nn.prior_hooks import active_prior, remove_prior
from smore_cli.planning.parameters import adapter_bytes, count_parameters
from smore_cli.planning.passes import measure_pass
from smore_cli.planning.skeleton import build_skeleton
from smore_cli.planning.trace import Tracker
from smore_cli.recipe import load_recipe
from smore_cli.recipe.schema import QuantizationConfig
from tests.contract.models import default_config

LAYERS = 4
TARGETS = {"mixlora": "[q_proj, mlp]"}
RECIPE = """\
version: 1
model: {{name_or_path: {folder}}}
adapter: {{method: {method}, target_modules: {targets}}}
data: {{train: [{{path: quickstart, format: multiple_choice}}]}}
output_dir: {folder}/run
"""


@pytest.fixture(scope="module")
def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, dtype="float32",
    )  # fmt: skip


@pytest.fixture
def recipe_of(config: LlamaConfig, tmp_path: Path) -> Callable[[str], Any]:
    config.save_pretrained(tmp_path)

    def load(method: str) -> Any:
        path = tmp_path / "recipe.yaml"
        path.write_text(
            RECIPE.format(folder=tmp_path, method=method, targets=TARGETS.get(method, "[q_proj, down_proj]"))
        )
        return load_recipe(path)

    return load


def rows() -> list[Row]:
    return [Row([5] * (9 + i), [[7] * 6], [[True] * 6], group=i % 2) for i in range(4)]


def really_allocated(config: LlamaConfig, adapter: Any, *, checkpointing: bool) -> int:
    """The peak of a real pass on the CPU, storage by storage."""
    model: Any = LlamaForCausalLM(config)
    attach(model, adapter)
    prior = active_prior(model)
    numbers = torch.zeros(4, prior.num_experts) if prior is not None else None
    if prior is not None:
        remove_prior(model, "default")
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    batch = collate(rows(), pad_token_id=0)
    tracker = Tracker(None, [*model.parameters(), *model.buffers()])  # type: ignore[arg-type]
    with tracker:
        with AdapterContext.of(batch, prior=numbers) as context:
            loss = -target_logprobs(model, batch).sum()
        loss = loss + context.aux_loss().to(loss)
        context.records.clear()
        loss.backward()
    return max(segment.peak for segment in tracker.segments)


@pytest.mark.parametrize("method", ["lora", "smore", "mixlora", "trex"])
def test_a_pass_on_shapes_of_two_layers_predicts_a_real_one_of_four(
    config: LlamaConfig, recipe_of: Callable[[str], Any], method: str
) -> None:
    recipe = recipe_of(method)
    skeleton = build_skeleton(recipe, torch.float32)
    assert len(skeleton.stack) < LAYERS
    checkpointing = method in ("lora", "smore")
    found = measure_pass(skeleton, collate(rows(), pad_token_id=0), checkpointing=checkpointing)
    assert found.peak == pytest.approx(really_allocated(config, recipe.adapter, checkpointing=checkpointing), rel=0.05)


def test_counts_are_those_of_the_whole_model(config: LlamaConfig, recipe_of: Callable[[str], Any]) -> None:
    recipe = recipe_of("smore")
    skeleton = build_skeleton(recipe, torch.float32)
    model = LlamaForCausalLM(config)
    attach(model, recipe.adapter)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counts = count_parameters(skeleton, recipe.adapter)
    assert counts.trainable == trained == adapter_bytes(skeleton)["trainable"] // 4
    assert sum(counts.parts.values()) == trained and counts.parts["routers"] > 0
    assert skeleton.numel == sum(p.numel() for p in LlamaForCausalLM(config).parameters())


def test_evaluation_needs_less_and_accumulation_more(recipe_of: Callable[[str], Any]) -> None:
    skeleton, batch = build_skeleton(recipe_of("lora"), torch.float32), collate(rows(), pad_token_id=0)
    train = measure_pass(skeleton, batch)
    assert measure_pass(skeleton, batch, train=False).peak < train.peak
    assert measure_pass(skeleton, batch, accumulating=True).peak > train.peak
    assert measure_pass(skeleton, batch, checkpointing=True).activations < train.activations / 3
    assert all(parameter.grad is None for parameter in skeleton.model.parameters())


def test_an_8_bit_backbone_keeps_the_inputs_of_its_maps_and_a_4_bit_one_does_not(
    recipe_of: Callable[[str], Any],
) -> None:
    batch, recipe = collate(rows(), pad_token_id=0), recipe_of("lora")
    kept = {}
    for bits in (4, 8):
        quantised = recipe.model_copy(update={"quantization": QuantizationConfig(bits=bits)})
        kept[bits] = measure_pass(build_skeleton(quantised, torch.float32), batch).activations
    dense = measure_pass(build_skeleton(recipe, torch.float32), batch).activations
    assert kept[4] == pytest.approx(dense, rel=0.02)
    assert kept[8] > 1.05 * dense


def test_files_that_weights_are_quantised_from_stay_mapped(recipe_of: Callable[[str], Any]) -> None:
    recipe = recipe_of("lora")
    quantised = recipe.model_copy(update={"quantization": QuantizationConfig(bits=4)})
    maps = LAYERS * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 96)
    assert build_skeleton(quantised, torch.float32).files == {"loading": 4 * maps, "kept": 4 * maps}
    assert build_skeleton(recipe, torch.float32).files == {"loading": 0, "kept": 0}
    whole = build_skeleton(recipe, torch.bfloat16)
    assert whole.files == {"loading": 4 * whole.numel, "kept": 0}


@pytest.mark.parametrize("method", available_methods())
def test_active_parameters_are_the_experts_that_a_token_is_sent_to(config: LlamaConfig, method: str) -> None:
    """At most: dense gates and probability masses may use every expert, and are counted so."""
    from smore_cli.nn import adapted_modules
    from smore_cli.nn.attach import find_targets, sites_of
    from smore_cli.nn.context import RoutingTrace
    from smore_cli.nn.full_copy import FullCopy

    adapter = default_config(method)
    model = LlamaForCausalLM(config)
    sites = sites_of(model, find_targets(model, adapter.target_modules, adapter.sites))
    attach(model, adapter)
    if active_prior(model) is not None:
        remove_prior(model, "default")
    picked: dict[Any, dict[int, int]] = {}

    def observe(trace: RoutingTrace) -> None:
        used = int((trace.gates[0] != 0).any(0).sum())
        picked.setdefault(trace.owner, {})[trace.level] = used

    ids = torch.tensor([[3]])
    prior = torch.zeros(1, adapter.build_prior(model).num_experts) if adapter.build_prior(model) else None
    with torch.no_grad(), AdapterContext(observe=observe, aux=False, prior=prior):
        model.eval()(input_ids=ids, use_cache=False)
    for path, module in adapted_modules(model).items():
        part = module.adapter("default")
        assert not isinstance(part, FullCopy)
        used = 0
        for name, parameter in part.named_parameters():
            level, axis = part.expert_axes.get(name, (None, 0))
            experts = parameter.numel() if level is None else _share(part, parameter, axis, picked[part][level], level)
            used += experts
        assert used <= adapter.num_active_parameters(sites[path]) <= adapter.num_parameters(sites[path])
        if method in ("mola", "goat", "moelora", "mor", "mixlora", "lora"):
            assert used == adapter.num_active_parameters(sites[path])


def _share(part: Any, parameter: torch.Tensor, axis: int, picked: int, level: int) -> int:
    """Numbers of a tensor that belong to the picked experts of a level."""
    router = part.router
    counts = router.num_experts
    total = counts[level] if isinstance(counts, list | tuple) else counts
    return parameter.numel() * picked // total
