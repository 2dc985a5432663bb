"""Adding up, over forward passes, what the routers of a model decide.

Only sums are kept, in float64 and over real tokens alone: memory does not grow with the data, and the result does not
depend on how the rows were batched, ordered or padded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from smore_cli.data.batch import collate
from smore_cli.errors import SmoreError, UsageError
from smore_cli.models.forward import target_logits
from smore_cli.nn import AdapterContext, adapted_modules
from smore_cli.nn.prior import PriorRouter
from smore_cli.routing.paths import PathCounter
from smore_cli.routing.statistics import RouterStatistics
from smore_cli.routing.tokens import Usage, UsageLog

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from smore_cli.data.batch import Row
    from smore_cli.nn.context import RoutingTrace

__all__ = ["Routing", "RoutingCollector", "collect_routing"]


@dataclass
class _Sums:
    """Sums over the decisions of one router.

    Attributes:
        decisions: how many.
        per_expert: (2, s) float64, how often each expert was taken, and its gate weights.
        entropy: () float64, in nats.
        taken: (s + 1,) int64, how many decisions took 0, 1, ..., s experts.
        together: (s, s) float64, how often two experts were taken by the same decision.
    """

    decisions: int
    per_expert: Tensor
    entropy: Tensor
    taken: Tensor
    together: Tensor

    def plus(self, other: _Sums) -> _Sums:
        """Returns the sums over the decisions of both."""
        return _Sums(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))


class RoutingCollector:
    """Receives the routing traces of a model's active adapters.

        collector = RoutingCollector(model)
        with collector.watch(token_mask):
            model(...)
        collector.results()

    Args:
        model: with adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._paths = {
            module.adapters[module.active]: path
            for path, module in adapted_modules(model).items()
            if module.active is not None
        }
        self._sums: dict[tuple[str, int], _Sums] = {}
        self._paths_taken = PathCounter()
        self.log = UsageLog()

    def watch(
        self, token_mask: Tensor, prompt_mask: Tensor | None = None, counted: Tensor | None = None
    ) -> AdapterContext:
        """Returns the context for one forward pass.

        Args:
            token_mask: (B, S) which tokens are real.
            prompt_mask: (B, S) which are the prompt; None: all real ones.
            counted: (B, S) which real tokens are counted; None: all.
        """
        mask = (token_mask if counted is None else counted).reshape(-1) != 0
        observe = partial(self._add, mask, int(mask.sum()))
        return AdapterContext(token_mask=token_mask, aux=False, observe=observe, prompt_mask=prompt_mask)

    def results(self) -> list[RouterStatistics]:
        """Returns every router that was seen, in the model's order, root first.

        Raises:
            SmoreError: a router gave values that are not finite.
        """
        place = {path: index for index, path in enumerate(self._paths.values())}
        keys = sorted(self._sums, key=lambda key: (place[key[0]], -key[1]))
        mixes = {path: _token_share(adapter) for adapter, path in self._paths.items()}
        return [
            replace(_statistics(*key, self._sums[key]), paths=self._paths_taken.shares(*key), token_share=mixes[key[0]])
            for key in keys
        ]

    @torch.no_grad()
    def _add(self, mask: Tensor, tokens: int, trace: RoutingTrace) -> None:
        """Adds one trace; `mask` (N,) is true on the real tokens, of which there are `tokens`."""
        real = mask.to(trace.gates.device)[:, None, None]
        # Not by multiplication: what a router makes of padding may be anything, and 0 * NaN is NaN.
        gates = torch.where(real, trace.gates.double(), 0.0)  # (N, F, s)
        probabilities = trace.probabilities.double()
        entropy = torch.where(real, -torch.xlogy(probabilities, probabilities), 0.0).sum()
        taken = gates != 0
        per_expert = torch.stack([taken.sum((0, 1)).double(), gates.sum((0, 1))])
        counts = taken[mask].sum(-1).flatten()
        each = taken.flatten(0, 1).double()
        here = _Sums(
            tokens * gates.shape[1],
            per_expert,
            entropy,
            torch.bincount(counts, minlength=gates.shape[-1] + 1),
            each.t() @ each,
        )
        key = (self._paths[trace.owner], trace.level)
        self._paths_taken.add(key[0], trace, real[:, 0, 0])
        self.log.add(key, gates[mask])
        seen = self._sums.get(key)
        self._sums[key] = here if seen is None else seen.plus(here)


