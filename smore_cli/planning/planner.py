"""A recipe's plan: parameters, memory, steps, tokens and disk, without loading a weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from smore_cli.data.batch import Row
from smore_cli.errors import UsageError
from smore_cli.models.load import default_device, load_tokenizer, resolve_dtype
from smore_cli.planning.memory import MemoryPlan, plan_memory
from smore_cli.planning.parameters import ParameterCounts, adapter_bytes, count_parameters, optimizer_bytes
from smore_cli.planning.passes import PassMemory, measure_pass
from smore_cli.planning.rows import PassShape, assumed_rows, heaviest, heaviest_held_out, supervised
from smore_cli.planning.skeleton import Skeleton, build_skeleton
from smore_cli.training.batches import Batches
from smore_cli.training.disk import checkpoints_kept
from smore_cli.training.process_memory import resident_with_libraries
from smore_cli.training.run_data import load_run_data
from smore_cli.training.schedule import StepPlan, lies_flat

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from smore_cli.data.batch import Batch
    from smore_cli.recipe.schema import Recipe
    from smore_cli.training.run_data import RunData
    from smore_cli.training.setup import Setup

__all__ = ["Planner", "RunPlan"]


@dataclass(frozen=True)
class RunPlan:
    """What a run will be.

    Attributes:
        parameters: what trains.
        backbone: numbers of the backbone.
        memory: at its peak.
        with_checkpointing: the peak with `train.gradient_checkpointing`, and without.
        heaviest: the pass that costs most.
        rows: training rows and their tokens, held-out rows; None: the data were not at hand.
        steps: steps, epochs, rows a step.
        tokens: places that go through the backbone, and the share of them that is padding.
        disk: bytes of a checkpoint, of all that are kept, of the final adapter.
        notes: what was assumed.
    """

    parameters: ParameterCounts
    backbone: int
    memory: MemoryPlan
    with_checkpointing: dict[str, int]
    heaviest: PassShape
    rows: dict[str, int] | None
    steps: dict[str, float]
    tokens: dict[str, float]
    disk: dict[str, int]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Returns it as plain values, for JSON."""
        parameters = {**vars(self.parameters), "backbone": self.backbone}
        return {
            "parameters": parameters,
            "memory": self.memory.as_dict() | {"peak_by_gradient_checkpointing": self.with_checkpointing},
            "heaviest_pass": {**vars(self.heaviest), "rows": [row + 1 for row in self.heaviest.rows]},
            "rows": self.rows,
            "steps": self.steps,
            "tokens": self.tokens,
            "disk": self.disk,
            "notes": self.notes,
        }


