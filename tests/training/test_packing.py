"""Packed training is unpacked training: the same losses and gradients, whatever shares a line with what."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from smore_cli.data.batch import Row, collate, collate_packs
from smore_cli.errors import ModelError
from smore_cli.methods import MethodConfig, load_method
from smore_cli.models import document_attention
from smore_cli.models.document_attention import attend_by_document
from smore_cli.models.forward import target_logits
from smore_cli.nn import checkpoint_contexts
from smore_cli.nn.prior_hooks import active_prior
from smore_cli.training.objective import Objective
from smore_cli.training.packing_probe import prepare_packing
from smore_cli.training.step import StepResult, accumulate_gradients
from tests.nn.models import adapter_gradients, add_random

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smore_cli.data.batch import Batch

PAD, VOCABULARY, WINDOW = 0, 64, 4
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
}
_LEARNED: dict[str, Any] = {"n_positions": 16, "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4}
_DRY: dict[str, Any] = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES),
    "mistral": MistralConfig(**_SIZES, sliding_window=WINDOW),
    "gemma3": Gemma3TextConfig(
        **_SIZES, head_dim=8, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    # Learned positions, fewer than a line of packed rows has places, and no more than the longest row.
    "gpt2": GPT2Config(
        **_LEARNED, **_DRY, vocab_size=VOCABULARY, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "smore": {"router_dim": 4, "key_dim": 4, "rank": [2, 2]},
    "trex": {"num_down": 2, "num_up": 3, "on_missing_prior": "error"},
    "loramoe": {"num_experts": 4, "rank": 2, "dropout": 0.0},
    "dynmole": {"num_experts": 4, "rank": 2, "dropout": 0.0},
    "moelora": {"num_experts": 4, "rank": 2, "dropout": 0.0},
    "mixlora": {"num_experts": 4, "rank": 2, "dropout": 0.0, "router": "switch", "capacity": 3, "jitter": 0.0},
}
"""The last five have something that belongs to a sequence: a prior, a group, sums, contrasts, queues."""
LENGTHS = [(5, 4), (1, 2), (9, 3), (0, 7), (3, 13), (2, 6), (4, 1)]


def rows() -> list[Row]:
    """Rows of 3 to 16 tokens, of two groups, not all of whose answers are learned."""
    made, generator = [], torch.Generator().manual_seed(0)
    for number, (prompt, answer) in enumerate(LENGTHS):
        ids = torch.randint(3, VOCABULARY, (prompt + answer,), generator=generator).tolist()
        learned = [number % 3 > 0 or place % 2 == 0 for place in range(answer)]
        made.append(Row(ids[:prompt], [ids[prompt:]], [learned], group=number % 2))
    return made


@functools.cache
def backbone(name: str, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        copy.deepcopy(CONFIGS[name]), attn_implementation=attention
    )
    return model.requires_grad_(False).eval()


def adapted(name: str, method: str, attention: str = "sdpa") -> nn.Module:
    config: MethodConfig = load_method(method)(**METHODS[method])
    model = add_random(copy.deepcopy(backbone(name, attention)), config).train()
    if name in ("llama", "gpt2") and attention == "sdpa":  # elsewhere a softmax or a mask is made for float32 alone
        model.double()
    for path, module in list(model.named_modules()):  # that of transformers computes in float32, whatever it is given
        if type(module).__name__ == "LlamaRMSNorm":
            norm = nn.RMSNorm(module.weight.shape, eps=1e-6).requires_grad_(False)
            norm.weight = module.weight
            model.set_submodule(path, norm)
    if (prior := active_prior(model)) is not None:
        spread = torch.randint(3, VOCABULARY, (6, 5), generator=torch.Generator().manual_seed(1)).tolist()
        prior.centroids = prior.embedder(model, spread)
    return model


def step(model: nn.Module, batches: Sequence[Batch], *, ranking: bool = False) -> tuple[StepResult, dict[str, Tensor]]:
    found = accumulate_gradients(
        model, batches, Objective(ranking, 0.1), device=torch.device("cpu"), backward=Tensor.backward
    )
    return found, adapter_gradients(model)


def require_same(own: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compares gradients tensor by tensor; what nearly cancels out is compared with the whole."""
    assert own.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    tolerance = 1e-6 if whole.dtype == torch.float64 else 1e-4
    for name, gradient in expected.items():
        assert (own[name] - gradient).norm() <= tolerance * (gradient.norm() + whole), name


