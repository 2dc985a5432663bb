"""MoLA: a mixture of LoRA experts on every linear map, with more experts in some layers than in others.

    y = W x + b + (alpha / r) sum_{e in top-k} g_e B_e A_e x      g = softmax(R x) on the k most probable of the s_j
                                                                      experts of layer j, divided by its sum
    layers  0-7: s = 2   8-15: s = 4   16-23: s = 6   24-31: s = 8    (num_experts [2, 4, 6, 8], 32 layers)

    x --+--R--> top-k ------------------------+
        |    +-- A_1 --> (r) --( g_1 )-- B_1 -+--> + y
        +----+-- A_2 --> (r) --( g_2 )-- B_2 -+
             +-- ...                          |

Auxiliary loss of each router, added up over all routers: coefficient * s sum_e F_e P_e, with F_e the share of the picks
that went to expert e and P_e its mean probability; 1 * coefficient where all are used alike, s times that where all
tokens go to one.

Paper: Gao et al., "MoLA: MoE LoRA with Layer-wise Expert Allocation" (Findings of NAACL 2025),
https://arxiv.org/abs/2402.08562. Its allocations, one entry for each quarter of the depth: rectangle [5, 5, 5, 5],
triangle [8, 6, 4, 2], inverted triangle [2, 4, 6, 8] (the released script's, and the default here), hourglass
[8, 2, 2, 8], diamond [2, 8, 8, 2] (of these the best on average, in the paper).

Deviations from the released code: the balance loss does not count padding and is of a whole optimisation step; the
router computes in float32; the experts of a token share its dropout mask, where each drew its own; one top_k for all
layers, where it could be set layer by layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from smore_cli.methods import MethodConfig, Site, require_top_k

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from smore_cli.nn import Adapter

Count = Annotated[int, Field(ge=1)]


class MoLAConfig(MethodConfig):
    """`method: mola`."""

    title: ClassVar[str] = "MoLA: LoRA experts, allocated by depth"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.08562"

    method: Literal["mola"] = "mola"
    num_experts: Annotated[
        Annotated[list[Count], Field(min_length=1)] | Count,
        Field(
            description="experts of each adapted map; a list is spread over the depth, [2, 4, 6, 8] by quarters",
            default_factory=lambda: [2, 4, 6, 8],
        ),
    ]
    top_k: Annotated[int, Field(description="experts a token goes to; their weights are made to sum to 1", ge=1)] = 2
    rank: Annotated[int, Field(description="r, the rank of each expert", ge=1)] = 8
    alpha: Annotated[float, Field(description="the update is scaled by alpha / r", gt=0)] = 16.0
    dropout: Annotated[float, Field(description="dropout on the input of A", ge=0, lt=1)] = 0.05
    aux_loss_coefficient: Annotated[float, Field(description="weight of each router's balance loss", ge=0)] = 1e-3

    @model_validator(mode="after")
    def _consistent(self) -> MoLAConfig:
        counts = self.num_experts if isinstance(self.num_experts, list) else [self.num_experts]
        for count in sorted(counts):
            require_top_k(self.top_k, count)
        return self

    def build(self, site: Site) -> Adapter:
        """Returns a `Bank` with a block core and the experts of the site's layer."""
        from smore_cli.nn.balance import SwitchBalanceLoss
        from smore_cli.nn.bank import BLOCK_EXPERTS, Bank, block
        from smore_cli.nn.router import Router
        from smore_cli.nn.selection import TopK

        s = site.at_depth(self.num_experts)
        balanced = self.aux_loss_coefficient > 0 and self.top_k < s  # where all are picked there is nothing to balance
        return Bank(
            site.in_features,
            site.out_features,
            down=s * self.rank,
            up=s * self.rank,
            router=Router(site.in_features, s, select=TopK(self.top_k)),
            core=block,
            scale=self.alpha / self.rank,
            dropout=self.dropout,
            losses=[SwitchBalanceLoss(self.aux_loss_coefficient, fractions="per_pick")] if balanced else [],
            expert_axes=BLOCK_EXPERTS,
        )

    def num_parameters(self, site: Site) -> int:
        """Each of the s_j experts has r (d_in + d_out), and d_in in the router."""
        s = site.at_depth(self.num_experts)
        return s * (self.rank * (site.in_features + site.out_features) + site.in_features)

    def num_active_parameters(self, site: Site) -> int:
        """Without the experts that are not picked."""
        unused = site.at_depth(self.num_experts) - self.top_k
        return self.num_parameters(site) - unused * self.rank * (site.in_features + site.out_features)


def settings_from_original(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a MoLA adapter of MoE-PEFT, from its adapter_config.json."""
    from smore_cli.models.moe_peft import expert_settings

    return expert_settings(values) | {"top_k": values.get("top_k", 2)}


def from_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a MoLA adapter of MoE-PEFT by this package's names: `PATH.A` and so on.

    Raises:
        AdapterError: a name is none of that layout's, or experts are missing.
    """
    from smore_cli.models.moe_peft import stacked_experts

    return stacked_experts(state_dict, "mola")
