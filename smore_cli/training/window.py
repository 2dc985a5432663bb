"""The steps between two lines of metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.training.checkpoint import TrainerState
    from smore_cli.training.step import StepResult

__all__ = ["Window"]


class _Step(NamedTuple):
    loss: Tensor
    aux: Tensor
    tokens: int


class Window:
    """The steps between two lines of metrics, kept on the device.

    Attributes:
        since: seconds of training before the first of them.
        steps: loss, auxiliary loss and tokens of each.
    """

    def __init__(self, since: float) -> None:
        self.since = since
        self.steps: list[_Step] = []

    @classmethod
    def of(cls, state: dict[str, Any], device: torch.device) -> Window:
        """Returns the window that a checkpoint was written in, so that the next line is what it would have been."""
        window = cls(state.get("since", 0.0))
        for loss, aux, tokens in state.get("steps", []):
            window.steps.append(_Step(torch.tensor(loss, device=device), torch.tensor(aux, device=device), tokens))
        return window

    def state(self) -> dict[str, Any]:
        """Returns the window as plain values, exactly."""
        steps = [[float(step.loss), float(step.aux), step.tokens] for step in self.steps]
        return {"since": self.since, "steps": steps}

    def add(self, result: StepResult) -> None:
        """Adds a step."""
        self.steps.append(_Step(result.loss, result.aux, result.tokens))

    def values(self, state: TrainerState) -> dict[str, Any]:
        """Returns means over the window's steps."""
        loss = float(torch.stack([step.loss for step in self.steps]).mean())
        aux = float(torch.stack([step.aux for step in self.steps]).mean())
        elapsed = state.seconds - self.since
        tokens = sum(step.tokens for step in self.steps)
        values: dict[str, Any] = {"step": state.step, "loss": round(loss, 6), "aux_loss": round(aux, 6)}
        values["tokens_per_second"] = round(tokens / max(elapsed, 1e-9), 1)
        values["seconds"] = round(state.seconds, 2)
        values["tokens"], values["supervised_tokens"] = state.tokens, state.supervised_tokens
        return values
