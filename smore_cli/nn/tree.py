"""A tree of residual low-rank experts (S'MoRE, eq. 3 and 10).

Pool l = 0..L-1, leaves first. Every expert sees the token, every parent sums its children:

    e_n(x)      = c_l (B_n (A_n x + a_n) + b_n)                            expert n of pool l, in R^{d_{l+1}}
    x_{l+1}     = sum_children alpha act( e_n(x) + W_l x_l + w_l )         "all"       (eq. 3)
                = sum_children alpha ( e_n(x) + W_l act(x_l) + w_l )       "child_v2"  (S'MoRE*, eq. 10)
                = sum_children ( alpha e_n(x) + W_l act(x_l) + w_l )       "child"     (released code only)
    y           = W x + b + P x_L + p

A child state x_l belongs to a node of the tree (a path), an expert's e_n to the token alone: it is computed once
however many parents picked it. Widths: d_0 = 0, d_{l+1} = d_l + s_l r_l, so that no information must be dropped on the
way up; a shared pool (S'MoRE#) has d_l = s r throughout.

    x --[A_{L-1}; ..; A_0; D]--> latents | x_down        one GEMM over d_in
           router(x_down) -> picks of every level         rank space
           leaves -> ... -> x_L                           rank space
    x_L --[P]--> added into y                             one GEMM over d_out
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from smore_cli.nn.factored import Factored
from smore_cli.nn.tree_recompute import recomputed
from smore_cli.nn.tree_router import Activation, Choice, Picks, TreeRouter, activation_module
from smore_cli.nn.tree_states import gated_sum, leaf_sum, node_sum
from smore_cli.nn.wide import Down

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["ActivationPosition", "Initialisation", "Tree"]

ActivationPosition = Literal["all", "child_v2", "child"]
Initialisation = Literal["w_final_zero", "eq_1_layer", "b_zero", "bw_zero", "normal"]


class Tree(Factored):
    """S'MoRE's update of one linear map.

    Attributes:
        A, a: (s_l, r_l, d_in), (s_l, r_l) down-projections of each pool; one entry for all levels if the pool is
        shared. B, b: (s_l, d_{l+1}, r_l), (s_l, d_{l+1}) up-projections.
        W, w: (d_{l+1}, d_l), (d_{l+1}) transform of the child state; entry i belongs to level i + 1, leaves have none.
        P, p: (d_out, d_L), (d_out) final projection.
        act: activation of each level.
        router: picks the tree.
        core_names: of the parameters that `core` computes with.
    """

    up_projections = frozenset({"P"})  # B and W map between widths of the tree
    stacked_biases = frozenset({"a", "b"})

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        num_experts: Sequence[int],
        rank: Sequence[int],
        scale: Sequence[float],
        router: TreeRouter,
        activation: Activation,
        activation_position: ActivationPosition,
        shared_pool: bool,
        init: Initialisation,
    ) -> None:
        super().__init__()
        self.num_experts, self.rank, self.level_scale = list(num_experts), list(rank), list(scale)
        self.activation, self.activation_position = activation, activation_position
        self.shared_pool, self.init = shared_pool, init
        self.widths = _state_widths(num_experts, rank, shared_pool)  # d_0 .. d_L
        pools = [0] if shared_pool else range(len(rank))
        shape = [(num_experts[l], rank[l], self.widths[l + 1]) for l in pools]
        self.A = nn.ParameterList(torch.empty(s, r, d_in) for s, r, _ in shape)
        self.a = nn.ParameterList(torch.empty(s, r) for s, r, _ in shape)
        self.B = nn.ParameterList(torch.empty(s, d, r) for s, r, d in shape)
        self.b = nn.ParameterList(torch.empty(s, d) for s, _, d in shape)
        self.W = nn.ParameterList(torch.empty(d, e) for e, d in zip(self.widths[1:], self.widths[2:], strict=False))
        self.w = nn.ParameterList(torch.empty(d) for d in self.widths[2:])
        self.P = nn.Parameter(torch.empty(d_out, self.widths[-1]))
        self.p = nn.Parameter(torch.empty(d_out))
        self.act = nn.ModuleList(activation_module(activation) for _ in rank)
        self.router = router
        wide = {id(p) for p in (*self.A, *self.a, self.P, self.p, self.router.down.weight)}
        self.core_names = [name for name, parameter in self.named_parameters() if id(parameter) not in wide]
        down_names = [*(f"{name}.{l}" for name in "Aa" for l in pools), "router.down.weight"]
        self._core, self._down = _places(self, self.core_names), _places(self, down_names)
        self.expert_axes = {f"{name}.{l}": (l, 0) for l in pools if not shared_pool for name in "AaBb"}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises by the rule `init`; all but `normal` give an update of exactly zero (dossier section 2)."""
        for group in (self.a, self.b, self.w, [self.p]):
            for bias in group:
                nn.init.zeros_(bias)
        for weight in (*self.A, *self.B, *self.W, self.P):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
        if self.init in ("w_final_zero", "eq_1_layer"):
            nn.init.zeros_(self.P)
        if self.init in ("b_zero", "bw_zero"):
            for B in self.B:
                nn.init.zeros_(B)
        if self.init == "bw_zero":
            for W in self.W:
                nn.init.zeros_(W)
        if self.init == "eq_1_layer":
            self._select_blocks()

    def silent_at_start(self) -> frozenset[str]:
        """What the initial zeros cut off from the loss; `normal` has none, routers may have losses of their own."""
        if self.init == "normal":
            return frozenset()
        if self.init in ("w_final_zero", "eq_1_layer"):  # P = 0: nothing below it has a gradient
            reached = {"P", "p"}
        else:  # B = 0: every state is 0, and so are the gradients of what multiplies it; W = 0 cuts off lower levels
            top = len(self.rank) - 1
            levels = range(top + 1) if self.init == "b_zero" else [top]
            pools = {0} if self.shared_pool else set(levels)
            reached = {"p"} | {f"{name}.{pool}" for pool in pools for name in "Bb"}
            reached |= {f"w.{level - 1}" for level in levels if level > 0}
        reached |= {f"router.{name}" for name in self.router.reached_by_loss()}
        return frozenset(name for name, _ in self.named_parameters() if name not in reached)

    def without_choice(self) -> frozenset[str]:
        """Of a level with one expert: its MLP, and what serves no level below it that has more."""
        free = {l for l, s in enumerate(self.num_experts) if s > 1}
        names = {name for name, _ in self.named_parameters()}
        found = set() if free else {name for name in names if name.startswith("router.down.")}
        for l in set(range(len(self.num_experts))) - free:
            own = f"router.levels.{l}."
            found |= {n for n in names if n.startswith(own) and (n != f"{own}keys" or not any(m < l for m in free))}
        return frozenset(found)

    def _select_blocks(self) -> None:
        """B and W as selectors: with identity activation the tree is then one layer of LoRA experts."""
        with torch.no_grad():
            for B in self.B:
                s, d, r = B.shape
                B.zero_()
                B.view(s, d, r)[:, : s * r] = torch.eye(s * r).view(s, r, s * r).transpose(1, 2)
            for W in self.W:
                W.copy_(torch.eye(W.shape[0])[:, -W.shape[1] :])  # the bottom d_l rows are the identity

    def down(self) -> Down:
        """The A_l and a_l of all pools, and D, which is the router's: R = sum_l s_l r_l + d_down rows."""
        *pools, router = _at(self._down)
        half = len(pools) // 2
        rows, bias = (tuple(each.flatten(0, 1) for each in part) for part in (pools[:half], pools[half:]))
        return Down(rows, (router,), bias)

    def up(self) -> tuple[Tensor, Tensor]:
        """P, p."""
        return self.P, self.p

    def core_parameters(self) -> list[Tensor]:
        """Those of the names `core_names`: plain tensors, where a call was lent some."""
        return _at(self._core)

    def middle(self, latent: Tensor) -> Tensor:
        """Routes and walks up the tree: everything between the two wide products.

        Args:
            latent: (N, R); only this and what was picked are kept for the backward pass.

        Returns:
            (N, d_L) the root's state x_L.
        """
        state, picks = recomputed(self, latent, self.core_names)
        self.router.report(picks, self)
        return state

    def core(self, latent: Tensor, again: Sequence[Choice] | None = None) -> tuple[Tensor, list[Picks]]:
        """Returns x_L, (N, d_L), and the picks, from latents (N, R); with `again` picks as before."""
        *latents, x_down = latent.split([*(a.numel() for a in self.a), self.router.down.out_features], dim=1)
        picks = self.router(x_down + self.router.down.bias, again)
        pools = [h.view(-1, *a.shape) for h, a in zip(latents, self.a, strict=True)]
        return self._propagate(pools, picks), picks

    def _propagate(self, latents: list[Tensor], picks: list[Picks]) -> Tensor:
        """Leaves to root: the state x_L, (N, d_L), from latents (N, s, r) of each pool."""
        dtype = latents[0].dtype
        state: Tensor | None = None
        W: Tensor | None = None
        for l, picked in enumerate(picks):
            pool = 0 if self.shared_pool else l
            latent, B, bias = latents[pool], self.B[pool].to(dtype), self.b[pool].to(dtype)
            if self.level_scale[l] != 1:
                B, bias = B * self.level_scale[l], bias * self.level_scale[l]
            if state is not None:
                W = self.W[l - 1].to(dtype)
                if self.activation_position != "child":  # gates sum the bias up with the rest
                    bias = bias + self.w[l - 1].to(dtype)
            act = self.act[l]
            if self.activation_position != "all":
                carried = None if state is None else self._carried(act(state), picked)
                new = gated_sum(latent, picked, B, bias, carried, W)
                if self.activation_position == "child" and l > 0:
                    new = new + len(picked.chosen) * self.w[l - 1].to(dtype)
                state = new
            elif state is None and picked.chosen[..., 0].numel() > self.num_experts[l]:
                state = leaf_sum(latent, picked, B, bias, act)
            else:
                slope = act.weight.to(dtype) if isinstance(act, nn.PReLU) else None
                state = node_sum(latent, picked, B, bias, state, W, self.activation, slope)
        assert state is not None  # a tree has at least one level
        return state

    def _carried(self, children: Tensor, picked: Picks) -> Tensor:
        """Sums the activated states of the children, (f_l, .., N, d) to (f_{l+1}, .., N, d)."""
        if self.activation_position == "child":
            return children.sum(0)
        return (children * picked.alpha.to(children.dtype).unsqueeze(-1)).sum(0)


def _places(module: nn.Module, names: Iterable[str]) -> list[tuple[nn.Module, str]]:
    """Returns whose each parameter is and its name there: to follow all names anew takes 50 microseconds."""
    return [(module.get_submodule(owner), name) for owner, _, name in (name.rpartition(".") for name in names)]


def _at(places: Sequence[tuple[nn.Module, str]]) -> list[Tensor]:
    return [cast("Tensor", module._parameters[name]) for module, name in places]


def _state_widths(num_experts: Sequence[int], rank: Sequence[int], shared_pool: bool) -> list[int]:
    """Returns d_0 .. d_L."""
    widths = [0]
    for s, r in zip(num_experts, rank, strict=True):
        widths.append(s * r if shared_pool else widths[-1] + s * r)
    return widths