def _statistics(module: str, level: int, sums: _Sums) -> RouterStatistics:
    taken, weights = (sums.per_expert / max(sums.decisions, 1)).tolist()
    # One expert leaves nothing to be undecided about: its entropy is 0 of at most 0.
    entropy = sums.entropy.item() / max(sums.decisions, 1) / math.log(max(len(taken), 2))
    if not all(map(math.isfinite, (*taken, *weights, entropy))):
        raise SmoreError(f"the router of {module} gives values that are not finite", "the adapter's training diverged")
    counts = (sums.taken.double() / sums.decisions).tolist()
    picked = int(sums.taken.nonzero().max())
    always_all = counts[-1] == 1
    together = None if always_all else (sums.together / sums.decisions).tolist()
    return RouterStatistics(
        module, level, sums.decisions, picked, taken, weights, entropy, taken=counts, together=together
    )


def _token_share(adapter: Any) -> float | None:
    """Returns the token's part, c_token lam / (c_token lam + c_prior (1 - lam)), of a router with a prior."""
    router = getattr(adapter, "router", None)
    if not isinstance(router, PriorRouter):
        return None
    mix = torch.sigmoid(router.sharpness * router.omega.detach().double()).item()
    token, prior = router.token_scale * mix, router.prior_scale * (1 - mix)
    return token / (token + prior)


@dataclass(frozen=True)
class Routing:
    """What the routers of a model did with some rows.

    Attributes:
        routers: in the model's order, the root of each first.
        usage: the same token by token.
    """

    routers: list[RouterStatistics]
    usage: Usage


@torch.inference_mode()
def collect_routing(
    model: nn.Module,
    rows: Sequence[Row],
    *,
    pad_token_id: int,
    batch_size: int,
    supervised: bool = False,
    on_progress: Callable[[int, int], None],
) -> Routing:
    """Runs rows through a model, without its output embedding, and returns what its routers did.

    Args:
        model: a causal language model of transformers with adapters, in evaluation mode.
        rows: at least one.
        pad_token_id: fills shorter rows; padding is not counted.
        batch_size: rows a forward pass; the result does not depend on it.
        supervised: count the places alone that predict a token that is learned or scored.
        on_progress: called with the rows done and their total.

    Raises:
        SmoreError: a router gave values that are not finite.
        UsageError: no token is counted.
    """
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    collector = RoutingCollector(model)
    # The least padding; the order does not matter.
    ordered = sorted(range(len(rows)), key=lambda number: rows[number].length, reverse=True)
    for start in range(0, len(ordered), batch_size):
        numbers = ordered[start : start + batch_size]
        batch = collate([rows[number] for number in numbers], pad_token_id=pad_token_id, mask_dtype=model.dtype)  # type: ignore[arg-type]
        batch = batch.to(weight.device)
        counted = batch.token_mask
        if supervised:
            counted = torch.zeros_like(batch.token_mask)
            counted.view(-1)[batch.sources] = True
        nowhere = batch.sources.new_empty(0)
        collector.log.add_pass(batch.input_ids, counted, batch.token_mask, numbers)
        with collector.watch(batch.token_mask, batch.prompt_mask, counted):
            target_logits(model, replace(batch, sources=nowhere, targets=nowhere))
        on_progress(min(start + batch_size, len(ordered)), len(ordered))
    usage = collector.log.usage()
    if not len(usage.ids):
        raise UsageError("no token of the rows is supervised", "look at all of them: --tokens all")
    return Routing(collector.results(), usage)
