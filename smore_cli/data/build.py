"""From a recipe's data section and a tokenizer to rows ready for training, with a report of what became of them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from smore_cli.data.encode import Encoder
from smore_cli.data.groups import number_labels, read_labels
from smore_cli.data.pipeline import encode_source, notice_lines
from smore_cli.data.report import DataReport, SourceReport, content_hash, name_rows
from smore_cli.data.rows import FlatRows, RowView, RowWriter
from smore_cli.data.sources import SourceRows, describe_source, read_source
from smore_cli.data.templates import Renderer
from smore_cli.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from smore_cli.data.batch import Row
    from smore_cli.data.groups import Label
    from smore_cli.recipe.schema import DataConfig, Source

__all__ = ["RowSet", "build_rows", "split_eval"]


@dataclass(frozen=True)
class RowSet:
    """Tokenised rows, in the order of their sources, the report about them, and what the data calls their groups."""

    rows: FlatRows
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
        check_source(data, source, renderer)
    writer = RowWriter()
    labels: list[Label | None] = []
    reports = tuple(_build_source(data, source, renderer, encoder, writer, labels) for source in sources)
    numbers, groups = number_labels(labels)
    rows = writer.finish(numbers)
    return RowSet(rows, DataReport(reports, content_hash(rows)), groups)


def split_eval(rows: Sequence[Row], fraction: float, seed: int) -> tuple[Sequence[Row], Sequence[Row]]:
    """Splits rows into training and held-out rows, both in their order; the same for the same seed and row count.

    Args:
        rows: at least two, if any are to be held out.
        fraction: share of the rows to hold out; 0 holds out none, any other at least one.
        seed: seeds the choice.

    Raises:
        DataError: no row would be left for training.
    """
    if fraction == 0:
        return rows, []
    count = max(1, round(fraction * len(rows)))
    if count >= len(rows):
        hint = "add rows, lower eval_fraction, or name held-out sources in data.eval"
        raise DataError(f"eval_fraction {fraction:g} of {len(rows)} rows leaves none for training", hint)
    held_out = np.zeros(len(rows), dtype=bool)
    held_out[random.Random(seed).sample(range(len(rows)), count)] = True
    return RowView(rows, np.flatnonzero(~held_out)), RowView(rows, np.flatnonzero(held_out))


def check_source(data: DataConfig, source: Source, renderer: Renderer) -> None:
    """Refuses a source whose settings contradict each other, without reading it.

    Raises:
        DataError: they do.
    """
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
    data: DataConfig,
    source: Source,
    renderer: Renderer,
    encoder: Encoder,
    writer: RowWriter,
    labels: list[Label | None],
) -> SourceReport:
    """Adds the rows of one source to `writer` and what it calls the group of each to `labels`."""
    raw = read_source(source)
    found = read_labels(raw, source)
    dropped: list[int] = []
    rows = truncated = tokens = supervised = longest = 0
    for number, encoded in encode_source(raw, source, renderer, encoder):
        label, row = found[number - 1], encoded.row
        if not encoded.learnable:
            dropped.append(number)
            continue
        writer.add(row)
        labels.append(label)
        rows += 1
        truncated += encoded.truncated
        tokens += row.length
        supervised += sum(map(sum, row.supervised))
        longest = max(longest, row.length)
    if dropped and (data.on_no_supervision == "error" or not rows):
        raise _nothing_to_learn(raw, dropped, data)
    counts = (rows, truncated, tuple(dropped), tokens, supervised, longest)
    return SourceReport(raw.origin, *counts, notices=notice_lines(raw))


def _nothing_to_learn(raw: SourceRows, dropped: list[int], data: DataConfig) -> DataError:
    count = f"{len(dropped):,} of {len(raw):,} rows" if len(dropped) > 1 else f"1 of {len(raw):,} rows"
    problem = f"{raw.origin}: {count} {'have' if len(dropped) > 1 else 'has'} no token to learn ({name_rows(dropped)})"
    hint = f"max_length {data.max_length} cuts their answers off, or they have none: raise max_length"
    if len(dropped) < len(raw):
        return DataError(problem, f"{hint}, or set on_no_supervision: drop")
    return DataError(problem, hint)
