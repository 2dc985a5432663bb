"""MoDE: one shared down-projection, and for each of its ranks a choice of up vectors with a router of its own.

    y = W x + b + sum_j sum_i g_ji(x) a_j(x) b_ji        a = A x,  g_j = softmax(R_j x) over the m vectors b_j1 ... b_jm

    x --A--> a_1 --( g_1 )--> b_11 ... b_1m --+
         +-> a_2 --( g_2 )--> b_21 ... b_2m --+--> + y          m^r combinations, where m LoRA experts give m
         +-> ...

With `ranks_per_gate` p, every p neighbouring ranks share a gate (the paper's rank-p generalisation, "m x r x p"):
1 x r x r is LoRA, m x r x r a mixture of m LoRA experts with a shared A.

Paper: Ning et al., "MoDE: Effective Multi-task Parameter Efficient Fine-Tuning with a Mixture of Dyadic Experts"
(Findings of NAACL 2025), https://arxiv.org/abs/2408.01505. No code was released. Defaults: 6 x 4, the best of the
paper's table. There is no auxiliary loss and no alpha in the paper; `alpha` is an addition.

ASSUMPTION: A starts as `nn.Linear` does and every b at 0, as in LoRA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from smore_cli.methods import MethodConfig, Site

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.nn import Adapter


def dyad(latent: Tensor, gates: Tensor) -> Tensor:
    """Dyad core, z_ij = g_ij h_j: latent (N, r) and gates (N, P, m) to (N, m r), P groups of r / P ranks.

    The up vectors lie choice by choice: first all b_j1, one a rank, then all b_j2.
    """
    groups = gates.shape[1]
    grouped = latent.view(len(latent), 1, groups, -1)  # (N, 1, P, p)
    return (gates.transpose(1, 2)[..., None] * grouped).flatten(1)  # (N, m, P, 1) * (N, 1, P, p)


class MoDEConfig(MethodConfig):
    """`method: mode`."""

    title: ClassVar[str] = "MoDE: dyadic experts, a router for every rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2408.01505"

    method: Literal["mode"] = "mode"
    num_experts: Annotated[int, Field(description="m, up vectors that each rank chooses from", ge=1)] = 6
    rank: Annotated[int, Field(description="r, the rank of the shared A", ge=1)] = 4
    ranks_per_gate: Annotated[int, Field(description="p, neighbouring ranks that share a gate", ge=1)] = 1
    alpha: Annotated[
        float | None, Field(description="scale the update by alpha / r; default: by 1, as the paper does", gt=0)
    ] = None
    dropout: Annotated[float, Field(description="dropout on the input of A", ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> MoDEConfig:
        if self.rank % self.ranks_per_gate:
            raise ValueError(f"ranks_per_gate: {self.rank} ranks cannot be split into groups of {self.ranks_per_gate}")
        return self

    def build(self, site: Site) -> Adapter:
        """Returns a `Bank` with a dyad core and a router with one group for every gate."""
        from smore_cli.nn.bank import Bank
        from smore_cli.nn.router import Router

        return Bank(
            site.in_features,
            site.out_features,
            down=self.rank,
            up=self.num_experts * self.rank,
            router=Router(site.in_features, self.num_experts, groups=self.rank // self.ranks_per_gate),
            core=dyad,
            scale=1.0 if self.alpha is None else self.alpha / self.rank,
            dropout=self.dropout,
            expert_axes={"B": (0, 1)},
        )

    def num_parameters(self, site: Site) -> int:
        """A has r d_in, the up vectors m r d_out, the routers (r / p) m d_in."""
        m, r, gates = self.num_experts, self.rank, self.rank // self.ranks_per_gate
        return r * site.in_features + m * r * site.out_features + gates * m * site.in_features
