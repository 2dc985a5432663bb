"""The ways to carry out one and the same step, and whether they all come to the same numbers.

reference              all rows in one forward pass, padded on the right
micro-batches          1 + 3 + 3 rows
packing                several rows in a line, kept apart
gradient checkpointing activations computed a second time in the backward pass
padding                on the left, and more of it
processes              two that share the step (`smore_cli.numerics.processes`)
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from smore_cli.data.batch import collate, collate_packs
from smore_cli.errors import ModelError, SmoreError
from smore_cli.models.source import one_line
from smore_cli.numerics.measure import distance, measure
from smore_cli.training.packing_probe import prepare_packing
from smore_cli.training.setup import enable_checkpointing

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from smore_cli.data.batch import Batch, Row
    from smore_cli.numerics.measure import Distance, Measured
    from smore_cli.numerics.subjects import Subject

__all__ = ["CHECKS", "Outcome", "judge", "left_padded", "reference", "run_check", "whole_step"]

PAD = 0
SPLIT = (1, 3, 3)
PACKS = ((0, 4), (1, 2, 6), (3, 5))


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    Attributes:
        backbone: its name.
        method: the adapter's.
        compared: with one forward pass over all rows.
        distance: None where the check could not be made.
        tolerance: the largest distance that is rounding.
        note: why it could not be made, or which tensor is off.
    """

    backbone: str
    method: str
    compared: str
    distance: Distance | None
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool | None:
        """Whether the numbers are the same; None where the check could not be made."""
        return None if self.distance is None else self.distance.largest <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        """Returns it as plain values, for JSON."""
        found = self.distance
        numbers = {name: None if found is None else getattr(found, name) for name in ("loss", "gradient", "aux")}
        shown = {name: None if value == float("inf") else value for name, value in numbers.items()}
        names = {"backbone": self.backbone, "method": self.method, "compared": self.compared}
        return names | shown | {"tolerance": self.tolerance, "ok": self.ok, "note": self.note}


def whole_step(rows: list[Row]) -> Batch:
    """Returns all rows in one forward pass, padded on the right."""
    return collate(rows, pad_token_id=PAD)


def reference(subject: Subject) -> Measured:
    """Returns what all other ways must come to."""
    return measure(subject, [whole_step(subject.rows)])


def run_check(subject: Subject, name: str, expected: Measured) -> Outcome:
    """Carries out the step in one other way; what the backbone cannot do is not checked, which the note says."""
    try:
        found = CHECKS[name](subject)
    except ModelError as error:
        return Outcome(subject.backbone, subject.name, name, None, subject.tolerance, error.message)
    except (RuntimeError, ValueError, SmoreError) as error:
        nowhere = replace(distance(expected, expected), gradient=float("inf"))
        return Outcome(subject.backbone, subject.name, name, nowhere, subject.tolerance, one_line(error))
    return judge(subject, name, found, expected)


def judge(subject: Subject, name: str, found: Measured, expected: Measured) -> Outcome:
    """Returns how far a way to carry out the step is from the reference, and in which tensor if that is too far."""
    apart = distance(found, expected)
    note = "" if apart.largest <= subject.tolerance else apart.tensor
    return Outcome(subject.backbone, subject.name, name, apart, subject.tolerance, note)


def _split(subject: Subject) -> Measured:
    rows = iter(subject.rows)
    return measure(subject, [whole_step([next(rows) for _ in range(size)]) for size in SPLIT])


def _packed(subject: Subject) -> Measured:
    prepare_packing(subject.model, subject.device)  # type: ignore[arg-type]
    packs = [[subject.rows[i] for i in pack] for pack in PACKS]
    return measure(subject, [collate_packs(packs, pad_token_id=PAD)])


def _checkpointed(subject: Subject) -> Measured:
    model: Any = subject.model
    enable_checkpointing(model)
    try:
        return measure(subject, [whole_step(subject.rows)])
    finally:
        model.activation_checkpointing_disable()


def _padded(subject: Subject) -> Measured:
    return measure(subject, [left_padded(whole_step(subject.rows), more=5)])


CHECKS: dict[str, Callable[[Subject], Measured]] = {
    "micro-batches": _split,
    "packing": _packed,
    "gradient checkpointing": _checkpointed,
    "padding on the left": _padded,
}


def left_padded(batch: Batch, more: int = 0) -> Batch:
    """Returns a batch with each line's padding before its tokens instead of after them.

    Args:
        batch: of single-branch rows, not packed.
        more: places of padding to add to every line.
    """
    lines, width = batch.input_ids.shape
    padding = width + more - batch.token_mask.sum(1)  # (B,)

    def move(tensor: Tensor) -> Tensor:
        moved = torch.nn.functional.pad(tensor, (0, more))
        return torch.stack([line.roll(int(shift)) for line, shift in zip(moved, padding, strict=True)])

    line = batch.sources // width
    shape = (lines, width)
    moved = {
        field.name: move(value)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), torch.Tensor) and value.shape == shape
    }
    return replace(batch, **moved, sources=line * (width + more) + batch.sources % width + padding[line])
