"""MoELoRA: LoRA experts that are taught to differ by a contrastive loss on their outputs.

    y = W x + b + (alpha / r) sum_{e in top-k} g_e B_e A_e x      g = the k largest of softmax(R x), made to sum to 1
    loss = task + aux_loss_coefficient * balance + contrastive_coefficient * contrast

    x --+--R--> top-k ------------------------+
        |    +-- A_1 --> (r) --( g_1 )-- B_1 -+--> + y
        +----+-- A_2 --> (r) --( g_2 )-- B_2 -+
             +-- ...       outputs of one expert attract, of different experts repel (`nn/contrastive.py`)

Paper: Luo et al., "MoELoRA: Contrastive Learning Guided Mixture of Experts on Parameter-Efficient Fine-Tuning for Large
Language Models", https://arxiv.org/abs/2402.12851. (Not MOELoRA of https://arxiv.org/abs/2310.18339, whose gates depend
on the task alone.) No code was found and only the abstract was available here: LoRA as a mixture of experts, and
contrastive learning that makes experts learn distinct features, against random routing.

ASSUMPTIONS, so that this is MoELoRA's idea and not a reproduction: the contrast is the supervised contrastive loss with
cosine similarity, an output's expert as its label; it compares outputs of the same sequence, each before its gate, at
most `contrast_tokens` tokens of it; the balance loss is Switch's; 8 experts, 2 for a token, of rank 4 (32 split over
them), alpha 8, dropout 0.05; temperature and all coefficients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from smore_cli.methods import MethodConfig, Site, require_top_k

if TYPE_CHECKING:
    from smore_cli.nn import Adapter
    from smore_cli.nn.router import RouterLoss


class MoELoRAConfig(MethodConfig):
    """`method: moelora`."""

    title: ClassVar[str] = "MoELoRA: LoRA experts with a contrastive loss"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.12851"

    method: Literal["moelora"] = "moelora"
    num_experts: Annotated[int, Field(description="experts of each adapted map", ge=1)] = 8
    top_k: Annotated[int, Field(description="experts a token goes to; their weights are made to sum to 1", ge=1)] = 2
    rank: Annotated[int, Field(description="r, the rank of each expert", ge=1)] = 4
    alpha: Annotated[float, Field(description="the update is scaled by alpha / r", gt=0)] = 8.0
    dropout: Annotated[float, Field(description="dropout on the input of A", ge=0, lt=1)] = 0.05
    aux_loss_coefficient: Annotated[float, Field(description="weight of each router's balance loss", ge=0)] = 1e-3
    contrastive_coefficient: Annotated[float, Field(description="weight of each bank's contrast", ge=0)] = 1e-3
    temperature: Annotated[
        float, Field(description="of the contrast: the smaller, the more the nearest outputs count", ge=0.01)
    ] = 0.1
    contrast_tokens: Annotated[
        int,
        Field(description="tokens of a sequence, evenly spaced, whose outputs are compared; bounds the memory", ge=2),
    ] = 64

    @model_validator(mode="after")
    def _consistent(self) -> MoELoRAConfig:
        require_top_k(self.top_k, self.num_experts)
        return self

    def build(self, site: Site) -> Adapter:
        """Returns a `ContrastiveBank` with a block core."""
        from smore_cli.nn.balance import SwitchBalanceLoss
        from smore_cli.nn.bank import BLOCK_EXPERTS
        from smore_cli.nn.contrastive import ContrastiveBank, ExpertContrastLoss
        from smore_cli.nn.router import Router
        from smore_cli.nn.selection import TopK

        s, k = self.num_experts, self.top_k
        losses: list[RouterLoss] = []
        if self.aux_loss_coefficient > 0 and k < s:  # where all are picked there is nothing to balance
            losses.append(SwitchBalanceLoss(self.aux_loss_coefficient))
        if self.contrastive_coefficient > 0 and s > 1:
            losses.append(ExpertContrastLoss(self.contrastive_coefficient, self.temperature, k, self.contrast_tokens))
        return ContrastiveBank(
            site.in_features,
            site.out_features,
            down=s * self.rank,
            up=s * self.rank,
            router=Router(site.in_features, s, select=TopK(k)),
            scale=self.alpha / self.rank,
            dropout=self.dropout,
            losses=losses,
            expert_axes=BLOCK_EXPERTS,
        )

    def num_parameters(self, site: Site) -> int:
        """Each of the s experts has r (d_in + d_out), and d_in in the router."""
        return self.num_experts * (self.rank * (site.in_features + site.out_features) + site.in_features)

    def num_active_parameters(self, site: Site) -> int:
        """Without the experts that are not picked."""
        unused = self.num_experts - self.top_k
        return self.num_parameters(site) - unused * self.rank * (site.in_features + site.out_features)
