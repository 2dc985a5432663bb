"""What an expert is worth: the change of the held-out loss without it, and with nothing but it.

    ablated(e) = loss(g_e = 0) - loss          above 0: the model needs the expert; the other gates stay as they are
    forced(e)  = loss(all mass on e) - loss    what the choice between it and the others is worth

Expert e of all chosen routers of a layer is changed at once, as so many passes are a layer's experts times two. (That
the experts of two projections have the same number means nothing: look at one projection to tell them apart.) What is
below the layer does not change, so it is not computed again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from smore_cli.errors import UsageError
from smore_cli.merging.streams import layers_of
from smore_cli.nn import adapted_modules
from smore_cli.nn.gate_edit import EditKind, GateEdit
from smore_cli.nn.router import Router
from smore_cli.nn.tree_router import TreeRouter
from smore_cli.routing.passes import Passes, evaluating

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from torch import nn
    from transformers import PreTrainedModel

    from smore_cli.data.batch import Row
    from smore_cli.merging.streams import Layers
    from smore_cli.nn import AdaptedModule
    from smore_cli.routing.passes import Losses

__all__ = ["CausalImportance", "Change", "Effect", "measure_causal", "routers_of"]


@dataclass(frozen=True)
class Change:
    """Of the loss, in nats per supervised token, and its standard error over the rows."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Effect:
    """One expert of the chosen routers of a layer.

    Attributes:
        layer: number of the layer.
        level: tree level, 0 = leaves.
        expert: its number.
        ablated: what happens without it.
        forced: what happens where every token takes it.
    """

    layer: int
    level: int
    expert: int
    ablated: Change
    forced: Change


@dataclass(frozen=True)
class CausalImportance:
    """All of them.

    Attributes:
        loss: of the model as it is, in nats per supervised token.
        supervised: how many tokens that is a mean over.
        modules: the adapted modules whose routers were changed.
        effects: layer by layer, root first.
    """

    loss: float
    supervised: int
    modules: tuple[str, ...]
    effects: tuple[Effect, ...]

    def document(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        effects = [
            {**vars(effect), "ablated": vars(effect.ablated), "forced": vars(effect.forced)} for effect in self.effects
        ]
        return {
            "loss": self.loss,
            "supervised_tokens": self.supervised,
            "modules": list(self.modules),
            "effects": effects,
        }


@dataclass(frozen=True)
class _Level:
    """The routers of a layer that have a tree level, each with its number of experts there."""

    level: int
    routers: dict[nn.Module, int]

    def edits(self) -> Iterator[tuple[int, dict[EditKind, GateEdit]]]:
        """Yields each expert, and how it is ablated and forced where there is one of that number."""
        for expert in range(max(self.routers.values())):
            having = frozenset(router for router, count in self.routers.items() if expert < count)
            yield expert, {kind: GateEdit(kind, (expert,), having, self.level) for kind in get_args(EditKind)}


def routers_of(module: AdaptedModule) -> list[Router | TreeRouter]:
    """Returns the routers of a module's active adapter."""
    if module.active is None:
        return []
    return [child for child in module.adapter(module.active).children() if isinstance(child, (Router, TreeRouter))]


def measure_causal(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    pad_token_id: int,
    modules: Collection[str] | None = None,
    level: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> CausalImportance:
    """Measures what the experts of a model's active adapter are worth on some rows.

    Args:
        model: with a routed adapter active.
        rows: of several branches the right one is read.
        pad_token_id: fills shorter rows.
        modules: only the routers of these adapted modules, by path; None: all.
        level: only this tree level; None: all.
        say: takes a line on how long it will take, after the first pass.
        on_progress: called with the passes done and their total.

    Raises:
        UsageError: there is no such router, the adapter is not on one stack of layers, or nothing is supervised.
    """
    adapted = {path: m for path, m in adapted_modules(model).items() if routers_of(m)}
    chosen = {path: m for path, m in adapted.items() if modules is None or path in modules}
    with evaluating(model):
        layers = layers_of(model, adapted)
        levels = [_levels(layers, number, chosen, level) for number in range(len(layers.modules))]
        if not any(levels):
            raise UsageError("there is no router to change", "choose layers, a linear map or a tree level that has one")
        passes = Passes(model, layers, rows, pad_token_id)
        started = time.perf_counter()
        plain = passes.losses()
        count, whole = _cost(levels)
        seconds = whole * (time.perf_counter() - started)
        say(f"{count:,} passes that come to {whole:,.0f} through all layers: about {seconds:,.0f} s")
        effects: list[Effect] = []
        for number, here in enumerate(levels):
            for effect in _effects(passes, here, plain):
                effects.append(effect)
                on_progress(2 * len(effects), count)
            if any(levels[number + 1 :]):
                passes.advance()
    return CausalImportance(plain.mean, int(plain.tokens.sum()), tuple(chosen), tuple(effects))


def _levels(layers: Layers, number: int, chosen: dict[str, AdaptedModule], only: int | None) -> list[_Level]:
    """Returns the tree levels of a layer that are wanted, root first."""
    found: dict[int, dict[nn.Module, int]] = {}
    for path, module in chosen.items():
        if not path.startswith(f"{layers.path}.{number}."):
            continue
        for router in routers_of(module):
            counts = [router.num_experts] if isinstance(router, Router) else router.num_experts
            for level, count in enumerate(counts):
                if only in (None, level):
                    found.setdefault(level, {})[router] = count
    return [_Level(level, found[level]) for level in sorted(found, reverse=True)]


def _cost(levels: Sequence[Sequence[_Level]]) -> tuple[int, float]:
    """Returns how many passes there are, and to how many through all layers they come, the head left out."""
    passes = [2 * sum(max(level.routers.values()) for level in here) for here in levels]
    return sum(passes), sum(count * (len(levels) - number) / len(levels) for number, count in enumerate(passes))


def _effects(passes: Passes, levels: Sequence[_Level], plain: Losses) -> Iterator[Effect]:
    """Yields what each expert of a layer is worth."""
    for here in levels:
        for expert, edits in here.edits():
            changes = {kind: Change(*passes.losses(edit).above(plain)) for kind, edit in edits.items()}
            yield Effect(passes.number, here.level, expert, changes["ablate"], changes["force"])
