"""GOAT: LoRA experts that start from different parts of the base weight's spectrum, scaled to follow full fine-tuning.

    y = (W - (scale / s) sum_i B_i(0) A_i(0)) x + b + scale sum_{i in top-k} g_i B_i A_i x
    B_i(0) A_i(0) = (the i-th of s evenly spaced pieces of W's singular value decomposition) / (scale rho)
    scale = sqrt(3 eta d_in / r_i)                r_i = rank / s, the rank of each expert

    x --+--R--> softmax --> top-k, weights made to sum to 1 --+
        +-- A_i --> (r_i) --( g_i )-- B_i --------------------+--> + y
        +-- A_i(0), B_i(0), frozen, subtracted ---------------+

The base weight is never changed: what is subtracted from it is kept in the frozen buffers A0 and B0, which are saved
with the adapter (and double its file). A fresh adapter is not exactly the backbone; instead it is the backbone, up to
rounding, wherever all gates are 1 / s. With k of s experts picked it differs by sum_i (g_i - 1/s) W_i x / rho, W_i the
pieces. Building takes one full singular value decomposition of every adapted weight, on the device where it lies.

Paper: Fan et al., "Make LoRA Great Again: Boosting LoRA with Adaptive Singular Values and Mixture-of-Experts
Optimization Alignment" (ICML 2025), https://arxiv.org/abs/2502.16894. Checked against the released code
(github.com/Facico/GOAT-PEFT): pieces, rho = 10, scale, subtraction by scale / s, dropout 0.05, Switch balance 0.001.
An early commit of that code scaled by alpha / r_i (with alpha 16), a later one by the paper's formula with eta = 1: set
`alpha` for the former. Its scripts train with a learning rate of 2e-5, which the large scale asks for.

Deviations from the released code: the balance loss does not count padding and is of a whole optimisation step; the
experts of a token share its dropout mask; the base weight is not rewritten (the code subtracts in place, and in the
weight's own precision).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from smore_cli.errors import AdapterError
from smore_cli.methods import MethodConfig, Site, require_top_k

if TYPE_CHECKING:
    from smore_cli.nn import Adapter


class GOATConfig(MethodConfig):
    """`method: goat`."""

    title: ClassVar[str] = "GOAT: experts from the base weight's spectrum"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.16894"
    starts_as_backbone: ClassVar[bool] = False

    method: Literal["goat"] = "goat"
    num_experts: Annotated[int, Field(description="experts of each adapted map", ge=1)] = 8
    top_k: Annotated[int, Field(description="experts a token goes to; their weights are made to sum to 1", ge=1)] = 2
    rank: Annotated[int, Field(description="total rank, split evenly over the experts", ge=1)] = 8
    alpha: Annotated[
        float | None,
        Field(description="scale the update by alpha / r_i; default: the derived sqrt(3 eta d_in / r_i)", gt=0),
    ] = None
    eta: Annotated[
        float, Field(description="ratio of full fine-tuning's learning rate to this one, for the derived scale", gt=0)
    ] = 1.0
    rho: Annotated[float, Field(description="experts start this much smaller than their piece of W", gt=0)] = 10.0
    dropout: Annotated[float, Field(description="dropout on the input of A", ge=0, lt=1)] = 0.05
    aux_loss_coefficient: Annotated[float, Field(description="weight of each router's balance loss", ge=0)] = 1e-3

    @model_validator(mode="after")
    def _consistent(self) -> GOATConfig:
        require_top_k(self.top_k, self.num_experts)
        if self.rank % self.num_experts:
            raise ValueError(f"rank: {self.rank} cannot be split evenly over {self.num_experts} experts")
        if self.alpha is not None and self.eta != 1.0:
            raise ValueError("eta: belongs to the derived scale, which alpha replaces; set one of them")
        return self

    def scale(self, site: Site) -> float:
        """Returns the factor on the update of a site."""
        each = self.rank // self.num_experts
        return math.sqrt(3 * self.eta * site.in_features / each) if self.alpha is None else self.alpha / each

    def build(self, site: Site) -> Adapter:
        """Returns a `SegmentBank`; all zeros where the site has no weight (for counting parameters).

        Raises:
            AdapterError: the weight has fewer singular values in a stretch than an expert has ranks.
        """
        from smore_cli.nn.adapted import dense_weight
        from smore_cli.nn.balance import SwitchBalanceLoss
        from smore_cli.nn.router import Router
        from smore_cli.nn.selection import TopK
        from smore_cli.nn.svd_segments import SegmentBank

        s, smallest = self.num_experts, min(site.in_features, site.out_features)
        if self.rank // s > smallest // s:
            raise AdapterError(
                f"rank: {self.rank} is more than the {smallest} singular values of {site.name} split over {s} experts",
                "use a smaller rank",
            )
        balanced = self.aux_loss_coefficient > 0 and self.top_k < s  # where all are picked there is nothing to balance
        return SegmentBank(
            site.in_features,
            site.out_features,
            num_experts=s,
            rank=self.rank // s,
            router=Router(site.in_features, s, select=TopK(self.top_k)),
            scale=self.scale(site),
            dropout=self.dropout,
            losses=[SwitchBalanceLoss(self.aux_loss_coefficient)] if balanced else [],
            weight=None if site.base is None else dense_weight(site.base),
            rho=self.rho,
        )

    def num_parameters(self, site: Site) -> int:
        """All experts together have rank (d_in + d_out), the router s d_in; the subtracted start is not trained."""
        return self.rank * (site.in_features + site.out_features) + self.num_experts * site.in_features

    def num_active_parameters(self, site: Site) -> int:
        """Without the experts that are not picked."""
        each = self.rank // self.num_experts * (site.in_features + site.out_features)
        return self.num_parameters(site) - (self.num_experts - self.top_k) * each
