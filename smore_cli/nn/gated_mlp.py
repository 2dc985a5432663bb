"""Experts that are whole gated MLPs: each is the backbone's own, with low-rank updates of its three maps.

    E_k(x) = W2_k (act(W1_k x) * W3_k x)              W*_k = W* + scale B*_k A*_k
    y      = F(x) + sum_k w_k (E_k(x) - F(x))         F(x) = W2 (act(W1 x) * W3 x), the backbone's own

Where the weights sum to one this is y = sum_k w_k E_k(x). Where they do not (top-p, a token over an expert's capacity),
the sum alone would rescale the backbone; mixing what the experts *change* leaves it whole, and an adapter whose B are
all zero changes nothing at all, whatever its weights.

The maps of the backbone run once for all experts: W1 x and W3 x are shared, and W2 is linear, so that

    y = W2 (h + sum_k w_k (h_k - h)) + scale B2 [w_k A2_k h_k]_k        h_k = act(W1_k x) * W3_k x, h that of F

Only the hidden states h_k (N, H) are an expert's own. With few picks they are computed pick by pick, not expert by
expert: pick j of all tokens is one product, with the latent of all other experts masked out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from smore_cli.nn.adapted import Adapter, add_projection
from smore_cli.nn.router import report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from smore_cli.nn.router import Router, RouterLoss

__all__ = ["GatedExperts"]

_MAPS = ("gate", "up", "down")


@dataclass(frozen=True)
class _Slot:
    """One expert for each token: the same for all (its block of the stacked ranks), or a pick of each token's own.

    Attributes:
        ranks: the block of the stacked ranks, s r of them, that is used.
        own: (N, s, 1) one-hot, which expert's ranks are the token's own; None: all of `ranks`.
        weight: (N, 1).
    """

    ranks: slice
    own: Tensor | None
    weight: Tensor

    def of(self, latent: Tensor) -> Tensor:
        """Returns the slot's part of a latent (N, s r): a block of it, or all of it, zero but at the token's own."""
        latent = latent[:, self.ranks]
        return latent if self.own is None else _masked(latent, self.own)


class GatedExperts(Adapter):
    """A mixture of gated MLPs that share the backbone's weights; exactly the backbone's own while all B = 0.

    Attributes:
        gate_A, up_A: (s r, d) down vectors of W1 and W3, expert by expert.
        gate_B, up_B: (H, s r) their up vectors.
        down_A, down_B: (s r, H) and (d, s r), those of W2.
        router: one for the whole MLP.
        picks: experts a token has at most; None: up to all of them.
        scale: multiplies the latents, never a wide output.
        dropout: on the inputs of A, while training; one draw of x serves all experts and both maps, the router sees x.
        losses: auxiliary losses of the router.
    """

    up_projections = frozenset({"gate_B", "up_B", "down_B"})

    def __init__(
        self,
        d: int,
        hidden: int,
        *,
        rank: int,
        router: Router,
        picks: int | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
        losses: Sequence[RouterLoss] = (),
    ) -> None:
        super().__init__()
        total = router.num_experts * rank
        self.gate_A, self.gate_B = nn.Parameter(torch.empty(total, d)), nn.Parameter(torch.empty(hidden, total))
        self.up_A, self.up_B = nn.Parameter(torch.empty(total, d)), nn.Parameter(torch.empty(hidden, total))
        self.down_A, self.down_B = nn.Parameter(torch.empty(total, hidden)), nn.Parameter(torch.empty(d, total))
        self.rank, self.router, self.picks = rank, router, picks
        self.scale, self.dropout, self.losses = scale, dropout, tuple(losses)
        self.expert_axes = {f"{name}_{half}": (0, dim) for name in _MAPS for dim, half in enumerate("AB")}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every A as `nn.Linear` initialises, every B = 0 (LoRA, section 4.1)."""
        for name in _MAPS:
            nn.init.kaiming_uniform_(self.get_parameter(f"{name}_A"), a=math.sqrt(5))
            nn.init.zeros_(self.get_parameter(f"{name}_B"))

    def silent_at_start(self) -> frozenset[str]:
        """While all B = 0 every expert is the backbone's MLP: only B have a gradient, and a router that has a loss."""
        reached = {f"{name}_B" for name in _MAPS} | ({"router.weight"} if self.losses else set())
        return frozenset(name for name, _ in self.named_parameters() if name not in reached) | self.without_choice()

    def without_choice(self) -> frozenset[str]:
        """The weight of a router with one expert."""
        return frozenset({"router.weight"} if self.router.num_experts == 1 else ())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Refuses: what the experts do inside the MLP cannot be added to its output; `adapted` is the way in."""
        raise TypeError("experts inside a gated MLP need the MLP, not its output: call adapted(x, base)")

    def adapted(self, x: Tensor, base: nn.Module) -> Tensor:
        """Returns the mixture.

        Args:
            x: (..., d) input of the MLP.
            base: the MLP, with gate_proj, up_proj, down_proj and act_fn.
        """
        rows = x.reshape(-1, x.shape[-1])  # (N, d)
        routing = self.router(x)
        report(routing, self, self.losses)
        dropped = F.dropout(rows, self.dropout, self.training) if self.dropout > 0 else rows
        latents = [F.linear(dropped, A.to(x.dtype)) * self.scale for A in (self.gate_A, self.up_A)]  # (N, s r) each
        mlp = cast("Any", base)
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)  # (..., H)
        inputs = (gate.flatten(0, -2), up.flatten(0, -2), *latents, routing.gates[:, 0].to(x.dtype), mlp.act_fn)
        # Recomputed in the backward pass: of the experts' hidden states, several (N, H) each, nothing is kept.
        mixed, latent = checkpoint(
            self._mix, *inputs, use_reentrant=False, preserve_rng_state=self.dropout > 0 and self.training
        )
        return add_projection(mlp.down_proj(mixed.view(gate.shape)), latent * self.scale, self.down_B)

    def inner_outputs(self, x: Tensor, base: nn.Module) -> dict[str, Tensor]:
        """Returns W x + scale sum_k w_k B_k A_k x for W1 and W3: the experts' inputs of `act`, mixed before it.

        Mixing before `act` is not mixing after it; the last map is fitted to what the MLP gives, and makes up for it.
        """
        weights = self.router(x).gates[:, 0].to(x.dtype)  # (N, s)
        rows, mlp = x.reshape(-1, x.shape[-1]), cast("Any", base)
        each = weights.repeat_interleave(self.rank, 1) * self.scale  # (N, s r)
        found = {}
        for name in ("gate", "up"):
            A, B = self.get_parameter(f"{name}_A").to(x.dtype), self.get_parameter(f"{name}_B").to(x.dtype)
            plain = getattr(mlp, f"{name}_proj")(x)
            found[f"{name}_proj"] = add_projection(plain, F.linear(rows, A) * each, B)
        return found

    def _mix(
        self, gate: Tensor, up: Tensor, h1: Tensor, h3: Tensor, weights: Tensor, act: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Returns the mixed hidden state (N, H) and the weighted latent of W2's experts (N, s r).

        Args:
            gate: (N, H) W1 x.
            up: (N, H) W3 x.
            h1: (N, s r) latents of W1's experts.
            h3: (N, s r) latents of W3's experts.
            weights: (N, s).
            act: the MLP's activation function.
        """
        B1, B3, A2 = (weight.to(gate.dtype) for weight in (self.gate_B, self.up_B, self.down_A))
        plain = act(gate) * up
        mixed, latents = plain, []
        for slot in self._slots(weights):
            own_gate = torch.addmm(gate, slot.of(h1), B1[:, slot.ranks].t())
            own_up = torch.addmm(up, slot.of(h3), B3[:, slot.ranks].t())
            hidden = act(own_gate) * own_up
            mixed = torch.addcmul(mixed, hidden - plain, slot.weight)
            dropped = F.dropout(hidden, self.dropout, self.training) if self.dropout > 0 else hidden
            latent = F.linear(dropped, A2[slot.ranks]) * slot.weight
            latents.append(latent if slot.own is None else _masked(latent, slot.own))
        by_pick = latents[0].shape == h1.shape  # each is as wide as all experts together, and 0 but at its own
        return mixed, torch.stack(latents).sum(0) if by_pick else torch.cat(latents, 1)

    def _slots(self, weights: Tensor) -> Iterator[_Slot]:
        """Yields what each token's picks are, or, where there are as many picks as experts, the experts."""
        s = weights.shape[1]
        if self.picks is None or self.picks >= s:
            for k in range(s):
                yield _Slot(slice(k * self.rank, (k + 1) * self.rank), None, weights[:, k : k + 1])
            return
        best = weights.topk(self.picks, dim=1)
        experts = torch.arange(s, device=weights.device)
        for j in range(self.picks):
            own = (best.indices[:, j : j + 1] == experts).to(weights.dtype)  # (N, s)
            yield _Slot(slice(None), own[..., None], best.values[:, j : j + 1])


def _masked(latent: Tensor, own: Tensor) -> Tensor:
    """Returns a latent (N, s r) with all ranks zero but those of each token's own expert, one-hot (N, s, 1)."""
    return (latent.view(*own.shape[:2], -1) * own).flatten(1)
