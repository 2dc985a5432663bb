"""The gradient census: before the first step, is every tensor that trains reached by a gradient, and every expert?

    pass 1      the true start      the tensors without a gradient are those the adapters declare
                                    (`Adapter.silent_at_start`: A while B = 0, say)
    pass 2, 3   everything nudged   every tensor has a finite gradient that is not zero, and so has the share of every
    (to 8)      a little            expert that was picked; experts that were not picked yet are counted, no more

What the probe changes (parameters, gradients, random state) is put back bit for bit: the run is the same without it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import torch

from smore_cli.errors import CheckFailed
from smore_cli.models.placement import gpus_of
from smore_cli.nn import AdapterContext, adapted_modules
from smore_cli.training.census_table import coverage_table
from smore_cli.training.objective import Counts
from smore_cli.training.reached import NEGLIGIBLE, Picks, Reached

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor, nn

    from smore_cli.data.batch import Batch
    from smore_cli.nn import Adapter
    from smore_cli.training.objective import Objective
    from smore_cli.training.setup import Setup

__all__ = ["Census", "gradient_census", "take_census"]

PROBES = 8
"""Forward and backward passes at most, of which so many are needed only where something is not reached."""
ENOUGH = 2
"""Nudged passes after which experts that no token went to are only counted."""
NUDGE = 0.02
"""Size of the noise: relative to a tensor's own size, absolute where it is zero."""


@dataclass
class Census:
    """What was found.

    Attributes:
        tensors: how many trainable tensors each adapted module has, by path.
        experts: how many experts there are, over all modules.
        silent: names, within their adapters, of the tensors without a gradient at the start, as declared.
        not_picked: how many experts no token went to.
        asleep: how many tensors only stronger noise made reachable, as a router whose ReLUs are off for every token.
        problems: what is wrong, by tensor.
    """

    tensors: dict[str, int] = field(default_factory=dict)
    experts: int = 0
    silent: set[str] = field(default_factory=set)
    not_picked: int = 0
    asleep: int = 0
    problems: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """Returns the census in one line."""
        experts = f", {self.experts:,} experts" if self.experts else ""
        state = f"{len(self.problems)} not as they should be" if self.problems else "all reached"
        parts = [
            f"gradient census: {len(self.tensors)} modules, {sum(self.tensors.values()):,} tensors{experts}: {state}"
        ]
        if self.silent:
            names = sorted({name.split(".")[0] for name in self.silent})
            parts.append(f"silent at the first step as declared: {', '.join(names)}")
        if self.not_picked:
            parts.append(f"experts not picked yet: {self.not_picked:,}")
        if self.asleep and not self.problems:
            parts.append(f"tensors that only stronger noise woke: {self.asleep:,}")
        return "; ".join(parts)

    def table(self) -> list[str]:
        """Returns targets x layers, with how many of the tensors there are as they should be."""
        wrong: dict[str, int] = defaultdict(int)
        for tensor in self.problems:
            wrong[max((path for path in self.tensors if tensor.startswith(f"{path}.")), key=len)] += 1
        return coverage_table({path: (total - wrong[path], total) for path, total in self.tensors.items()})


def take_census(setup: Setup, say: Callable[[str], None]) -> Census:
    """Takes the census of a run that is about to start, says what it found in a line, and returns it.

    Raises:
        CheckFailed: some tensor would not be trained as its method says; the message names it.
    """
    started = time.perf_counter()
    model = setup.model
    passes = (batch for step in range(PROBES) for batch in setup.batches.step(step))
    batches = list(islice(passes, PROBES))
    census = gradient_census(model, batches, setup.objective, device=setup.device, backward=setup.accelerator.backward)
    setup.seconds["census"] = round(time.perf_counter() - started, 2)
    say(census.line())
    if not census.problems:
        return census
    for line in census.table():
        say(line)
    shown = "; ".join(f"{tensor}: {problem}" for tensor, problem in islice(census.problems.items(), 5))
    more = f"; and {len(census.problems) - 5} more" if len(census.problems) > 5 else ""
    raise CheckFailed(
        f"gradient census: {len(census.problems)} of {sum(census.tensors.values())} tensors would not be trained as "
        f"they should: {shown}{more}",
        "nothing was written; train.gradient_census: false trains without this check",
    )


