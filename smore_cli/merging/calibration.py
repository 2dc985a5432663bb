"""The text a merge is fitted to, and the other text on which it is judged.

fitted to    the run's own training mixture, or a file: a merge is best for what looks like its calibration text
judged on    what the run was evaluated on, or held out; else training rows that were not fitted to
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from smore_cli.data.batch import Batch, Row, collate
from smore_cli.data.build import build_rows, split_eval
from smore_cli.data.bundled import QUICKSTART
from smore_cli.data.cache import cached_rows
from smore_cli.data.sources import describe_source
from smore_cli.data.stream import StreamRows
from smore_cli.errors import DataError, UsageError
from smore_cli.recipe.schema import DataConfig, Source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from smore_cli.recipe.schema import Recipe

__all__ = ["FORMATS", "Calibration", "Corpus", "Texts", "batches_of", "gold_rows", "read_texts", "training_text"]

FORMATS: tuple[str, ...] = Source.model_fields["format"].annotation.__args__  # type: ignore[union-attr]
PASS_TOKENS = 2048
"""Tokens of a forward pass, padding included: enough for the products, few enough for the memory."""
JUDGED_TOKENS = 4096
"""Tokens of each source that a merge is judged on."""


@dataclass(frozen=True)
class Calibration:
    """How a routed adapter is fitted.

    Attributes:
        path: a file of text; None: the run's own training mixture.
        format: how to read it; None: as the run's own data, where they have one format.
        tokens: how many are used.
        ridge: share of the mean square of an input's entries that is added to all of them (`regression.fit`).
        prior: what directions without data fall back to.
        distill: steps of `distillation` after it.
    """

    path: Path | None = None
    format: str | None = None
    tokens: int = 16384
    ridge: float = 1e-3
    prior: Literal["none", "mean"] = "none"
    distill: int = 0


@dataclass(frozen=True)
class Corpus:
    """Tokenised text of one source; every row has one branch.

    Attributes:
        origin: the source.
        rows: at least one.
    """

    origin: str
    rows: list[Row]

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return sum(row.length for row in self.rows)


@dataclass(frozen=True)
class Texts:
    """What a merge reads.

    Attributes:
        calibration: what it is fitted to.
        judged: what it is judged on, source by source.
        role: what `judged` is to the run.
    """

    calibration: Corpus
    judged: list[Corpus]
    role: Literal["evaluation data", "held out", "training rows not fitted to", "bundled questions"]


def read_texts(recipe: Recipe | None, tokenizer: PreTrainedTokenizerBase, options: Calibration) -> Texts:
    """Reads both texts.

    An adapter without its run, or whose data is not on this machine, is judged on the bundled questions, and fitted to
    them too unless a file is given.

    Raises:
        DataError: the calibration file cannot be read.
        UsageError: it is not clear how.
    """
    try:
        mixture, judged, role = _of_run(recipe, tokenizer)
    except DataError:
        mixture, judged, role = _of_run(None, tokenizer)
    if options.path is not None:
        source = _given(options, recipe)
        data = _reading(recipe.data if recipe else DataConfig(train=[source]), source)
        mixture = [(1.0, Corpus(describe_source(source), gold_rows(build_rows(data, tokenizer, [source]).rows)))]
    calibration, left = _draw(mixture, options.tokens)
    if not judged:
        judged, role = left, "training rows not fitted to"
        if not judged:  # all were fitted to: better these than none
            judged = [calibration]
    return Texts(calibration, [_first(corpus, JUDGED_TOKENS) for corpus in judged], role)


def training_text(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, tokens: int, *, without: Sequence[Row]) -> Corpus:
    """Returns about so many tokens of a run's training mixture, none of them in the rows that are named.

    Raises:
        DataError: it cannot be read.
    """
    taken = {_text_of(row) for row in gold_rows(without)}
    mixture, _, _ = _of_run(recipe, tokenizer)
    rest = [
        (weight, Corpus(corpus.origin, [row for row in corpus.rows if _text_of(row) not in taken]))
        for weight, corpus in mixture
    ]
    return _draw(rest, tokens)[0]


def batches_of(rows: Sequence[Row], pad_token_id: int, *, tokens: int = PASS_TOKENS) -> list[Batch]:
    """Returns rows as forward passes of about `tokens`, long ones first, so that little is padding."""
    ordered = sorted(rows, key=lambda row: row.length, reverse=True)
    batches, start = list[Batch](), 0
    while start < len(ordered):
        size = max(1, tokens // ordered[start].length)
        batches.append(collate(ordered[start : start + size], pad_token_id=pad_token_id))
        start += size
    return batches


def _of_run(recipe: Recipe | None, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, list[Corpus], Any]:
    """Returns the training mixture, (weight, corpus) a source, the held-out text, and what that is."""
    if recipe is None:
        data = DataConfig(train=[Source(path=QUICKSTART, format="multiple_choice")], template="plain")
        source = Source(path=QUICKSTART, split="test", format="multiple_choice")
        judged = [Corpus("quickstart (test)", gold_rows(build_rows(data, tokenizer, [source]).rows))]
        train = Corpus(QUICKSTART, gold_rows(build_rows(data, tokenizer, data.train).rows))
        return [(1.0, train)], judged, "bundled questions"
    data = recipe.data
    evaluated = [
        Corpus(describe_source(source), gold_rows(cached_rows(data, tokenizer, [source], lambda _: None).rows))
        for source in data.eval or []
    ]
    if data.streaming:
        stream = StreamRows(data, tokenizer, recipe.seed)
        numbers = range(512)
        stream.tokenise(numbers)
        names = ", ".join(describe_source(source) for source in data.train)
        return [(1.0, Corpus(names, gold_rows([stream[n] for n in numbers])))], evaluated, "evaluation data"
    found = cached_rows(data, tokenizer, data.train, lambda _: None)
    kept, held_out = ([int(i) for i in range(len(found.rows))], []) if data.eval else _split(len(found.rows), recipe)
    ends = [0, *accumulate(report.rows for report in found.report.sources)]

    def corpora(numbers: list[int]) -> list[Corpus]:
        spans = zip(data.train, ends[:-1], ends[1:], strict=True)
        return [
            Corpus(describe_source(source), gold_rows([found.rows[i] for i in numbers if first <= i < end]))
            for source, first, end in spans
        ]

    parts = corpora(kept)
    weights = [source.weight or float(len(part.rows)) for source, part in zip(data.train, parts, strict=True)]
    mixture = list(zip(weights, parts, strict=True))
    if data.eval:
        return mixture, evaluated, "evaluation data"
    return mixture, [corpus for corpus in corpora(held_out) if corpus.rows], "held out"


def _split(count: int, recipe: Recipe) -> tuple[list[int], list[int]]:
    """Returns the numbers of the rows that the run trained on, and of those it held out."""
    numbered = [Row([], [[number]], [[True]]) for number in range(count)]
    train, held_out = split_eval(numbered, recipe.data.eval_fraction, recipe.seed)
    return [row.branches[0][0] for row in train], [row.branches[0][0] for row in held_out]


def _given(options: Calibration, recipe: Recipe | None) -> Source:
    """Returns the file that the command line names as a source."""
    form = options.format
    own = {source.format for source in recipe.data.train} if recipe else set()
    if form is None and len(own) == 1:
        form = own.pop()
    if form not in FORMATS:
        problem = f"--calibration {options.path}: " + (f"no format '{form}'" if form else "there is no --format for it")
        raise UsageError(problem, f"formats: {', '.join(FORMATS)}")
    return Source.model_validate({"path": str(options.path), "format": form})


def _reading(data: DataConfig, source: Source) -> DataConfig:
    """How a given file is written and tokenised: as the run's data, but for what only matters when it is learned."""
    changes: dict[str, Any] = {"on_no_supervision": "drop"}
    if source.format != "multiple_choice":
        changes["objective"] = "completion"
    return data.model_copy(update=changes)


