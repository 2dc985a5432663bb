"""LoRA: one low-rank update, the same for every token; with rsLoRA's scale, or DoRA's magnitudes, where asked.

    LoRA    y = W x + b + s B A x                 s = alpha / r, or alpha / sqrt(r) with `use_rslora`
    DoRA    y = rho (W x + s B A x) + b           rho = m / ||W + s B A||, one number a row, with `use_dora`

      x --A--> (r) --B--> + y                     m: (d_out,) starts at ||W||, so that rho = 1

Papers: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685;
Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", https://arxiv.org/abs/2312.03732;
Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", https://arxiv.org/abs/2402.09353

Deviations: none. DoRA's norm is a constant to the gradient, as its section 4.3 proposes; the bias is not rescaled. The
adapter folder is a PEFT LoRA folder and loads with `PeftModel.from_pretrained`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from smore_cli.methods import MethodConfig, Site

if TYPE_CHECKING:
    from smore_cli.nn import Adapter


class LoRAConfig(MethodConfig):
    """`method: lora`."""

    title: ClassVar[str] = "LoRA: one low-rank update"
    paper: ClassVar[str] = "https://arxiv.org/abs/2106.09685"
    routed: ClassVar[bool] = False

    method: Literal["lora"] = "lora"
    rank: Annotated[int, Field(description="r, the rank of the update", ge=1)] = 16
    alpha: Annotated[float | None, Field(description="the update is scaled by alpha / r; default: 2 r", gt=0)] = None
    dropout: Annotated[float, Field(description="dropout on the input of A", ge=0, lt=1)] = 0.0
    use_rslora: Annotated[bool, Field(description="rsLoRA: scale by alpha / sqrt(r) instead")] = False
    use_dora: Annotated[bool, Field(description="DoRA: a learned length for every row of W + s B A")] = False

    @model_validator(mode="after")
    def _alpha_is_given_where_it_counts(self) -> LoRAConfig:
        if self.use_rslora and self.alpha is None:
            raise ValueError(
                "alpha: use_rslora needs it: with the default of 2 r the scale 2 sqrt(r) would grow with the rank"
            )
        return self

    @property
    def scale(self) -> float:
        """The factor alpha / r, or alpha / sqrt(r) for rsLoRA."""
        if self.alpha is None:
            return 2.0
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def build(self, site: Site) -> Adapter:
        """Returns a `LowRank` adapter with B = 0, or a `WeightDecomposed` one.

        Raises:
            ValueError: DoRA is to be built for a site without its linear map, whose weight it starts from.
        """
        from smore_cli.nn.low_rank import LowRank, WeightDecomposed

        d_in, d_out = site.in_features, site.out_features
        if not self.use_dora:
            return LowRank(d_in, d_out, rank=self.rank, scale=self.scale, dropout=self.dropout)
        if site.base is None:
            raise ValueError(f"{site.name}: DoRA starts from the weight of the linear map, and the site has none")
        return WeightDecomposed(site.base, d_in, d_out, rank=self.rank, scale=self.scale, dropout=self.dropout)

    def num_parameters(self, site: Site) -> int:
        """LoRA has r (d_in + d_out), and DoRA d_out magnitudes more."""
        magnitudes = site.out_features if self.use_dora else 0
        return self.rank * (site.in_features + site.out_features) + magnitudes
