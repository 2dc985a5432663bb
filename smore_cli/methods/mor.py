"""MoR: several routers vote on the experts of a token, and a main router weighs their votes.

    y = W x + b + (alpha / r) sum_{e in top-k} g_e B_e A_e x      g = the k largest of p, made to sum to 1
    p = sum_k w_k softmax(G_k x)                                  w = softmax(G_0 x)

    x --+--G_1, ..., G_K--> K distributions --( weighted by w )--> p --> top-k --+
        +--G_0--> w                                                              |
        +-- A_e --> (r) --( g_e )-- B_e -----------------------------------------+--> + y

Paper: Zhang et al., "Mixture of Routers", https://arxiv.org/abs/2503.23362. Only the abstract and summaries were
available here (the paper's code is on an anonymous host): several sub-routers select together, a learnable main router
weighs them, two sub-routers are nearly as good as more, and a load-balancing loss is part of it. It is a plug-in: the
paper puts it on MixLoRA and MoLA; here the experts are plain LoRA experts on every linear map.

ASSUMPTIONS: the main router weighs all sub-routers, by a softmax; distributions are mixed, not logits; the k experts
are picked after mixing, from the mixed distribution, and their weights made to sum to 1; the balance loss is Switch's,
of the mixed distribution, with coefficient 0.001; 8 experts of rank 8, 2 of them for a token, alpha 16, dropout 0.05
(MoLA's).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from smore_cli.methods import MethodConfig, Site, require_top_k

if TYPE_CHECKING:
    from smore_cli.nn import Adapter


class MoRConfig(MethodConfig):
    """`method: mor`."""

    title: ClassVar[str] = "MoR: a mixture of routers"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.23362"

    method: Literal["mor"] = "mor"
    num_experts: Annotated[int, Field(description="experts of each adapted map", ge=1)] = 8
    num_routers: Annotated[int, Field(description="K, the sub-routers; 1 is plain top-k routing", ge=1)] = 2
    top_k: Annotated[int, Field(description="experts a token goes to; their weights are made to sum to 1", ge=1)] = 2
    rank: Annotated[int, Field(description="r, the rank of each expert", ge=1)] = 8
    alpha: Annotated[float, Field(description="the update is scaled by alpha / r", gt=0)] = 16.0
    dropout: Annotated[float, Field(description="dropout on the input of A", ge=0, lt=1)] = 0.05
    aux_loss_coefficient: Annotated[float, Field(description="weight of each mixture's balance loss", ge=0)] = 1e-3

    @model_validator(mode="after")
    def _consistent(self) -> MoRConfig:
        require_top_k(self.top_k, self.num_experts)
        if self.num_routers > 1 and self.num_experts == 1:
            raise ValueError(f"num_routers: {self.num_routers} routers have nothing to choose from a single expert")
        return self

    def build(self, site: Site) -> Adapter:
        """Returns a `Bank` with a block core and a mixture of routers."""
        from smore_cli.nn.balance import SwitchBalanceLoss
        from smore_cli.nn.bank import BLOCK_EXPERTS, Bank
        from smore_cli.nn.mixture_router import MixtureRouter
        from smore_cli.nn.selection import TopK

        s = self.num_experts
        balanced = self.aux_loss_coefficient > 0 and self.top_k < s  # where all are picked there is nothing to balance
        return Bank(
            site.in_features,
            site.out_features,
            down=s * self.rank,
            up=s * self.rank,
            router=MixtureRouter(site.in_features, s, num_routers=self.num_routers, select=TopK(self.top_k)),
            scale=self.alpha / self.rank,
            dropout=self.dropout,
            losses=[SwitchBalanceLoss(self.aux_loss_coefficient)] if balanced else [],
            expert_axes=BLOCK_EXPERTS,
        )

    def num_parameters(self, site: Site) -> int:
        """Each of the s experts has r (d_in + d_out); K sub-routers s d_in each; the main router K d_in, if K > 1."""
        s, routers = self.num_experts, self.num_routers
        main = routers if routers > 1 else 0
        experts = s * self.rank * (site.in_features + site.out_features)
        return experts + (routers * s + main) * site.in_features

    def num_active_parameters(self, site: Site) -> int:
        """Without the experts that are not picked."""
        unused = self.num_experts - self.top_k
        return self.num_parameters(site) - unused * self.rank * (site.in_features + site.out_features)
