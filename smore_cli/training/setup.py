"""Everything a run needs before its first step; nothing is written here, so a mistake costs nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed

from smore_cli.data.batch import prompt_of
from smore_cli.data.rows import row_lengths
from smore_cli.errors import ModelError
from smore_cli.models.embedders import use_tokenizer
from smore_cli.models.load import load_backbone, load_skeleton, load_tokenizer, require_usable, resolve_dtype
from smore_cli.models.notices import backbone_notices
from smore_cli.models.prior import fit_prior
from smore_cli.nn import attach, checkpoint_contexts
from smore_cli.nn.prior_hooks import active_prior
from smore_cli.nn.targets import find_saved, find_targets
from smore_cli.training.batches import Batches
from smore_cli.training.benchmark_scores import benchmark_tasks
from smore_cli.training.learning_rate import build_scheduler
from smore_cli.training.neftune import add_neftune
from smore_cli.training.objective import Objective
from smore_cli.training.optim import build_optimizer, require_optimizer
from smore_cli.training.packing_probe import prepare_packing
from smore_cli.training.parallel import ALONE
from smore_cli.training.process_memory import give_back_large_blocks, resident_with_libraries
from smore_cli.training.replicas import make_equal, share_out
from smore_cli.training.run_data import load_run_data
from smore_cli.training.schedule import lies_flat
from smore_cli.training.shard import require_shardable, shard, sharding_wanted, whole_numel
from smore_cli.training.stream_plan import StreamPlan
from smore_cli.training.trackers import require_trackers
from smore_cli.training.zero_settings import plain_accelerate, require_zero, zero_settings, zero_wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from smore_cli.data.batch import Row
    from smore_cli.evaluation.benchmarks import Task
    from smore_cli.recipe.schema import Recipe
    from smore_cli.training.parallel import Processes
    from smore_cli.training.schedule import Plan
    from smore_cli.training.zero import Zero

__all__ = ["Setup", "enable_checkpointing", "prepare"]


@dataclass
class Setup:
    """A run, ready for its first step.

    Attributes:
        recipe: what to run.
        accelerator: device and backward pass.
        model: backbone with the adapter attached, in training mode.
        tokenizer: the backbone's.
        train_rows: tokenised training rows; of a stream its first ones.
        eval_rows: tokenised held-out rows, maybe none.
        data_hash: hash of the training rows.
        plan: which rows each step sees.
        batches: the forward passes of each step.
        objective: what is minimised.
        optimizer: over the adapter's parameters.
        scheduler: of the learning rate.
        targets: paths of the adapted modules.
        seconds: time spent, by phase.
        processes: those that train together.
        sharded: each of them holds only a part of the model, or of the optimiser.
        zero: DeepSpeed's ZeRO, which then runs the optimiser.
        baseline: bytes of the process before the model was loaded.
        tasks: benchmarks to score at every evaluation, with their questions.
    """

    recipe: Recipe
    accelerator: Accelerator
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    train_rows: Sequence[Row]
    eval_rows: Sequence[Row]
    data_hash: str
    plan: Plan
    batches: Batches
    objective: Objective
    optimizer: Optimizer
    scheduler: LambdaLR
    targets: list[str]
    seconds: dict[str, float]
    processes: Processes = ALONE
    sharded: bool = False
    zero: Zero | None = None
    baseline: int = 0
    tasks: Sequence[Task] = ()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.accelerator.device
        return device

    def parameter_counts(self) -> dict[str, int]:
        """Returns trainable numbers, and all of them (a 4-bit weight counts the numbers it stands for)."""
        trainable = sum(whole_numel(p) for p in self.model.parameters() if p.requires_grad)
        if self.zero is not None and self.zero.stage == 3:
            return {"trainable": trainable, "total": sum(whole_numel(p) for p in self.model.parameters())}
        return {"trainable": trainable, "total": int(self.model.num_parameters())}  # type: ignore[operator]

    @property
    def backward(self) -> Callable[[Tensor], None]:
        """Runs the backward pass of a scalar."""
        return self.accelerator.backward if self.zero is None else self.zero.backward

    @property
    def num_train_rows(self) -> int | None:
        """Training rows; None for a stream, whose end nobody knows."""
        return None if self.recipe.data.streaming else len(self.train_rows)

    def hash_after(self, steps: int) -> str:
        """Returns a hash that two runs share where their training rows are the same, of a stream up to that step."""
        return self.plan.after(steps).hash if isinstance(self.plan, StreamPlan) else self.data_hash

    def describe(self) -> list[str]:
        """Returns what is about to be run, in a few lines."""
        counts = self.parameter_counts()
        held_out = f"{len(self.eval_rows):,} held out"
        if self.num_train_rows is None:
            rows = f"training rows from a stream, {held_out}"
        else:
            rows = f"{self.num_train_rows:,} training rows ({row_lengths(self.train_rows).sum():,} tokens), {held_out}"
        return [
            f"method    {self.recipe.adapter.title}, on {len(self.targets)} linear maps",
            f"trainable {counts['trainable']:,} of {counts['total']:,} parameters "
            f"({100 * counts['trainable'] / counts['total']:.2f} %)",
            f"data      {rows}",
            *self.plan.lines(),
        ]


def prepare(recipe: Recipe, say: Callable[[str], None], processes: Processes = ALONE) -> Setup:
    """Loads data and backbone, attaches the adapter, builds the optimiser.

    Args:
        recipe: what to run.
        say: told what the user should know.
        processes: those that train together, which all call this.

    Raises:
        UsageError: anything about recipe, data or model that cannot work.
    """
    started = time.perf_counter()
    seconds: dict[str, float] = {}

    def lap(phase: str) -> None:
        nonlocal started
        seconds[phase] = round(time.perf_counter() - started, 2)
        started = time.perf_counter()

    require_trackers(recipe.log)
    recipe = share_out(recipe, processes)
    if fsdp := sharding_wanted():
        require_shardable(recipe, processes)
    if zero_wanted():
        require_zero(recipe, processes)
    accelerator = _accelerator(processes)
    settings = _zero_settings(recipe, processes, accelerator.device, say) if zero_wanted() else None
    sharded = fsdp or settings is not None
    tasks = benchmark_tasks(recipe.eval, sharded=sharded)
    require_optimizer(recipe.train, accelerator.device, say)
    _require_fit(recipe, accelerator.device)
    set_seed(recipe.seed, device_specific=True)  # of dropout and noise: each process draws its own
    tokenizer = load_tokenizer(recipe.model)
    data = processes.main_first(lambda: load_run_data(recipe, tokenizer, say))
    lap("data")
    quantised = recipe.quantization is not None
    baseline = resident_with_libraries(quantised=quantised)
    if quantised and accelerator.device.type == "cpu":
        give_back_large_blocks()
    partitioned = fsdp or (settings is not None and settings["zero_optimization"]["stage"] == 3)
    model = _backbone(recipe, accelerator.device, sharded=partitioned)
    if recipe.data.packing:
        ranking = recipe.data.objective == "choice_ranking"
        prepare_packing(model, model.device, branched=ranking, flat=lies_flat(recipe))
    plan = data.plan(recipe)
    targets = attach(model, recipe.adapter, seed=recipe.seed)
    for line in backbone_notices(model):
        say(line)
    if (prior := active_prior(model)) is not None:
        use_tokenizer(model, tokenizer)
        prompts = [prompt_of(row) for row in data.train_rows]
        processes.main_first(lambda: fit_prior(model, prior, prompts, data.used_by(plan), say))
    make_equal(model, recipe, data.hash, processes)
    model.train()
    if recipe.train.neftune_noise_alpha is not None:
        add_neftune(model, recipe.train.neftune_noise_alpha)
    if recipe.train.gradient_checkpointing:
        enable_checkpointing(model)
    if fsdp:
        shard(model, accelerator.device)
    optimizer = build_optimizer(model, recipe.train)
    zero = _zero(model, optimizer, settings, accelerator.device) if settings is not None else None
    lap("model")
    scheduler = build_scheduler(optimizer, recipe.train, plan.total_steps)
    batches = Batches(
        data.train_rows if data.stream is None else data.stream, plan, int(tokenizer.pad_token_id),
        resolve_dtype(recipe.model, accelerator.device), processes.rank, processes.count,
        packed=recipe.data.packing, flat=lies_flat(recipe),
        num_workers=recipe.train.dataloader_num_workers, pin_memory=accelerator.device.type == "cuda",
    )  # fmt: skip
    objective = Objective.from_config(recipe.data)
    return Setup(
        recipe, accelerator, model, tokenizer, data.train_rows, data.eval_rows, data.hash, plan, batches, objective,
        optimizer, scheduler, targets, seconds, processes, sharded, zero, baseline, tasks,
    )  # fmt: skip


def _require_fit(recipe: Recipe, device: torch.device) -> None:
    """Refuses an adapter that does not fit the model by the model's shapes alone: reading the data may take hours."""
    require_usable(recipe.model, device)
    shapes, adapter = load_skeleton(recipe.model), recipe.adapter
    find_saved(shapes, adapter.modules_to_save, find_targets(shapes, adapter.target_modules, adapter.sites))


