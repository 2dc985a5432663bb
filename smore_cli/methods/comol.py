"""CoMoL: one LoRA with a small square matrix between A and B that is mixed for every token; routed in rank space.

    y = W x + b + (alpha / r) B (sum_e g_e M_e)^T A x      h = A x,  g = softmax(R h),  M_e: (r, r)

                 +--R--> g ------------------------+
      x --A--> (r) --+-- M_1^T --+                 |
                     +-- ...     +--( weighted by g )--> (r) --B--> + y
                     +-- M_s^T --+

An expert costs r^2 parameters and r in the router, so that many of them cost little more than one LoRA.

Paper: Cao et al., "CoMoL: Efficient Mixture of LoRA Experts via Dynamic Core Space Merging",
https://arxiv.org/abs/2603.00573. Settings are the released code's (github.com/DCDmllm/CoMoL): 8 experts, rank 16,
alpha = r, dropout 0.1, every M_e and A as `nn.Linear` starts, B = 0.

Deviations from the released code: dropout on the input of A only, where the code also drops elements of every token's
mixed matrix and of its output; the mixed matrix of a token is never formed; the router computes in float32; the code's
optional loss that makes the M_e orthogonal to each other, off by default, is left out, and so is routing on x; all
linear maps are adapted unless `target_modules` says otherwise (the code: q, k, v, o, up and down).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from smore_cli.methods import MethodConfig, Site

if TYPE_CHECKING:
    from smore_cli.nn import Adapter


class CoMoLConfig(MethodConfig):
    """`method: comol`."""

    title: ClassVar[str] = "CoMoL: experts in the core of one LoRA"
    paper: ClassVar[str] = "https://arxiv.org/abs/2603.00573"

    method: Literal["comol"] = "comol"
    num_experts: Annotated[int, Field(description="core matrices M_e", ge=1)] = 8
    rank: Annotated[int, Field(description="r, the rank of A, B and the core matrices", ge=1)] = 16
    alpha: Annotated[
        float | None, Field(description="the update is scaled by alpha / r; default: r, so by 1", gt=0)
    ] = None
    dropout: Annotated[float, Field(description="dropout on the input of A", ge=0, lt=1)] = 0.1

    def build(self, site: Site) -> Adapter:
        """Returns a `Bank` with a core of matrices and a router on the latent."""
        from smore_cli.nn.bank import Bank
        from smore_cli.nn.mix_core import MixCore
        from smore_cli.nn.router import Router

        return Bank(
            site.in_features,
            site.out_features,
            down=self.rank,
            up=self.rank,
            router=Router(self.rank, self.num_experts),
            core=MixCore(self.num_experts, self.rank),
            scale=1.0 if self.alpha is None else self.alpha / self.rank,
            dropout=self.dropout,
            router_input="latent",
            expert_axes={"core.M": (0, 0)},
        )

    def num_parameters(self, site: Site) -> int:
        """A and B have r (d_in + d_out), the s cores r^2 each, the router s r."""
        r, s = self.rank, self.num_experts
        return r * (site.in_features + site.out_features) + s * r * r + s * r
