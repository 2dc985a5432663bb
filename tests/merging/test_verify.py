"""The measured difference against values computed by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from smore_cli.merging.verify import difference, logits_of


def test_equal_logits_do_not_differ() -> None:
    logits = [torch.randn(4, 7), torch.randn(2, 7)]
    assert difference(logits, logits).max_abs_logit == 0
    assert difference(logits, logits).mean_kl == 0
    assert difference(logits, logits).top1_agreement == 1
    assert difference(logits, logits).tokens == 6


def test_difference_of_known_distributions() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]).log()
    apart = difference([p], [q])
    assert apart.max_abs_logit == pytest.approx(math.log(2))
    assert apart.mean_kl == pytest.approx(0.25 * math.log(2) / 2)
    assert apart.top1_agreement == 0.5


def test_adding_a_constant_to_logits_changes_no_distribution() -> None:
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    assert difference([logits], [logits + 3]).mean_kl == pytest.approx(0, abs=1e-12)
    assert difference([logits], [logits + 3]).max_abs_logit == pytest.approx(3)


def test_logits_are_those_of_each_text_by_itself(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    texts = [[5, 6, 7, 8], [9, 10]]
    with torch.no_grad():
        model.eval()
        expected = [model(input_ids=torch.tensor([ids])).logits[0] for ids in texts]
    model.train()
    for logits, reference in zip(logits_of(model, texts), expected, strict=True):
        assert torch.equal(logits, reference)
