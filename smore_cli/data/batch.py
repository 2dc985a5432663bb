"""One batch, for training and for scoring: token ids plus which hidden state predicts which token.

B rows of S tokens. A row is a prompt and k >= 1 branches (answers) that each continue the prompt and do not see one
another: for plain training k = 1. With k > 1 the prompt is read once, and a 4-D attention mask keeps the branches
apart:

    row        p p p p | a a a | b b | pad
    positions  0 1 2 3 | 4 5 6 | 4 5 | 0

No label is ever shifted: `sources[i]` is the place whose hidden state predicts `targets[i]`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

__all__ = ["Batch", "Row", "collate", "collate_packs", "prompt_of"]


@dataclass(frozen=True)
class Row:
    """A tokenised example.

    Attributes:
        prompt: token ids of the shared prefix; empty where there is one branch that holds everything (text, chats).
        branches: token ids of each continuation, at least one.
        supervised: for each branch, which of its tokens are learned or scored (same lengths as `branches`).
        gold: index of the right branch.
        group: number of the group the row belongs to, for methods that know of groups; None: of none.
    """

    prompt: list[int]
    branches: list[list[int]]
    supervised: list[list[bool]]
    gold: int = 0
    group: int | None = None

    @property
    def length(self) -> int:
        """Tokens the row occupies in a batch."""
        return len(self.prompt) + sum(len(branch) for branch in self.branches)


@dataclass(frozen=True)
class Batch:
    """Tensors of one forward pass over B lines of S tokens, which hold D rows: one each, or several where packed.

    Attributes:
        input_ids: (B, S) int64, right-padded.
        position_ids: (B, S) int64.
        attention_mask: (B, S) int64 for single-branch rows, else (B, 1, S, S) float, 0 where attention is allowed and
            the dtype's minimum elsewhere. None for packed single-branch rows: the backbone keeps apart what
            `position_ids` say are different documents (`smore_cli.data.packing`).
        token_mask: (B, S) bool, true on real tokens (what routing statistics count).
        sources: (n,) int64, flat indices into B*S: the place that predicts.
        targets: (n,) int64, the token to be predicted there.
        choice: (n,) int64, which branch of the whole batch (counted over rows) the target belongs to.
        gold: (D,) int64, number of the right branch, counted over the whole batch.
        branch_row: (number of branches,) int64, the row of each branch.
        groups: (D,) int64, the group of each row; None where a row has none.
        prompt_mask: (B, S) bool, true on the tokens of `prompt_of(row)`, which come first in a row.
        documents: (B, S) int64, which row each token belongs to, -1 on padding; None where every line is one row.
        places: (D, L) int64, where in B*S the tokens of each row are, -1 beyond its end; given with `documents`.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    token_mask: Tensor
    sources: Tensor
    targets: Tensor
    choice: Tensor
    gold: Tensor
    branch_row: Tensor
    groups: Tensor | None = None
    prompt_mask: Tensor | None = None
    documents: Tensor | None = None
    places: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on `device`."""
        tensors = {f.name: tensor for f in fields(self) if (tensor := getattr(self, f.name)) is not None}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def collate(rows: Sequence[Row], *, pad_token_id: int, mask_dtype: torch.dtype = torch.float32) -> Batch:
    """Puts rows side by side, padded on the right to the longest.

    Args:
        rows: at least one row.
        pad_token_id: id written where there is no token (never attended to, never counted).
        mask_dtype: dtype of the 4-D mask, the backbone's compute dtype; unused for single-branch rows.
    """
    return collate_packs([[row] for row in rows], pad_token_id=pad_token_id, mask_dtype=mask_dtype, packed=False)


def collate_packs(
    packs: Sequence[Sequence[Row]],
    *,
    pad_token_id: int,
    mask_dtype: torch.dtype = torch.float32,
    packed: bool = True,
    flat: bool = False,
) -> Batch:
    """Puts packs side by side, the rows of each one after another in one line, padded on the right to the longest.

    Args:
        packs: at least one, each of at least one row.
        pad_token_id: id written where there is no token.
        mask_dtype: dtype of the 4-D mask, the backbone's compute dtype; unused for single-branch rows.
        packed: false where every pack is one row, and is to be laid out as `collate` does.
        flat: lay all packs in one line, without any padding: what variable-length attention kernels want.
    """
    lines = [[row for pack in packs for row in pack]] if flat else packs
    rows = [row for line in lines for row in line]
    shape = len(lines), max(sum(row.length for row in line) for line in lines)
    starts = [
        b * shape[1] + offset
        for b, line in enumerate(lines)
        for offset in [0, *accumulate(row.length for row in line)][:-1]
    ]
    longest = max(row.length for row in rows)
    ids = torch.full((shape[0] * shape[1],), pad_token_id, dtype=torch.long)
    # Padding at the end of a packed line is another document, never longer than a real one: models with learned
    # positions have no more of them.
    ends = torch.tensor([sum(row.length for row in line) for line in lines])[:, None]
    beyond = (torch.arange(shape[1]) - ends).clamp_min(0).flatten()
    positions = beyond.remainder(longest) if packed else torch.zeros_like(ids)
    branch_of, documents = torch.full_like(ids, -1), torch.full_like(ids, -1)
    prompt_mask = torch.zeros_like(ids, dtype=torch.bool)
    places = torch.full((len(rows), longest), -1, dtype=torch.long)
    sources: list[int] = []
    targets: list[int] = []
    choice: list[int] = []
    gold: list[int] = []
    branch_row: list[int] = []
    for d, (row, start) in enumerate(zip(rows, starts, strict=True)):
        here = slice(start, start + row.length)
        ids[here], positions[here], branch_of[here] = _tokens(row)
        documents[here] = d
        places[d, : row.length] = torch.arange(start, start + row.length)
        prompt_mask[start : start + len(prompt_of(row))] = True
        for place, target, branch in _predictions(row):
            sources.append(start + place)
            targets.append(target)
            choice.append(len(branch_row) + branch)
        gold.append(len(branch_row) + row.gold)
        branch_row += [d] * len(row.branches)
    attention_mask: Tensor | None = None
    if any(len(row.branches) > 1 for row in rows):
        attention_mask = _branch_mask(branch_of.view(shape), documents.view(shape), mask_dtype)
    elif not packed:
        attention_mask = (branch_of >= 0).long().view(shape)
    groups = [row.group for row in rows]
    return Batch(
        input_ids=ids.view(shape),
        position_ids=positions.view(shape),
        attention_mask=attention_mask,
        token_mask=(branch_of >= 0).view(shape),
        sources=torch.tensor(sources, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        choice=torch.tensor(choice, dtype=torch.long),
        gold=torch.tensor(gold, dtype=torch.long),
        branch_row=torch.tensor(branch_row, dtype=torch.long),
        groups=None if None in groups else torch.tensor(groups, dtype=torch.long),
        prompt_mask=prompt_mask.view(shape),
        documents=documents.view(shape) if packed else None,
        places=places if packed else None,
    )


def _tokens(row: Row) -> Tensor:
    """Returns token ids, positions and branch numbers (0: the prompt, j + 1: branch j) of a row, (3, its length)."""
    ids, positions = list(row.prompt), list(range(len(row.prompt)))
    branches = [0] * len(row.prompt)
    for j, branch in enumerate(row.branches):
        ids += branch
        positions += range(len(row.prompt), len(row.prompt) + len(branch))
        branches += [j + 1] * len(branch)
    return torch.tensor([ids, positions, branches], dtype=torch.long)


def _predictions(row: Row) -> Iterator[tuple[int, int, int]]:
    """Yields each supervised token of a row: the place (within the row) that predicts it, the token, its branch."""
    start = len(row.prompt)
    for j, (branch, supervised) in enumerate(zip(row.branches, row.supervised, strict=True)):
        for t, (token, learned) in enumerate(zip(branch, supervised, strict=True)):
            # The first token of every branch is predicted by the last token of the prompt.
            before = start + t - 1 if t > 0 else len(row.prompt) - 1
            if learned and before >= 0:
                yield before, token, j
        start += len(branch)


def prompt_of(row: Row) -> list[int]:
    """Returns the tokens that say what a row is about before anything of it is answered.

    That is its prompt. A row without one (a chat or a text, which is a single branch) has the tokens before the first
    that is learned; where the very first is learned already, it has nothing but all of its tokens.
    """
    if row.prompt:
        return row.prompt
    branch, learned = row.branches[0], row.supervised[0]
    before = learned.index(True) if True in learned else len(branch)
    return branch[:before] or [token for branch in row.branches for token in branch]


def _branch_mask(branch_of: Tensor, documents: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the additive (B, 1, S, S) mask: causal, prompt and own branch only; padding attends to itself alone."""
    size = branch_of.shape[1]
    query, key = branch_of[:, :, None], branch_of[:, None, :]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    allowed = causal & (query >= 0) & ((key == 0) | (key == query)) & (documents[:, :, None] == documents[:, None, :])
    allowed |= torch.eye(size, dtype=torch.bool)  # a row of the mask without any key would give NaN
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)
    return mask[:, None]
