"""The runs of a comparison, each in a process of its own: trained, evaluated, and then never done again.

    OUT/runs/LABEL-OBJECTIVE-seedN/     an ordinary run
    OUT/found/LABEL-OBJECTIVE-seedN.json   what was measured of it; while it is not there, the run is gone on with
    OUT/logs/LABEL-OBJECTIVE-seedN.log     what the run printed
    ...-seed0-lrF                       a trial: the same with F times the learning rate (`tuning`)

A process of its own, so that the peak of its memory is its own and two can run side by side. All are forked from one
that has imported the libraries already.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smore_cli.atomic import write_text
from smore_cli.comparing.work import Task, carry_out
from smore_cli.errors import Diverged, Interrupted, SmoreError, UsageError
from smore_cli.recipe.dump import dump_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from smore_cli.comparing.sizes import Sized
    from smore_cli.comparing.spec import Comparison, Objective
    from smore_cli.recipe.schema import Recipe

__all__ = ["Planned", "plan_run", "plan_runs", "run_all"]


@dataclass(frozen=True)
class Planned:
    """One run of a comparison.

    Attributes:
        name: of its files.
        label: of the method; None: the backbone by itself, which is only evaluated.
        objective: what it is trained with.
        seed: of everything in it.
        task: what its process does.
        found: the file of what was measured.
        learning_rate: its peak.
        factor: what that is of its recipe's.
        trial: whether only its held-out loss is asked for, and it may diverge.
    """

    name: str
    label: str | None
    objective: Objective
    seed: int
    task: Task
    found: Path
    learning_rate: float
    factor: float = 1.0
    trial: bool = False

    @property
    def key(self) -> str:
        """A hash of all that its figures depend on."""
        return hashlib.sha256(json.dumps(vars(self.task), sort_keys=True, default=str).encode()).hexdigest()[:16]

    def result(self) -> dict[str, Any] | None:
        """Returns what was measured; None: nothing yet.

        Raises:
            UsageError: it was measured of another run of that name.
        """
        if not self.found.is_file():
            return None
        values: dict[str, Any] = json.loads(self.found.read_text())
        if values["key"] != self.key:
            raise UsageError(
                f"{self.found} was measured with other settings than this comparison has", "choose another --out"
            )
        return values


def plan_runs(
    comparison: Comparison, sized: list[Sized], out: Path, factors: Mapping[tuple[str, str], float] | None = None
) -> list[Planned]:
    """Returns every run, the backbone first, then seed by seed, so that a part of them compares all methods.

    Args:
        comparison: what is compared.
        sized: its methods.
        out: its folder.
        factors: of the learning rate, by label and objective; None: 1.
    """
    factors = factors or {}
    recipe = comparison.baseline.recipe.model_copy(update={"output_dir": str(out / "runs" / "backbone")})
    task = _task(comparison, recipe, trained=False)
    found, rate = out / "found" / "backbone.json", recipe.train.learning_rate
    runs = [Planned("backbone", None, comparison.objectives[0], 0, task, found, rate)]
    return runs + [
        plan_run(comparison, one, objective, seed, out, factor=factors.get((one.contender.label, objective), 1.0))
        for seed in range(comparison.config.seeds)
        for objective in comparison.objectives
        for one in sized
    ]


def plan_run(
    comparison: Comparison,
    one: Sized,
    objective: Objective,
    seed: int,
    out: Path,
    *,
    factor: float = 1.0,
    trial: bool = False,
) -> Planned:
    """Returns a run of one method; where learning rates are tried the first seed's is the trial, which goes on."""
    label = one.contender.label
    name = f"{label}-{objective}-seed{seed}"
    tried = f"{name}-lr{factor:g}" if comparison.config.learning_rate_factors and seed == 0 else name
    recipe = one.contender.recipe
    rates = {"learning_rate": recipe.train.learning_rate, "router_learning_rate": recipe.train.router_learning_rate}
    scaled = {key: factor * rate for key, rate in rates.items() if rate is not None}
    changes = {
        "adapter": one.adapter,
        "data": recipe.data.model_copy(update={"objective": objective}),
        "train": recipe.train.model_copy(update=scaled),
        "seed": seed,
        "output_dir": str(out / "runs" / tried),
    }
    task = _task(comparison, recipe.model_copy(update=changes), trained=True, trial=trial, first=seed == 0)
    name = tried if trial else name
    rate = scaled["learning_rate"]
    return Planned(name, label, objective, seed, task, out / "found" / f"{name}.json", rate, factor, trial)


