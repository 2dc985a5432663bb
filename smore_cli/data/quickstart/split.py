"""What counts as a near-duplicate, and how questions are dealt to the two files.

Two questions are near-duplicates when any of these holds:

1. the same normalised question: equal after lower-casing and dropping all but letters and digits;
2. the same material: the same fact (science), the same story with the same three numbers in any order (arithmetic),
   the same source value (reformat), the same hand-written sentence (labelling), whatever the wording or the choices;
3. much the same words: the sets of normalised words of question and right answer together have a Jaccard similarity
   above 0.85 (shared / all).

No test row has a near-duplicate in training, and no normalised question stands twice anywhere.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeVar

from smore_cli.data.quickstart.items import Item, normalised

__all__ = ["MAX_SIMILARITY", "deal", "similarity"]

T = TypeVar("T")

MAX_SIMILARITY = 0.85
_LARGEST_TEST_SHARE = 0.4  # of the materials of one kind, so that training sees most of each


def deal(items: Iterable[Item], train: int, test: int, rng: random.Random) -> tuple[list[Item], list[Item]]:
    """Deals one family's questions to training and test.

    Test questions come evenly from every kind and each from a material of its own; training takes every other material
    once, then again in a second wording, until it is full.

    Raises:
        ValueError: the material does not suffice.
    """
    materials: dict[tuple[str, str, str], list[Item]] = defaultdict(list)
    for item in items:
        materials[item.key].append(item)
    keys = rng.sample(list(materials), len(materials))
    test_keys = _test_keys(keys, test)
    test_items = [rng.choice(materials[key]) for key in test_keys]
    held_out = set(test_keys)
    candidates = _by_turns([rng.sample(materials[key], len(materials[key])) for key in keys if key not in held_out])
    train_items = _without_near_duplicates(candidates, test_items)[:train]
    if len(train_items) < train:
        raise ValueError(f"{len(train_items)} training questions can be made of this material, {train} are wanted")
    return train_items, test_items


def similarity(a: set[str], b: set[str]) -> float:
    """The Jaccard similarity of two sets of words."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def _test_keys(keys: Sequence[tuple[str, str, str]], count: int) -> list[tuple[str, str, str]]:
    """`count` keys, taken from the kinds in turn, at most `_LARGEST_TEST_SHARE` of a kind."""
    kinds: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for key in keys:
        kinds[key[1]].append(key)
    chosen = _by_turns([of_kind[: int(len(of_kind) * _LARGEST_TEST_SHARE)] for of_kind in kinds.values()])[:count]
    if len(chosen) < count:
        raise ValueError(f"{len(chosen)} test questions can be made of this material, {count} are wanted")
    return chosen


def _by_turns(groups: Sequence[Sequence[T]]) -> list[T]:
    """The first of every group, then the second of every group, and so on."""
    longest = max(map(len, groups), default=0)
    return [group[turn] for turn in range(longest) for group in groups if turn < len(group)]


def _words(item: Item) -> set[str]:
    return set(normalised(f"{item.question} {item.answer}").split())


def _without_near_duplicates(candidates: Sequence[Item], test_items: Sequence[Item]) -> list[Item]:
    """Candidates that are no near-duplicate of a test question and repeat no question."""
    seen = {normalised(item.question) for item in test_items}
    test_words = [_words(item) for item in test_items]
    kept = []
    for item in candidates:
        question, words = normalised(item.question), _words(item)
        if question not in seen and all(similarity(words, other) <= MAX_SIMILARITY for other in test_words):
            seen.add(question)
            kept.append(item)
    return kept
