"""What one process of a comparison does: train a run, or go on with it, and measure it."""

from __future__ import annotations

import json
import math
import os
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from smore_cli.recipe.schema import Recipe

__all__ = ["Task", "carry_out"]


@dataclass(frozen=True)
class Task:
    """A run and what is measured of it.

    Attributes:
        recipe: as YAML, every setting in it.
        trained: whether there is an adapter; else the backbone alone is measured.
        benchmarks, data_dir, limit: the questions.
        general: a source of general text as JSON, or None.
        general_tokens: how much of it is read.
        dividend_tokens: tokens the best static update is fitted to; 0: the routing dividend is not measured.
    """

    recipe: str
    trained: bool
    benchmarks: tuple[str, ...]
    data_dir: str | None
    limit: int | None
    general: str | None
    general_tokens: int
    dividend_tokens: int


def carry_out(task: Task, log: Path, threads: int) -> dict[str, Any]:
    """Trains and measures a run; called in a process of its own, whose output goes to a file.

    Args:
        task: what to do.
        log: the file.
        threads: how many of the processor's cores it may use.

    Returns:
        JSON values: see `summary`.
    """
    _end_with_parent()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)

    import torch

    from smore_cli.recipe.schema import Recipe

    torch.set_num_threads(threads)
    started = time.perf_counter()
    recipe = Recipe.model_validate(yaml.safe_load(task.recipe))
    run = Path(recipe.output_dir)
    found: dict[str, Any] = {}
    if task.trained:
        _train(recipe, run, task.recipe)
        found |= _of_training(run)
    subject = _load(recipe, run if task.trained else None)
    found["tasks"] = _scores(subject, recipe, task)
    found["perplexity"] = _perplexity(subject, recipe, task)
    found["dividend"] = _dividend(subject, recipe, task.dividend_tokens) if task.dividend_tokens else None
    return found | {"seconds": time.perf_counter() - started}


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, so that no two ever write one run."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclass(frozen=True)
class _Subject:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def _load(recipe: Recipe, run: Path | None) -> _Subject:
    """Returns a run's model as everyone loads it, or the backbone alone."""
    from smore_cli.models.load import default_device, load_backbone
    from smore_cli.models.runs import open_run

    if run is not None:
        return _Subject(*open_run(run).load(default_device()))
    backbone = load_backbone(recipe.model, recipe.quantization, default_device())
    return _Subject(backbone.model, backbone.tokenizer)


def _train(recipe: Recipe, run: Path, text: str) -> None:
    """Trains a run to its end, from where it is."""
    from smore_cli.training.loop import train

    values = json.loads((run / "run.json").read_text()) if (run / "run.json").is_file() else None
    if values is None or not values["finished"]:
        train(recipe, text, resume=values is not None)


def _of_training(run: Path) -> dict[str, Any]:
    """Returns what a run's own files say of its training."""
    values = json.loads((run / "run.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "seconds" in line]
    paces = [
        (later["seconds"] - earlier["seconds"]) / (later["step"] - earlier["step"])
        for earlier, later in zip([{"seconds": 0.0, "step": 0}, *steps], steps, strict=False)
    ]
    tokens = {line["step"]: line["tokens"] for line in steps}
    curve = [[_at(tokens, line["step"]), line["eval_loss"]] for line in lines if "eval_loss" in line]
    peak = values["peak_memory_bytes"]
    return {
        "data_hash": values["data"]["hash"],
        "step_seconds": statistics.median(paces),
        "peak_memory_bytes": peak.get("device", peak["resident"]),
        "curve": curve,
        "tokens": values["result"]["tokens"],
    }


def _at(tokens: dict[int, int], step: int) -> float:
    """Returns the tokens after a step, between two lines of metrics in proportion."""
    known = sorted({0: 0, **tokens}.items())
    before = max(pair for pair in known if pair[0] <= step)
    after = min((pair for pair in known if pair[0] >= step), default=before)
    share = 0.0 if after[0] == before[0] else (step - before[0]) / (after[0] - before[0])
    return before[1] + share * (after[1] - before[1])


def _scores(subject: _Subject, recipe: Recipe, task: Task) -> dict[str, Any]:
    """Returns the value of every question, by task and metric; 1 is a right answer."""
    from smore_cli.evaluation.benchmarks import read_tasks
    from smore_cli.evaluation.harness import score
    from smore_cli.evaluation.subjects import training_template

    folder = None if task.data_dir is None else Path(task.data_dir)
    tasks = [one for name in task.benchmarks for one in read_tasks(name, folder)]
    if not tasks:
        return {}
    template = training_template(recipe.data)
    results = score(subject.model, subject.tokenizer, tasks, limit=task.limit, template=template)
    return {result.task: {name: result.values(name) for name in result.metrics} for result in results}


def _perplexity(subject: _Subject, recipe: Recipe, task: Task) -> float | None:
    """Returns the perplexity of general text, token by token."""
    if task.general is None:
        return None
    from smore_cli.data.build import build_rows
    from smore_cli.merging.calibration import Corpus, first_tokens
    from smore_cli.merging.verdict import read
    from smore_cli.recipe.schema import DataConfig, Source

    source = Source.model_validate_json(task.general)
    data = DataConfig(train=[source], max_length=recipe.data.max_length, on_no_supervision="drop")
    rows = build_rows(data, subject.tokenizer, [source]).rows
    corpus = first_tokens(Corpus(source.path, list(rows)), task.general_tokens)
    (reading,) = read(subject.model, [corpus], int(subject.tokenizer.pad_token_id or 0), logits=False)
    return math.exp(reading.loss)


def _dividend(subject: _Subject, recipe: Recipe, tokens: int) -> dict[str, Any]:
    """Returns what routing earned on the run's held-out rows."""
    from smore_cli.merging.calibration import training_text
    from smore_cli.routing.dividend import measure_dividend
    from smore_cli.routing.inputs import choose_inputs

    held_out = choose_inputs((), recipe, subject.tokenizer, None).rows
    text = training_text(recipe, subject.tokenizer, tokens, without=held_out)
    pad = int(subject.tokenizer.pad_token_id or 0)
    return measure_dividend(subject.model, text.rows, held_out, pad_token_id=pad).document()
