"""What is evaluated: a backbone by itself, or the adapters of runs, all on one backbone that is loaded once."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smore_cli.errors import AdapterError
from smore_cli.models.adapter_files import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from smore_cli.models.embedders import fingerprint, use_tokenizer
from smore_cli.models.load import default_device, load_backbone
from smore_cli.models.runs import Run, open_run
from smore_cli.nn import set_active
from smore_cli.recipe.schema import ModelConfig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from smore_cli.evaluation.harness import Template
    from smore_cli.recipe.schema import DataConfig

__all__ = ["Subject", "load_subject", "load_subjects", "training_template"]


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        model: the backbone, with the run's adapter attached if there is a run; several subjects share it.
        tokenizer: its tokenizer.
        backbone: the backbone's name, as the recipe has it.
        run: the folder of the run or adapter; None: a bare backbone.
        method: the adapter's method; None: a bare backbone.
        template: how the run's training wrote its questions.
        seconds: how long loading took.
        keeps_results: whether `run` is a run, where results belong, and not an adapter from elsewhere.
        adapter: the name of the run's adapter in the model; None: a bare backbone.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    backbone: str
    run: Path | None = None
    method: str | None = None
    template: Template = "plain"
    seconds: float = 0.0
    keeps_results: bool = False
    adapter: str | None = None

    def identity(self) -> str:
        """Returns a text that tells this model and the way it is asked from any other, for the journal."""
        files = [] if self.run is None or self.adapter is None else [self.run / CONFIG_FILE, self.run / WEIGHTS_FILE]
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        return " ".join([fingerprint(self.model), self.template, *digests])


def load_subject(run: Path | None, model: str | None, *, full_precision: bool = False) -> Subject:
    """Loads a backbone by itself, or a run: its backbone with its adapter.

    Args:
        run: a run's folder; None: the newest. Not read where `model` is given; `load_subjects` takes several.
        model: a backbone, as a recipe names it.
        full_precision: load the weights of a run's backbone unquantised, though it was trained on quantised ones.

    Raises:
        AdapterError: there is no such run, or it is incomplete.
        ModelError: the backbone cannot be loaded.
    """
    started = time.perf_counter()
    if model is not None:
        backbone = load_backbone(ModelConfig(name_or_path=model))
        return Subject(backbone.model, backbone.tokenizer, model, seconds=time.perf_counter() - started)
    return load_subjects([run], full_precision=full_precision)[0]


def load_subjects(runs: Sequence[Path | None], *, full_precision: bool = False) -> list[Subject]:
    """Loads a backbone once, with the adapter of every run attached to it.

    Args:
        runs: folders of runs on one backbone; None: the newest run.
        full_precision: load the weights of the backbone unquantised, though training had them quantised.

    Raises:
        AdapterError: there is no such run, it is incomplete, or its backbone is another than the first one's.
        ModelError: the backbone cannot be loaded.
    """
    started = time.perf_counter()
    opened = [open_run(run) for run in runs]
    for other in opened[1:]:
        _require_same_backbone(opened[0], other)
    model, tokenizer = opened[0].load(default_device(), full_precision=full_precision)
    names = ["default", *(f"run{i}" for i in range(1, len(opened)))]
    for run, name in zip(opened[1:], names[1:], strict=True):
        load_adapter(model, run.adapter.folder, name=name)
        use_tokenizer(model, tokenizer)
    set_active(model, names[0])
    seconds = time.perf_counter() - started
    return [
        Subject(
            model,
            tokenizer,
            backbone=run.model.name_or_path,
            run=run.folder,
            method=run.adapter.method,
            template="plain" if run.recipe is None else training_template(run.recipe.data),
            seconds=seconds if number == 0 else 0.0,
            keeps_results=run.recipe is not None and not full_precision,  # a run's own are of its own weights
            adapter=name,
        )
        for number, (run, name) in enumerate(zip(opened, names, strict=True))
    ]


def _require_same_backbone(first: Run, other: Run) -> None:
    """Refuses a run whose adapter belongs on other weights.

    Raises:
        AdapterError: with both backbones.
    """
    if other.model == first.model and other.quantization == first.quantization:
        return

    def described(run: Run) -> str:
        bits = "" if run.quantization is None else f" in {run.quantization.bits} bits"
        return f"{run.folder} is on {run.model.name_or_path}{bits}"

    problem = f"one table has one backbone: {described(first)}, {described(other)}"
    if described(first).partition(" is ")[2] == described(other).partition(" is ")[2]:
        problem += " with other settings of model or quantization"
    raise AdapterError(problem, "evaluate them one by one")


def training_template(data: DataConfig) -> Template:
    """Returns how training wrote questions: in chats if the recipe says so, or if it had nothing but conversations."""
    only_chats = data.template == "auto" and all(source.format == "chat" for source in data.train)
    return "chat" if data.template == "chat" or only_chats else "plain"
