"""LoRA: one low-rank update, the same for every token.

    y = W x + b + (alpha / r) B A x

      x --A--> (r) --B--> + y

Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685

Deviations: none. The adapter folder is a PEFT LoRA folder and loads with `PeftModel.from_pretrained`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

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

    @property
    def scale(self) -> float:
        """The factor alpha / r."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def build(self, site: Site) -> Adapter:
        """Returns a `LowRank` adapter with B = 0."""
        from smore_cli.nn.low_rank import LowRank

        return LowRank(site.in_features, site.out_features, rank=self.rank, scale=self.scale, dropout=self.dropout)

    def num_parameters(self, site: Site) -> int:
        """LoRA has r (d_in + d_out)."""
        return self.rank * (site.in_features + site.out_features)
