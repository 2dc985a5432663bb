"""What the gradients of a census reach: tensors, and of those that hold one block an expert, each expert by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from smore_cli.nn import AdaptedModule, Adapter
    from smore_cli.nn.context import RoutingTrace

__all__ = ["NEGLIGIBLE", "Picks", "Reached"]

NEGLIGIBLE = 1e-6
"""Beside the largest of its kind, so small a gradient is rounding, and so small a token's is nothing to count on."""


class Picks:
    """Which experts got tokens that matter: those whose output has a gradient.

    A token of the last layer that predicts nothing has none, and its experts then cannot have one either.

    Attributes:
        of_call: (N, F, s) bool, what was picked, by adapter and tree level, in the module call that is running.
        of_expert: (s,) bool, which experts got such tokens, by adapter and level.
    """

    def __init__(self, modules: dict[str, AdaptedModule]) -> None:
        self.of_call: dict[tuple[nn.Module, int], Tensor] = {}
        self.of_expert: dict[tuple[nn.Module, int], Tensor] = {}
        self._modules = modules
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Picks:
        self._handles = [module.register_forward_hook(self._after) for module in self._modules.values()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def observe(self, trace: RoutingTrace) -> None:
        """Notes the picks of one router."""
        self.of_call[trace.owner, trace.level] = trace.gates != 0

    def _after(self, module: nn.Module, _: object, output: Tensor) -> None:
        """Once a module was called: waits for the gradient of its output, which says which tokens count."""
        adapted = cast("AdaptedModule", module)
        if adapted.active is None:  # a pass of the bare backbone, as a prior's embedder runs
            return
        owner = adapted.adapter(adapted.active)
        calls = {key: self.of_call.pop(key) for key in list(self.of_call) if key[0] is owner}
        if not calls or not output.requires_grad:
            return

        def count(gradient: Tensor) -> None:
            size = gradient.flatten(0, -2).abs().amax(-1)  # (N,)
            matters = size > NEGLIGIBLE * size.amax()
            for key, picked in calls.items():
                got = (picked & matters[:, None, None]).flatten(0, 1).any(0)  # (s,)
                self.of_expert[key] = self.of_expert[key] | got if key in self.of_expert else got

        output.register_hook(count)


class Reached:
    """What the gradients of one adapter reach.

    Attributes:
        problems: by tensor.
        unpicked: how many experts got no token that matters.
        experts: how many there are.
    """

    def __init__(self, adapter: Adapter, picks: Picks) -> None:
        self.problems: dict[str, str] = {}
        levels = {level for level, _ in adapter.expert_axes.values()}
        picked = {level: picks.of_expert[adapter, level] for level in levels if (adapter, level) in picks.of_expert}
        self.experts = sum(len(experts) for experts in picked.values())
        self.unpicked = sum(int((~experts).sum()) for experts in picked.values())
        without_choice = adapter.without_choice()
        for name, parameter in adapter.named_parameters():
            if name in without_choice:
                continue
            level, dim = adapter.expert_axes.get(name, (-1, 0))
            if problem := _problem(parameter.grad, picked.get(level), dim):
                self.problems[name] = problem

    @property
    def complete(self) -> bool:
        """Whether another pass could show nothing more."""
        return not self.problems and not self.unpicked


def _problem(gradient: Tensor | None, picked: Tensor | None, dim: int) -> str | None:
    """Returns what is wrong with a gradient, if anything.

    Args:
        gradient: of one parameter.
        picked: (s,) bool, which experts got tokens; None: it belongs to no expert.
        dim: along which the experts lie.
    """
    if gradient is not None and not gradient.isfinite().all():
        return "its gradient is not finite"
    if picked is not None and not picked.any():
        return None
    if gradient is None or not gradient.any():
        return "no gradient reaches it"
    if picked is None:
        return None
    blocks = gradient.movedim(dim, 0)
    if len(blocks) % len(picked):
        return f"its {len(blocks)} rows along dimension {dim} (expert_axes) are not blocks of {len(picked)} experts"
    experts = blocks.reshape(len(picked), -1)  # (s, the rest)
    missing = (picked & ~experts.any(1)).nonzero().flatten().tolist()
    return f"no gradient reaches experts {', '.join(map(str, missing))}, which got tokens" if missing else None
