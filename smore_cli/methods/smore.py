r"""S'MoRE: a tree of residual low-rank experts, chosen anew for every token.

Experts stand in pools, one a layer of the tree. A router walks from the root down and picks, for every node, its
children in the pool below; states then travel from the leaves up (`nn/tree.py` has the propagation, `nn/tree_router.py`
the router):

    x_{l+1} = sum_{children n} alpha_n act( B_n A_n x + W_l x_l^n ),      y = W x + b + P x_L

                 root                 fanout [2, 2], num_experts [4, 4]: 2 of 4 experts on top, each with 2 of the
               /      \               4 leaves. The same expert under two parents has two states: with s = 4, f = 2
             n1        n3             there are 216 different trees, against 66 sets of flat residual experts.
            /  \      /  \
          m0    m2  m2    m3

Paper: "S'MoRE: Structural Mixture of Residual Experts for Parameter-Efficient LLM Fine-tuning" (NeurIPS 2025),
https://arxiv.org/abs/2504.06426

Deviations from the paper that the released code has and this file reproduces by default: biases on A, B, W and P; a
noisy gate compares unit vectors (`score: cosine`), where eq. 7 has a plain product (`score: dot`); a single child
(fanout 1) is weighted by its raw probability (switch) or by its raw, possibly negative score (noisy_topk), where
`gate_weights: pool` is eq. 7 and `selected` weights it 1. Deviations from the released code: the balance loss does not
count padding, is not multiplied by gradient accumulation, and is not part of the evaluation loss; adapters go on any
linear map.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from smore_cli.errors import AdapterError
from smore_cli.methods import MethodConfig, Site

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from smore_cli.nn import Adapter

PerLevel = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]


class SMoREConfig(MethodConfig):
    """`method: smore`. Lists have one entry a pool, leaves first, as in the paper."""

    title: ClassVar[str] = "S'MoRE: a tree of residual experts"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.06426"

    method: Literal["smore"] = "smore"
    rank: Annotated[
        PerLevel, Field(description="rank of one expert of each pool, leaves first", default_factory=lambda: [8, 8])
    ]
    num_experts: Annotated[
        PerLevel, Field(description="experts in each pool, leaves first", default_factory=lambda: [4, 4])
    ]
    fanout: Annotated[
        PerLevel,
        Field(
            description="children each node picks from each pool, leaves first; a dense gate takes all",
            default_factory=lambda: [2, 2],
        ),
    ]
    gate: Annotated[
        Literal["dense", "switch", "noisy_topk"],
        Field(description="dense: all experts; switch: top-f of a softmax; noisy_topk: top-f of noisy scores"),
    ] = "switch"
    gate_weights: Annotated[
        Literal["released", "selected", "pool"],
        Field(
            description="weights of the picked children. selected: softmax over them; pool: their share of a softmax "
            "over the whole pool (eq. 7); released: selected, but a single child has its raw probability or score"
        ),
    ] = "released"
    score: Annotated[
        Literal["dot", "cosine"] | None,
        Field(description="how queries meet keys; default as released: cosine for noisy_topk, else dot"),
    ] = None
    activation: Annotated[
        Literal["tanh", "relu", "identity", "prelu"], Field(description="activation between the layers of the tree")
    ] = "tanh"
    activation_position: Annotated[
        Literal["all", "child_v2", "child"],
        Field(description="all: eq. 3; child_v2: S'MoRE*, eq. 10; child: the released code's ungated variant"),
    ] = "all"
    shared_pool: Annotated[bool, Field(description="S'MoRE#: all layers pick from one pool of experts")] = False
    alpha: Annotated[
        list[float] | None, Field(description="an expert's output is scaled by alpha / rank, one a pool; default: 1")
    ] = None
    init: Annotated[
        Literal["w_final_zero", "eq_1_layer", "b_zero", "bw_zero", "normal"],
        Field(description="initialisation; all but normal start at exactly the backbone"),
    ] = "w_final_zero"
    router_dim: Annotated[int, Field(description="width of the token's down-projection for the router", ge=1)] = 32
    key_dim: Annotated[int, Field(description="width of a router's keys and hidden layer", ge=1)] = 32
    router_activation: Annotated[
        Literal["tanh", "relu", "identity", "prelu"], Field(description="activation in the router's MLP")
    ] = "relu"
    aux_loss_coefficient: Annotated[float, Field(description="weight of the balance loss", ge=0)] = 0.01

    @model_validator(mode="after")
    def _consistent(self) -> SMoREConfig:
        levels = len(self.rank)
        for field in ("num_experts", "fanout", "alpha"):
            value = getattr(self, field)
            if value is not None and len(value) != levels:
                raise ValueError(f"{field}: has {len(value)} entries, rank has {levels}; one a pool, leaves first")
        for l, (f, s) in enumerate(zip(self.fanout, self.num_experts, strict=True)):
            if self.gate != "dense" and f > s:
                raise ValueError(f"fanout: {f} children cannot be picked from the {s} experts of pool {l}")
            if self.gate == "noisy_topk" and f == s:
                raise ValueError(
                    f"fanout: noisy_topk must leave an expert out, but picks all {s} of pool {l}; use dense"
                )
        if self.shared_pool and (len(set(self.rank)) > 1 or len(set(self.num_experts)) > 1):
            raise ValueError("shared_pool: one pool serves all layers, so rank and num_experts must be equal in each")
        return self

    @property
    def children(self) -> list[int]:
        """Children a node has in each pool: the fanout, or all experts for a dense gate."""
        return self.num_experts if self.gate == "dense" else self.fanout

    def build(self, site: Site) -> Adapter:
        """Returns a `Tree`."""
        from smore_cli.nn.tree import Tree
        from smore_cli.nn.tree_router import TreeRouter

        router = TreeRouter(
            site.in_features,
            num_experts=self.num_experts,
            fanout=self.children,
            down_dim=self.router_dim,
            key_dim=[self.key_dim] * len(self.rank),
            gate=self.gate,
            score=self.score or ("cosine" if self.gate == "noisy_topk" else "dot"),
            gate_weights=self.gate_weights,
            activation=self.router_activation,
            aux_coefficient=self.aux_loss_coefficient,
        )
        return Tree(
            site.in_features,
            site.out_features,
            num_experts=self.num_experts,
            rank=self.rank,
            scale=[1.0] * len(self.rank)
            if self.alpha is None
            else [a / r for a, r in zip(self.alpha, self.rank, strict=True)],
            router=router,
            activation=self.activation,
            activation_position=self.activation_position,
            shared_pool=self.shared_pool,
            init=self.init,
        )

    def num_parameters(self, site: Site) -> int:
        """The dossier's formulas: pools, transforms and final projection, then the router."""
        d_in, d_out, levels = site.in_features, site.out_features, len(self.rank)
        s, r, m = self.num_experts, self.rank, self.key_dim
        own = [n * k for n, k in zip(s, r, strict=True)]
        d = [own[0] if self.shared_pool else sum(own[: l + 1]) for l in range(levels)]  # d_1 .. d_L
        pools = [0] if self.shared_pool else range(levels)
        experts = sum(s[l] * (r[l] * (d_in + 1) + d[l] * (r[l] + 1)) for l in pools)
        experts += sum(d[l] * (d[l - 1] + 1) for l in range(1, levels)) + d_out * (d[-1] + 1)
        inputs = [self.router_dim + m * (levels - 1 - l) for l in range(levels)]
        router = self.router_dim * (d_in + 1) + sum(
            m * (i + 1) + m * (m + 1) + n * m for i, n in zip(inputs, s, strict=True)
        )
        if self.gate == "noisy_topk":
            router += sum(n * i for n, i in zip(s, inputs, strict=True))
        slopes = levels * ((self.activation == "prelu") + (self.router_activation == "prelu"))
        return experts + router + slopes

    def num_active_parameters(self, site: Site) -> int:
        """Without the experts that no node picks: a level has at most as many different ones as it has nodes."""
        if self.shared_pool:
            return self.num_parameters(site)
        found, width, nodes = self.num_parameters(site), 0, math.prod(self.children)
        for s, r, children in zip(self.num_experts, self.rank, self.children, strict=True):
            width += s * r  # d_{l+1}, what the levels up to this one make
            found -= max(s - nodes, 0) * (r * (site.in_features + 1) + width * (r + 1))
            nodes //= children
        return found


