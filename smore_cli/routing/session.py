"""One inspection from beginning to end: open a run, read the data, run them through the model."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smore_cli import __version__
from smore_cli.errors import UsageError
from smore_cli.methods import load_method
from smore_cli.models.load import default_device, load_tokenizer
from smore_cli.models.runs import open_run
from smore_cli.nn import adapted_modules
from smore_cli.routing.beside import checkpoints_of, look_beside
from smore_cli.routing.collect import collect_routing
from smore_cli.routing.facts import router_facts
from smore_cli.routing.inputs import choose_inputs, given_source
from smore_cli.routing.layout import choose_level, choose_modules, places
from smore_cli.routing.statistics import DEAD_BELOW, summarise
from smore_cli.routing.trace import trace_text
from smore_cli.routing.worth import NOTHING, measure_worth
from smore_cli.training.checkpoint import step_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from smore_cli.routing.beside import Beside
    from smore_cli.routing.inputs import Inputs
    from smore_cli.routing.statistics import RouterStatistics
    from smore_cli.routing.trace import TextTrace
    from smore_cli.routing.worth import Progress, Worth, WorthRequest

__all__ = ["Choice", "DataRequest", "Extra", "RoutingProfile", "inspect_run"]


@dataclass(frozen=True)
class DataRequest:
    """What the command line says about data; None: as the run has it.

    Attributes:
        paths: files or names; empty: the run's own.
        format, split: how they are read.
        limit: the most rows.
        supervised: count the tokens that are learned or scored alone.
    """

    paths: tuple[str, ...] = ()
    format: str | None = None
    split: str | None = None
    limit: int | None = None
    supervised: bool = False


@dataclass(frozen=True)
class Extra:
    """What else is looked at.

    Attributes:
        similarity: how alike the experts' updates are.
        drift: how the routing came about, checkpoint by checkpoint.
        compare: another run, on the same rows.
    """

    similarity: bool = False
    drift: bool = False
    compare: Path | None = None


@dataclass(frozen=True)
class Choice:
    """Which routers are wanted; None: all."""

    level: int | None = None
    layers: set[int] | None = None
    module: str | None = None


@dataclass(frozen=True)
class RoutingProfile:
    """What the routers of a run do with some data.

    Attributes:
        run: the run's folder.
        backbone: its backbone, as the recipe has it.
        method: its adapter's method.
        inputs: the data.
        routers: in the model's order, the root of each first.
        seconds: wall-clock time of each part.
        worth: what experts and routing are worth, where that was asked for.
        trace: what the routers do with each token of a text, where one was given.
        facts: by module and level, what else is known of a router (`facts.router_facts`).
        beside: the same rows through the run's checkpoints, and through another run.
    """

    run: Path
    backbone: str
    method: str
    inputs: Inputs
    routers: list[RouterStatistics]
    seconds: dict[str, float]
    worth: Worth = NOTHING
    trace: TextTrace | None = None
    facts: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    beside: list[Beside] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        found = places(router.module for router in self.routers)
        return {
            "run": str(self.run),
            "backbone": self.backbone,
            "method": self.method,
            "data": self.inputs.document(),
            "dead_below": DEAD_BELOW,
            "levels": [level.document() for level in summarise(self.routers)],
            "routers": [
                {**vars(found[router.module]), **router.document(), **self.facts.get((router.module, router.level), {})}
                for router in self.routers
            ],
            "drift": [beside.document() for beside in self.beside if beside.step is not None],
            "compare": next((beside.document() for beside in self.beside if beside.step is None), None),
            **self.worth.document(),
            **({} if self.trace is None else {"trace": self.trace.document()}),
            "seconds": {part: round(seconds, 3) for part, seconds in self.seconds.items()},
            "versions": {"smore": __version__},
        }


def inspect_run(
    run: Path | None,
    request: DataRequest,
    choice: Choice,
    *,
    batch_size: int | None,
    worth: WorthRequest,
    prompt: str | None,
    extra: Extra,
    say: Callable[[str], None],
    progress: Progress,
) -> RoutingProfile:
    """Runs data through a run's model and returns what its routers did.

    Args:
        run: a run's folder, or an adapter's; None: the newest run.
        request: which data.
        choice: which routers.
        batch_size: rows a forward pass; None: 8 on a CPU, else 32. The result does not depend on it.
        worth: what else is to be measured.
        prompt: a text that is to be traced token by token.
        extra: what else is looked at.
        say: takes a line on how long that will take.
        progress: a context for a piece of work, named, that yields what to call with the steps done and their total.

    Raises:
        UsageError: the run has no router, or there is nothing of what was asked for.
        SmoreError: a router gave values that are not finite.
    """
    opened = open_run(run)
    method = opened.adapter.method
    if not load_method(method).routed:
        raise UsageError(
            f"{opened.folder} is a run of method {method}, which treats every token alike: nothing is routed",
            "inspect a run of a routed method, such as smore",
        )
    given = [given_source(path, request.format, request.split, opened.recipe) for path in request.paths]
    checkpoints = checkpoints_of(opened.folder) if extra.drift else []
    started = time.perf_counter()
    inputs = choose_inputs(given, opened.recipe, load_tokenizer(opened.model), request.limit)
    data_done = time.perf_counter()
    device = default_device()
    model, tokenizer = opened.load(device)
    wanted = choose_modules(adapted_modules(model), layers=choice.layers, name=choice.module)
    model_done = time.perf_counter()
    size = batch_size or (8 if device.type == "cpu" else 32)
    with progress("running the rows through the model") as on_progress:
        routing = collect_routing(
            model,
            inputs.rows,
            pad_token_id=tokenizer.pad_token_id,
            batch_size=size,
            supervised=request.supervised,
            on_progress=on_progress,
        )
    chosen = choose_level([router for router in routing.routers if router.module in wanted], choice.level)
    facts = router_facts(
        model, tokenizer, inputs, chosen, routing.usage, similarity=extra.similarity, contexts=choice.module is not None
    )
    trace = None
    if prompt is not None:
        trace = trace_text(model, tokenizer, prompt, opened.recipe, modules=wanted, level=choice.level)
    ended = time.perf_counter()
    seconds = {"data": data_done - started, "model": model_done - data_done, "forward": ended - model_done}
    measured = measure_worth(
        worth, model, tokenizer, opened.recipe, inputs, modules=wanted, level=choice.level, say=say, progress=progress
    )
    if measured != NOTHING:
        seconds["worth"] = time.perf_counter() - ended
    del model
    beside = []
    for other in [*checkpoints, *([] if extra.compare is None else [extra.compare])]:
        with progress(f"running the rows through {other}") as on_progress:
            beside.append(
                look_beside(
                    other,
                    opened.model.name_or_path,
                    inputs.rows,
                    chosen,
                    device=device,
                    batch_size=size,
                    step=step_of(other) if other in checkpoints else None,
                    supervised=request.supervised,
                    on_progress=on_progress,
                )
            )
    return RoutingProfile(
        opened.folder, opened.model.name_or_path, method, inputs, chosen, seconds, measured, trace, facts, beside
    )
