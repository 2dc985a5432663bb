"""Everything a run needs before its first step; nothing is written here, so a mistake costs nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from smore_cli.data.batch import prompt_of
from smore_cli.data.build import build_rows, split_eval
from smore_cli.data.groups import require_groups
from smore_cli.errors import DataError, ModelError, UsageError
from smore_cli.models.embedders import use_tokenizer
from smore_cli.models.load import load_backbone, load_tokenizer, resolve_dtype
from smore_cli.models.prior import fit_prior
from smore_cli.nn import attach, checkpoint_contexts
from smore_cli.nn.prior_hooks import active_prior
from smore_cli.training.batches import Batches
from smore_cli.training.objective import Objective
from smore_cli.training.schedule import StepPlan, build_optimizer, build_scheduler

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PreTrainedTokenizerBase

    from smore_cli.data.batch import Row
    from smore_cli.recipe.schema import Recipe

__all__ = ["Setup", "prepare"]


@dataclass
class Setup:
    """A run, ready for its first step.

    Attributes:
        recipe: what to run.
        accelerator: device and backward pass.
        model: backbone with the adapter attached, in training mode.
        tokenizer: the backbone's.
        train_rows: tokenised training rows.
        eval_rows: tokenised held-out rows, maybe none.
        data_hash: hash of the training rows.
        plan: which rows each step sees.
        batches: the forward passes of each step.
        objective: what is minimised.
        optimizer: over the adapter's parameters.
        scheduler: of the learning rate.
        targets: paths of the adapted modules.
        seconds: time spent, by phase.
    """

    recipe: Recipe
    accelerator: Accelerator
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    train_rows: list[Row]
    eval_rows: list[Row]
    data_hash: str
    plan: StepPlan
    batches: Batches
    objective: Objective
    optimizer: Optimizer
    scheduler: LambdaLR
    targets: list[str]
    seconds: dict[str, float]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.accelerator.device
        return device

    def parameter_counts(self) -> dict[str, int]:
        """Returns trainable numbers, and all of them (a 4-bit weight counts the numbers it stands for)."""
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return {"trainable": trainable, "total": int(self.model.num_parameters())}  # type: ignore[operator]

    def describe(self) -> list[str]:
        """Returns what is about to be run, in a few lines."""
        counts, plan = self.parameter_counts(), self.plan
        epochs = plan.epoch_of(plan.total_steps)
        tokens = sum(row.length for row in self.train_rows)
        return [
            f"method    {self.recipe.adapter.title}, on {len(self.targets)} linear maps",
            f"trainable {counts['trainable']:,} of {counts['total']:,} parameters "
            f"({100 * counts['trainable'] / counts['total']:.2f} %)",
            f"data      {len(self.train_rows):,} training rows ({tokens:,} tokens), {len(self.eval_rows):,} held out",
            f"steps     {plan.total_steps} of {plan.global_batch_size} rows, {epochs:.2f} epochs",
        ]


def prepare(recipe: Recipe, say: Callable[[str], None]) -> Setup:
    """Loads data and backbone, attaches the adapter, builds the optimiser.

    Raises:
        UsageError: anything about recipe, data or model that cannot work.
    """
    started = time.perf_counter()
    seconds: dict[str, float] = {}

    def lap(phase: str) -> None:
        nonlocal started
        seconds[phase] = round(time.perf_counter() - started, 2)
        started = time.perf_counter()

    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise UsageError("this version trains in one process", "start it with plain `smore train`")
    set_seed(recipe.seed)
    tokenizer = load_tokenizer(recipe.model)
    train_rows, eval_rows, data_hash = _rows(recipe, tokenizer, say)
    lap("data")
    backbone = load_backbone(recipe.model, recipe.quantization, accelerator.device)
    model = backbone.model
    plan = StepPlan.from_config(recipe.train, len(train_rows), recipe.seed)
    targets = attach(model, recipe.adapter, seed=recipe.seed)
    if (prior := active_prior(model)) is not None:
        use_tokenizer(model, tokenizer)
        fit_prior(model, prior, [prompt_of(row) for row in train_rows], plan.rows_used(), say)
    model.train()
    if recipe.train.gradient_checkpointing:
        _enable_checkpointing(model)
    lap("model")
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer = build_optimizer(trainable, recipe.train)
    scheduler = build_scheduler(optimizer, recipe.train, plan.total_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    batches = Batches(train_rows, plan, int(tokenizer.pad_token_id), resolve_dtype(recipe.model, accelerator.device))
    objective = Objective.from_config(recipe.data)
    return Setup(
        recipe, accelerator, model, tokenizer, train_rows, eval_rows, data_hash, plan, batches, objective, optimizer,
        scheduler, targets, seconds,
    )  # fmt: skip


def _rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]
) -> tuple[list[Row], list[Row], str]:
    data = recipe.data
    train = build_rows(data, tokenizer, data.train)
    for line in train.report.lines():
        say(line)
    if recipe.adapter.row_groups is not None:
        require_groups(train.rows, train.groups, recipe.adapter.row_groups)
    if data.eval:
        held_out = build_rows(data, tokenizer, data.eval).rows
        return train.rows, held_out, train.report.content_hash
    train_rows, eval_rows = split_eval(train.rows, data.eval_fraction, recipe.seed)
    if not train_rows:
        raise DataError("no training row is left after holding out data.eval_fraction", "lower it, or add data")
    return train_rows, eval_rows, train.report.content_hash


def _enable_checkpointing(model: Any) -> None:
    """Non-reentrant checkpointing whose recomputation sees the routing context and records nothing twice."""
    if not model.supports_gradient_checkpointing:
        name = type(model).__name__
        raise ModelError(f"{name} cannot recompute activations", "set train.gradient_checkpointing: false")
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
