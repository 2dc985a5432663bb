"""How far two models are apart, measured on text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["Difference", "difference", "logits_of"]


@dataclass(frozen=True)
class Difference:
    """The second model against the first, over all tokens of some text.

    Attributes:
        max_abs_logit: largest difference of any logit.
        mean_kl: KL(first || second) of the next-token distributions in nats, mean over tokens.
        top1_agreement: share of tokens after which both think the same token most likely.
        tokens: how many.
    """

    max_abs_logit: float
    mean_kl: float
    top1_agreement: float
    tokens: int


@torch.inference_mode()
def logits_of(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Returns float32 logits (tokens, vocabulary) of each text on the CPU, one text at a time and so without padding.

    Args:
        model: a causal language model.
        texts: token ids; keep them few, a token takes 4 bytes for each entry of the vocabulary.
    """
    model.train(False)
    inputs = (torch.tensor([list(ids)], device=model.device) for ids in texts)
    return [model(input_ids=ids).logits[0].float().cpu() for ids in inputs]


@torch.inference_mode()
def difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> Difference:
    """Returns how far the logits of two models on the same texts are apart.

    Args:
        first: the reference, (tokens, vocabulary) for each text.
        second: the other, the same shapes.
    """
    largest = kl = agreed = 0.0
    tokens = 0
    for p, q in zip(first, second, strict=True):
        largest = max(largest, float((p - q).abs().max()))
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)  # a KL of 1e-9 is lost in float32
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        agreed += float((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(p)
    return Difference(largest, kl / tokens, agreed / tokens, tokens)
