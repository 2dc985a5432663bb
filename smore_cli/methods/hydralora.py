"""HydraLoRA: one shared down-projection, several up-projections, mixed anew for every token.

    y = W x + b + (alpha / r) sum_e w_e B_e A x          w = softmax(R x)

                     +-- B_1 --+
    x --A--> (r) ----+-- B_2 --+--( weighted by w )--> + y
                     +-- B_s --+

Paper: Tian et al., "HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning" (NeurIPS 2024),
https://arxiv.org/abs/2404.19245

Deviations: the number of heads is a setting; the paper finds it by clustering the corpus. There is no auxiliary loss,
as in the paper (the released code has one that is always zero). All linear maps are adapted unless `target_modules`
says otherwise (the released script: gate, up and down; the paper's tables: q and v, by their sizes).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from smore_cli.methods import MethodConfig, Site

if TYPE_CHECKING:
    from smore_cli.nn import Adapter


class HydraLoRAConfig(MethodConfig):
    """`method: hydralora`."""

    title: ClassVar[str] = "HydraLoRA: one A, several B"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.19245"

    method: Literal["hydralora"] = "hydralora"
    num_experts: Annotated[int, Field(description="up-projections (heads) B_e", ge=1)] = 4
    rank: Annotated[int, Field(description="r, the rank of each head and of the shared A", ge=1)] = 4
    alpha: Annotated[float, Field(description="the update is scaled by alpha / r", gt=0)] = 32.0
    dropout: Annotated[float, Field(description="dropout on the input of A", ge=0, lt=1)] = 0.05

    def build(self, site: Site) -> Adapter:
        """Returns a `Bank` with a fan core."""
        from smore_cli.nn.bank import Bank, fan
        from smore_cli.nn.router import Router

        return Bank(
            site.in_features,
            site.out_features,
            down=self.rank,
            up=self.num_experts * self.rank,
            router=Router(site.in_features, self.num_experts),
            core=fan,
            scale=self.alpha / self.rank,
            dropout=self.dropout,
            expert_axes={"B": (0, 1)},
        )

    def num_parameters(self, site: Site) -> int:
        """A has r d_in, the heads s r d_out, the router s d_in."""
        s, r = self.num_experts, self.rank
        return r * site.in_features + s * r * site.out_features + s * site.in_features