def packs_of(numbers: Sequence[Sequence[int]], **options: Any) -> Batch:
    made = rows()
    return collate_packs([[made[i] for i in pack] for pack in numbers], pad_token_id=PAD, **options)


def unpacked() -> list[Batch]:
    return [collate(rows()[:4], pad_token_id=PAD), collate(rows()[4:], pad_token_id=PAD)]


LAYOUTS = {
    "one pass": lambda: [packs_of([[4, 0, 1], [2, 3], [5, 6]])],
    "two passes": lambda: [packs_of([[0, 6, 2], [1, 3]]), packs_of([[4, 5]])],
    "one line": lambda: [packs_of([[4, 0, 1], [2, 3], [5, 6]], flat=True)],
}
CASES = [("llama", method, "sdpa") for method in METHODS] + [
    ("llama", "trex", "eager"),
    ("gemma3", "lora", "sdpa"),
    ("gemma3", "trex", "eager"),
    ("mistral", "loramoe", "sdpa"),
    ("gpt2", "lora", "eager"),
    ("gpt2", "smore", "sdpa"),
]


@pytest.mark.parametrize(("name", "method", "attention"), CASES)
def test_packing_changes_neither_losses_nor_gradients(name: str, method: str, attention: str) -> None:
    model = adapted(name, method, attention)
    expected, gradients = step(model, unpacked())
    assert gradients and all(gradient.isfinite().all() for gradient in gradients.values())
    assert (expected.aux > 0) == (method not in ("lora", "trex"))
    for layout, make in LAYOUTS.items():
        found, own = step(model, make())
        assert (found.counts, found.tokens) == (expected.counts, expected.tokens), layout
        for part in ("loss", "nll", "aux"):
            torch.testing.assert_close(getattr(found, part), getattr(expected, part), rtol=1e-5, atol=1e-9)
        require_same(own, gradients)


