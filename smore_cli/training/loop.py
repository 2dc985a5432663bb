"""The training loop: steps, logging, evaluation, and stopping without losing anything; `run` writes it down."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smore_cli.errors import Interrupted, SmoreError
from smore_cli.training.benchmark_scores import benchmark_scores
from smore_cli.training.best import drop_former_best, is_best, out_of_patience
from smore_cli.training.census import take_census
from smore_cli.training.checkpoint import newest_complete
from smore_cli.training.disk import require_space
from smore_cli.training.held_out import held_out_loss
from smore_cli.training.optim import take_step
from smore_cli.training.out_of_memory import out_of_memory_explained
from smore_cli.training.parallel import ALONE
from smore_cli.training.progress import make_reporter
from smore_cli.training.replicas import share_out
from smore_cli.training.routing_health import collapse_line, routing_summary
from smore_cli.training.run import Run
from smore_cli.training.run_folder import require_new, require_writable
from smore_cli.training.same_data import require_same_data
from smore_cli.training.same_run import require_same_run
from smore_cli.training.setup import prepare
from smore_cli.training.step import StepResult, accumulate_gradients
from smore_cli.training.stopping import Stop, stop_signals
from smore_cli.training.window import Window

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from smore_cli.data.batch import Batch
    from smore_cli.recipe.document import Document
    from smore_cli.recipe.schema import Recipe
    from smore_cli.training.parallel import Processes

__all__ = ["train"]


def train(
    recipe: Recipe,
    recipe_text: str,
    *,
    resume: bool = False,
    checkpoint: Path | None = None,
    document: Document | None = None,
    processes: Processes = ALONE,
    predict_memory: bool = False,
) -> dict[str, Any]:
    """Runs a recipe to its end and returns the values of run.json.

    Args:
        recipe: what to run.
        recipe_text: the recipe file as it stands, kept in the run folder.
        resume: continue the run in `output_dir` from its newest complete checkpoint.
        checkpoint: continue from this checkpoint instead.
        document: knows where the recipe says what, for messages about a recipe that changed.
        processes: those that train together, which all call this; the main one prints and writes.
        predict_memory: put what `smore plan` predicts beside what was measured, which takes seconds when all is done.

    Raises:
        UsageError: something cannot work; nothing was written.
        CheckFailed: a gradient does not reach everything that trains; nothing was written.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
    """
    run_dir = Path(recipe.output_dir)
    reporter = make_reporter(main=processes.main)
    again = resume or checkpoint is not None
    recipe = share_out(recipe, processes)

    def check_folder() -> None:
        if again:
            require_same_run(recipe, run_dir, document, reporter.say)
            require_writable(run_dir)
        else:
            require_new(run_dir)

    processes.on_main(check_folder)
    setup = prepare(recipe, reporter.say, processes)

    def find_start() -> Path | None:
        if again:
            require_same_data(run_dir, recipe, setup.data_hash, document)
        require_space(run_dir, setup.model, recipe, setup.plan.total_steps)
        return checkpoint if checkpoint is not None else newest_complete(run_dir, reporter.say) if resume else None

    start = processes.on_main(find_start)
    run = Training(setup, run_dir, reporter)
    if start is not None:
        run.restore(start)
    elif resume:
        reporter.say("no complete checkpoint: starting from the first step")
    if start is None and recipe.train.gradient_census:
        with out_of_memory_explained(run):
            run.census()
    run.open(recipe_text)
    for line in setup.describe():
        reporter.say(line)
    with stop_signals(processes) as stop:
        reporter.start(setup.plan.total_steps, run.state.step)
        try:
            with out_of_memory_explained(run):
                run.loop(stop)
        finally:
            reporter.stop()
            run.trackers.close()
    values = run.finish()
    return processes.on_main(lambda: run.add_prediction(values)) if predict_memory else values


class Training(Run):
    """A run, step by step."""

    def census(self) -> None:
        """Takes the gradient census, in the main process, where the model is whole."""
        if self.setup.sharded:
            self.reporter.say("gradient census: not taken of a sharded model; --dry-run in one process takes it")
            return
        self.processes.on_main(lambda: take_census(self.setup, self.reporter.say).problems)

    def loop(self, stop: Stop) -> None:
        """Runs the steps that are left."""
        train, plan = self.setup.recipe.train, self.setup.plan
        evaluation = self.setup.recipe.eval
        steps = self.setup.batches.from_step(self.state.step)
        while self.state.step < plan.total_steps and not out_of_patience(evaluation, self.state):
            started = time.perf_counter()
            self.window.add(self.step(self.next_of(steps)))
            self.state.seconds += time.perf_counter() - started
            step = self.state.step
            self.reporter.step(step)
            last = step == plan.total_steps
            if step % train.logging_steps == 0 or last:
                self.log()
            if (evaluation.steps and step % evaluation.steps == 0) or last:
                self.evaluate()
            if stop.wanted():
                folder = self.save(last_chance=True)
                raise Interrupted(
                    f"stopped by {stop.signal_name} after step {step}; saved {folder}", "go on with --resume"
                )
            if self.alarm and train.on_collapse == "stop" and not last:
                raise SmoreError(
                    f"{self.alarm}, at step {step}; saved {self.save(last_chance=True)}",
                    "go on with --resume --set train.on_collapse=warn, or start anew with a larger balance loss",
                )
            if step % train.save_steps == 0 and not last:
                self.try_to_save()
        if self.state.step < plan.total_steps:
            self.end_early()

    def end_early(self) -> None:
        """Says why the run ends, and logs the steps that no line of metrics covers yet."""
        if self.window.steps:
            self.log()
        evaluation = self.setup.recipe.eval
        self.reporter.say(
            f"stopping after step {self.state.step}: {self.state.without_improvement} evaluations without a better "
            f"{evaluation.metric_for_best_model} (eval.early_stopping_patience)"
        )

    def next_of(self, steps: Iterator[list[Batch]]) -> list[Batch]:
        """Returns the next step's forward passes; where they cannot be made, what was learned so far is saved first."""
        try:
            return next(steps)
        except SmoreError as error:
            done = self.state.step
            if done == 0 or self.processes.count > 1:  # the others would have to be told to save as well
                raise
            saved = f"{error.message}; saved {self.save(last_chance=True)} after step {done}"
            raise SmoreError(saved, f"{error.hint}; then go on with --resume" if error.hint else "") from error

    def step(self, batches: list[Batch]) -> StepResult:
        """Runs one optimiser step."""
        setup, train = self.setup, self.setup.recipe.train
        result = accumulate_gradients(
            setup.model,
            batches,
            setup.objective,
            device=setup.device,
            backward=setup.backward,
            aux_over_step=train.aux_statistics == "global_batch",
            processes=self.processes,
            reduce=not setup.sharded,
        )
        self.latest |= {"grad_norm": self.update(), "learning_rate": setup.scheduler.get_last_lr()[0]}
        setup.scheduler.step()
        self.watch.add(result.loads)
        self.state.step += 1
        self.state.tokens += result.tokens
        self.state.supervised_tokens += result.counts.tokens
        return result

    def update(self) -> Tensor:
        """Takes the optimiser's step on clipped gradients and returns their norm before, a scalar."""
        setup = self.setup
        if setup.zero is not None:
            return setup.zero.step()
        limit = setup.recipe.train.max_grad_norm or math.inf
        return take_step(setup.optimizer, [p for p in setup.model.parameters() if p.requires_grad], limit)

    def log(self) -> None:
        """Adds a line of training numbers."""
        self.require_finite()
        values = self.window.values(self.state)
        self.window = Window(since=self.state.seconds)
        routers = self.watch.routers(self.processes)
        if routers:
            values["routing"] = routing_summary(routers)
        values["learning_rate"] = self.latest["learning_rate"]
        values["grad_norm"] = round(float(self.latest.pop("grad_norm")), 5)
        values["epoch"] = round(self.setup.plan.epoch_of(self.state.step), 4)
        self.latest.update(values)
        self.record(values)
        if news := self.watch.news(routers):
            self.reporter.say(f"warning: {news}")
        self.alarm = collapse_line(routers) if self.watch.lasting else None

    def evaluate(self) -> None:
        """Adds a line with the loss on the held-out rows, if there are any, and the benchmarks' scores."""
        held_out = held_out_loss(self.setup)
        found = held_out | benchmark_scores(self.setup)
        if not found:
            return
        values = {"step": self.state.step} | found
        self.latest.update(values)
        self.record(values)
        former, config = self.state.best, self.setup.recipe.eval
        if not held_out or not config.steps or not is_best(config, self.state, self.latest):
            return
        if not self.try_to_save():
            self.state.best = former  # what has no checkpoint cannot be gone back to
        elif self.processes.main:
            drop_former_best(self.run_dir, former.get("step"), self.setup.recipe.train.save_steps)
