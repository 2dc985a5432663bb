"""log p(target) in chunks: the numbers of all logits at once, at the memory of one chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from smore_cli.models import chunked_loss
from smore_cli.models.chunked_loss import head_scores, scores_of
from smore_cli.models.logit_rule import LogitRule
from tests.nn.trees import rows

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

D, VOCABULARY, N = 4, 40, 23
RULES = {
    "none": LogitRule(),
    "multiply": LogitRule("multiply", 0.3),
    "divide": LogitRule("divide", 4.0),
    "cap": LogitRule("cap", 1.5),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "ROWS", {"cpu": 5})


def head_of(*, bias: bool, trains: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(D, VOCABULARY, bias=bias, dtype=torch.float64).requires_grad_(trains)


def targets_of(n: int = N) -> Tensor:
    return torch.randint(0, VOCABULARY, (n,), generator=torch.Generator().manual_seed(3))


def whole(head: nn.Linear, hidden: Tensor, rule: LogitRule) -> Tensor:
    """The same from all logits, in the words of the definition."""
    return F.log_softmax(rule(head(hidden)), -1)[torch.arange(len(hidden)), targets_of(len(hidden))]


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_scores_and_gradients_are_those_of_all_logits_at_once(rule: str, bias: bool, trains: bool) -> None:
    head = head_of(bias=bias, trains=trains)
    weights, results = torch.linspace(-1, 2, N, dtype=torch.float64), []
    for chunked in (True, False):
        hidden = rows(N, D).requires_grad_()
        found = (
            head_scores(head, hidden, targets_of(), RULES[rule]).logprobs
            if chunked
            else whole(head, hidden, RULES[rule])
        )
        wanted = [hidden, *(p for p in head.parameters() if p.requires_grad)]
        results.append([found, *torch.autograd.grad((found * weights).sum(), wanted)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_equal_finite_differences(rule: str) -> None:
    head = head_of(bias=True)
    hidden = rows(7, D).requires_grad_()
    torch.autograd.gradcheck(lambda h: head_scores(head, h, targets_of(7), RULES[rule]).logprobs, (hidden,))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_whether_the_target_is_the_best_token_is_told_where_asked(trains: bool, gradients: bool) -> None:
    head, hidden = head_of(bias=True, trains=trains), rows(N, D).requires_grad_(gradients)
    best = head(hidden).argmax(-1)
    targets = torch.where(torch.arange(N) % 3 == 0, best, targets_of())
    with torch.set_grad_enabled(gradients):
        found = head_scores(head, hidden, targets, RULES["none"], best=True)
        assert head_scores(head, hidden, targets, RULES["none"]).best is None
    assert found.best is not None and torch.equal(found.best, best == targets) and 0 < found.best.sum() < N


def test_no_target_gives_no_score() -> None:
    hidden = rows(0, D).requires_grad_()
    found = head_scores(head_of(bias=False), hidden, targets_of(0), RULES["none"], best=True)
    assert found.logprobs.shape == (0,)
    found.logprobs.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, D)


def test_very_large_logits_lose_no_digit() -> None:
    head, hidden = head_of(bias=False), rows(N, D) * 1e4
    found = head_scores(head, hidden, targets_of(), RULES["none"]).logprobs
    torch.testing.assert_close(found, whole(head, hidden, RULES["none"]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    head, hidden = head_of(bias=False).to(dtype), rows(N, D).to(dtype)
    found = head_scores(head, hidden, targets_of(), RULES["none"]).logprobs
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, scores_of(head(hidden).float(), targets_of()).logprobs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_no_tensor_has_a_row_of_the_vocabulary_for_more_than_a_chunk(trains: bool) -> None:
    head, widest = head_of(bias=True, trains=trains), 0

    class Widest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal widest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == VOCABULARY:
                widest = max(widest, len(out))
            return out

    with Widest():
        head_scores(head, rows(N, D).requires_grad_(), targets_of(), RULES["none"]).logprobs.sum().backward()
    assert widest == 5
