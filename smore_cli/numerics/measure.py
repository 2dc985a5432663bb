"""Loss, gradient and auxiliary loss of a step, and how far two of them are apart.

    loss, aux   |a - b| / |b|                     gradient    max over tensors of |A - B| / |B|   (Frobenius norms)

A tensor whose gradient is below a thousandth of the largest is measured against that, not against its own rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from smore_cli.training.parallel import ALONE
from smore_cli.training.step import accumulate_gradients

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from smore_cli.data.batch import Batch
    from smore_cli.numerics.subjects import Subject
    from smore_cli.training.parallel import Processes

__all__ = ["Distance", "Measured", "distance", "measure"]


@dataclass(frozen=True)
class Measured:
    """What a step came to.

    Attributes:
        loss: without auxiliary losses.
        aux: the auxiliary loss.
        gradient: of every tensor that trains, by name; float64, on the CPU.
    """

    loss: float
    aux: float
    gradient: dict[str, Tensor]


@dataclass(frozen=True)
class Distance:
    """How far two steps are apart, relative to the second.

    Attributes:
        loss: of the losses.
        gradient: of the gradients, in the tensor where it is largest.
        aux: of the auxiliary losses; None where neither has one.
        tensor: the name of that tensor.
    """

    loss: float
    gradient: float
    aux: float | None
    tensor: str

    @property
    def largest(self) -> float:
        """The largest of the three."""
        return max(self.loss, self.gradient, self.aux or 0.0)


def measure(subject: Subject, batches: Sequence[Batch], processes: Processes = ALONE) -> Measured:
    """Runs a step the way training does, and takes its gradient.

    Args:
        subject: model, device and objective.
        batches: the forward passes of this process.
        processes: those that share the step.
    """
    trained = {name: p for name, p in subject.model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.grad = None
    result = accumulate_gradients(
        subject.model,
        batches,
        subject.objective,
        device=subject.device,
        backward=torch.Tensor.backward,
        processes=processes,
    )
    gradient = {
        name: torch.zeros(parameter.shape, dtype=torch.float64)
        if parameter.grad is None
        else parameter.grad.detach().double().cpu()
        for name, parameter in trained.items()
    }
    for parameter in trained.values():
        parameter.grad = None
    return Measured(float(result.loss), float(result.aux), gradient)


def distance(found: Measured, reference: Measured) -> Distance:
    """Returns how far `found` is from `reference`; infinite where a number is not finite."""
    norms = {name: float(tensor.norm()) for name, tensor in reference.gradient.items()}
    floor = max(max(norms.values()) * 1e-3, torch.finfo(torch.float64).tiny)
    apart = {
        name: _finite(float((found.gradient[name] - tensor).norm()) / max(norms[name], floor))
        for name, tensor in reference.gradient.items()
    }
    tensor = max(apart, key=lambda name: apart[name])
    aux = None if found.aux == reference.aux == 0 else _relative(found.aux, reference.aux)
    return Distance(_relative(found.loss, reference.loss), apart[tensor], aux, tensor)


def _relative(found: float, reference: float) -> float:
    return 0.0 if found == reference else _finite(abs(found - reference) / max(abs(reference), 1e-12))


def _finite(value: float) -> float:
    return value if value < float("inf") else float("inf")  # not a number compares as false
