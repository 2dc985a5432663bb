"""A run: how far it is, and what of it is on the disk. What every process holds is gathered; the main one writes."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from smore_cli.atomic import write_text, writing
from smore_cli.errors import CheckpointError, Diverged, UsageError
from smore_cli.models.adapter_files import save_adapter
from smore_cli.models.tokenizer_files import save_tokenizer
from smore_cli.planning.compare import compare
from smore_cli.recipe import dump_recipe
from smore_cli.training.best import point, take_best
from smore_cli.training.checkpoint import (
    TrainerState,
    damage,
    load_checkpoint,
    processes_of,
    prune,
    random_state,
    rescue_checkpoint,
    save_checkpoint,
    step_of,
)
from smore_cli.training.model_card import model_card
from smore_cli.training.routing_health import RoutingWatch
from smore_cli.training.run_folder import MetricsLog, environment, peak_memory, read_run_json, write_run_json
from smore_cli.training.same_data import keep_fingerprints
from smore_cli.training.same_run import machine_changes
from smore_cli.training.shard import WholeOptimizer, whole_adapter
from smore_cli.training.trackers import Trackers
from smore_cli.training.window import Window

if TYPE_CHECKING:
    from pathlib import Path

    from torch.optim import Optimizer

    from smore_cli.training.progress import Reporter
    from smore_cli.training.setup import Setup
    from smore_cli.training.zero import Zero

__all__ = ["Run"]


class Run:
    """A run in progress.

    Attributes:
        setup: everything loaded.
        run_dir: where it writes.
        reporter: what the user sees.
        state: how far it is.
        latest: the newest training and evaluation numbers.
        watch: how the routers spread their tokens.
        window: the steps since the last line of metrics.
        alarm: what there is to say of routers that have collapsed, where it lasts.
        saved: the newest checkpoint of this process.
        adapter_step: the step whose adapter comes out, where it is not the last.
        trackers: where metrics go beside metrics.jsonl.
        inexact: why the run does not go on bit for bit where it was resumed.
        seconds_before: time spent in steps before it was resumed.
    """

    def __init__(self, setup: Setup, run_dir: Path, reporter: Reporter) -> None:
        self.setup, self.run_dir, self.reporter = setup, run_dir, reporter
        self.processes = setup.processes
        self.state = TrainerState(data_hash=setup.data_hash)
        self.latest: dict[str, Any] = {}
        self.environment = environment(setup.device)
        self.resumed_from: int | None = None
        self.watch = RoutingWatch(setup.model)
        self.alarm: str | None = None
        self.saved: Path | None = None
        self.adapter_step: int | None = None
        self.trackers = Trackers(reporter.say)
        self.inexact: str | None = None
        self.window = Window(since=0.0)
        self.seconds_before = 0.0

    def restore(self, folder: Path) -> None:
        """Continues from a checkpoint."""
        setup = self.setup
        if problem := self.processes.on_main(lambda: damage(folder)):
            raise CheckpointError(f"{folder}: {problem}", "name another checkpoint, or --resume without one")
        optimizer = setup.zero or (WholeOptimizer(setup.optimizer) if setup.sharded else setup.optimizer)
        rank = self.processes.rank
        with whole_adapter(setup.model, changes=True):
            data_hash = setup.hash_after(step_of(folder))
            self.state = load_checkpoint(folder, setup.model, optimizer, setup.scheduler, data_hash, rank)
        if setup.zero is not None:
            setup.zero.restore()
        self.resumed_from, self.seconds_before = self.state.step, self.state.seconds
        self.latest |= self.state.latest
        self.window = Window.of(self.state.window, setup.device)
        if (writers := processes_of(folder)) != self.processes.count:
            self.inexact = (
                f"{folder.name} was written by {writers} processes and is resumed by {self.processes.count}: the same "
                "training, but not bit for bit; sums round differently and dropout draws other numbers"
            )
            self.reporter.say(f"warning: {self.inexact}")
        if self.state.step > setup.plan.total_steps:
            raise UsageError(
                f"{folder} is past the end of the recipe, step {setup.plan.total_steps}", "raise train.max_steps"
            )
        before = read_run_json(self.run_dir)["environment"]
        if warning := machine_changes(before, self.environment):
            self.reporter.say(warning)
        self.reporter.say(f"resuming from {folder} at step {self.state.step}")

    def open(self, recipe_text: str) -> None:
        """Makes the run folder."""
        self.processes.on_main(lambda: self.make_folder(recipe_text))
        self.processes.on_main(lambda: self.trackers.open(self.setup.recipe, self.run_dir))

    def make_folder(self, recipe_text: str) -> None:
        """Makes the run folder."""
        with writing(self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            write_run_json(self.run_dir, self.values(finished=False))  # first: with it the folder is a run's
            write_text(self.run_dir / "recipe.yaml", recipe_text)
            write_text(self.run_dir / "resolved.yaml", dump_recipe(self.setup.recipe))
            self.metrics = MetricsLog(self.run_dir / "metrics.jsonl", self.resumed_from)
            if self.resumed_from is None:
                keep_fingerprints(self.run_dir, self.setup.recipe)
            point(self.run_dir, self.state)

    def record(self, values: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl; a full disk delays it, and does not end the run."""
        if not self.processes.main:
            return
        if problem := self.metrics.add(values):
            self.reporter.say(f"warning: metrics.jsonl could not be written: {problem}; its lines are kept for later")
        self.reporter.metrics(values)
        self.trackers.log(values)

    def try_to_save(self) -> bool:
        """Writes a checkpoint; where that fails the run goes on, because to stop would lose what is in memory."""
        try:
            self.save()
        except CheckpointError as error:
            due = self.state.step + self.setup.recipe.train.save_steps
            self.reporter.say(
                f"warning: {error.message}; training goes on, the next checkpoint is due after step {due}: {error.hint}"
            )
            return False
        return True

    def save(self, *, last_chance: bool = False) -> Path:
        """Writes a checkpoint, then removes those beyond the limit.

        Args:
            last_chance: the run is about to end: where its folder cannot be written, write it somewhere else.

        Raises:
            CheckpointError: it could not be written; with `last_chance` it says where the state is now.
            Diverged: the run has come to numbers that are not finite; no checkpoint makes room for one of these.
        """
        self.require_finite()
        if self.saved is not None and self.saved.name == f"checkpoint-{self.state.step}":
            return self.saved  # the best evaluation's, a moment ago
        try:
            folder = self.write_state(self.run_dir)
            self.processes.on_main(self.tidy_folder)
        except CheckpointError as error:
            raise (rescue_checkpoint(error, self.run_dir, self.write_state) if last_chance else error) from error
        self.saved = folder
        return folder

    def require_finite(self) -> None:
        """Ends a run whose loss since the last line of metrics, or whose newest gradient, is not finite.

        Raises:
            Diverged: in every process, as all know the same numbers.
        """
        numbers = {"loss": sum(float(step.loss) for step in self.window.steps)}
        numbers["norm of the gradient"] = float(self.latest.get("grad_norm", 0.0))
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise Diverged(
                    f"the {name} is {value} at step {self.state.step}",
                    "lower train.learning_rate, or go on from an earlier checkpoint with --resume",
                )

    def tidy_folder(self) -> None:
        """Points at the newest checkpoint and at the best, and removes those beyond the limit."""
        with writing(self.run_dir, CheckpointError):
            point(self.run_dir, self.state)
            limit = self.setup.recipe.train.save_total_limit
            prune(self.run_dir, limit, self.state.step, self.state.best.get("step"))

    def write_state(self, folder: Path) -> Path:
        """Writes a checkpoint below `folder`, of what all processes hold."""
        setup = self.setup
        self.state.data_hash = setup.hash_after(self.state.step)
        # A run that ends here, out of patience, has a last line of metrics to write when it is resumed.
        newest = {key: float(self.latest[key]) for key in ("learning_rate", "grad_norm") if key in self.latest}
        self.state.latest, self.state.window = self.results() | newest, self.window.state()
        random_states = self.processes.gather_objects(random_state())
        optimizer = self.whole_optimizer()
        with whole_adapter(setup.model):
            return self.processes.on_main(
                lambda: save_checkpoint(
                    folder, self.state, setup.model, optimizer, setup.scheduler, setup.recipe, random_states
                )
            )

    def whole_optimizer(self) -> Optimizer | WholeOptimizer | Zero:
        """Returns what has the optimiser's whole state; all processes call it together."""
        if self.setup.zero is not None:
            return self.setup.zero.gathered()
        return WholeOptimizer.gathered(self.setup.optimizer) if self.setup.sharded else self.setup.optimizer

    def finish(self) -> dict[str, Any]:
        """Writes what the run was for; where its folder cannot be written, the state goes somewhere else.

        Raises:
            CheckpointError: it could not be written, and where the state is now.
        """
        try:
            with whole_adapter(self.setup.model):
                return self.processes.on_main(self.write_results)
        except CheckpointError as error:
            raise rescue_checkpoint(error, self.run_dir, self.write_state) from error

    def write_results(self) -> dict[str, Any]:
        """Writes the adapter, the tokenizer, the model card and the final run.json."""
        recipe = self.setup.recipe
        with writing(self.run_dir, CheckpointError):
            save_adapter(self.setup.model, recipe.adapter, self.run_dir, base=recipe.model)
            if recipe.eval.load_best_model_at_end and self.state.best.get("step", self.state.step) != self.state.step:
                self.take_best()
            save_tokenizer(self.setup.tokenizer, self.run_dir)
            values = self.values(finished=True)
            write_text(self.run_dir / "README.md", model_card(recipe, dump_recipe(recipe), values))
            write_run_json(self.run_dir, values)
        return values

    def add_prediction(self, values: dict[str, Any]) -> dict[str, Any]:
        """Adds predicted and measured memory to run.json, of a run that is over and saved."""
        started = time.perf_counter()
        values |= {"memory": compare(self.setup, values["peak_memory_bytes"])}
        values["seconds"] |= {"prediction": round(time.perf_counter() - started, 2)}
        write_run_json(self.run_dir, values)
        return values

    def take_best(self) -> None:
        """Makes the adapter of the best evaluation, and what was measured of it, the result of the run."""
        best = self.state.best
        if problem := take_best(self.run_dir, self.state):
            self.reporter.say(f"warning: the adapter is the last step's: of checkpoint-{best['step']}, {problem}")
            return
        self.adapter_step = best["step"]
        self.latest |= best["measured"]
        self.reporter.say(f"the adapter is that of step {best['step']}, the best by {best['metric']}: {best['value']}")

    def results(self) -> dict[str, Any]:
        """Returns the newest losses."""
        return {
            key: self.latest[key] for key in ("loss", "eval_loss", "eval_accuracy", "benchmarks") if key in self.latest
        }

    def values(self, *, finished: bool) -> dict[str, Any]:
        """Returns what goes into run.json."""
        state, plan = self.state, self.setup.plan
        result = self.results()
        result |= {"steps": state.step, "epochs": plan.epoch_of(state.step), "seconds": round(state.seconds, 2)}
        result |= {"tokens": state.tokens, "supervised_tokens": state.supervised_tokens}
        if self.adapter_step is not None:
            result["adapter_step"] = self.adapter_step
        if state.best:
            result["best"] = {key: state.best[key] for key in ("step", "metric", "value")}
        return {
            "finished": finished,
            "environment": self.environment,
            "seed": self.setup.recipe.seed,
            "parameters": self.setup.parameter_counts(),
            "targets": len(self.setup.targets),
            "data": {
                "train_rows": self.setup.num_train_rows,
                "eval_rows": len(self.setup.eval_rows),
                "hash": self.setup.data_hash,
                **self.setup.plan.facts(),
            },
            "seconds": self.setup.seconds | {"steps": round(state.seconds - self.seconds_before, 2)},
            "peak_memory_bytes": peak_memory(self.setup.device),
            "processes": {"count": self.processes.count, "sharded": self.setup.sharded}
            | ({} if self.setup.zero is None else {"zero_stage": self.setup.zero.stage}),
            "resumed_from": self.resumed_from,
            "resumed_inexactly": self.inexact,
            "result": result,
        }
