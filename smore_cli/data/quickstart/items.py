"""A question before it gets its place in a file: `Item`, and the small helpers every family shares."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Item", "normalised", "with_article", "words"]


@dataclass(frozen=True)
class Item:
    """One question with its right answer and more wrong ones than or as many as it needs.

    Attributes:
        family: one of the four families.
        kind: the table, story, task or label it was made from; test rows are spread evenly over kinds.
        material: the fact, numbers, value or sentence it asks about; never in both files.
        wording: which of several wordings of the same material this is.
        question: the text after "Question: ".
        answer: the right choice.
        wrong: the other choices, distinct and all false.
    """

    family: str
    kind: str
    material: str
    wording: int
    question: str
    answer: str
    wrong: tuple[str, ...]

    @property
    def key(self) -> tuple[str, str, str]:
        """What the split keeps together."""
        return self.family, self.kind, self.material

    @property
    def id(self) -> str:
        """A readable name, unique over both files: family/kind/material/wording."""
        return "/".join((self.family, self.kind, slug(self.material), str(self.wording)))


def slug(text: str) -> str:
    """`text` in lower case with every run of other characters than letters and digits as one hyphen."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def normalised(text: str) -> str:
    """`text` as its lower-case words and numbers: punctuation, case and spacing do not tell two questions apart."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def with_article(noun: str) -> str:
    """`noun` with "a" or "an"; every noun of the material goes by its first letter."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def words(text: str) -> tuple[str, ...]:
    """The words of a word list that is written as running text."""
    return tuple(text.split())
