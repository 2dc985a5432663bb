"""Generated answers in batches of prompts of like length, each kept as it comes.

How one batch is generated is HFLM's matter: padded on the left, greedy where the task says so, with a cache of keys and
values, until every answer has reached a stop sequence. So a batch is as long as its longest answer; small batches of
questions that are alike waste least.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from smore_cli.evaluation.journal import Journal

__all__ = ["generate_in_batches"]


def generate_in_batches(
    requests: Sequence[Any],
    answer: Callable[[list[Any]], list[str]],
    batch_size: int,
    journal: Journal,
    on_progress: Callable[[int, int], None],
) -> list[str]:
    """Returns the generated text of every request, in order.

    Args:
        requests: lm-eval's instances, whose arguments are a prompt and the settings of generation.
        answer: generates the answers of one batch, all with the same settings.
        batch_size: requests a batch.
        journal: where answers are kept, and taken from, batch by batch.
        on_progress: called with the number of requests done and the number in all.
    """
    answers: dict[int, str] = {}
    for members in _batches(requests, batch_size):
        batch = [requests[i] for i in members]
        key = journal.key([list(request.args) for request in batch])
        found = journal.recall(key)
        if found is None:
            found = answer(batch)
            journal.keep(key, found)
        answers.update(zip(members, found, strict=True))
        on_progress(len(answers), len(requests))
    return [answers[i] for i in range(len(requests))]


def _batches(requests: Sequence[Any], size: int) -> Iterator[list[int]]:
    """Yields the requests of each batch by index: the same settings, long prompts first."""
    groups: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
    for members in groups.values():
        ordered = sorted(members, key=lambda i: -len(requests[i].args[0]))
        yield from (ordered[start : start + size] for start in range(0, len(ordered), size))
