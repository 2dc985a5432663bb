"""MixLoRA: the feed-forward network becomes a mixture of experts that share its weights; plain LoRA elsewhere.

    y = F(x) + sum_k w_k (E_k(x) - F(x))           F(x) = W2 (act(W1 x) * W3 x), the backbone's own
    E_k(x) = W2_k (act(W1_k x) * W3_k x)           W*_k = W* + (alpha / r) B*_k A*_k
    p = softmax(R x / temperature)                 one router for the whole feed-forward network

            +--> E_1 --+
    x ------+--> E_2 --+--( weighted by w: top-k, top-p or switch )--> y
      |     +--> E_s --+
      +--R--> p

Paper: Li et al., "MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts",
https://arxiv.org/abs/2404.15159

Routers: `top_k` is the paper's. `top_p` ("dynamic") and `switch` are in the released code alone.

Deviations: the paper and its code write y = sum_k w_k E_k(x). For weights that sum to one (top_k) that is the equation
above. For others it rescales the backbone (the released `top_p` and `switch` do not start as the backbone); here the
experts' weighted *changes* are added to it. A token over an expert's capacity gets F(x); the code returns its input x,
and in evaluation skips the whole network. The capacity counts real tokens, not padding, and acts in training alone.
The jitter reaches the router's input, not, as in the code, the hidden states themselves. The temperature divides the
logits; in the code, the probabilities, which do not sum to one then. One draw of dropout serves all experts.

Balance loss: coefficient * s * sum F P with F = picks / tokens, as in the code (balanced: the number of picks).
Its default is 1e-3, best in the paper's ablation and the default of the code; the paper's text says 1e-2. The jitter,
capacity and z-loss coefficient are the released code's. ASSUMPTION: dropout 0.05, found in the code's templates alone.
A sequence, for the capacity, is a row of the batch: with `objective: choice_ranking` a question with all its choices.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from smore_cli.errors import AdapterError
from smore_cli.methods import MethodConfig, Site, SiteKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from smore_cli.nn import Adapter
    from smore_cli.nn.router import RouterLoss
    from smore_cli.nn.selection import Selector

_BELONGS_TO = {
    "top_k": "top_k",
    "top_p": "top_p",
    "capacity": "switch",
    "jitter": "switch",
    "z_loss_coefficient": "switch",
}
"""Settings that one router alone reads."""


class MixLoRAConfig(MethodConfig):
    """`method: mixlora`."""

    title: ClassVar[str] = "MixLoRA: a mixture of feed-forward networks, LoRA elsewhere"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.15159"
    sites: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "gated_mlp"})

    method: Literal["mixlora"] = "mixlora"
    num_experts: Annotated[int, Field(description="experts of a feed-forward network", ge=1)] = 8
    rank: Annotated[int, Field(description="r, the rank of every expert's maps, and of LoRA elsewhere", ge=1)] = 16
    alpha: Annotated[float, Field(description="updates are scaled by alpha / r", gt=0)] = 32.0
    dropout: Annotated[float, Field(description="dropout on the input of every A", ge=0, lt=1)] = 0.05
    router: Annotated[
        Literal["top_k", "top_p", "switch"],
        Field(
            description="how experts are picked. top_k: the most probable, a fixed number; top_p: as many as reach a "
            "probability mass ('dynamic'); switch: one, with room for few tokens in training"
        ),
    ] = "top_k"
    top_k: Annotated[int, Field(description="router top_k: experts a token", ge=1)] = 2
    top_p: Annotated[
        float, Field(description="router top_p: the mass, the expert that crosses it included", gt=0, le=1)
    ] = 0.8
    renormalise: Annotated[
        bool | None,
        Field(description="divide the picked experts' weights by their sum; default: with top_k"),
    ] = None
    temperature: Annotated[float, Field(description="divides the router's logits", gt=0)] = 1.0
    capacity: Annotated[
        int,
        Field(
            description="router switch: tokens of one sequence an expert takes in training, in order of arrival; the "
            "others get the plain feed-forward network. 0: no limit",
            ge=0,
        ),
    ] = 32
    jitter: Annotated[
        float, Field(description="router switch: relative noise on the router's input in training", ge=0, lt=1)
    ] = 0.01
    aux_loss_coefficient: Annotated[float, Field(description="weight of the balance loss of each router", ge=0)] = 1e-3
    z_loss_coefficient: Annotated[
        float, Field(description="router switch: weight of the mean squared logsumexp of the logits", ge=0)
    ] = 1e-3

    @model_validator(mode="after")
    def _fits_together(self) -> MixLoRAConfig:
        for field, router in _BELONGS_TO.items():
            if self.router != router and getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"{field}: only router {router} has it, and the router is {self.router}")
        if self.router == "top_k" and self.top_k > self.num_experts:
            raise ValueError(f"top_k: {self.top_k} experts cannot be picked from {self.num_experts}")
        if self.renormalised and self.num_experts > 1 and (self.router == "switch" or self._picks == 1):
            why = "a single expert's weight would always be 1, and the router learn nothing from the text"
            raise ValueError(f"renormalise: {why}; set it to false, or pick more")
        return self

    @property
    def renormalised(self) -> bool:
        """Whether the weights of the picked experts are divided by their sum."""
        return self.router == "top_k" if self.renormalise is None else self.renormalise

    @property
    def _picks(self) -> int | None:
        """How many experts a token has at most; None: all of them."""
        return {"top_k": self.top_k, "top_p": None, "switch": 1}[self.router]

    def build(self, site: Site) -> Adapter:
        """Returns the mixture on a gated MLP, a plain LoRA on a linear map."""
        from smore_cli.nn.gated_mlp import GatedExperts
        from smore_cli.nn.low_rank import LowRank
        from smore_cli.nn.switch import SwitchRouter

        scale = self.alpha / self.rank
        if site.kind == "linear":
            return LowRank(site.in_features, site.out_features, rank=self.rank, scale=scale, dropout=self.dropout)
        switch = self.router == "switch"
        router = SwitchRouter(
            site.in_features,
            self.num_experts,
            select=self._selector(),
            init="normal",
            temperature=self.temperature,
            jitter=self.jitter if switch else 0.0,
            capacity=(self.capacity or None) if switch else None,
        )
        return GatedExperts(
            site.in_features,
            site.hidden,
            rank=self.rank,
            router=router,
            picks=self._picks,
            scale=scale,
            dropout=self.dropout,
            losses=self._losses(),
        )

    def _selector(self) -> Selector:
        from smore_cli.nn.selection import TopK, TopP

        if self.router == "top_p":
            return TopP(self.top_p, renormalise=self.renormalised)
        return TopK(self._picks or 1, renormalise=self.renormalised)

    def _losses(self) -> list[RouterLoss]:
        from smore_cli.nn.balance import SwitchBalanceLoss
        from smore_cli.nn.switch import RouterZLoss

        losses: list[RouterLoss] = []
        if self.aux_loss_coefficient > 0 and self._picks != self.num_experts:  # where all are picked it is constant
            losses.append(SwitchBalanceLoss(self.aux_loss_coefficient))
        if self.router == "switch" and self.z_loss_coefficient > 0:
            losses.append(RouterZLoss(self.z_loss_coefficient))
        return losses

    def num_parameters(self, site: Site) -> int:
        """A gated MLP has s experts, each with 3 r (d + H), and the router's s d; a linear map has r (d_in + d_out)."""
        d, r, s = site.in_features, self.rank, self.num_experts
        if site.kind == "linear":
            return r * (d + site.out_features)
        return 3 * s * r * (d + site.hidden) + s * d

    def num_active_parameters(self, site: Site) -> int:
        """Without the experts that are not picked; top_p may pick all of them."""
        if site.kind == "linear" or self._picks is None:
            return self.num_parameters(site)
        each = 3 * self.rank * (site.in_features + site.hidden)
        return self.num_parameters(site) - (self.num_experts - self._picks) * each


