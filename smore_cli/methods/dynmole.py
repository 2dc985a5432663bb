"""DynMoLE: all LoRA experts for tokens whose router is unsure, a few for the others.

    y = W x + b + (alpha / r) sum_e w_e B_e A_e x          p = softmax(R x)
    H(p) > threshold:  w = p                               H = S_q(p + eps) / S_q(uniform), the Tsallis entropy
    else:              w = p on the most probable experts whose mass stays below top_p, at least top_k; 0 elsewhere

    x --R--> p --> H(p) > threshold? --yes--> all experts ---+
             |           +---------no--> top-p, min top-k ---+--> w --( weights B_e A_e x )--> + y
             +-- most probable first: .42 .30 | .15 .08 .05     top_p .75: the third would make it .87 and stays out

    loss += entropy_loss_coefficient * mean_t H(p_t)  +  aux_loss_coefficient * s sum_e F_e P_e
    F_e = mean_t w_te, differentiable;  P_e = mean_t p_te;  1 where the experts are used alike by dense routing

The first term makes routers sure, the second spreads tokens over experts. A router starts unsure, so training starts
nearly dense and turns sparse.

Paper: Li et al., "DynMoLE: Boosting Mixture of LoRA Experts Fine-Tuning with a Hybrid Routing Mechanism" (2025),
https://arxiv.org/abs/2504.00661. Only its abstract, its introduction and the released code could be read, so what
follows is the code. Where it could be read otherwise there is a field: `threshold_on`, `crossing`, `renormalise`,
`balance_fractions`, `balance`, `entropy_over_padding`.

Deviations of the defaults from the released code, all undone by `preset: released`: padding does not count in the mean
entropy; the balance loss is the mean over routers of each router's own, not one of all routers pooled (which is blind
to routers that each collapse onto another expert). Deviations that stay: both losses are of a whole optimisation step,
not the mean over its micro-batches; the experts of a token share its dropout mask, where each drew its own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from smore_cli.methods import MethodConfig, Site, require_top_k

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from smore_cli.nn import Adapter
    from smore_cli.nn.entropy import Entropy
    from smore_cli.nn.router import RouterLoss

RELEASED: dict[str, Any] = {
    "entropy": "tsallis",
    "threshold_on": "normalised",
    "crossing": False,
    "renormalise": False,
    "balance_fractions": "soft",
    "balance": "pooled",
    "entropy_over_padding": True,
}
"""What the released code (its last commit that runs, 2f428d3) does where it has no setting."""


class DynMoLEConfig(MethodConfig):
    """`method: dynmole`."""

    title: ClassVar[str] = "DynMoLE: dense or sparse, by the router's entropy"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.00661"

    method: Literal["dynmole"] = "dynmole"
    target_modules: Annotated[
        Annotated[list[str], Field(min_length=1)] | str,
        Field(
            description="names of the linear maps to adapt, or 'all-linear'; default: the feed-forward maps",
            default_factory=lambda: ["gate_proj", "up_proj", "down_proj"],
        ),
    ]
    preset: Annotated[
        Literal["released"] | None,
        Field(description="released: what the released code computes, padding in the entropy and pooled balance too"),
    ] = None
    num_experts: Annotated[int, Field(description="experts of each adapted map", ge=1)] = 6
    rank: Annotated[int, Field(description="r, the rank of each expert", ge=1)] = 24
    alpha: Annotated[float, Field(description="the update is scaled by alpha / r", gt=0)] = 48.0
    dropout: Annotated[float, Field(description="dropout on the input of A", ge=0, lt=1)] = 0.05
    threshold: Annotated[
        float, Field(description="a token of higher entropy goes to all experts; 1 (normalised): none does", ge=0)
    ] = 0.9
    threshold_on: Annotated[
        Literal["normalised", "raw"],
        Field(description="which entropy the threshold is for; the loss always has the normalised one"),
    ] = "normalised"
    entropy: Annotated[Literal["tsallis", "renyi"], Field(description="kind of entropy")] = "tsallis"
    q: Annotated[float, Field(description="order of the entropy; 1 is Shannon's", gt=0)] = 1.1
    eps: Annotated[float, Field(description="added to every probability in the entropy", ge=0, le=0.01)] = 1e-5
    top_p: Annotated[float, Field(description="probability mass that a token's experts make up", ge=0, le=1)] = 0.75
    top_k: Annotated[int, Field(description="experts a token goes to at least", ge=1)] = 2
    crossing: Annotated[bool, Field(description="whether the expert whose probability crosses top_p is picked")] = False
    renormalise: Annotated[
        bool, Field(description="whether the weights of the picked experts are made to sum to 1")
    ] = False
    entropy_loss_coefficient: Annotated[float, Field(description="weight of the mean entropy", ge=0)] = 0.01
    entropy_over_padding: Annotated[bool, Field(description="whether the mean entropy counts padding")] = False
    aux_loss_coefficient: Annotated[float, Field(description="weight of the balance loss", ge=0)] = 1e-3
    balance: Annotated[
        Literal["per_router", "pooled"],
        Field(
            description="per_router: mean of each router's balance loss; pooled: one of all routers' tokens together"
        ),
    ] = "per_router"
    balance_fractions: Annotated[
        Literal["soft", "hard"],
        Field(
            description="F of the balance loss. soft: mean weight; hard: share of tokens with the expert in the top_k"
        ),
    ] = "soft"

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        preset = isinstance(values, dict) and values.get("preset") == "released"
        return {**RELEASED, **values} if preset else values

    @model_validator(mode="after")
    def _consistent(self) -> DynMoLEConfig:
        require_top_k(self.top_k, self.num_experts, renormalised=False)
        for field, value in RELEASED.items() if self.preset else ():
            if getattr(self, field) != value:
                is_not = f"{value}, not {getattr(self, field)}".lower()
                raise ValueError(f"{field}: the preset 'released' has {is_not}; leave out one of the two")
        if self.q != 1 and self.num_experts > 1:
            shift = self.num_experts * self.eps / abs(self.q - 1) / math.log(self.num_experts)
            if shift > 0.02:
                raise ValueError(
                    f"q: {self.q} is so near 1 that eps = {self.eps} shifts the entropy by {shift:.0%} of its range; "
                    "use q: 1 or eps: 0"
                )
        return self

    def build(self, site: Site) -> Adapter:
        """Returns a `Bank` with a block core."""
        from smore_cli.nn.bank import BLOCK_EXPERTS, Bank, block
        from smore_cli.nn.entropy import EntropyHybrid
        from smore_cli.nn.router import Router
        from smore_cli.nn.selection import TopP

        sparse = TopP(self.top_p, self.top_k, crossing=self.crossing, renormalise=self.renormalise)
        select = EntropyHybrid(sparse, self._entropy(self.threshold_on == "normalised"), self.threshold)
        return Bank(
            site.in_features,
            site.out_features,
            down=self.num_experts * self.rank,
            up=self.num_experts * self.rank,
            router=Router(site.in_features, self.num_experts, select=select, init="kaiming"),
            core=block,
            scale=self.alpha / self.rank,
            dropout=self.dropout,
            losses=self._losses(),
            expert_axes=BLOCK_EXPERTS,
        )

    def _entropy(self, normalised: bool) -> Entropy:
        from smore_cli.nn.entropy import Entropy

        return Entropy(self.q, self.entropy, self.eps, normalised)

    def _losses(self) -> list[RouterLoss]:
        from smore_cli.nn.balance import AcrossRouters, SwitchBalanceLoss
        from smore_cli.nn.entropy import EntropyLoss

        losses: list[RouterLoss] = []
        if self.num_experts == 1:  # nothing to be unsure of, nothing to balance
            return losses
        if self.entropy_loss_coefficient > 0:
            entropy = EntropyLoss(self.entropy_loss_coefficient, self._entropy(True), self.entropy_over_padding)
            losses.append(AcrossRouters(entropy))
        constant = self.balance_fractions == "hard" and self.top_k == self.num_experts  # every F is then 1
        if self.aux_loss_coefficient > 0 and not constant:
            if self.balance_fractions == "soft":
                balance = SwitchBalanceLoss(self.aux_loss_coefficient, "gate_mass")
            else:
                balance = SwitchBalanceLoss(self.aux_loss_coefficient, "per_decision", self.top_k)
            losses.append(AcrossRouters(balance, "pooled" if self.balance == "pooled" else "mean"))
        return losses

    def num_parameters(self, site: Site) -> int:
        """Each expert has r (d_in + d_out), and d_in in the router."""
        return self.num_experts * (self.rank * (site.in_features + site.out_features) + site.in_features)


_ORIGINAL_SETTINGS: dict[str, tuple[str, type]] = {
    "entropy_threshold": ("threshold", float),
    "entropy_index": ("q", float),
    "entropy_eps": ("eps", float),
    "keep_top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "router_dyn_loss_coef": ("entropy_loss_coefficient", float),
}


def settings_from_original(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of an adapter trained by the released code, from its adapter_config.json."""
    from smore_cli.models.moe_peft import expert_settings

    named = {ours: kind(values[theirs]) for theirs, (ours, kind) in _ORIGINAL_SETTINGS.items() if theirs in values}
    return {"preset": "released", **expert_settings(values), **named}


def from_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of an adapter trained by the released code by this package's names: `PATH.A` and so on.

    Raises:
        AdapterError: a name is none of that layout's, or experts are missing.
    """
    from smore_cli.models.moe_peft import stacked_experts

    return stacked_experts(state_dict, "dynmole")