def _accelerator(processes: Processes) -> Accelerator:
    """Returns accelerate's device and trackers; what the environment may say of precision is the recipe's matter.

    The model and the optimiser are not given to it: it would wrap both, and divide the loss or its gradient.
    """
    plain = GradientAccumulationPlugin(num_steps=1)
    cpu = processes.count > 1 and not torch.cuda.is_available()
    with plain_accelerate():
        return Accelerator(cpu=cpu, mixed_precision="no", gradient_accumulation_plugin=plain)


def _zero_settings(
    recipe: Recipe, processes: Processes, device: torch.device, say: Callable[[str], None]
) -> dict[str, Any]:
    """Returns DeepSpeed's configuration, and says what of it has no effect."""
    from smore_cli.training.zero import require_valid  # only here, because nothing imports DeepSpeed unless asked

    settings, idle = zero_settings(recipe, processes, device)
    require_valid(settings)
    if idle:
        say(f"DeepSpeed's configuration: {', '.join(idle)} has no effect here")
    return settings


def _zero(model: nn.Module, optimizer: Optimizer, settings: dict[str, Any], device: torch.device) -> Zero:
    from smore_cli.training.zero import Zero

    return Zero(model, optimizer, settings, device)


def _backbone(recipe: Recipe, device: torch.device, *, sharded: bool) -> PreTrainedModel:
    """Loads the backbone to where it trains; one that is to be sharded may not fit there, and stays on the CPU."""
    if not sharded:
        return load_backbone(recipe.model, recipe.quantization, device).model
    dtype = str(resolve_dtype(recipe.model, device)).removeprefix("torch.")
    return load_backbone(recipe.model.model_copy(update={"dtype": dtype}), None, torch.device("cpu")).model


def enable_checkpointing(model: Any) -> None:
    """Non-reentrant checkpointing whose recomputation sees the routing context and records nothing twice."""
    if not model.supports_gradient_checkpointing:
        name = type(model).__name__
        raise ModelError(f"{name} cannot recompute activations", "set train.gradient_checkpointing: false")
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
