"""How sure a router is: entropies of its distribution, routing that depends on them, and the loss that lowers them.

    Tsallis   S_q(p) = (1 - sum_n p_n^q) / (q - 1)        largest, at p = 1/s:  (1 - s^(1-q)) / (q - 1)
    Renyi     R_q(p) = ln(sum_n p_n^q) / (1 - q)          largest:              ln s
    Both become Shannon's -sum_n p_n ln p_n at q = 1; normalised, they are divided by their largest value.

An eps > 0 is added to every p_n, with nothing divided afterwards, as DynMoLE's released code does. The sum of the
p_n + eps is then 1 + s eps, which shifts S_q by -s eps / (q - 1): nothing at q = 1.1, without bound as q nears 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch.autograd.function import once_differentiable

from smore_cli.nn.balance import masked_sum
from smore_cli.nn.selection import Selector, TopP

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.nn.context import AdapterContext
    from smore_cli.nn.router import Routing

__all__ = ["Entropy", "EntropyHybrid", "EntropyLoss", "renyi", "tsallis"]


def tsallis(p: Tensor, q: float, eps: float = 0.0) -> Tensor:
    """Returns S_q(p + eps), (..., s) to (...), accurate for any q > 0 however near 1.

    p must sum to 1: with that, S_q = -sum_n p_n (p_n^(q-1) - 1) / (q - 1), which has no difference of nearly equal
    numbers and is Shannon's entropy term by term as q -> 1.
    """
    return cast("Tensor", _Tsallis.apply(p, q, eps))


class _Tsallis(torch.autograd.Function):
    """dS_q / dp_n = -1 - (p_n^(q-1) - 1) q / (q - 1), at q = 1 -1 - ln p_n: three passes; plain autograd has ten."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: float, eps: float) -> Tensor:
        p = p + eps
        log = p.clamp_min(torch.finfo(p.dtype).tiny).log()  # the factor p makes the term of p = 0 exactly 0
        power = log if q == 1 else torch.expm1((q - 1) * log)
        ctx.save_for_backward(power)
        ctx.q = q
        total = -(p * power).sum(-1)
        return total if q == 1 else (total - p.shape[-1] * eps) / (q - 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (power,) = ctx.saved_tensors
        slope = -1 - power * (1 if ctx.q == 1 else ctx.q / (ctx.q - 1))
        return slope.mul_(grad[..., None]), None, None


def renyi(p: Tensor, q: float, eps: float = 0.0) -> Tensor:
    """Returns R_q(p + eps), (..., s) to (...), accurate for any q > 0 however near 1; p must sum to 1."""
    if abs(q - 1) < 0.5:  # ln(sum p^q) of a sum near 1, from its distance to 1
        raw = tsallis(p, q, eps)
        return raw if q == 1 else torch.log1p((1 - q) * raw) / (1 - q)
    p = p + eps
    powers = (q * p.clamp_min(torch.finfo(p.dtype).tiny).log()).masked_fill(p <= 0, -math.inf)
    return torch.logsumexp(powers, -1) / (1 - q)


@dataclass(frozen=True)
class Entropy:
    """An entropy of a distribution over s experts.

    Attributes:
        q: the order, above 0; at 1 it is Shannon's.
        kind: tsallis or renyi.
        eps: added to every probability.
        normalised: whether it is divided by its largest value, so that a uniform distribution has 1.
    """

    q: float = 1.0
    kind: Literal["tsallis", "renyi"] = "tsallis"
    eps: float = 0.0
    normalised: bool = True

    def __call__(self, probabilities: Tensor) -> Tensor:
        """Maps (..., s) to (...); 0 for a single expert, which leaves nothing to be unsure of."""
        s = probabilities.shape[-1]
        if s == 1:
            return probabilities[..., 0] * 0
        raw = (tsallis if self.kind == "tsallis" else renyi)(probabilities, self.q, self.eps)
        return raw / self.largest(s) if self.normalised else raw

    def largest(self, s: int) -> float:
        """Returns the entropy of the uniform distribution over s experts (with eps = 0), before any division."""
        log = math.log(s)
        return log if self.kind == "renyi" or self.q == 1 else math.expm1((1 - self.q) * log) / (1 - self.q)


@dataclass(frozen=True)
class EntropyHybrid(Selector):
    """Every expert for a token whose router is unsure, else the selection `sparse` (DynMoLE).

    Attributes:
        sparse: what is picked at low entropy; it also says whether gates are renormalised.
        entropy: the measure.
        threshold: a token is unsure if its entropy is above it, not at it. At or above the largest entropy (1 for a
            normalised one) no token is, even where rounding or eps puts its entropy higher.
    """

    sparse: TopP
    entropy: Entropy
    threshold: float

    @property
    def renormalise(self) -> bool:  # type: ignore[override]
        """As the selection at low entropy says."""
        return self.sparse.renormalise

    def mask(self, probabilities: Tensor) -> Tensor:
        """Returns which experts are picked, (..., s) bool."""
        picked = self.sparse.mask(probabilities)
        if self.may_be_unsure(probabilities.shape[-1]):
            picked = picked | (self.entropy(probabilities.detach()) > self.threshold)[..., None]
        return picked

    def may_be_unsure(self, s: int) -> bool:
        """Whether the entropy of s experts can be above the threshold."""
        return self.threshold < (1.0 if self.entropy.normalised else self.entropy.largest(s))


@dataclass(frozen=True)
class EntropyLoss:
    """coefficient * mean_t H(p_t): pushes a router towards being sure.

    Sums, of one column: row 0 the entropies, row 1 the number of routing decisions.

    Attributes:
        coefficient: weight of the loss.
        entropy: the measure H.
        padding: whether padding counts too, as in DynMoLE's released code.
    """

    coefficient: float
    entropy: Entropy
    padding: bool = False

    def sums(self, routing: Routing, context: AdapterContext) -> Tensor:
        """Returns (2, 1)."""
        entropies = self.entropy(routing.probabilities)[..., None]  # (N, G, 1)
        weights, tokens = (None, len(entropies)) if self.padding else context.weights(entropies)
        decisions = entropies.new_ones(1) * (tokens * entropies.shape[1])
        return torch.stack([masked_sum(entropies, weights), decisions])

    def __call__(self, sums: Tensor) -> Tensor:
        """Maps (..., 2, 1) to (...); 0 where no decision was counted."""
        total, decisions = sums.squeeze(-1).unbind(-1)
        return self.coefficient * total / decisions.clamp_min(1)