@pytest.fixture
def documents(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many documents every packed attention had."""
    found: list[int] = []
    attend = document_attention.document_attention

    def counted(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:
        if mask is not None and mask.dtype == torch.long:
            found.append(mask.numel())
        return attend(module, query, key, value, mask, **options)

    monkeypatch.setattr(document_attention, "document_attention", counted)
    return found


@pytest.mark.parametrize(
    ("name", "method"), [("llama", "lora"), ("llama", "dynmole"), ("llama", "trex"), ("gpt2", "smore")]
)
def test_attention_document_by_document_changes_neither_losses_nor_gradients(
    name: str, method: str, documents: list[int]
) -> None:
    model: Any = adapted(name, method)
    expected, gradients = step(model, unpacked())
    assert attend_by_document(model)
    for again in (False, True):
        if again:
            model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
        for layout, make in LAYOUTS.items():
            documents.clear()
            batches = make()
            found, own = step(model, batches)
            assert set(documents) == {int((batch.position_ids == 0).sum()) for batch in batches}, layout
            torch.testing.assert_close((found.loss, found.aux), (expected.loss, expected.aux), rtol=1e-5, atol=1e-9)
            require_same(own, gradients)
    documents.clear()
    found, own = step(model, unpacked())  # padded rows, as "sdpa" has them
    assert not documents
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-9, atol=0)
    require_same(own, gradients)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_document_longer_than_the_models_window_has_a_mask(name: str, documents: list[int]) -> None:
    model = copy.deepcopy(backbone(name, "sdpa"))
    long, short = packs_of([[4, 0, 1], [2, 3]]), packs_of([[1], [1]])
    expected = [logits(model, batch) for batch in (long, short)]
    assert attend_by_document(model)
    torch.testing.assert_close(logits(model, long), expected[0], rtol=0, atol=0)
    assert not documents
    torch.testing.assert_close(logits(model, short), expected[1], rtol=1e-4, atol=1e-5)
    assert documents == [2, 2]


@pytest.mark.parametrize(("name", "method"), [("gemma3", "trex"), ("llama", "loramoe")])
def test_packing_changes_nothing_where_activations_are_recomputed(name: str, method: str) -> None:
    model = adapted(name, method)
    _, gradients = step(model, unpacked())
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})  # type: ignore[operator]
    _, own = step(model, LAYOUTS["two passes"]())
    require_same(own, gradients)


@pytest.mark.parametrize("method", ["lora", "trex"])
def test_questions_with_several_choices_can_be_packed(method: str) -> None:
    made, generator = [], torch.Generator().manual_seed(3)
    for prompt, choices in ((4, (2, 3)), (6, (1, 4, 2)), (3, (3, 3)), (5, (2, 1))):
        ids = torch.randint(3, VOCABULARY, (40,), generator=generator).tolist()
        branches = [ids[10 * (j + 1) :][:length] for j, length in enumerate(choices)]
        made.append(Row(ids[:prompt], branches, [[True] * length for length in choices], gold=1))
    model = adapted("llama", method)
    kind = {"pad_token_id": PAD, "mask_dtype": torch.float64}
    expected, gradients = step(model, [collate(made, **kind)], ranking=True)
    assert expected.counts.questions == 4
    for packs in ([made[:2], made[2:]], [[made[3], made[0], made[1]], [made[2]]]):
        found, own = step(model, [collate_packs(packs, **kind)], ranking=True)
        torch.testing.assert_close((found.loss, found.correct), (expected.loss, expected.correct), rtol=1e-6, atol=1e-9)
        require_same(own, gradients)


# What would be wrong.


def logits(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return target_logits(model, batch)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_document_sees_nothing_of_the_one_before_it(name: str) -> None:
    model, (first, second) = backbone(name, "sdpa"), (rows()[4], rows()[3])
    other = replace(first, branches=[[token % 60 + 4 for token in reversed(first.branches[0])]])
    silent = [replace(row, supervised=[[False] * len(row.branches[0])]) for row in (first, other)]
    one, two = (collate_packs([[row, second]], pad_token_id=PAD) for row in silent)
    assert torch.equal(logits(model, one), logits(model, two))
    alone = logits(model, collate([second], pad_token_id=PAD))
    torch.testing.assert_close(logits(model, one), alone, rtol=1e-4, atol=1e-4)
    # Either mistake shows: positions that run on, and a mask that hides padding alone.
    running = replace(one, position_ids=torch.arange(one.input_ids.shape[1]).remainder(16)[None])
    masked = replace(one, attention_mask=one.token_mask.long())
    for wrong in (replace(running, attention_mask=one.token_mask.long()), masked):
        assert (logits(model, wrong) - alone).abs().max() > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_the_probe_lets_backbones_pass_that_keep_documents_apart(name: str) -> None:
    for branched in (False, True):
        prepare_packing(
            copy.deepcopy(backbone(name, "sdpa")), torch.device("cpu"), branched=branched, flat=not branched
        )


def test_the_probe_refuses_a_backbone_with_a_running_state() -> None:
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ModelError, match="MambaForCausalLM does not keep packed documents apart"):
        prepare_packing(model, torch.device("cpu"))
    with pytest.raises(ModelError, match="MambaForCausalLM cannot be called with packed rows"):
        prepare_packing(model, torch.device("cpu"), branched=True)


def test_a_model_attends_by_document_where_that_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention_of(name: str, attention: str, **options: Any) -> str:
        model = copy.deepcopy(backbone(name, attention))
        prepare_packing(model, torch.device("cpu"), **options)
        return str(model.config._attn_implementation)

    assert attention_of("llama", "sdpa") == attention_of("gpt2", "sdpa", flat=True) == document_attention.NAME
    assert attention_of("llama", "eager") == "eager"
    assert attention_of("llama", "sdpa", branched=True) == "sdpa"
    attend = document_attention.document_attention

    def blind(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        if mask is not None and mask.dtype == torch.long:
            mask = mask[..., :1]
        return attend(module, query, key, value, mask, **options)

    monkeypatch.setattr(document_attention, "document_attention", blind)
    assert attention_of("llama", "sdpa", flat=True) == "sdpa"


def test_the_probe_refuses_a_wrong_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(backbone("llama", "sdpa"))
    forward = model.forward
    model.forward = lambda **inputs: forward(**inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])})  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="does not keep packed documents apart: another one before it moved"):
        prepare_packing(model, torch.device("cpu"))