def gold_rows(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows with their right branch alone."""
    return [Row(r.prompt, [r.branches[r.gold]], [r.supervised[r.gold]], group=r.group) for r in rows]


def _text_of(row: Row) -> tuple[int, ...]:
    return (*row.prompt, *row.branches[0])


def _draw(mixture: Sequence[tuple[float, Corpus]], tokens: int) -> tuple[Corpus, list[Corpus]]:
    """Draws about `tokens` tokens from the sources by weight; returns them, and what is left of each source."""
    drawn, left = list[Row](), list[Corpus]()
    total = sum(weight for weight, _ in mixture)
    for weight, corpus in mixture:
        rows = list(corpus.rows)
        random.Random(0).shuffle(rows)
        wanted, taken = tokens * weight / total, 0
        while rows and taken < wanted:
            row = rows.pop()
            drawn.append(row)
            taken += row.length
        if rows:
            left.append(Corpus(corpus.origin, rows))
    return Corpus(", ".join(corpus.origin for _, corpus in mixture), drawn), left


def _first(corpus: Corpus, tokens: int) -> Corpus:
    """Returns the first rows of a corpus, as many as hold that many tokens."""
    rows, taken = list[Row](), 0
    for row in corpus.rows:
        if rows and taken + row.length > tokens:
            break
        rows.append(row)
        taken += row.length
    return Corpus(corpus.origin, rows)
