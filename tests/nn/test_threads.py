"""Small operations run on one thread, and the threads come back whatever happens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from smore_cli.nn.threads import SMALL, all_threads, one_thread
from tests.nn.trees import random_tree, rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_small_tensors_get_one_thread_and_large_ones_all() -> None:
    for numbers, threads in ((SMALL - 1, 1), (SMALL, 2)):
        with one_thread(torch.empty(numbers)):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 2


def test_many_tensors_are_as_small_as_they_are_on_average() -> None:
    for numbers, threads in (([SMALL, SMALL - 2], 1), ([SMALL, SMALL], 2)):
        with one_thread(*map(torch.empty, numbers)):
            assert torch.get_num_threads() == threads
            assert all_threads() == 2


def test_an_error_inside_gives_the_threads_back() -> None:
    with pytest.raises(ZeroDivisionError), one_thread(torch.empty(1)):
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2


def test_a_trees_core_runs_on_one_thread_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    tree, seen = random_tree(rank=[2, 3], num_experts=[4, 4], fanout=[2, 2]), list[int]()
    core = tree.core

    def watched(latent: Tensor, again: object = None) -> object:
        seen.append(torch.get_num_threads())
        return core(latent, again)  # type: ignore[arg-type]

    monkeypatch.setattr(tree, "core", watched)
    tree(rows(7, 6).requires_grad_(), rows(7, 5)).sum().backward()
    assert seen == [1, 1]
    assert torch.get_num_threads() == 2
