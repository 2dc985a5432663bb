"""Elementary science: tables of facts, each asked in several wordings and, where it is one to one, in both directions.

A `Table` holds facts `subject -> answer`. The wrong choices of a question are other answers (or subjects) of the same
table. A pair that is also true, or arguable, is named in `also`, so that it is never offered as a wrong choice.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from smore_cli.data.quickstart.items import Item, with_article

__all__ = ["Table", "by_answer", "science_items"]


@dataclass(frozen=True)
class Table:
    """Facts of one kind and the ways to ask for them.

    Attributes:
        name: the kind.
        facts: subject -> its one right answer.
        ask: wordings with `{subject}` or `{a_subject}`; the choices are answers.
        pick: wordings with `{answer}` or `{a_answer}`; the choices are subjects. Only for one-to-one tables.
        also: subject -> further answers that are true of it or could be argued for.
        more: answers that are right for no subject and serve as wrong choices only.
    """

    name: str
    facts: Mapping[str, str]
    ask: Sequence[str]
    pick: Sequence[str] = ()
    also: Mapping[str, Sequence[str]] = field(default_factory=dict)
    more: Sequence[str] = ()

    def holds(self, subject: str, answer: str) -> bool:
        """Whether `answer` is true, or not plainly false, of `subject`."""
        return self.facts[subject] == answer or answer in self.also.get(subject, ())


def by_answer(groups: Mapping[str, str]) -> dict[str, str]:
    """Turns `{answer: "subject, subject"}` into `{subject: answer}`."""
    return {subject: answer for answer, subjects in groups.items() for subject in subjects.split(", ")}


def science_items(tables: Sequence[Table], rng: random.Random) -> Iterator[Item]:
    """Every fact of every table in every wording, with three wrong choices drawn afresh for each."""
    for table in tables:
        answers = list(dict.fromkeys((*table.facts.values(), *table.more)))
        for subject, answer in table.facts.items():
            wrong_answers = [other for other in answers if not table.holds(subject, other)]
            wrong_subjects = [other for other in table.facts if not table.holds(other, answer)]
            questions = [(wording, answer, wrong_answers) for wording in table.ask]
            questions += [(wording, subject, wrong_subjects) for wording in table.pick]
            names = {"subject": subject, "a_subject": with_article(subject)}
            names |= {"answer": answer, "a_answer": with_article(answer)}
            for number, (wording, right, pool) in enumerate(questions):
                wrong = tuple(rng.sample(pool, 3))
                yield Item("science", table.name, subject, number, wording.format(**names), right, wrong)