_ORIGINAL_NAMES = {
    r"moe_A\.(\d+)": "A.{0}",
    r"moe_A_bias\.(\d+)": "a.{0}",
    r"moe_B\.(\d+)": "B.{0}",
    r"moe_B_bias\.(\d+)": "b.{0}",
    r"moe_W\.(\d+)": "W.{0}",
    r"moe_W_bias\.(\d+)": "w.{0}",
    r"moe_W_final": "P",
    r"moe_W_final_bias": "p",
    r"moe_downproj_x\.(weight|bias)": "router.down.{0}",
    r"moe_gate\.(\d+)\.mlp\.(\d)\.(weight|bias)": "router.levels.{0}.mlp.{1}.{2}",
    r"moe_gate\.(\d+)\.keys": "router.levels.{0}.keys",
    r"moe_gate\.(\d+)\.weight_noise\.weight": "router.levels.{0}.noise",
    r"moe_expert_act_param\.(\d+)": "act.{0}.weight",
}
_ORIGINAL_SETTINGS = {
    "expert_dims": "rank",
    "num_experts": "num_experts",
    "num_active": "fanout",
    "gate_type": "gate",
    "activation_position": "activation_position",
    "is_shared_expert_pool": "shared_pool",
    "init_method": "init",
    "dim_downproj_x": "router_dim",
}


