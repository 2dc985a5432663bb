"""LoRAMoE: every token uses every expert, and a loss divides the work by what kind of sample the token belongs to.

    y = W x + b + (alpha / r) sum_e w_e B_e A_e x          w = softmax(R x)
    loss += coefficient * var(Z) / mean(Z)                 Z[n, m] = (1 +- delta) sum over tokens of sample m of w_n

            +--A_1--> (r) --B_1--+
    x ------+--A_2--> (r) --B_2--+--( weighted by w )--> + y          + delta: expert and sample are of one group
      |     +--A_s--> (r) --B_s--+                                     - delta: of different groups
      +--R--> w

Paper: Dou et al., "LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style Plugin",
https://arxiv.org/abs/2312.09979

Samples get their group from the data: `group: qa` on a source, or `columns: {group: task_type}` for each of its rows.
Labels are numbered in sorted order, and the experts are dealt to the groups in order: of 6 experts and groups `other`
and `qa`, experts 1-3 are those of `other`. A sample is a row (with `objective: choice_ranking` all choices of a
question).

The loss is least where Z is flat, so that experts get *less* weight from samples of their own group, by the factor
(1 - delta) / (1 + delta), 0.82 at the default. That is the paper's loss; it tells the groups apart just as well. Z
grows with the tokens of a sample, and with it the paper's form of the loss, but not the released one.

Deviations: padding does not count (in the released code it does). `balance: released` is the code's form of the loss.
The code's groups are two halves; here any number that divides the experts. ASSUMPTION: rank, alpha, dropout and both
coefficients are the paper's as others report them; the released script has 8 experts and both coefficients at zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from smore_cli.methods import MethodConfig, Site

if TYPE_CHECKING:
    from smore_cli.nn import Adapter


class LoRAMoEConfig(MethodConfig):
    """`method: loramoe`."""

    title: ClassVar[str] = "LoRAMoE: all experts, with work divided by kind of sample"
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.09979"

    method: Literal["loramoe"] = "loramoe"
    target_modules: Annotated[
        Annotated[list[str], Field(min_length=1)] | str,
        Field(description="names of the linear maps to adapt, or 'all-linear'; the paper's: the feed-forward maps"),
    ] = Field(default_factory=lambda: ["gate_proj", "up_proj", "down_proj"])
    num_experts: Annotated[int, Field(description="experts of a linear map", ge=1)] = 6
    rank: Annotated[int, Field(description="r, the rank of each expert", ge=1)] = 4
    alpha: Annotated[float, Field(description="the update is scaled by alpha / r", gt=0)] = 32.0
    dropout: Annotated[float, Field(description="dropout on the input of A", ge=0, lt=1)] = 0.05
    aux_loss_coefficient: Annotated[
        float, Field(description="weight of the localised balance loss of each router; 0: none", ge=0)
    ] = 0.1
    delta: Annotated[
        float,
        Field(description="how much the groups of the balance loss differ; 0: no groups, plain balance", ge=0, le=1),
    ] = 0.1
    num_groups: Annotated[int, Field(description="how many groups the training rows are of", ge=2)] = 2
    balance: Annotated[
        Literal["paper", "released"],
        Field(description="paper: var / mean, grows with the length of the rows; released: var / mean squared"),
    ] = "paper"

    @model_validator(mode="after")
    def _groups_divide_the_experts(self) -> LoRAMoEConfig:
        if self.row_groups is not None and self.num_experts % self.num_groups:
            problem = f"{self.num_experts} experts cannot be dealt evenly to {self.num_groups} groups"
            raise ValueError(f"num_experts: {problem}; take a multiple, or delta: 0 for a balance without groups")
        return self

    @property
    def row_groups(self) -> int | None:
        """Groups of training rows that the loss tells apart; None where it does not."""
        return self.num_groups if self.aux_loss_coefficient > 0 and self.delta > 0 else None

    def build(self, site: Site) -> Adapter:
        """Returns a `Bank` with a block core and a dense router."""
        from smore_cli.nn.bank import BLOCK_EXPERTS, Bank
        from smore_cli.nn.localised import LocalisedBalanceLoss
        from smore_cli.nn.router import Router

        loss = LocalisedBalanceLoss(self.aux_loss_coefficient, self.delta, self.num_groups, self.balance)
        return Bank(
            site.in_features,
            site.out_features,
            down=self.num_experts * self.rank,
            up=self.num_experts * self.rank,
            router=Router(site.in_features, self.num_experts),
            scale=self.alpha / self.rank,
            dropout=self.dropout,
            losses=[loss] if self.aux_loss_coefficient > 0 and self.num_experts > 1 else [],
            expert_axes=BLOCK_EXPERTS,
        )

    def num_parameters(self, site: Site) -> int:
        """Each expert has r (d_in + d_out), the router s d_in."""
        s, r = self.num_experts, self.rank
        return s * r * (site.in_features + site.out_features) + s * site.in_features