_ATTENTION = re.compile(r"mixlora\.(?P<path>layers\.\d+\.self_attn\.\w+)\.lora_(?P<half>[AB])\.weight")
_GATE = re.compile(r"mixlora\.layers\.(?P<layer>\d+)\.(?:mlp\.moe_gate|gate)\.weight")
_EXPERT = re.compile(  # the second form is that of the first released weights, with the maps' names of Llama's own code
    r"mixlora\.layers\.(?P<layer>\d+)\."
    r"(?:mlp\.(?P<map>\w+)\.experts\.(?P<expert>\d+)|experts\.(?P<old_expert>\d+)\.(?P<old_map>\w+))"
    r"\.lora_(?P<half>[AB])\.weight"
)
_MAPS = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "w1_proj": "gate",
    "w3_proj": "up",
    "w2_proj": "down",
}


def settings_from_original(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a MixLoRA adapter of MoE-PEFT or of the `mixlora` package, from its adapter_config.json.

    Raises:
        AdapterError: it computes something that this method does not.
    """
    from smore_cli.models.moe_peft import expert_settings

    if (strategy := values["routing_strategy"]) not in ("mixlora", "mixtral"):
        why = "it multiplies the backbone's own output by the sum of the weights, and no router here does"
        raise AdapterError(f"routing_strategy: '{strategy}' is not read: {why}", "top-k routing ('mixlora') is read")
    elsewhere = expert_settings(values)
    experts = expert_settings(values, values.get("expert_lora"))
    if experts != elsewhere and not _MAPS.keys() >= set(values["target_modules"]):
        raise AdapterError("expert_lora: experts of another rank, alpha or dropout than LoRA elsewhere are not read")
    return experts | {"top_k": values.get("top_k", 2)}


def from_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a MixLoRA adapter of MoE-PEFT or of the `mixlora` package by this package's names.

    Args:
        state_dict: names as in `mixlora.layers.0.mlp.up_proj.experts.0.lora_A.weight`, or in the first released weights
            `mixlora.layers.0.experts.0.w3_proj.lora_A.weight`.

    Raises:
        AdapterError: a name is none of these layouts', or experts are missing.
    """
    from smore_cli.models.moe_peft import stack

    renamed: dict[str, Tensor] = {}
    halves: dict[tuple[str, str, str], dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in state_dict.items():
        if match := _ATTENTION.fullmatch(name):
            renamed[f"model.{match['path']}.lora_{match['half']}"] = tensor
        elif match := _GATE.fullmatch(name):
            renamed[f"model.layers.{match['layer']}.mlp.router.weight"] = tensor
        elif (match := _EXPERT.fullmatch(name)) and (map := _MAPS.get(match["map"] or match["old_map"])):
            number = int(match["expert"] or match["old_expert"])
            halves[f"model.layers.{match['layer']}.mlp", map, match["half"]][number] = tensor
        else:
            hint = "expected such as mixlora.layers.0.mlp.up_proj.experts.0.lora_A.weight"
            raise AdapterError(f"'{name}' is not a tensor of the released MixLoRA layouts", hint)
    for (path, map, half), experts in halves.items():
        renamed[f"{path}.{map}_{half}"] = stack(experts, half, f"{path}.{map}_proj")
    return renamed