def settings_from_original(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of an adapter trained by the released code, from its adapter_config.json.

    Raises:
        AdapterError: it computes something that this method does not.
    """
    for key, only in (("moe_arch", "smore"), ("gate_arch", "mlp")):
        if values.get(key, only) != only:
            raise AdapterError(f"{key}: '{values[key]}' is not read", f"'{only}' is")
    if len(set(values["gate_dims"])) > 1:
        raise AdapterError(f"gate_dims: {values['gate_dims']} differ from pool to pool, and key_dim is one for all")
    alpha = values.get("lora_alpha")
    return {
        **{ours: values[theirs] for theirs, ours in _ORIGINAL_SETTINGS.items()},
        "key_dim": values["gate_dims"][0],
        "activation": str(values["expert_act_fn"]).partition("|")[0],  # 'prelu|0.25' names where the slope starts
        "router_activation": str(values["gate_act_fn"]).partition("|")[0],
        "alpha": None if alpha is None else [float(a) for a in alpha],
        "aux_loss_coefficient": float(values["balance_loss_weight"]),
    }


def from_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of an adapter trained by the released code (its PEFT layout) to this file's names.

    Args:
        state_dict: names as in `[base_model.model.]PATH.moe_A[.default].0`; PATH may be empty.

    Returns:
        The same tensors as `[PATH.]A.0` and so on: `load_state_dict` of a `Tree` takes them where PATH is empty.

    Raises:
        AdapterError: a name is none of the released layout's.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        path, _, original = name.removeprefix("base_model.model.").rpartition("moe_")
        original = re.sub(r"\.default\b", "", f"moe_{original}")
        # `moe_gate.0.mlp...` is found by its last `moe_`, so the path before it is the module's.
        for pattern, ours in _ORIGINAL_NAMES.items():
            if match := re.fullmatch(pattern, original):
                groups = list(match.groups())
                if ours[:2] in ("W.", "w."):  # the released list has an empty first entry: leaves carry no state
                    groups[0] = str(int(groups[0]) - 1)
                renamed[path + ours.format(*groups)] = tensor
                break
        else:
            raise AdapterError(
                f"'{name}' is not a tensor of the released S'MoRE layout", "expected names such as moe_A.0"
            )
    return renamed


def without_shared_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drops what a saved S'MoRE# adapter repeats: every level's copy of the one pool, which stays as `A.0` and so on.

    Raises:
        AdapterError: a copy differs.
    """
    kept = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.[AaBb])\.(\d+)", name)
        if match is None or match[2] == "0":
            kept[name] = tensor
        elif (first := tensors.get(f"{match[1]}.0")) is None or not tensor.equal(first):
            raise AdapterError(f"{name} differs from {match[1]}.0, and a shared pool is one pool")
    return kept


def count_trees(num_experts: list[int], fanout: list[int]) -> int:
    """How many trees the router can pick, Gamma = prod_l C(s_l, f_l)^{F_{l+1}} (paper, section 4)."""
    trees, parents = 1, 1
    for s, f in zip(reversed(num_experts), reversed(fanout), strict=True):
        trees *= math.comb(s, f) ** parents
        parents *= f
    return trees
