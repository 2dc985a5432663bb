"""Two-step arithmetic: short stories with small numbers, each `(a first b) second c`.

The wrong choices are the errors people make: stopping after the first step, taking the wrong operation in either step,
repeating a number of the story, or slipping by one or by ten. They are chosen so that the right answer is as often the
smallest as the largest of the four: the size of a number gives nothing away.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from smore_cli.data.quickstart.arithmetic_stories import ITEMS, NAMES, STORIES, Story
from smore_cli.data.quickstart.items import Item

__all__ = ["arithmetic_items", "solve"]

_SMALLEST, _LARGEST = 4, 60  # answers below 4 leave no room for three smaller positive choices


def solve(story: Story, a: int, b: int, c: int) -> tuple[int, int] | None:
    """The results of both steps, or None where one does not come out as a positive whole number."""
    first = _apply(story.first, a, b)
    if first is None:
        return None
    second = _apply(story.second, first, c)
    return None if second is None else (first, second)


def arithmetic_items(per_story: int, rng: random.Random) -> Iterator[Item]:
    """`per_story` instances of every story, no two with the same numbers in any order."""
    for story in STORIES:
        instances = [
            (a, b, c, *results)
            for a in range(story.a[0], story.a[1] + 1)
            for b in range(story.b[0], story.b[1] + 1)
            for c in range(story.c[0], story.c[1] + 1)
            if (results := solve(story, a, b, c)) and _SMALLEST <= results[1] <= _LARGEST and a != b
        ]
        for a, b, c, first, answer in _distinct(rng.sample(instances, len(instances)))[:per_story]:
            names = rng.sample(NAMES, 3)
            words = {"a": a, "b": b, "c": c, "name": names[0], "name2": names[1], "name3": names[2]}
            question = story.text.format(**words, items=rng.choice(ITEMS))
            wrong = _wrong(answer, _errors(story, a, b, c, first, answer), rng)
            yield Item("arithmetic", story.name, f"{a}-{b}-{c}", 0, question, str(answer), tuple(map(str, wrong)))


def _distinct(instances: Sequence[tuple[int, int, int, int, int]]) -> list[tuple[int, int, int, int, int]]:
    """The first instance of each set of three numbers: 3 + 5 - 2 and 5 + 3 - 2 are the same exercise."""
    return list({tuple(sorted(instance[:3])): instance for instance in reversed(instances)}.values())


def _apply(op: str, left: int, right: int) -> int | None:
    """One step; `~` is the subtraction the other way round (right - left)."""
    if op == "/":
        return left // right if left % right == 0 else None
    result = {"+": left + right, "-": left - right, "*": left * right, "~": right - left}[op]
    return result if result > 0 else None


def _errors(story: Story, a: int, b: int, c: int, first: int, answer: int) -> list[int]:
    """Numbers a hasty reader would answer, likeliest first, without the answer and without repeats."""
    wrong_first = [_apply(op, a, b) for op in "+-*" if op != story.first]
    found = [first]
    found += [value for op in "+-~" if op != story.second and (value := _apply(op, first, c))]
    found += [value for step in wrong_first if step and (value := _apply(story.second, step, c))]
    found += [a, b, c, answer + 1, answer - 1, answer + 10, answer - 10, answer + 2, answer - 2, answer + 3, answer - 3]
    return [value for value in dict.fromkeys(found) if 0 < value < 100 and value != answer]


def _wrong(answer: int, errors: Sequence[int], rng: random.Random) -> list[int]:
    """Three of `errors`, as many of them below the answer as a fair draw from 0..3 says."""
    smaller = [value for value in errors if value < answer]
    larger = [value for value in errors if value > answer]
    below = rng.randrange(4)
    return smaller[:below] + larger[: 3 - below]
