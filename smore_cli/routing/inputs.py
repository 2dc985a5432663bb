"""Which rows a run's routing is looked at on: its held-out rows, or others that were named."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from smore_cli.data.batch import Row
from smore_cli.data.build import build_rows, split_eval
from smore_cli.data.bundled import QUICKSTART
from smore_cli.data.sources import describe_source
from smore_cli.errors import UsageError
from smore_cli.recipe.schema import DataConfig, Source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from smore_cli.data.build import RowSet
    from smore_cli.recipe.schema import Recipe

__all__ = ["FORMATS", "Inputs", "Role", "choose_inputs", "given_source", "spread"]

T = TypeVar("T")
FORMATS: tuple[str, ...] = Source.model_fields["format"].annotation.__args__  # type: ignore[union-attr]
Role = Literal["given", "held-out", "training"]


@dataclass(frozen=True)
class Inputs:
    """Rows, and where they come from.

    Attributes:
        role: given on the command line, held out from the run's training, or the run's training rows.
        origins: the sources.
        rows: those that are used.
        available: how many rows there were to use.
        labels: what each row is of: its source, where there are several, else its group; None: all rows are of one.
        label_names: of these numbers.
    """

    role: Role
    origins: list[str]
    rows: list[Row]
    available: int
    labels: list[int] | None = None
    label_names: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of the rows, every branch counted."""
        return sum(row.length for row in self.rows)

    def line(self) -> str:
        """Returns what the rows are, for people."""
        role = {"given": "", "held-out": ", held out from training", "training": ", which the run was trained on"}
        rows = f"{len(self.rows):,} rows"
        if len(self.rows) < self.available:
            rows = f"{len(self.rows):,} of {self.available:,} rows, evenly spaced"
        return f"{', '.join(self.origins)}{role[self.role]}; {rows}; {self.tokens:,} tokens"

    def document(self) -> dict[str, Any]:
        """Returns what the rows are as JSON values."""
        return {
            "role": self.role,
            "sources": self.origins,
            "rows": len(self.rows),
            "available_rows": self.available,
            "tokens": self.tokens,
            "labels": self.label_names,
        }


def given_source(path: str, format_name: str | None, split: str | None, recipe: Recipe | None) -> Source:
    """Returns the source that the command line names; by default in the format of the run's own data.

    Raises:
        UsageError: the format is unknown, or not given where the run's data do not settle it.
    """
    if format_name is None:
        own = {source.format for source in recipe.data.train} if recipe else set()
        if path == QUICKSTART:
            format_name = "multiple_choice"
        elif len(own) == 1:
            format_name = own.pop()
        else:
            raise UsageError(f"--data {path}: there is no --format to read it by", f"formats: {', '.join(FORMATS)}")
    elif format_name not in FORMATS:
        raise UsageError(f"--format: there is no format '{format_name}'", f"there are: {', '.join(FORMATS)}")
    return Source.model_validate({"path": path, "format": format_name, "split": split or "train"})


def choose_inputs(
    given: Sequence[Source], recipe: Recipe | None, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> Inputs:
    """Reads the rows.

    Args:
        given: what the command line names; empty: the run's `data.eval`, else the rows it held out by `eval_fraction`,
            else its training rows.
        recipe: the run's; None: the adapter has none, and sources must be given.
        tokenizer: the backbone's.
        limit: the most rows to use; they are taken from all over the data, since files are often sorted.

    Raises:
        UsageError: there are no data to use.
        DataError: they cannot be read.
    """
    if not given and recipe is None:
        raise UsageError("this adapter has no recipe that names its data", "name some with --data FILE --format FORMAT")
    role: Role = "given"
    sources = given or (recipe.data.eval or recipe.data.train if recipe is not None else ())
    data = _data_config(sources[0], recipe) if given or recipe is None else recipe.data
    found = build_rows(data, tokenizer, sources)
    numbers: Sequence[int] = range(len(found.rows))
    if not given and recipe is not None:
        held_out = numbers if data.eval else _held_out(len(found.rows), recipe)
        role, numbers = ("held-out", held_out) if held_out else ("training", numbers)
    origins = [describe_source(source) for source in sources]
    chosen = spread(numbers, limit)
    rows = [found.rows[number] for number in chosen]
    labels, names = _labels(found, chosen, origins)
    return Inputs(role, origins, rows, len(numbers), labels, names)


def _held_out(count: int, recipe: Recipe) -> list[int]:
    """Returns the numbers of the rows that a run held out of so many."""
    numbered = [Row([], [[number]], [[True]]) for number in range(count)]
    return [row.branches[0][0] for row in split_eval(numbered, recipe.data.eval_fraction, recipe.seed)[1]]


def _labels(found: RowSet, chosen: Sequence[int], origins: list[str]) -> tuple[list[int] | None, list[str]]:
    """Returns what each chosen row is of, as a number, and the numbers' names."""
    if len(origins) > 1:
        ends = list(accumulate(report.rows for report in found.report.sources))
        return [bisect_right(ends, number) for number in chosen], origins
    groups = [found.rows[number].group for number in chosen]
    if None in groups or len(set(groups)) < 2:
        return None, []
    return [int(group or 0) for group in groups], [str(name) for name in found.groups]


def spread(rows: Sequence[T], limit: int | None) -> list[T]:
    """Returns at most `limit` rows, evenly spaced over all of them."""
    count = len(rows) if limit is None else min(limit, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def _data_config(source: Source, recipe: Recipe | None) -> DataConfig:
    """How given rows are written and tokenised: as in the run, but for what only matters when they are learned."""
    if recipe is None:
        return DataConfig(train=[source], on_no_supervision="drop")
    changes: dict[str, Any] = {"loss_on": "completion", "on_no_supervision": "drop"}
    if source.format != "multiple_choice":
        changes["objective"] = "completion"
    return recipe.data.model_copy(update=changes)
