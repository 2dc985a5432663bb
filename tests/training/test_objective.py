"""Both objectives against their equations, computed the slow way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from smore_cli.data.batch import Row, collate
from smore_cli.training.objective import Counts, Objective

ROWS = [
    Row([5, 6, 7], [[8, 9], [10], [11, 12, 13]], [[True, True], [True], [True, True, True]], gold=1),
    Row([20, 21], [[22], [23, 24]], [[True], [True, True]], gold=0),
]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64).eval()


def branch_logprobs(model: nn.Module, prompt: list[int], branch: list[int]) -> Tensor:
    ids = torch.tensor([prompt + branch])
    logprobs = torch.log_softmax(model(input_ids=ids).logits[0], -1)
    return torch.stack([logprobs[len(prompt) + t - 1, token] for t, token in enumerate(branch)])


def test_choice_ranking_is_its_equation(model: nn.Module) -> None:
    ranking, nll, tokens = torch.zeros((), dtype=torch.float64), 0.0, 0
    correct = 0
    for row in ROWS:
        scores = torch.stack([branch_logprobs(model, row.prompt, branch).mean() for branch in row.branches])
        ranking = ranking - torch.log_softmax(scores, 0)[row.gold]
        correct += int(scores.argmax()) == row.gold
        nll = nll - branch_logprobs(model, row.prompt, row.branches[row.gold]).sum()
        tokens += len(row.branches[row.gold])
    batch = collate(ROWS, pad_token_id=2, mask_dtype=torch.float64)
    counts = Counts.of([batch])
    assert counts == Counts(tokens=tokens, questions=2)
    share = Objective(ranking=True, completion_weight=0.3)(model, batch, counts)
    # log-probabilities are float32 from the logits on
    torch.testing.assert_close(share.loss.double(), ranking / 2 + 0.3 * nll / tokens, rtol=1e-5, atol=1e-5)
    assert int(share.correct) == correct


def test_completion_is_the_mean_over_supervised_tokens(model: nn.Module) -> None:
    rows = [Row([5, 6, 7], [[8, 9, 3]], [[True, True, False]]), Row([], [[20, 21, 22]], [[True, True, True]])]
    batch = collate(rows, pad_token_id=2)
    expected = -(branch_logprobs(model, [5, 6, 7], [8, 9]).sum() + branch_logprobs(model, [20], [21, 22]).sum()) / 4
    share = Objective(ranking=False, completion_weight=0.1)(model, batch, Counts.of([batch]))
    torch.testing.assert_close(share.loss.double(), expected, rtol=1e-5, atol=1e-5)


def test_questions_with_fewer_choices_do_not_borrow(model: nn.Module) -> None:
    """A question's loss is the same beside one with more choices as alone."""
    objective, one = Objective(ranking=True, completion_weight=0.0), Counts(1, 1)
    both = objective(model, collate(ROWS, pad_token_id=2, mask_dtype=torch.float64), one).loss
    alone = [objective(model, collate([row], pad_token_id=2, mask_dtype=torch.float64), one).loss for row in ROWS]
    torch.testing.assert_close(both, alone[0] + alone[1], rtol=1e-5, atol=1e-6)