def gradient_census(
    model: nn.Module,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    device: torch.device,
    backward: Callable[[Tensor], None],
) -> Census:
    """Probes a model with freshly initialised adapters, which it leaves as it found them.

    Args:
        model: in training mode; its active adapter is looked at.
        batches: the first for the true start, the others, as many as are needed, for the nudged passes.
        objective: what is minimised.
        device: where the model is.
        backward: runs the backward pass of a scalar.
    """
    modules = {path: module for path, module in adapted_modules(model).items() if module.active is not None}
    adapters = {path: module.adapter(str(module.active)) for path, module in modules.items()}
    census = Census({path: len(list(adapter.parameters())) for path, adapter in adapters.items()})
    with _put_back(adapters, gpus_of(model, device)), Picks(modules) as picks:

        def probe(batch: Batch) -> None:
            picks.of_call.clear()
            batch = batch.to(device)
            with AdapterContext.of(batch, observe=picks.observe) as context:
                loss = objective(model, batch, Counts.of([batch])).loss
            backward(loss + context.aux_loss().to(loss))

        probe(batches[0])
        undeclared: dict[str, list[str]] = defaultdict(list)  # paths of the modules, by tensor
        for path, adapter in adapters.items():
            _check_start(census, path, adapter, undeclared)
        for name, paths in undeclared.items():
            # In some modules it may be the few tokens of one batch, as where a router's ReLUs are all off for them: the
            # nudged passes tell. In all modules it is the method.
            if len(paths) == sum(_expects(adapter, name) for adapter in adapters.values()):
                said = "no gradient at the first step, which its method does not declare"
                census.problems |= {f"{path}.{name}": said for path in paths}
        for adapter in adapters.values():
            adapter.zero_grad()
        _nudge(adapters.values())
        picks.of_expert.clear()
        for number, batch in enumerate(batches[1:] or batches, 1):
            probe(batch)  # gradients add up, as picks do
            found = {path: Reached(adapter, picks) for path, adapter in adapters.items()}
            wrong = sum(len(reached.problems) for reached in found.values())
            if not wrong and (number >= ENOUGH or all(reached.complete for reached in found.values())):
                break
            if number >= ENOUGH:  # ReLUs that are off for every token wake up; what is cut off stays so
                census.asleep = max(census.asleep, wrong)
                _nudge(adapters.values(), size=NUDGE * 2**number, seed=number)
        for path, reached in found.items():
            census.experts += reached.experts
            census.not_picked += reached.unpicked
            for name, problem in reached.problems.items():
                census.problems.setdefault(f"{path}.{name}", problem)
    return census


@contextmanager
def _put_back(adapters: dict[str, Adapter], gpus: list[int]) -> Iterator[None]:
    """Restores parameters, buffers, gradients and the random state, bit for bit."""
    tensors = {t for adapter in adapters.values() for t in (*adapter.parameters(), *adapter.buffers())}
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
    with torch.random.fork_rng(devices=gpus):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in kept:
                    tensor.copy_(value)
                    tensor.grad = None


@torch.no_grad()
def _nudge(adapters: Iterable[Adapter], size: float = NUDGE, seed: int = 0) -> None:
    """Adds noise to everything that trains, the same in every run."""
    generators: dict[torch.device, torch.Generator] = {}
    for adapter in adapters:
        for parameter in adapter.parameters():
            generator = generators.setdefault(parameter.device, torch.Generator(parameter.device).manual_seed(seed))
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype)
            own = parameter.square().mean().sqrt()
            parameter.add_(noise * size * torch.where(own > 0, own, 1.0))


def _expects(adapter: Adapter, name: str) -> bool:
    """Whether an adapter has a parameter of that name, with a gradient at the start by its own declaration."""
    return name in dict(adapter.named_parameters()) and name not in adapter.silent_at_start()


def _check_start(census: Census, path: str, adapter: Adapter, undeclared: dict[str, list[str]]) -> None:
    """Compares the gradients at the true start with what the adapter declares; `undeclared` gets what was not."""
    largest = max((float(p.grad.abs().amax()) for p in adapter.parameters() if p.grad is not None), default=0.0)
    declared = adapter.silent_at_start()
    for name, parameter in adapter.named_parameters():
        size = 0.0 if parameter.grad is None else float(parameter.grad.abs().amax())
        if not size < float("inf"):
            census.problems[f"{path}.{name}"] = "its first gradient is not finite"
        elif name in declared and size <= NEGLIGIBLE * largest:
            census.silent.add(name)
        elif name in declared:
            census.problems[f"{path}.{name}"] = "has a gradient at the first step, where its method declares none"
        elif size == 0:
            undeclared[name].append(path)
