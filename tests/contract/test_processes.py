"""A step shared by two processes is the step of one, for every method; they are threads here, each with its own model.

What real processes add (gloo, sharding, signals) does not depend on the method: `tests/training/test_parallel.py`.
"""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import torch

from smore_cli.data.batch import collate
from smore_cli.training.objective import Objective
from smore_cli.training.parallel import ALONE, Processes
from smore_cli.training.step import StepResult, accumulate_gradients
from tests.contract.models import PAD, VARIANTS, Case, assert_same, cases, gradients, logits, rows, token_ids

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor, nn

    from smore_cli.data.batch import Row

T = TypeVar("T")
ON_ONE_ARCHITECTURE = [
    name for name, case in cases() if case.architecture == "llama" or name.removesuffix("-gpt2") in VARIANTS
]


class Exchange:
    """Where two threads lay down what the other takes."""

    def __init__(self) -> None:
        self.barrier, self.slots = threading.Barrier(2, timeout=60), [None, None]


class Half(Processes):
    """One of two threads."""

    def __init__(self, rank: int, exchange: Exchange) -> None:
        super().__init__(rank, 2)
        self.exchange = exchange

    def both(self, value: T) -> list[T]:
        slots: list[Any] = self.exchange.slots
        slots[self.rank] = value
        self.exchange.barrier.wait()
        found = list(slots)
        self.exchange.barrier.wait()
        return found

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        return self.both(list(values))

    def from_main(self, value: T) -> T:
        return self.both(value)[0]

    def sum_tensors(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [a + b for a, b in zip(*self.both(list(tensors)), strict=True)]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        none = [None if parameter.grad is None else parameter.grad.clone() for parameter in trained]
        for parameter, *parts in zip(trained, *self.both(none), strict=True):
            found = [part for part in parts if part is not None]
            parameter.grad = torch.stack(found).sum(0) if found else None


def step(
    model: nn.Module, splits: Sequence[Sequence[Row]], processes: Processes
) -> tuple[StepResult, dict[str, Tensor]]:
    result = accumulate_gradients(
        model,
        [collate(part, pad_token_id=PAD) for part in splits],
        Objective(ranking=False, completion_weight=0.0),
        device=torch.device("cpu"),
        backward=torch.Tensor.backward,
        processes=processes,
    )
    return result, gradients(model)


@pytest.mark.parametrize("case", ON_ONE_ARCHITECTURE, indirect=True)
def test_two_processes_give_the_gradient_losses_and_loads_of_one(case: Case) -> None:
    model, data = case.random(torch.float64, **case.without_dropout), rows(5)
    model.train()
    ids = token_ids(2, 7)
    model.train(torch.equal(logits(model, ids), logits(model, ids)))  # noise would differ from process to process
    # First alone: a prior then knows the scores of all rows, which it computes in float32, batch by batch.
    whole, expected = step(model, [data], ALONE)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    model.zero_grad()
    models = [model, copy.deepcopy(model)]
    passes = [data[:2], data[2:4], data[4:]]  # dealt out: the second process has one pass less
    exchange = Exchange()
    with ThreadPoolExecutor(2) as pool:
        halves = [pool.submit(step, models[rank], passes[rank::2], Half(rank, exchange)) for rank in (0, 1)]
        found = [half.result() for half in halves]
    for result, gradient in found:
        assert_same(gradient, expected, 1e-9)
        torch.testing.assert_close(result.loss, whole.loss)
        torch.testing.assert_close(result.aux, whole.aux)
        assert (result.counts, result.tokens) == (whole.counts, whole.tokens)
    of_one = sum_of_loads([whole])
    torch.testing.assert_close(sum_of_loads([result for result, _ in found]), of_one)


def sum_of_loads(results: Sequence[StepResult]) -> Tensor:
    """How many picks and how many decisions there were, over all routers."""
    loads = [
        torch.stack([each.load.sum().double(), each.decisions.double().sum()]) for r in results for each in r.loads
    ]
    return torch.stack(loads).sum(0) if loads else torch.zeros(2)
