"""Does an expert go with a data set, or with a kind of token? Mutual information in bits, held against chance.

    I(E; L) = sum_el p(e, l) log2 p(e, l) / (p(e) p(l))          p(e, l) = mean over tokens of u_te [label_t = l]

u_te is expert e's share of the gate weight of token t. Of a few tokens and many experts I is above 0 by chance alone;
how much is found by dealing out the labels anew. Rows are dealt their labels as a whole. Tokens of a row are not
independent, nor are those of one type, so the labels of tokens are dealt out in two ways, within each row and among
types of tokens, and the one counts that leaves more doubt: a router that follows the row, or types whatever their kind,
tells nothing of the kind. What is inside the interval of the shuffles cannot be told from noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

__all__ = ["TOKEN_CLASSES", "Information", "mutual_information", "of_rows", "of_tokens", "token_class"]

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


Deal = Callable[[torch.Generator], Tensor]
"""Returns labels dealt out anew."""


def mutual_information(
    usage: Tensor, experts: Sequence[int], labels: Tensor, deal: Deal | None = None, *, shuffles: int = SHUFFLES
) -> list[Information]:
    """Returns what each router tells of the labels; the same numbers every time.

    Args:
        usage: (T, S) gate weight by expert, the experts of all routers side by side; a router's share of a line sums to
            1 for a token, or to the number of tokens of a row.
        experts: of each router, summing to S.
        labels: (T,) int64 from 0.
        deal: deals out the labels anew; None: every line's may go to every other.
        shuffles: how often.
    """
    usage = usage.double()
    classes = int(labels.max()) + 1
    generator = torch.Generator().manual_seed(0)
    joint = _joint(usage, labels, classes)
    truth = _information(joint, experts)  # (routers,)
    dealt = ((deal or _freely(labels))(generator) for _ in range(shuffles))
    chance = torch.stack([_information(_joint(usage, each, classes), experts) for each in dealt])  # (shuffles, routers)
    low, high = torch.quantile(chance, torch.tensor([0.025, 0.975], dtype=chance.dtype), dim=0)
    at_least = ((chance >= truth - 1e-12).sum(0) + 1) / (shuffles + 1)
    share = joint.sum(1) / joint.sum()
    most = float(-torch.xlogy(share, share).sum() / torch.log(torch.tensor(2.0)))
    columns = zip(truth.tolist(), chance.mean(0).tolist(), low.tolist(), high.tolist(), at_least.tolist(), strict=True)
    return [Information(*column, most) for column in columns]


def of_rows(usage: Tensor, experts: Sequence[int], labels: Tensor, rows: Tensor) -> list[Information]:
    """Returns what each router tells of the label of a token's row.

    Args:
        usage: as in `mutual_information`, token by token.
        experts: as there.
        labels: (R,) int64 from 0, of each row.
        rows: (T,) int64, each token's row.
    """
    summed = usage.new_zeros(len(labels), usage.shape[1], dtype=torch.float64).index_add_(0, rows, usage.double())
    return mutual_information(summed, experts, labels)


def of_tokens(usage: Tensor, experts: Sequence[int], labels: Tensor, rows: Tensor, ids: Tensor) -> list[Information]:
    """Returns what each router tells of the label of a token, which its type decides.

    Args:
        usage: as in `mutual_information`.
        experts: as there.
        labels: (T,) int64 from 0, the same for the same type.
        rows: (T,) int64, each token's row.
        ids: (T,) int64, its type.
    """
    by_row = rows.argsort(stable=True)
    kinds, kind_of = ids.unique(return_inverse=True)
    label_of = labels.new_empty(len(kinds)).index_copy_(0, kind_of, labels)

    def within_rows(generator: torch.Generator) -> Tensor:
        drawn = torch.rand(len(rows), generator=generator, dtype=torch.float64)
        return labels.new_empty(len(labels)).index_copy_(0, by_row, labels[(rows + 0.999 * drawn).argsort()])

    def among_types(generator: torch.Generator) -> Tensor:
        return label_of[torch.randperm(len(kinds), generator=generator)][kind_of]

    ways = (mutual_information(usage, experts, labels, deal) for deal in (within_rows, among_types))
    return [max(pair, key=lambda one: (one.p, one.chance)) for pair in zip(*ways, strict=True)]


def _freely(labels: Tensor) -> Deal:
    return lambda generator: labels[torch.randperm(len(labels), generator=generator)]


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
