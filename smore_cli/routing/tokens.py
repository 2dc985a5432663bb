"""Each token's use of the experts, kept token by token: for what depends on which token it was, and in which row.

    u_te = sum_parents |g_te| / sum_e sum_parents |g_te|          so that a token counts 1, however it is routed

It takes 4 bytes an expert and token: 128 rows of 40 tokens through 90 routers of 8 experts are 15 MB.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Usage", "UsageLog", "top_tokens"]

TOP = 5
"""Tokens of an expert that are named."""
AROUND = 8
"""Tokens before and after one that is shown in context."""


@dataclass
class Usage:
    """The tokens that were counted, and how they used the experts of each router.

    Attributes:
        ids: (T,) int64, which token each is.
        rows: (T,) int64, which row it is of.
        places: (T,) int64, where in that row.
        texts: token ids of each row, as they were laid out (branches one after the other).
        experts: by router (module, level), (T, s) float32, rows summing to 1.
    """

    ids: Tensor
    rows: Tensor
    places: Tensor
    texts: dict[int, list[int]]
    experts: dict[tuple[str, int], Tensor]


@dataclass
class UsageLog:
    """Gathers a `Usage` over forward passes."""

    parts: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    ids: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)
    texts: dict[int, list[int]] = field(default_factory=dict)

    def add_pass(self, input_ids: Tensor, counted: Tensor, real: Tensor, rows: list[int]) -> None:
        """Adds the tokens of a pass.

        Args:
            input_ids: (B, S).
            counted: (B, S) bool, those that count.
            real: (B, S) bool, those that are no padding.
            rows: number of each of the B rows.
        """
        line, place = counted.nonzero(as_tuple=True)
        self.ids.append(input_ids[counted].cpu())
        self.rows.append(torch.tensor(rows)[line.cpu()])
        self.places.append(place.cpu())
        for b, row in enumerate(rows):
            self.texts[row] = input_ids[b][real[b]].tolist()

    def add(self, key: tuple[str, int], gates: Tensor) -> None:
        """Adds what a router gave the counted tokens: (n, F, s)."""
        weight = gates.abs().sum(1)
        share = weight / weight.sum(-1, keepdim=True).clamp_min(1e-30)
        self.parts.setdefault(key, []).append(share.float().cpu())

    def usage(self) -> Usage:
        """Returns everything."""
        experts = {key: torch.cat(parts) for key, parts in self.parts.items()}
        return Usage(torch.cat(self.ids), torch.cat(self.rows), torch.cat(self.places), self.texts, experts)


def top_tokens(
    usage: Usage, key: tuple[str, int], tokenizer: PreTrainedTokenizerBase, *, contexts: int = 0
) -> list[list[dict[str, Any]]]:
    """Returns for each expert the tokens that use it most beyond its mean: those with the largest sum of u_te - p(e).

    Args:
        usage: of some text.
        key: of the router.
        tokenizer: names the tokens.
        contexts: how many places of each are shown with what stands around them.

    Returns:
        For each expert `{token, count, usage, contexts}`: text, occurrences, mean of u_te over them, and the places.
    """
    share = usage.experts[key].double()
    kinds, inverse, counts = usage.ids.unique(return_inverse=True, return_counts=True)
    sums = share.new_zeros(len(kinds), share.shape[1]).index_add_(0, inverse, share)
    beyond = sums - counts[:, None] * share.mean(0)
    found: list[list[dict[str, Any]]] = []
    for expert in range(share.shape[1]):
        best = beyond[:, expert].argsort(descending=True, stable=True)[:TOP].tolist()
        found.append(
            [
                {
                    "token": tokenizer.decode([int(kinds[kind])]),
                    "count": int(counts[kind]),
                    "usage": float(sums[kind, expert] / counts[kind]),
                    "contexts": _contexts(usage, share[:, expert], inverse == kind, tokenizer, contexts),
                }
                for kind in best
                if beyond[kind, expert] > 1e-9
            ]
        )
    return found


def _contexts(
    usage: Usage, share: Tensor, which: Tensor, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[dict[str, Any]]:
    """Returns the places of a token that use the expert most, with what stands around them."""
    places = which.nonzero().flatten()
    best = places[share[places].argsort(descending=True, stable=True)[:count]].tolist()
    shown = []
    for index in best:
        text, at = usage.texts[int(usage.rows[index])], int(usage.places[index])
        before, after = text[max(0, at - AROUND) : at], text[at + 1 : at + 1 + AROUND]
        shown.append(
            {
                "before": tokenizer.decode(before),
                "token": tokenizer.decode([text[at]]),
                "after": tokenizer.decode(after),
                "usage": float(share[index]),
            }
        )
    return shown
