"""A loss that pulls the outputs of one expert together and pushes those of different experts apart.

Every picked expert output v_i = B_e A_e x_t of a sequence is an anchor. With c_ij the cosine of v_i and v_j, P_i the
other anchors of the same expert and tau a temperature (supervised contrastive loss, Khosla et al. 2020, eq. 2):

    loss_i = -1/|P_i| sum_(j in P_i) log( exp(c_ij / tau) / sum_(a != i) exp(c_ia / tau) )

and the loss is its mean over the anchors that have both another anchor of their expert and one of a different expert.
Cosines need no wide vector: <v_i, v_j> = h_i^T (B_e^T B_f) h_j.

Only anchors of the same sequence meet, so the sums add up however a step is split into forward passes, and only so
many tokens of a sequence are taken that memory is bounded by (tokens x picks)^2 a sequence, whatever its length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from smore_cli.nn.bank import Bank

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.nn.context import AdapterContext
    from smore_cli.nn.router import Routing

__all__ = ["ContrastiveBank", "ExpertContrastLoss"]


@dataclass(frozen=True)
class ExpertContrastLoss:
    """coefficient * mean of loss_i over all anchors of the step, for the block bank that owns the routing.

    Sums: row 0 the sum of loss_i, row 1 the number of anchors, (2, 1).

    Attributes:
        coefficient: weight of the loss.
        temperature: tau.
        top_k: experts a token uses.
        max_tokens: of each sequence at most so many real tokens are anchors, evenly spaced.
    """

    coefficient: float
    temperature: float
    top_k: int
    max_tokens: int

    def sums(self, routing: Routing, context: AdapterContext) -> Tensor:
        """Returns (2, 1)."""
        latent, bank = cast("Tensor", routing.latent), cast("Bank", routing.owner)
        mask = context.flat_mask(len(latent), latent.device)
        if mask is None or context.token_mask is None:  # without a mask nothing tells where a sequence ends
            mask = latent.new_ones(1, len(latent), dtype=torch.bool)
        else:
            mask = context.by_sequence(mask)
        tokens, real = evenly_spaced(mask, self.max_tokens)  # (b, M)
        if context.places is not None:  # places among the documents, of which each has its own in the batch
            tokens = context.places.to(tokens.device).flatten()[tokens].clamp_min(0)
        picks = routing.gates if routing.picked is None else routing.picked.to(routing.gates.dtype)
        experts = picks.squeeze(1)[tokens].topk(self.top_k, -1).indices  # (b, M, k)
        with torch.autocast(latent.device.type, enabled=False):
            wide = torch.promote_types(latent.dtype, torch.float32)
            cosines = self._cosines(latent.to(wide)[tokens], experts, bank.B.to(wide), picks.shape[-1])
            losses, counted = self._losses(cosines, experts.flatten(1), real.repeat_interleave(self.top_k, 1))
            return torch.stack([losses.sum(), counted.sum().to(losses.dtype)])[:, None]

    def __call__(self, sums: Tensor) -> Tensor:
        """Maps (..., 2, 1) to (...); 0 where there was nothing to contrast."""
        losses, anchors = sums.squeeze(-1).unbind(-1)
        return self.coefficient * losses / anchors.clamp_min(1)

    @staticmethod
    def _cosines(latent: Tensor, experts: Tensor, up: Tensor, num_experts: int) -> Tensor:
        """Returns the cosines of all pairs of anchors, (b, M k, M k), from latents (b, M, s r) and picks (b, M, k)."""
        rows = latent.view(*latent.shape[:2], num_experts, -1)  # (b, M, s, r)
        own = (experts[..., None] == torch.arange(num_experts, device=experts.device)).to(rows.dtype)  # (b, M, k, s)
        alone = (own[..., None] * rows[:, :, None]).flatten(1, 2).flatten(2)  # (b, M k, s r), one expert's latent each
        products = (alone @ (up.t() @ up)) @ alone.mT
        # The small number keeps value and gradient finite, and the gradient zero, while B = 0.
        inverse = (products.diagonal(dim1=1, dim2=2).clamp_min(0) + 1e-12).rsqrt()
        cosines: Tensor = products * inverse[:, :, None] * inverse[:, None, :]
        return cosines

    def _losses(self, cosines: Tensor, experts: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Returns loss_i, 0 where it does not count, and whether it counts, both (b, M k)."""
        itself = torch.eye(experts.shape[1], dtype=torch.bool, device=experts.device)
        others = real[:, :, None] & real[:, None, :] & ~itself
        same = experts[:, :, None] == experts[:, None, :]
        positives, negatives = others & same, others & ~same
        logits = (cosines / self.temperature).masked_fill(~others, torch.finfo(cosines.dtype).min)
        attraction = torch.where(positives, torch.log_softmax(logits, -1), 0.0).sum(-1)
        counted = positives.any(-1) & negatives.any(-1)
        losses = -attraction / positives.sum(-1).clamp_min(1)
        return torch.where(counted, losses, 0.0), counted


class ContrastiveBank(Bank):
    """A bank with an `ExpertContrastLoss`, which differentiates through A and B but not through what was picked."""

    def silent_at_start(self) -> frozenset[str]:
        """As `Bank`; the contrast is flat while B = 0 and never reaches the router."""
        if any(not isinstance(loss, ExpertContrastLoss) for loss in self.losses):
            return super().silent_at_start()
        return frozenset(name for name, _ in self.named_parameters() if name != "B")


def evenly_spaced(mask: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Picks at most `most` real tokens of each sequence, evenly spaced; padding does not change which.

    Args:
        mask: (b, S) bool, true on real tokens.
        most: how many.

    Returns:
        Their places among the b S tokens, (b, M), and which of these are real tokens, (b, M) bool.
    """
    b, length = mask.shape
    wanted = min(most, length)
    real = mask.sum(1, keepdim=True)  # (b, 1)
    ranks = torch.arange(wanted, device=mask.device) * real.clamp_min(wanted) // wanted  # (b, M)
    places = (~mask).to(torch.uint8).argsort(dim=1, stable=True)  # real tokens first, in their order
    start = torch.arange(b, device=mask.device)[:, None] * length
    return places.gather(1, ranks.clamp_max(length - 1)) + start, ranks < real
