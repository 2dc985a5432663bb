"""Does this backbone keep packed documents apart? Asked of the model itself, in one small forward pass.

    line 1   A  B        B must come out the same in all three lines: in the second a document before it is another
    line 2   A' B        one, in the third there is none, and B begins at the first place of its line
    line 3   B

A model that carries something from one place of a line to all later ones (a recurrent state, a convolution), or that
counts positions itself, fails. So would a wrong mask of transformers, or a kernel that ignores it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from smore_cli.data.batch import Row, collate_packs
from smore_cli.errors import ModelError
from smore_cli.models.document_attention import attend_by_document, attend_by_mask
from smore_cli.models.forward import target_logits
from smore_cli.models.source import one_line

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from smore_cli.data.batch import Batch

__all__ = ["prepare_packing"]

LENGTH = 8
"""Tokens of a probed document."""


def prepare_packing(
    model: PreTrainedModel, device: torch.device, *, branched: bool = False, flat: bool = False
) -> None:
    """Refuses a backbone in which packed documents see one another; another one on a CPU attends to them one by one.

    The latter where it gives what the backbone's own mask gives.

    Args:
        model: without adapters, in evaluation mode.
        device: where its inputs go.
        branched: rows are questions with several choices, which a mask of their own keeps apart.
        flat: all packs of a pass are laid in one line.

    Raises:
        ModelError: packed documents see one another, or the model cannot be called with packs at all.
    """
    name = type(model).__name__
    hint = "set data.packing: false; train.group_by_length: true saves padding too"
    batch = _probe(model, branched=branched, flat=flat).to(device)
    try:
        masked = _logits(model, batch)
    except _CANNOT_CALL as error:
        raise ModelError(f"{name} cannot be called with packed rows: {one_line(error)}", hint) from error
    lines = masked.view(3, -1, masked.shape[-1])
    moved = _apart(lines[1:], lines[0])
    if not moved < _tolerance(masked):
        problem = f"{name} does not keep packed documents apart: another one before it moved a document by {moved:.1%}"
        raise ModelError(problem, hint)
    if branched or not attend_by_document(model):
        return
    try:
        same = _apart(_logits(model, batch), masked) < _tolerance(masked)
    except _CANNOT_CALL:
        same = False
    if not same:
        attend_by_mask(model)


_CANNOT_CALL = (TypeError, ValueError, RuntimeError)
"""What a model raises that takes no such inputs."""


def _probe(model: PreTrainedModel, *, branched: bool, flat: bool) -> Batch:
    """Returns the three lines."""
    embedding: Any = model.get_input_embeddings()
    first, other, second = (
        _row(len(embedding.weight), number, learned=number == 2, branched=branched) for number in range(3)
    )
    packs = [[first, second], [other, second], [second]]
    return collate_packs(packs, pad_token_id=0, mask_dtype=embedding.weight.dtype, flat=flat)


@torch.no_grad()
def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    return target_logits(model, batch)  # (3 lines x n places, vocabulary)


def _apart(found: Tensor, expected: Tensor) -> float:
    """Returns how far the logits (..., vocabulary) of any place are from those expected, of their length."""
    found, expected = found.float(), expected.float()
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def _tolerance(logits: Tensor) -> float:
    """Places differ, so kernels round differently; what attends to a foreign document is off by far more."""
    return float(torch.finfo(logits.dtype).eps ** 0.5)


def _row(vocabulary: int, seed: int, *, learned: bool, branched: bool) -> Row:
    """Returns a row of random tokens, all of them learned, or none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (2 * LENGTH,), generator=generator).tolist()
    if not branched:
        return Row([], [ids[:LENGTH]], [[learned] * LENGTH])
    half = LENGTH // 2
    branches = [ids[LENGTH : LENGTH + half], ids[LENGTH + half :]]
    return Row(ids[:LENGTH], branches, [[learned] * half] * 2)
