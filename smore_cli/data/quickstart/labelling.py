"""Labelling short texts with the words of a made-up office: which desk, which mood, which page.

The label words are the project's own (a complaint about a bill goes to `ledger`), so an untrained model can only guess,
and a trained one has to learn what each word stands for. Every text is one hand-written sentence, its material, with an
optional opening and close; a sentence never stands in both files.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from smore_cli.data.quickstart.items import Item

__all__ = ["Task", "labelling_items"]


@dataclass(frozen=True)
class Task:
    """One set of labels.

    Attributes:
        name: the task; a kind is task and label.
        texts: label -> its sentences.
        ask: wordings with `{text}`.
        openings: what may stand before a sentence.
        closes: what may stand after it.
        things: names for the slot `{thing}` of a sentence.
    """

    name: str
    texts: Mapping[str, Sequence[str]]
    ask: Sequence[str]
    openings: Sequence[str]
    closes: Sequence[str]
    things: Sequence[str]


def labelling_items(tasks: Sequence[Task], per_text: int, rng: random.Random) -> Iterator[Item]:
    """Every sentence of every task in `per_text` different dresses."""
    for task in tasks:
        for label, texts in task.texts.items():
            others = tuple(other for other in task.texts if other != label)
            for number, text in enumerate(texts):
                questions: dict[str, None] = {}
                while len(questions) < per_text:
                    questions[_dressed(task, text, rng)] = None
                for wording, question in enumerate(questions):
                    yield Item("labelling", f"{task.name}-{label}", f"{number:02}", wording, question, label, others)


def _dressed(task: Task, text: str, rng: random.Random) -> str:
    sentence = text.format(thing=rng.choice(task.things))
    dressed = " ".join(part for part in (rng.choice(task.openings), sentence, rng.choice(task.closes)) if part)
    return rng.choice(task.ask).format(text=dressed)
