"""The loss on the held-out rows, while training; several processes share the rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from smore_cli.nn import AdapterContext
from smore_cli.training.objective import Counts

if TYPE_CHECKING:
    from smore_cli.training.setup import Setup

__all__ = ["held_out_loss"]


def held_out_loss(setup: Setup) -> dict[str, Any]:
    """Returns the loss (and for choice_ranking the accuracy) on `setup.eval_rows`; empty where there are none.

    The batches are sorted by length; the model is in training mode again afterwards.
    """
    rows, size = setup.eval_rows, setup.recipe.eval.batch_size
    if not rows:
        return {}
    model = setup.model
    model.eval()
    nll = correct = 0.0
    by_length = sorted(rows, key=lambda row: row.length)
    passes = [by_length[i : i + size] for i in range(0, len(rows), size)]
    mine = passes[setup.processes.rank :: setup.processes.count]
    # Where the model is sharded a pass needs all processes, so that each runs as many; the last may then not count.
    fill = [passes[0]] * (-(-len(passes) // setup.processes.count) - len(mine))
    tokens = 0
    # Not inference mode, whose tensors a sharded model could not gather again in training.
    with torch.no_grad():
        for number, group in enumerate([*mine, *fill]):
            batch = setup.batches.collate(group).to(setup.device)
            with AdapterContext(token_mask=batch.token_mask, aux=False, prompt_mask=batch.prompt_mask):
                share = setup.objective(model, batch, Counts(1, 1))
            if number < len(mine):
                nll, correct = nll + float(share.nll), correct + float(share.correct)
                tokens += Counts.of([batch]).tokens
    model.train()
    nll, correct, supervised = setup.processes.sums([nll, correct, tokens])
    values: dict[str, Any] = {"eval_rows": len(rows)}
    values["eval_loss"] = round(nll / max(supervised, 1), 6)
    if setup.objective.ranking:
        values["eval_accuracy"] = round(correct / len(rows), 6)
    return values
