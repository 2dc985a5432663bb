"""From a recipe's data section and a tokenizer to rows ready for training, with a report of what became of them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from smore_cli.data.encode import Encoded, Encoder
from smore_cli.data.formats import read_examples
from smore_cli.data.groups import number_groups, read_labels
from smore_cli.data.report import DataReport, SourceReport, content_hash, name_rows
from smore_cli.data.sources import SourceRows, describe_source, read_source
from smore_cli.data.templates import Renderer
from smore_cli.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from smore_cli.data.batch import Row
    from smore_cli.data.groups import Label
    from smore_cli.data.templates import Rendered
    from smore_cli.recipe.schema import DataConfig, Source

__all__ = ["RowSet", "build_rows", "split_eval"]

CHUNK = 1000
"""Rows given to the tokenizer at a time: enough to keep its threads busy."""


@dataclass(frozen=True)
class RowSet:
    """Tokenised rows, in the order of their sources, the report about them, and what the data calls their groups."""

    rows: list[Row]
    report: DataReport
    groups: tuple[Label, ...] = ()


def build_rows(data: DataConfig, tokenizer: PreTrainedTokenizerBase, sources: Sequence[Source]) -> RowSet:
    """Reads, renders and tokenises sources.

    Args:
        data: how: template, objective, loss_on, max_length, on_no_supervision.
        tokenizer: a fast tokenizer.
        sources: which rows: `data.train`, `data.eval` or others.

    Raises:
        DataError: a source cannot be read, a row is not of its format or cannot be written by the template, or rows
            have nothing to learn and `on_no_supervision` is `error`.
        ModelError: the tokenizer cannot do what is asked.
    """
    renderer, encoder = Renderer(data, tokenizer), Encoder(tokenizer, data.max_length)
    for source in sources:  # every contradiction is found before the first file is read
        _check(data, source, renderer)
    rows: list[Row] = []
    labels: list[Label | None] = []
    reports = []
    for source in sources:
        kept, labels_of_kept, report = _build_source(data, source, renderer, encoder)
        rows += kept
        labels += labels_of_kept
        reports.append(report)
    rows, groups = number_groups(rows, labels)
    return RowSet(rows, DataReport(tuple(reports), content_hash(rows)), groups)


def split_eval(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Splits rows into training and held-out rows, both in their order; the same for the same seed and row count.

    Args:
        rows: at least two, if any are to be held out.
        fraction: share of the rows to hold out; 0 holds out none, any other at least one.
        seed: seeds the choice.

    Raises:
        DataError: no row would be left for training.
    """
    if fraction == 0:
        return list(rows), []
    count = max(1, round(fraction * len(rows)))
    if count >= len(rows):
        hint = "add rows, lower eval_fraction, or name held-out sources in data.eval"
        raise DataError(f"eval_fraction {fraction:g} of {len(rows)} rows leaves none for training", hint)
    held_out = set(random.Random(seed).sample(range(len(rows)), count))
    train = [row for index, row in enumerate(rows) if index not in held_out]
    return train, [rows[index] for index in sorted(held_out)]


def _check(data: DataConfig, source: Source, renderer: Renderer) -> None:
    origin = describe_source(source)
    if source.group is not None and "group" in source.columns:
        problem = f"{origin}: 'group' and 'columns: {{group: {source.columns['group']}}}' both name the rows' groups"
        raise DataError(problem, "keep one")
    if data.objective == "choice_ranking":
        if source.format != "multiple_choice":
            problem = f"{origin}: objective choice_ranking ranks choices, and format {source.format} has none"
            raise DataError(problem, "use format: multiple_choice, or objective: completion")
        if data.loss_on == "all":
            problem = "objective choice_ranking compares answers to one question; loss_on: all would learn the question"
            raise DataError(problem, "use loss_on: completion")
    try:
        renderer.style(source.format)
    except DataError as error:
        raise DataError(f"{origin}: {error.message}", error.hint) from error


def _build_source(
    data: DataConfig, source: Source, renderer: Renderer, encoder: Encoder
) -> tuple[list[Row], list[Label | None], SourceReport]:
    """Returns the rows of one source, what it calls the group of each, and its report."""
    raw = read_source(source)
    labels = iter(read_labels(raw, source))
    rows: list[Row] = []
    kept: list[Label | None] = []
    dropped: list[int] = []
    truncated = 0
    for number, encoded in enumerate(_encoded(raw, source, renderer, encoder), 1):
        label = next(labels)
        if not encoded.learnable:
            dropped.append(number)
            continue
        rows.append(encoded.row)
        kept.append(label)
        truncated += encoded.truncated
    if dropped and (data.on_no_supervision == "error" or not rows):
        raise _nothing_to_learn(raw, dropped, data)
    return rows, kept, SourceReport.of(raw.origin, rows, truncated=truncated, dropped=dropped)


def _encoded(raw: SourceRows, source: Source, renderer: Renderer, encoder: Encoder) -> Iterator[Encoded]:
    rendered = _rendered(raw, source, renderer)
    while chunk := list(islice(rendered, CHUNK)):
        yield from encoder.encode(chunk)


def _rendered(raw: SourceRows, source: Source, renderer: Renderer) -> Iterator[Rendered]:
    """Yields every row as text; what a chat template cannot write is reported with its place."""
    style = renderer.style(source.format)
    for number, example in enumerate(read_examples(raw, source.format), 1):
        try:
            yield renderer.render(example, style)
        except DataError as error:
            raise DataError(f"{raw.origin}, row {number}: {error.message}", error.hint) from error


def _nothing_to_learn(raw: SourceRows, dropped: list[int], data: DataConfig) -> DataError:
    count = f"{len(dropped):,} of {len(raw):,} rows" if len(dropped) > 1 else f"1 of {len(raw):,} rows"
    problem = f"{raw.origin}: {count} {'have' if len(dropped) > 1 else 'has'} no token to learn ({name_rows(dropped)})"
    hint = f"max_length {data.max_length} cuts their answers off, or they have none: raise max_length"
    if len(dropped) < len(raw):
        return DataError(problem, f"{hint}, or set on_no_supervision: drop")
    return DataError(problem, hint)
