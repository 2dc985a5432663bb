"""The training loop: steps, logging, evaluation, checkpoints, and stopping without losing anything."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smore_cli.atomic import write_text
from smore_cli.errors import CheckpointError, Interrupted, SmoreError
from smore_cli.models.adapter_files import save_adapter
from smore_cli.models.tokenizer_files import save_tokenizer
from smore_cli.recipe import dump_recipe
from smore_cli.training.census import take_census
from smore_cli.training.checkpoint import (
    TrainerState,
    damage,
    load_checkpoint,
    newest_complete,
    prune,
    save_checkpoint,
)
from smore_cli.training.held_out import held_out_loss
from smore_cli.training.model_card import model_card
from smore_cli.training.progress import Reporter, make_reporter
from smore_cli.training.routing_health import RoutingWatch, collapse_line, routing_summary
from smore_cli.training.run_folder import (
    MetricsLog,
    environment,
    peak_memory,
    require_new,
    write_run_json,
)
from smore_cli.training.same_run import require_same_run
from smore_cli.training.setup import Setup, prepare
from smore_cli.training.step import StepResult, accumulate_gradients
from smore_cli.training.stopping import Stop, stop_signals
from smore_cli.training.window import Window

if TYPE_CHECKING:
    from smore_cli.recipe.schema import Recipe

__all__ = ["train"]


def train(recipe: Recipe, recipe_text: str, *, resume: bool = False, checkpoint: Path | None = None) -> dict[str, Any]:
    """Runs a recipe to its end and returns the values of run.json.

    Args:
        recipe: what to run.
        recipe_text: the recipe file as it stands, kept in the run folder.
        resume: continue the run in `output_dir` from its newest complete checkpoint.
        checkpoint: continue from this checkpoint instead.

    Raises:
        UsageError: something cannot work; nothing was written.
        CheckFailed: a gradient does not reach everything that trains; nothing was written.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
    """
    run_dir = Path(recipe.output_dir)
    if resume or checkpoint:
        require_same_run(recipe, run_dir)
    else:
        require_new(run_dir)
    reporter = make_reporter()
    setup = prepare(recipe, reporter.say)
    start = checkpoint if checkpoint is not None else newest_complete(run_dir, reporter.say) if resume else None
    run = Run(setup, run_dir, reporter)
    if start is not None:
        run.restore(start)
    elif resume:
        reporter.say("no complete checkpoint: starting from the first step")
    if start is None and recipe.train.gradient_census:
        take_census(setup, reporter.say)
    run.open(recipe_text)
    for line in setup.describe():
        reporter.say(line)
    with stop_signals() as stop:
        reporter.start(setup.plan.total_steps, run.state.step)
        try:
            run.loop(stop)
        finally:
            reporter.stop()
    return run.finish()


class Run:
    """A run in progress.

    Attributes:
        setup: everything loaded.
        run_dir: where it writes.
        reporter: what the user sees.
        state: how far it is.
        latest: the newest training and evaluation numbers.
        watch: how the routers spread their tokens.
        alarm: what there is to say of routers that have collapsed, where it lasts.
    """

    def __init__(self, setup: Setup, run_dir: Path, reporter: Reporter) -> None:
        self.setup, self.run_dir, self.reporter = setup, run_dir, reporter
        self.state = TrainerState(data_hash=setup.data_hash)
        self.latest: dict[str, Any] = {}
        self.environment = environment(setup.device)
        self.resumed_from: int | None = None
        self.watch = RoutingWatch(setup.accelerator.unwrap_model(setup.model))
        self.alarm: str | None = None

    def restore(self, folder: Path) -> None:
        """Continues from a checkpoint."""
        setup = self.setup
        if problem := damage(folder):
            raise CheckpointError(f"{folder}: {problem}", "name another checkpoint, or --resume without one")
        self.state = load_checkpoint(folder, setup.model, setup.optimizer, setup.scheduler, setup.data_hash)
        self.resumed_from = self.state.step
        self.reporter.say(f"resuming from {folder} at step {self.state.step}")

    def open(self, recipe_text: str) -> None:
        """Makes the run folder."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        write_text(self.run_dir / "recipe.yaml", recipe_text)
        write_text(self.run_dir / "resolved.yaml", dump_recipe(self.setup.recipe))
        self.metrics = MetricsLog(self.run_dir / "metrics.jsonl", self.resumed_from)
        write_run_json(self.run_dir, self.values(finished=False))

    def loop(self, stop: Stop) -> None:
        """Runs the steps that are left."""
        train, plan = self.setup.recipe.train, self.setup.plan
        window = Window(since=self.state.seconds)
        while self.state.step < plan.total_steps:
            started = time.perf_counter()
            window.add(self.step())
            self.state.seconds += time.perf_counter() - started
            step = self.state.step
            self.reporter.step(step)
            last = step == plan.total_steps
            if step % train.logging_steps == 0 or last:
                self.log(window)
                window = Window(since=self.state.seconds)
            if (self.setup.recipe.eval.steps and step % self.setup.recipe.eval.steps == 0) or last:
                self.evaluate()
            if stop.signal_name:
                folder = self.save()
                raise Interrupted(
                    f"stopped by {stop.signal_name} after step {step}; saved {folder}", "go on with --resume"
                )
            if self.alarm and train.on_collapse == "stop" and not last:
                raise SmoreError(
                    f"{self.alarm}, at step {step}; saved {self.save()}",
                    "go on with --resume --set train.on_collapse=warn, or start anew with a larger balance loss",
                )
            if step % train.save_steps == 0 and not last:
                self.save()

    def step(self) -> StepResult:
        """Runs one optimiser step."""
        setup, train = self.setup, self.setup.recipe.train
        result = accumulate_gradients(
            setup.model,
            setup.batches.step(self.state.step),
            setup.objective,
            device=setup.device,
            backward=setup.accelerator.backward,
            aux_over_step=train.aux_statistics == "global_batch",
        )
        limit = train.max_grad_norm or math.inf
        trainable = [p for p in setup.model.parameters() if p.requires_grad]
        norm = setup.accelerator.clip_grad_norm_(trainable, limit)
        self.latest |= {"grad_norm": norm, "learning_rate": setup.scheduler.get_last_lr()[0]}
        setup.optimizer.step()
        setup.scheduler.step()
        setup.optimizer.zero_grad()
        self.watch.add(result.loads)
        self.state.step += 1
        self.state.tokens += result.tokens
        self.state.supervised_tokens += result.counts.tokens
        return result

    def log(self, window: Window) -> None:
        """Adds a line of training numbers."""
        values = window.values(self.state)
        routers = self.watch.routers()
        if routers:
            values["routing"] = routing_summary(routers)
        values["learning_rate"] = self.latest["learning_rate"]
        values["grad_norm"] = round(float(self.latest.pop("grad_norm")), 5)
        values["epoch"] = round(self.setup.plan.epoch_of(self.state.step), 4)
        if not math.isfinite(values["loss"]):
            raise SmoreError(
                f"the loss is {values['loss']} at step {self.state.step}",
                "lower train.learning_rate, or go on from an earlier checkpoint with --resume",
            )
        self.latest.update(values)
        self.metrics.add(values)
        self.reporter.metrics(values)
        if news := self.watch.news(routers):
            self.reporter.say(f"warning: {news}")
        self.alarm = collapse_line(routers) if self.watch.lasting else None

    def evaluate(self) -> None:
        """Adds a line with the loss on the held-out rows, if there are any."""
        found = held_out_loss(self.setup)
        if not found:
            return
        values = {"step": self.state.step} | found
        self.latest.update(values)
        self.metrics.add(values)
        self.reporter.metrics(values)

    def save(self) -> Path:
        """Writes a checkpoint, then removes those beyond the limit."""
        setup = self.setup
        model = setup.accelerator.unwrap_model(setup.model)
        folder = save_checkpoint(self.run_dir, self.state, model, setup.optimizer, setup.scheduler, setup.recipe)
        prune(self.run_dir, setup.recipe.train.save_total_limit)
        return folder

    def finish(self) -> dict[str, Any]:
        """Writes the adapter, the tokenizer, the model card and the final run.json."""
        recipe = self.setup.recipe
        save_adapter(
            self.setup.accelerator.unwrap_model(self.setup.model), recipe.adapter, self.run_dir, base=recipe.model
        )
        save_tokenizer(self.setup.tokenizer, self.run_dir)
        values = self.values(finished=True)
        write_text(self.run_dir / "README.md", model_card(recipe, dump_recipe(recipe), values))
        write_run_json(self.run_dir, values)
        return values

    def values(self, *, finished: bool) -> dict[str, Any]:
        """Returns what goes into run.json."""
        state, plan = self.state, self.setup.plan
        result: dict[str, Any] = {
            key: self.latest[key] for key in ("loss", "eval_loss", "eval_accuracy") if key in self.latest
        }
        result |= {"steps": state.step, "epochs": plan.epoch_of(state.step), "seconds": round(state.seconds, 2)}
        result |= {"tokens": state.tokens, "supervised_tokens": state.supervised_tokens}
        return {
            "finished": finished,
            "environment": self.environment,
            "seed": self.setup.recipe.seed,
            "parameters": self.setup.parameter_counts(),
            "targets": len(self.setup.targets),
            "data": {
                "train_rows": len(self.setup.train_rows),
                "eval_rows": len(self.setup.eval_rows),
                "hash": self.setup.data_hash,
            },
            "seconds": self.setup.seconds,
            "peak_memory_bytes": peak_memory(self.setup.device),
            "resumed_from": self.resumed_from,
            "result": result,
        }
