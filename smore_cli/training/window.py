"""The steps between two lines of metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from smore_cli.training.checkpoint import TrainerState
    from smore_cli.training.step import StepResult

__all__ = ["Window"]


class Window:
    """The steps between two lines of metrics, summed on the device."""

    def __init__(self, since: float) -> None:
        self.results: list[StepResult] = []
        self.since = since

    def add(self, result: StepResult) -> None:
        """Adds a step."""
        self.results.append(result)

    def values(self, state: TrainerState) -> dict[str, Any]:
        """Returns means over the window's steps."""
        results = self.results
        loss = float(torch.stack([result.loss for result in results]).mean())
        aux = float(torch.stack([result.aux for result in results]).mean())
        elapsed = state.seconds - self.since
        tokens = sum(result.tokens for result in results)
        values: dict[str, Any] = {"step": state.step, "loss": round(loss, 6), "aux_loss": round(aux, 6)}
        values["tokens_per_second"] = round(tokens / max(elapsed, 1e-9), 1)
        values["seconds"] = round(state.seconds, 2)
        values["tokens"], values["supervised_tokens"] = state.tokens, state.supervised_tokens
        return values