def _task(comparison: Comparison, recipe: Recipe, *, trained: bool, trial: bool = False, first: bool = False) -> Task:
    """Returns what a process is to do; of a trial nothing is measured but what its training says."""
    config = comparison.config
    return Task(
        recipe=dump_recipe(recipe),
        trained=trained,
        benchmarks=() if trial else tuple(config.benchmarks),
        data_dir=None if config.data_dir is None else str(Path(config.data_dir).absolute()),
        limit=config.limit,
        general=None if trial or config.general_text is None else config.general_text.model_dump_json(),
        general_tokens=config.general_tokens,
        dividend_tokens=config.dividend_tokens if first and not trial else 0,
    )


def run_all(runs: list[Planned], out: Path, jobs: int, say: Callable[[str], None]) -> None:
    """Does what is not done yet.

    Args:
        runs: all of them.
        out: the comparison's folder.
        jobs: how many at a time; the processor's cores are divided among them.
        say: takes a line for each that is done.

    Raises:
        SmoreError: one failed; the others that were running are finished first.
        Interrupted: the same command goes on.
    """
    left = [run for run in runs if run.result() is None]
    if len(left) < len(runs):
        say(f"{len(runs) - len(left)} of {len(runs)} runs are done already")
    if not left:
        return
    (out / "logs").mkdir(parents=True, exist_ok=True)
    threads = max(1, len(os.sched_getaffinity(0)) // jobs) if hasattr(os, "sched_getaffinity") else 1
    os.environ["OMP_NUM_THREADS"] = str(threads)
    started = time.monotonic()
    for done, (run, outcome) in enumerate(_finished(left, out, jobs, threads), 1):
        outcome["key"] = run.key
        write_text(run.found, json.dumps(outcome, indent=1) + "\n")  # benchmarks stay in the order that was asked for
        rest = (time.monotonic() - started) / done * (len(left) - done)
        say(
            f"{len(runs) - len(left) + done} of {len(runs)}: {run.name}, {outcome['seconds']:.0f} s; {_time(rest)} left"
        )


def _finished(runs: list[Planned], out: Path, jobs: int, threads: int) -> Iterator[tuple[Planned, dict[str, Any]]]:
    """Yields what comes of runs, as they are done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["smore_cli.comparing.work", "smore_cli.training.loop", "smore_cli.evaluation.harness"]
    )
    pool = ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1)
    futures: dict[Future[dict[str, Any]], Planned] = {
        pool.submit(carry_out, run.task, out / "logs" / f"{run.name}.log", threads): run for run in runs
    }
    try:
        for future in as_completed(futures):
            run = futures[future]
            try:
                yield run, future.result()
            except BrokenProcessPool:
                raise SmoreError(
                    f"the process of {run.name} or of one beside it was killed", "the same command goes on"
                ) from None
            except Diverged as error:
                if not run.trial:
                    raise _named(run, out, error) from None
                yield run, {"diverged": error.message, "seconds": 0.0}
            except Interrupted as error:
                raise Interrupted(f"{run.name}: {error.message}", "the same command goes on") from None
            except SmoreError as error:
                raise _named(run, out, error) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _named(run: Planned, out: Path, error: SmoreError) -> SmoreError:
    """Returns the error of a run with its name and log."""
    log = out / "logs" / f"{run.name}.log"
    return SmoreError(f"{run.name}: {error.message}", f"{error.hint or 'see'} ({log})")


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
