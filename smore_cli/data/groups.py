"""Which group a row belongs to, for methods that tell groups of rows apart: by source, or by a column of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smore_cli.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smore_cli.data.batch import Row
    from smore_cli.data.sources import SourceRows
    from smore_cli.recipe.schema import Source

__all__ = ["Label", "number_labels", "read_labels", "require_groups"]

Label = str | int
"""What the data calls a group."""

_HOW = "in data.train: `group: NAME` for a whole source, or `columns: {group: COLUMN}` for each of its rows"


def read_labels(raw: SourceRows, source: Source) -> list[Label | None]:
    """Returns the group of every row of a source as the data calls it; None where the source names no groups.

    Raises:
        DataError: the column is missing, or a row's group is neither a text nor a whole number.
    """
    if "group" not in source.columns:
        return [source.group] * len(raw)
    labels: list[Label | None] = []
    for number, row in enumerate(raw, 1):
        label = row["group"]
        if isinstance(label, bool) or not isinstance(label, str | int):
            problem = f"{raw.origin}, row {number}: '{source.columns['group']}' is {label!r}, which names no group"
            raise DataError(problem, "a group is named by a text or a whole number")
        labels.append(label)
    return labels


def number_labels(labels: Sequence[Label | None]) -> tuple[list[int | None], tuple[Label, ...]]:
    """Returns the number of each row's group (None: of none), and the groups' labels by number: sorted."""
    names = sorted({label for label in labels if label is not None}, key=lambda label: (isinstance(label, str), label))
    numbers = {label: number for number, label in enumerate(names)}
    return [None if label is None else numbers[label] for label in labels], tuple(names)


def require_groups(rows: Sequence[Row], groups: Sequence[Label], wanted: int) -> None:
    """Refuses training rows that a method with so many groups cannot learn from.

    Raises:
        DataError: a row has no group, or there are more or fewer groups.
    """
    if missing := sum(row.group is None for row in rows):
        problem = f"the adapter tells {wanted} groups of rows apart, and {missing:,} of {len(rows):,} rows name none"
        raise DataError(problem, f"name them {_HOW}")
    if len(groups) != wanted:
        named = ", ".join(map(str, groups[:10])) + (", ..." if len(groups) > 10 else "")
        count = f"{len(groups)} group{'s' if len(groups) != 1 else ''}"
        problem = f"the training rows are of {count} ({named}), and adapter.num_groups is {wanted}"
        hint = f"set adapter.num_groups: {len(groups)}" if len(groups) > 1 else f"name the others {_HOW}"
        raise DataError(problem, hint)
