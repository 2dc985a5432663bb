"""Log-probabilities with the head at supervised places alone equal those of the full logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from smore_cli.data.batch import Row, collate
from smore_cli.errors import ModelError
from smore_cli.methods.smore import SMoREConfig
from smore_cli.models.forward import target_logits, target_logprobs
from smore_cli.nn import attach

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from smore_cli.data.batch import Batch

CHOICES = [
    Row([11, 12, 13], [[21, 22], [31], [41, 42, 43]], [[True, True], [True], [True, False, True]], gold=2),
    Row([51, 52], [[61], [71, 72]], [[True], [True, True]], gold=1),
]
PLAIN = [Row([11, 12, 13], [[21, 22]], [[True, True]]), Row([], [[61, 62, 63]], [[True, False, True]])]


@pytest.fixture
def model(tiny_llama: Path) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    attach(model, SMoREConfig(init="normal", router_dim=4, key_dim=4))
    return model


def naive(model: nn.Module, rows: list[Row]) -> Tensor:
    """One forward pass for every branch, full logits, no sharing."""
    out = []
    for row in rows:
        for branch, supervised in zip(row.branches, row.supervised, strict=True):
            ids = torch.tensor([row.prompt + branch])
            scores = F.log_softmax(model(input_ids=ids).logits[0].float(), -1)
            for t, learned in enumerate(supervised):
                place = len(row.prompt) + t
                if learned and place > 0:
                    out.append(scores[place - 1, branch[t]])
    return torch.stack(out)


def test_logits_are_those_of_the_whole_sequence_at_the_sources(model: nn.Module) -> None:
    batch = collate(CHOICES, pad_token_id=2)
    with torch.no_grad():
        inputs = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
        full = model(input_ids=batch.input_ids, **inputs).logits
        out = target_logits(model, batch)
    assert out.shape == (len(batch.sources), 512)
    torch.testing.assert_close(out, full.flatten(0, 1)[batch.sources], rtol=1e-5, atol=1e-5)


def test_flash_attention_is_refused_for_rows_with_branches(model: nn.Module) -> None:
    """It would take the dense mask (B, 1, S, S) for one of padding, and index far beyond the batch."""
    model.config._attn_implementation = "flash_attention_2"  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="flash_attention_2 cannot keep the choices of a question apart"):
        target_logits(model, collate(CHOICES, pad_token_id=2))


@pytest.mark.parametrize("rows", [CHOICES, PLAIN, CHOICES[:1], PLAIN[1:]])
def test_logprobs_and_gradients_equal_those_of_separate_rows(model: nn.Module, rows: list[Row]) -> None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    results = []
    for logprobs in (target_logprobs(model, collate(rows, pad_token_id=2)), naive(model, rows)):
        gradients = torch.autograd.grad(logprobs.sum(), trainable, allow_unused=True)
        results.append((logprobs, gradients))
    (ours, our_gradients), (plain, plain_gradients) = results
    assert ours.dtype == torch.float32 and (ours < 0).all()
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert sum(g is not None and bool(g.any()) for g in our_gradients) > 100
    for mine, other in zip(our_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


class Widths(nn.Module):
    """A head that notes how many rows it is given."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head
        self.weight = head.weight
        self.rows: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.rows.append(hidden[..., 0].numel())
        return self.head(hidden)  # type: ignore[no-any-return]


def test_the_head_runs_at_the_sources_alone_and_everywhere_again_afterwards(model: nn.Module) -> None:
    head = Widths(model.lm_head)  # type: ignore[arg-type]
    model.lm_head = head
    batch: Batch = collate(CHOICES, pad_token_id=2)
    with torch.no_grad():
        target_logits(model, batch)
        model(input_ids=batch.input_ids)
    assert head.rows == [len(batch.sources), batch.input_ids.numel()]


def test_the_head_is_free_again_after_a_failed_forward(model: nn.Module) -> None:
    batch = collate(PLAIN, pad_token_id=2)
    with pytest.raises(TypeError):
        target_logits(model, batch, no_such_argument_of_a_model=1, input_ids=None)
    with torch.no_grad():
        assert model(input_ids=batch.input_ids).logits.shape[:2] == batch.input_ids.shape


def test_a_bfloat16_model_gives_float32_logprobs(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    batch = collate(CHOICES, pad_token_id=2, mask_dtype=torch.bfloat16)
    with torch.no_grad():
        assert target_logits(model, batch).dtype == torch.bfloat16
        assert target_logprobs(model, batch).dtype == torch.float32


def test_a_model_without_an_output_embedding_is_refused(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="LlamaModel has no output embedding"):
        target_logits(model.model, collate(PLAIN, pad_token_id=2))  # type: ignore[arg-type]
