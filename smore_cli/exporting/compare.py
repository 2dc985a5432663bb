"""The same prompts through ours and through the program an export is for: where do their answers part?

Both continue each prompt with their most probable token, with whatever cache they have. Up to the first token that
differs both have read the same text, so that there

    |log p_ours(t) - log p_theirs(t)|          t: the tokens that ours chose

is a number in nats that rounding explains or does not. Its mean decides: a choice between two tokens of nearly the same
probability may fall either way, and so may a router's pick, which moves one token far. Both are shown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["NEW_TOKENS", "Divergence", "Step", "Verdict", "Writer", "answers", "greedy", "judge"]

NEW_TOKENS = 16
"""Tokens each prompt is continued by."""
_KEPT = 256  # most probable tokens that a step keeps


@dataclass(frozen=True)
class Step:
    """One token of an answer.

    Attributes:
        token: the most probable one.
        logprobs: log-probabilities by token, in nats, of at least the most probable ones; empty: they are not known.
    """

    token: int
    logprobs: dict[int, float]

    def of(self, token: int) -> float:
        """Returns a token's log-probability, minus infinity for one that is not among the most probable."""
        return self.logprobs.get(token, -math.inf) if self.logprobs else math.nan


class Writer(Protocol):
    """Continues token ids greedily."""

    def __call__(self, prompt: Sequence[int], new_tokens: int) -> list[Step]:
        """Returns a step for each new token; fewer where the model ends its answer."""
        ...


@dataclass(frozen=True)
class Divergence:
    """The first token that the two choose differently.

    Attributes:
        prompt: number of the prompt, from 1.
        position: number of the new token, from 1.
        ours: the token of ours, and its log-probability in ours and in theirs.
        theirs: the token of theirs, and its log-probability in ours and in theirs.
    """

    prompt: int
    position: int
    ours: tuple[int, float, float]
    theirs: tuple[int, float, float]


@dataclass(frozen=True)
class Verdict:
    """How far apart the answers are.

    Attributes:
        prompts: how many were continued.
        tokens: how many log-probabilities were compared.
        mean: the mean difference, in nats.
        largest: the largest.
        tolerance: what mean is allowed; None: nothing is refused, the difference is what the format costs.
        divergence: the first diverging token; None: all tokens are the same.
    """

    prompts: int
    tokens: int
    mean: float
    largest: float
    tolerance: float | None
    divergence: Divergence | None

    @property
    def passed(self) -> bool:
        """Whether the mean is within the tolerance; what is not a number is not."""
        return self.tolerance is None or self.mean <= self.tolerance

    def lines(self, show: Any) -> list[str]:
        """Returns the verdict for people.

        Args:
            show: turns a token id into text.
        """
        allowed = "" if self.tolerance is None else f", {self.tolerance:g} allowed"
        first = (
            f"log-probabilities differ by {self.mean:.1e} nats{allowed} (mean of {self.tokens} tokens after "
            f"{self.prompts} prompts; largest {self.largest:.1e})"
        )
        if (found := self.divergence) is None:
            return [first, "no token differs"]
        (a, a_ours, a_theirs), (b, b_ours, b_theirs) = found.ours, found.theirs
        return [
            first,
            f"first diverging token: prompt {found.prompt}, token {found.position}: ours {show(a)!r} "
            f"({a_ours:.4f}, there {a_theirs:.4f}), theirs {show(b)!r} ({b_theirs:.4f}, ours {b_ours:.4f})",
        ]


def answers(writer: Writer, prompts: Sequence[Sequence[int]]) -> list[list[Step]]:
    """Returns what a writer says after each prompt."""
    return [writer(prompt, NEW_TOKENS) for prompt in prompts]


def judge(ours: Sequence[list[Step]], theirs: Sequence[list[Step]], *, tolerance: float | None) -> Verdict:
    """Returns how far apart two sets of answers to the same prompts are."""
    differences: list[float] = []
    first: Divergence | None = None
    for number, (own, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        for position, (a, b) in enumerate(zip(own, other, strict=False), start=1):
            if b.logprobs:
                differences.append(abs(a.of(a.token) - b.of(a.token)))
            if a.token != b.token:
                at = (a.token, a.of(a.token), b.of(a.token)), (b.token, a.of(b.token), b.of(b.token))
                first = first or Divergence(number, position, *at)
                break
    known = differences if differences and not any(map(math.isnan, differences)) else [math.nan]
    return Verdict(len(ours), len(differences), sum(known) / len(known), max(known), tolerance, first)


def greedy(model: Any) -> Writer:
    """Returns what continues by a causal language model of transformers, with its key-value cache."""

    @torch.inference_mode()
    def write(prompt: Sequence[int], new_tokens: int) -> list[Step]:
        cache, steps = None, []
        ids = torch.tensor([list(prompt)], device=model.device)  # (1, S)
        for _ in range(new_tokens):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(_step(out.logits[0, -1]))
            ids = torch.tensor([[steps[-1].token]], device=model.device)
        return steps

    model.eval()
    return write


def _step(logits: Tensor) -> Step:
    """Returns the step that logits (V,) lead to."""
    best = logits.double().log_softmax(-1).topk(min(_KEPT, len(logits)))
    tokens = best.indices.tolist()
    return Step(tokens[0], dict(zip(tokens, best.values.tolist(), strict=True)))
