"""OMoE: LoRA experts whose outputs for a token are made orthogonal to each other before they are added up.

    y = W x + b + (alpha / r) sum_e g_e u_e         v_e = B_e A_e x,  u = GramSchmidt(v),  g = softmax(R x)

    x --+--R--> g -------------------------------------+
        +-- A_1 --> (r) -- B_1 --> v_1 --+             |
        +-- A_2 --> (r) -- B_2 --> v_2 --+--> u_1, u_2 +--( weighted by g )--> + y

Gram-Schmidt only changes the coefficients with which the v_e are added up, and those follow from the inner products
h_e^T (B_e^T B_f) h_f of rank-r vectors (`nn/gram_schmidt.py`): no wide vector of a single expert is ever formed.

Paper: Feng et al., "OMoE: Diversifying Mixture of Low-Rank Adaptation by Orthogonal Finetuning",
https://arxiv.org/abs/2501.10062. There is no released code, and only the abstract was available here: Gram-Schmidt on
the experts' representations, learning objective unchanged (so no auxiliary loss). From a table of settings in a later
paper with the same first author (CoMoE, https://arxiv.org/abs/2505.17553, table 6): rank 16, alpha 32, dropout 0.05,
soft routing (all experts).

ASSUMPTIONS, where neither says: 2 experts (a quarter of the parameters of eight, as the abstract and that table have
it); Gram-Schmidt takes the experts by their number (`order: gate`: by falling gate); the u_e keep their lengths.
"Within the Stiefel manifold" read to the letter asks for unit vectors: that is `normalise: true`, with lengths floored
at 0.001, because LoRA starts at v = 0, where a direction does not exist.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from smore_cli.methods import MethodConfig, Site

if TYPE_CHECKING:
    from smore_cli.nn import Adapter


class OMoEConfig(MethodConfig):
    """`method: omoe`."""

    title: ClassVar[str] = "OMoE: experts with orthogonal outputs"
    paper: ClassVar[str] = "https://arxiv.org/abs/2501.10062"

    method: Literal["omoe"] = "omoe"
    num_experts: Annotated[int, Field(description="experts of each adapted map", ge=1)] = 2
    top_k: Annotated[
        int | None,
        Field(description="experts a token goes to, their weights made to sum to 1; default: all (soft routing)", ge=1),
    ] = None
    rank: Annotated[int, Field(description="r, the rank of each expert", ge=1)] = 16
    alpha: Annotated[float, Field(description="the update is scaled by alpha / r", gt=0)] = 32.0
    dropout: Annotated[float, Field(description="dropout on the input of A", ge=0, lt=1)] = 0.05
    order: Annotated[
        Literal["index", "gate"],
        Field(description="whose output stays as it is: the first expert's (index), or that of the largest gate"),
    ] = "index"
    normalise: Annotated[bool, Field(description="give every orthogonalised output the length 1")] = False

    @model_validator(mode="after")
    def _consistent(self) -> OMoEConfig:
        if self.top_k is not None and self.top_k > self.num_experts:
            raise ValueError(f"top_k: {self.top_k} experts cannot be picked from {self.num_experts}")
        if self.top_k == 1 and self.num_experts > 1:
            raise ValueError(
                "top_k: a single expert has nothing to be orthogonal to, and its weight, divided by its own sum, is 1 "
                "whatever the router says; pick at least 2"
            )
        return self

    def build(self, site: Site) -> Adapter:
        """Returns an `OrthogonalBank`."""
        from smore_cli.nn.gram_schmidt import OrthogonalBank
        from smore_cli.nn.router import Router
        from smore_cli.nn.selection import All, TopK

        return OrthogonalBank(
            site.in_features,
            site.out_features,
            num_experts=self.num_experts,
            rank=self.rank,
            router=Router(site.in_features, self.num_experts, select=All() if self.top_k is None else TopK(self.top_k)),
            scale=self.alpha / self.rank,
            dropout=self.dropout,
            order=self.order,
            normalise=self.normalise,
        )

    def num_parameters(self, site: Site) -> int:
        """Each of the s experts has r (d_in + d_out), and d_in in the router."""
        return self.num_experts * (self.rank * (site.in_features + site.out_features) + site.in_features)

    def num_active_parameters(self, site: Site) -> int:
        """Without the experts that are not picked."""
        unused = self.num_experts - (self.top_k or self.num_experts)
        return self.num_parameters(site) - unused * self.rank * (site.in_features + site.out_features)