@dataclass
class Planner:
    """Plans a recipe; what is the same for several plans of one recipe is made once.

    Attributes:
        recipe: what to plan.
        device: `cpu` or `cuda`, where it would run.
        batches: its passes; None: the data are not at hand, or are a stream.
        first_rows: rows of a stream that were looked at.
        eval_rows: held-out rows.
        baseline: resident bytes of the process without the model.
        notes: what was assumed.
    """

    recipe: Recipe
    device: str
    batches: Batches | None
    eval_rows: Sequence[Row] = ()
    first_rows: Sequence[Row] = ()
    baseline: int = 0
    notes: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, recipe: Recipe, device: str | None = None, say: Callable[[str], None] = lambda _: None) -> Planner:
        """Reads the recipe's data, if they are there.

        Raises:
            UsageError: the recipe cannot be run.
        """
        notes: list[str] = []
        device = device or default_device().type
        quantised = recipe.quantization is not None
        try:
            tokenizer = load_tokenizer(recipe.model)
            data: RunData | None = load_run_data(recipe, tokenizer, say)
        except UsageError as error:
            notes.append(
                f"without the data ({error.message}): every row is taken to have data.max_length tokens, all learned"
            )
            return cls(recipe, device, None, baseline=resident_with_libraries(quantised=quantised), notes=notes)
        assert data is not None
        if data.stream is not None:
            notes.append(f"a stream: judged by its first {len(data.train_rows)} rows")
            return cls(
                recipe,
                device,
                None,
                data.eval_rows,
                data.train_rows,
                resident_with_libraries(quantised=quantised),
                notes,
            )
        batches = Batches(
            data.train_rows, data.plan(recipe), int(tokenizer.pad_token_id), torch.float32,
            packed=recipe.data.packing, flat=lies_flat(recipe),
        )  # fmt: skip
        return cls(recipe, device, batches, data.eval_rows, (), resident_with_libraries(quantised=quantised), notes)

    @classmethod
    def of_setup(cls, setup: Setup) -> Planner:
        """Takes what a run has loaded already."""
        streamed = not isinstance(setup.plan, StepPlan)
        batches = None if streamed else setup.batches
        first = setup.train_rows if streamed else ()
        return cls(setup.recipe, setup.device.type, batches, setup.eval_rows, first, setup.baseline)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The compute dtype, on the device the plan is for."""
        if self.recipe.model.dtype == "auto" and self.device != default_device().type:
            return torch.float32 if self.device == "cpu" else torch.bfloat16
        return resolve_dtype(self.recipe.model, torch.device(self.device))

    @cached_property
    def skeleton(self) -> Skeleton:
        """The model, without weights."""
        return build_skeleton(self.recipe, self.dtype)

    @cached_property
    def heaviest(self) -> PassShape:
        """The training pass that costs most: tokens and logits weighed by what a first measurement says."""
        if self.batches is None:
            rows = self._rows_without_plan()
            size = max(row.length for row in rows)
            return PassShape(None, len(rows), size, sum(map(supervised, rows)), ())
        first = heaviest(self.batches, lambda shape: shape.places)
        memory = self.measure(first, checkpointing=self.recipe.train.gradient_checkpointing)
        place = (memory.peak - memory.logits) / max(first.places, 1)
        position = memory.logits_alone / max(first.supervised, 1)
        return heaviest(self.batches, lambda shape: place * shape.places + position * shape.supervised)

    def memory(self, *, checkpointing: bool | None = None) -> MemoryPlan:
        """Returns the memory at the peak.

        Args:
            checkpointing: with activations recomputed; default: as the recipe says.
        """
        wanted = self.recipe.train.gradient_checkpointing if checkpointing is None else checkpointing
        train = self.measure(self.heaviest, checkpointing=wanted)
        held_out = None
        size = self.recipe.eval.batch_size
        if found := heaviest_held_out(self.eval_rows, size, lambda shape: shape.places):
            batch = self._collate([[self.eval_rows[i]] for i in found.rows])
            held_out = measure_pass(self.skeleton, batch, train=False)
        return plan_memory(self.recipe, self.skeleton, train, held_out, device=self.device, baseline=self.baseline)

    def measure(self, shape: PassShape, *, checkpointing: bool) -> PassMemory:
        """Runs a training pass on shapes."""
        key = (shape.places, shape.lines, shape.supervised, checkpointing)
        if key not in self._measured:
            train = self.recipe.train
            several = (train.global_batch_size or 0) > train.per_device_batch_size
            batch = self._batch(shape)
            self._measured[key] = measure_pass(self.skeleton, batch, checkpointing=checkpointing, accumulating=several)
        return self._measured[key]

    @cached_property
    def _measured(self) -> dict[Any, PassMemory]:
        return {}

    def _batch(self, shape: PassShape) -> Batch:
        if self.batches is None:
            return self._collate([[row] for row in self._rows_without_plan()])
        for packs in self.batches.plan.passes(shape.step or 0):
            if tuple(row for pack in packs for row in pack) == shape.rows:
                return self._collate([[self.batches.rows[row] for row in pack] for pack in packs])
        raise ValueError("the plan changed while it was looked at")

    def _collate(self, packs: Sequence[Sequence[Row]]) -> Batch:
        made = self.batches or Batches((), None, 0, self.dtype)  # type: ignore[arg-type]
        return Batches(
            made.rows, made.plan, made.pad_token_id, self.dtype, packed=made.packed, flat=made.flat
        ).collate_packs(packs)

    def _rows_without_plan(self) -> list[Row]:
        if not self.first_rows:
            return assumed_rows(self.recipe)
        by_length = sorted(self.first_rows, key=lambda row: row.length, reverse=True)
        return by_length[: self.recipe.train.per_device_batch_size]

    def plan(self) -> RunPlan:
        """Returns the whole plan."""
        counts = count_parameters(self.skeleton, self.recipe.adapter)
        memory = self.memory()
        own, train = self.recipe.train.gradient_checkpointing, self.recipe.train
        both = {
            str(state).lower(): memory.peak if state == own else self.memory(checkpointing=state).peak
            for state in (False, True)
        }
        adapter = adapter_bytes(self.skeleton)
        saved = adapter["trainable"] + adapter["frozen"]
        steps, tokens, rows = self._length()
        checkpoint = saved + optimizer_bytes(self.skeleton, train)
        kept = checkpoints_kept(self.recipe, int(steps["steps"])) if "steps" in steps else 1
        disk = {
            "checkpoint": checkpoint,
            "checkpoints_kept": kept,
            "adapter": saved,
            "in_all": checkpoint * kept + saved,
        }
        return RunPlan(counts, self.skeleton.numel, memory, both, self.heaviest, rows, steps, tokens, disk, self.notes)

    def _length(self) -> tuple[dict[str, float], dict[str, float], dict[str, int] | None]:
        """Returns steps, tokens and rows, as far as they are known."""
        train = self.recipe.train
        size = train.global_batch_size or train.per_device_batch_size
        if self.batches is None:
            found: dict[str, float] = {"rows_a_step": size}
            return (found | {"steps": train.max_steps} if train.max_steps else found), {}, None
        plan = self.batches.plan
        assert isinstance(plan, StepPlan)
        padding = plan.padding[plan.layout]
        drawn = len(plan.mix.epoch(0)) if plan.mix.epoch_size else 1
        mean = padding.tokens / max(min(drawn, 20_000), 1)
        epochs = plan.epoch_of(plan.total_steps)
        steps = {"steps": plan.total_steps, "epochs": epochs, "rows_a_step": size}
        tokens = {"tokens": round(mean * drawn * epochs), "padding": padding.share}
        rows = {
            "train": len(self.batches.rows),  # type: ignore[arg-type]
            "tokens": sum(plan.lengths),
            "held_out": len(self.eval_rows),
        }
        return steps, tokens, rows
