"""Does an expert go with a data set, or with a kind of token? Mutual information in bits, held against chance.

    I(E; L) = sum_el p(e, l) log2 p(e, l) / (p(e) p(l))          p(e, l) = mean over tokens of u_te [label_t = l]

u_te is expert e's share of the gate weight of token t. Of a few tokens and many experts I is above 0 by chance alone;
how much is found by shuffling: labels of rows are dealt out to the rows anew, labels of tokens to the tokens. What is
inside the interval of these shuffles is no specialisation that could be told from noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

__all__ = ["TOKEN_CLASSES", "Information", "mutual_information", "token_class"]

SHUFFLES = 200
TOKEN_CLASSES = ("word", "inside of a word", "number", "punctuation", "space", "special")


@dataclass(frozen=True)
class Information:
    """What a router's choice tells of a label, all in bits.

    Attributes:
        bits: mutual information.
        chance: its mean over the shuffles.
        low, high: where 95 % of the shuffles are.
        p: share of the shuffles (and the truth) that tell at least as much.
        most: entropy of the labels, which is the most that can be told.
    """

    bits: float
    chance: float
    low: float
    high: float
    p: float
    most: float

    def document(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return {**vars(self), "above_chance": self.bits - self.chance}


def mutual_information(
    usage: Tensor, experts: Sequence[int], labels: Tensor, units: Tensor | None = None, *, shuffles: int = SHUFFLES
) -> list[Information]:
    """Returns what each router tells of the labels; the same numbers every time.

    Args:
        usage: (T, S) each token's gate weight by expert, the experts of all routers side by side; a router's sum to 1.
        experts: of each router, summing to S.
        labels: (T,) int64 from 0, or (U,) with `units`.
        units: (T,) int64, what is shuffled as a whole (the token's row); None: every token by itself.
        shuffles: how often labels are dealt out anew.
    """
    usage = usage.double()
    if units is not None:  # a row's tokens share its label: their sum is all that counts
        usage = usage.new_zeros(len(labels), usage.shape[1]).index_add_(0, units, usage)
    classes = int(labels.max()) + 1
    generator = torch.Generator().manual_seed(0)
    found = [_information(_joint(usage, labels, classes), experts)]
    for _ in range(shuffles):
        dealt = labels[torch.randperm(len(labels), generator=generator)]
        found.append(_information(_joint(usage, dealt, classes), experts))
    truth, chance = found[0], torch.stack(found[1:])  # (routers,), (shuffles, routers)
    low, high = torch.quantile(chance, torch.tensor([0.025, 0.975], dtype=chance.dtype), dim=0)
    at_least = ((chance >= truth - 1e-12).sum(0) + 1) / (shuffles + 1)
    joint = _joint(usage, labels, classes)
    share = joint.sum(1) / joint.sum()
    most = float(-torch.xlogy(share, share).sum() / torch.log(torch.tensor(2.0)))
    columns = zip(truth.tolist(), chance.mean(0).tolist(), low.tolist(), high.tolist(), at_least.tolist(), strict=True)
    return [Information(*column, most) for column in columns]


def _joint(usage: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Returns (classes, S) sums of usage by label."""
    return usage.new_zeros(classes, usage.shape[1]).index_add_(0, labels, usage)


def _information(joint: Tensor, experts: Sequence[int]) -> Tensor:
    """Returns the mutual information (routers,) in bits of joint sums (classes, S)."""
    values = []
    for block in joint.split(list(experts), dim=1):  # (classes, s)
        p = block / block.sum()
        independent = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
        values.append((torch.xlogy(p, p) - torch.xlogy(p, independent)).sum())
    return torch.stack(values) / torch.log(torch.tensor(2.0, dtype=joint.dtype))


def token_class(tokenizer: PreTrainedTokenizerBase, token: int) -> int:
    """Returns which of `TOKEN_CLASSES` a token is: by its text alone, so that the same token always is the same."""
    if token in tokenizer.all_special_ids:
        return 5
    text = str(tokenizer.decode([token]))
    inside = text.strip()
    if not inside:
        return 4
    if any(character.isdigit() for character in inside):
        return 2
    if not any(character.isalpha() for character in inside):
        return 3
    return 0 if text[0].isspace() or tokenizer.convert_ids_to_tokens(token)[0] in "Ġ▁" else 1
