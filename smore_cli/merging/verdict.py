"""What a merge kept of the adapter: backbone, routed and merged model on the same text, source by source.

    gain kept = (loss_backbone - loss_merged) / (loss_backbone - loss_routed)      loss: on the tokens the run learns
    KL(routed || merged) and equal first choices, mean over all tokens

Of the routed model, which is gone when the merged one is read, the log-probabilities of some tokens are held.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smore_cli.merging.calibration import Corpus, batches_of
from smore_cli.merging.streams import context_of
from smore_cli.merging.verify import Difference, difference
from smore_cli.models.forward import target_logits, target_logprobs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel


__all__ = ["Reading", "SourceVerdict", "Verdict", "judge", "read"]

COMPARED_TOKENS = 2048
"""Tokens of all sources together whose logits are held: 0.4 GB for a vocabulary of 49,152."""


@dataclass(frozen=True)
class Reading:
    """One model on one source.

    Attributes:
        loss: mean negative log-likelihood of the supervised tokens, in nats.
        supervised: how many these are.
        logits: (tokens, vocabulary) float32 for each batch of the first rows; none where they are not wanted.
    """

    loss: float
    supervised: int
    logits: list[Tensor]


@dataclass(frozen=True)
class SourceVerdict:
    """The three models on one source.

    Attributes:
        origin: the source.
        supervised: tokens that the losses are means over.
        base, routed, merged: their losses in nats.
        difference: merged against routed, over all tokens of the first rows.
    """

    origin: str
    supervised: int
    base: float
    routed: float
    merged: float
    difference: Difference

    @property
    def gain_kept(self) -> float | None:
        """The share of the adapter's gain that the merge has; None where the adapter gained nothing."""
        gain = self.base - self.routed
        return (self.base - self.merged) / gain if gain > 0 else None

    def document(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return {
            "source": self.origin,
            "supervised_tokens": self.supervised,
            "loss": {"base": self.base, "routed": self.routed, "merged": self.merged},
            "gain_kept": self.gain_kept,
            "mean_kl": self.difference.mean_kl,
            "top1_agreement": self.difference.top1_agreement,
            "max_abs_logit": self.difference.max_abs_logit,
            "compared_tokens": self.difference.tokens,
        }


@dataclass(frozen=True)
class Verdict:
    """All sources.

    Attributes:
        sources: at least one.
        role: what they are to the run.
    """

    sources: list[SourceVerdict]
    role: str

    @property
    def difference(self) -> Difference:
        """Merged against routed over the tokens of all sources."""
        parts = [source.difference for source in self.sources]
        tokens = sum(part.tokens for part in parts)

        def mean(name: str) -> float:
            return sum(float(getattr(part, name)) * part.tokens for part in parts) / tokens

        largest = max(part.max_abs_logit for part in parts)
        return Difference(largest, mean("mean_kl"), mean("top1_agreement"), tokens)

    @property
    def whole(self) -> SourceVerdict:
        """All sources as one, each token counting the same."""
        supervised = sum(source.supervised for source in self.sources)

        def mean(name: str) -> float:
            return sum(float(getattr(s, name)) * s.supervised for s in self.sources) / max(supervised, 1)

        losses = mean("base"), mean("routed"), mean("merged")
        return SourceVerdict("all", supervised, *losses, self.difference)

    def document(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return {"role": self.role, "sources": [s.document() for s in self.sources], "all": self.whole.document()}

    def lines(self) -> list[str]:
        """Returns the verdict for people: one line a source, and one for all."""
        shown = [*self.sources, self.whole] if len(self.sources) > 1 else self.sources
        width = max(len(source.origin) for source in shown)
        head = f"{'':{width}}  {'backbone':>8} {'routed':>8} {'merged':>8} {'kept':>7}  {'KL':>8} {'top-1':>8}"
        lines = [f"loss on {self.role}, gain kept, KL from the routed model, same first choice:", head]
        for source in shown:
            kept = "-" if source.gain_kept is None else f"{100 * source.gain_kept:.1f} %"
            apart = source.difference
            lines.append(
                f"{source.origin:{width}}  {source.base:8.4f} {source.routed:8.4f} {source.merged:8.4f} {kept:>7}  "
                f"{apart.mean_kl:8.1e} {100 * apart.top1_agreement:6.1f} %"
            )
        return lines


@torch.inference_mode()
def read(model: PreTrainedModel, corpora: Sequence[Corpus], pad_token_id: int, *, logits: bool = True) -> list[Reading]:
    """Reads every source with a model as it is.

    Args:
        model: in evaluation mode, with or without an active adapter.
        corpora: the sources.
        pad_token_id: fills shorter rows.
        logits: whether those of the first rows are wanted.
    """
    model.train(False)
    room = COMPARED_TOKENS // len(corpora)
    return [_read(model, corpus, pad_token_id, room if logits else 0) for corpus in corpora]


def _read(model: PreTrainedModel, corpus: Corpus, pad_token_id: int, room: int) -> Reading:
    nll, supervised = 0.0, 0
    for batch in batches_of(corpus.rows, pad_token_id):
        batch = batch.to(model.device)
        with context_of(model, batch):
            nll -= float(target_logprobs(model, batch).double().sum())
        supervised += len(batch.targets)
    logits = []
    for row in corpus.rows:
        if room <= 0:
            break
        (batch,) = batches_of([row], pad_token_id)
        batch = batch.to(model.device)
        everywhere = torch.arange(min(row.length, room), device=model.device)
        with context_of(model, batch):
            logits.append(target_logits(model, replace(batch, sources=everywhere)).float().cpu())
        room -= row.length
    return Reading(nll / max(supervised, 1), supervised, logits)


def judge(
    corpora: Sequence[Corpus], role: str, base: Sequence[Reading], routed: Sequence[Reading], merged: Sequence[Reading]
) -> Verdict:
    """Returns the verdict on readings of the same sources."""
    sources = [
        SourceVerdict(c.origin, r.supervised, b.loss, r.loss, m.loss, difference(r.logits, m.logits))
        for c, b, r, m in zip(corpora, base, routed, merged, strict=True)
    ]
    return Verdict(sources, role)
