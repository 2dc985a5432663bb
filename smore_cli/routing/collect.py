"""Adding up, over forward passes, what the routers of a model decide.

Only sums are kept, in float64 and over real tokens alone: memory does not grow with the data, and the result does not
depend on how the rows were batched, ordered or padded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from smore_cli.data.batch import collate
from smore_cli.errors import SmoreError
from smore_cli.models.forward import target_logits
from smore_cli.nn import AdapterContext, adapted_modules
from smore_cli.routing.paths import PathCounter
from smore_cli.routing.statistics import RouterStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from smore_cli.data.batch import Row
    from smore_cli.nn.context import RoutingTrace

__all__ = ["RoutingCollector", "collect_routing"]


@dataclass
class _Sums:
    """Sums over the decisions of one router.

    Attributes:
        decisions: how many.
        per_expert: (2, s) float64, how often each expert was taken, and its gate weights.
        entropy: () float64, in nats.
        picked: () int64, the most experts that one decision took.
    """

    decisions: int
    per_expert: Tensor
    entropy: Tensor
    picked: Tensor


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

    def watch(self, token_mask: Tensor, prompt_mask: Tensor | None = None) -> AdapterContext:
        """Returns the context for one forward pass.

        Args:
            token_mask: (B, S) which tokens are real.
            prompt_mask: (B, S) which are the prompt; None: all real ones.
        """
        mask = token_mask.reshape(-1) != 0
        observe = partial(self._add, mask, int(mask.sum()))
        return AdapterContext(token_mask=token_mask, aux=False, observe=observe, prompt_mask=prompt_mask)

    def results(self) -> list[RouterStatistics]:
        """Returns every router that was seen, in the model's order, root first.

        Raises:
            SmoreError: a router gave values that are not finite.
        """
        place = {path: index for index, path in enumerate(self._paths.values())}
        keys = sorted(self._sums, key=lambda key: (place[key[0]], -key[1]))
        return [replace(_statistics(*key, self._sums[key]), paths=self._paths_taken.shares(*key)) for key in keys]

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
        picked = taken.sum(-1).amax()
        decisions = tokens * gates.shape[1]
        key = (self._paths[trace.owner], trace.level)
        self._paths_taken.add(key[0], trace, real[:, 0, 0])
        if (seen := self._sums.get(key)) is None:
            self._sums[key] = _Sums(decisions, per_expert, entropy, picked)
            return
        seen.decisions += decisions
        seen.per_expert += per_expert
        seen.entropy += entropy
        seen.picked = torch.maximum(seen.picked, picked)


def _statistics(module: str, level: int, sums: _Sums) -> RouterStatistics:
    taken, weights = (sums.per_expert / sums.decisions).tolist()
    # One expert leaves nothing to be undecided about: its entropy is 0 of at most 0.
    entropy = sums.entropy.item() / sums.decisions / math.log(max(len(taken), 2))
    if not all(map(math.isfinite, (*taken, *weights, entropy))):
        raise SmoreError(f"the router of {module} gives values that are not finite", "the adapter's training diverged")
    return RouterStatistics(module, level, sums.decisions, int(sums.picked), taken, weights, entropy)


@torch.inference_mode()
def collect_routing(
    model: nn.Module,
    rows: Sequence[Row],
    *,
    pad_token_id: int,
    batch_size: int,
    on_progress: Callable[[int, int], None],
) -> list[RouterStatistics]:
    """Runs rows through a model, without its output embedding, and returns what its routers did.

    Args:
        model: a causal language model of transformers with adapters, in evaluation mode.
        rows: at least one.
        pad_token_id: fills shorter rows; padding is not counted.
        batch_size: rows a forward pass; the result does not depend on it.
        on_progress: called with the rows done and their total.

    Raises:
        SmoreError: a router gave values that are not finite.
    """
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    collector = RoutingCollector(model)
    ordered = sorted(rows, key=lambda row: row.length, reverse=True)  # the least padding; the order does not matter
    for start in range(0, len(ordered), batch_size):
        batch = collate(ordered[start : start + batch_size], pad_token_id=pad_token_id, mask_dtype=model.dtype)  # type: ignore[arg-type]
        batch = batch.to(weight.device)
        nowhere = batch.sources.new_empty(0)
        with collector.watch(batch.token_mask, batch.prompt_mask):
            target_logits(model, replace(batch, sources=nowhere, targets=nowhere))
        on_progress(min(start + batch_size, len(ordered)), len(ordered))
    return collector.results()
