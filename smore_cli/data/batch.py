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
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Batch", "Row", "collate", "prompt_of"]


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
    """Tensors of one forward pass.

    Attributes:
        input_ids: (B, S) int64, right-padded.
        position_ids: (B, S) int64.
        attention_mask: (B, S) int64 for single-branch rows, else (B, 1, S, S) float, 0 where attention is allowed and
            the dtype's minimum elsewhere.
        token_mask: (B, S) bool, true on real tokens (what routing statistics count).
        sources: (n,) int64, flat indices into B*S: the place that predicts.
        targets: (n,) int64, the token to be predicted there.
        choice: (n,) int64, which branch of the whole batch (counted over rows) the target belongs to.
        gold: (B,) int64, number of the right branch, counted over the whole batch.
        branch_row: (number of branches,) int64, the row of each branch.
        groups: (B,) int64, the group of each row; None where a row has none.
        prompt_mask: (B, S) bool, true on the tokens of `prompt_of(row)`, which come first in a row.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    token_mask: Tensor
    sources: Tensor
    targets: Tensor
    choice: Tensor
    gold: Tensor
    branch_row: Tensor
    groups: Tensor | None = None
    prompt_mask: Tensor | None = None

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
    size, longest = len(rows), max(row.length for row in rows)
    ids = torch.full((size, longest), pad_token_id, dtype=torch.long)
    positions = torch.zeros((size, longest), dtype=torch.long)
    branch_of = torch.full((size, longest), -1, dtype=torch.long)  # 0: prompt, j + 1: branch j, -1: padding
    sources: list[int] = []
    targets: list[int] = []
    choice: list[int] = []
    gold: list[int] = []
    branch_row: list[int] = []
    for b, row in enumerate(rows):
        offset, end = b * longest, len(row.prompt)
        ids[b, :end] = torch.tensor(row.prompt)
        positions[b, :end] = torch.arange(end)
        branch_of[b, :end] = 0
        gold.append(len(branch_row) + row.gold)
        for j, (branch, supervised) in enumerate(zip(row.branches, row.supervised, strict=True)):
            start, end = end, end + len(branch)
            ids[b, start:end] = torch.tensor(branch, dtype=torch.long)
            positions[b, start:end] = len(row.prompt) + torch.arange(len(branch))
            branch_of[b, start:end] = j + 1
            for t, (token, learned) in enumerate(zip(branch, supervised, strict=True)):
                # The first token of every branch is predicted by the last token of the prompt.
                before = start + t - 1 if t > 0 else len(row.prompt) - 1
                if learned and before >= 0:
                    sources.append(offset + before)
                    targets.append(token)
                    choice.append(len(branch_row))
            branch_row.append(b)
    token_mask = branch_of >= 0
    groups = [row.group for row in rows]
    branched = any(len(row.branches) > 1 for row in rows)
    return Batch(
        input_ids=ids,
        position_ids=positions,
        attention_mask=_branch_mask(branch_of, mask_dtype) if branched else token_mask.long(),
        token_mask=token_mask,
        sources=torch.tensor(sources, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        choice=torch.tensor(choice, dtype=torch.long),
        gold=torch.tensor(gold, dtype=torch.long),
        branch_row=torch.tensor(branch_row, dtype=torch.long),
        groups=None if None in groups else torch.tensor(groups, dtype=torch.long),
        prompt_mask=torch.arange(longest) < torch.tensor([len(prompt_of(row)) for row in rows])[:, None],
    )


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


def _branch_mask(branch_of: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the additive (B, 1, S, S) mask: causal, prompt and own branch only; padding attends to itself alone."""
    size = branch_of.shape[1]
    query, key = branch_of[:, :, None], branch_of[:, None, :]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    allowed = causal & (query >= 0) & ((key == 0) | (key == query))
    allowed |= torch.eye(size, dtype=torch.bool)  # a row of the mask without any key would give NaN
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)
    return mask[:, None]
