"""`smore merge`: an adapter and its backbone become one ordinary model folder, which is reopened and judged first.

exact          W + D where D is the same for every token: LoRA, DoRA, a router with one expert
least-squares  the D that is nearest to the update on real inputs, layer by layer (`sequential`)
mean, uniform  every token given the mean gates, or all experts the same weight (`mean`)
"""

from __future__ import annotations

import gc
import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from smore_cli.atomic import atomic_folder, write_text, writing
from smore_cli.errors import CheckFailed, UsageError
from smore_cli.merging.calibration import Calibration, batches_of
from smore_cli.merging.card import card
from smore_cli.merging.dense import dequantise, fold, is_constant
from smore_cli.merging.distillation import distil, lessons_of
from smore_cli.merging.fitting import Solver
from smore_cli.merging.mean_merge import merge_mean
from smore_cli.merging.outcome import MERGE_FILE, Merged, peak_memory
from smore_cli.merging.precision import precision_gap, require_quantised
from smore_cli.merging.reference import NO_BENCHMARK, Benchmark, Reference, measure_reference
from smore_cli.merging.sequential import merge_sequentially
from smore_cli.merging.work import Work, fingerprint, key_of
from smore_cli.merging.writing import reopen, require_room, write_manifest, write_model
from smore_cli.methods.lora import LoRAConfig
from smore_cli.models.quantised import describe_quantization
from smore_cli.models.runs import open_run
from smore_cli.nn import attach
from smore_cli.nn.adapted import dense_weight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

    from smore_cli.merging.distillation import Lesson
    from smore_cli.models.runs import Run

__all__ = ["TOLERANCE", "Merged", "Method", "merge", "refusing_existing", "require_close", "seal", "solved_layers"]

Method = Literal["exact", "least-squares", "mean", "uniform"]
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 1e-2}
"""Largest mean KL in nats of an exact merge, by type of the weights: rounding alone gave 1e-11 in float32 and 2e-3 in
bfloat16 (SmolLM2-135M, rank 16 on all linear maps, updates a sixtieth of the weights' size)."""
DISTILLED_RANK = 16
_UNFITTED: dict[str, Any] = {"ridge": Calibration.ridge, "prior": Calibration.prior}


def _silent(line: str) -> None:
    """Tells nobody."""


def merge(
    path: Path,
    out: Path,
    *,
    method: Method | None = None,
    calibration: Calibration | None = None,
    tolerance: float | None = None,
    base_weights: Literal["trained", "original"] = "trained",
    dtype: str | None = None,
    shard_size: str = "2GB",
    benchmark: Benchmark = NO_BENCHMARK,
    say: Callable[[str], None] = _silent,
    device: torch.device | None = None,
) -> Merged:
    """Merges the adapter of a run into its backbone and writes the result as a Hugging Face folder.

    Args:
        path: a run, a checkpoint or an adapter folder.
        out: must not exist.
        method: default: exact where the update is the same for every token, else least-squares.
        calibration: what a routed adapter is fitted to, and how; default: `Calibration()`.
        tolerance: largest mean KL in nats of the written model from the adapter; default: for exact merges by
            `TOLERANCE`, for others none.
        base_weights: of a backbone that training had quantised: the dequantised weights, or those of its files.
        dtype: of what is written; default: the run's.
        shard_size: largest file of weights, as in 2GB.
        benchmark: to score backbone, adapter and merge on.
        say: takes lines of progress.
        device: default: the first CUDA device, else the CPU.

    Raises:
        UsageError: it cannot be merged so, or `out` exists; nothing was written.
        CheckFailed: the written model differs by more than the tolerance; nothing is left of it.
        SmoreError: the folder could not be written; nothing is left of it.
    """
    if out.exists():
        raise UsageError(f"{out} already exists", "name a new folder; a merge replaces nothing")
    run = open_run(path)
    if base_weights == "original":
        require_quantised(run, "--base-weights original")
    model, tokenizer = run.load(device)
    chosen = _choose(run, model, method, calibration)
    calibration = calibration or Calibration()
    reference = measure_reference(run, model, tokenizer, calibration, benchmark, say)
    precision = None
    if base_weights == "original":
        del model
        gc.collect()
        precision = precision_gap(run, device)
        model, tokenizer = run.load(device, full_precision=True)
    elif run.quantization is not None:
        dequantise(model)
    written = model.dtype if dtype is None else getattr(torch, dtype)
    numbers = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    solved = sum(p.nbytes for p in model.parameters()) if chosen == "least-squares" else 0
    require_room(out, numbers * written.itemsize + solved)
    settings = (calibration, chosen, base_weights, fingerprint(model), str(run.quantization), _hash_of(reference))
    with writing(out), solved_layers(out, key_of(run.folder, *map(str, settings))) as work:
        linears = _merge(model, chosen, reference, calibration, work, say)
        place = model.device
        with refusing_existing(out), atomic_folder(out) as folder:
            write_model(model, tokenizer, folder, written, shard_size)
            del model  # the folder is reopened: never two models in memory
            gc.collect()
            say("reopening what was written")
            again = reopen(folder, place)
            verdict = reference.judged_by(again)
            merged = Merged(
                out=out,
                run=run.folder,
                adapter=run.adapter.method,
                backbone=run.model.name_or_path,
                method=chosen,
                linears=linears,
                dtype=str(written).removeprefix("torch."),
                quantised=run.quantization is not None,
                weights=_describe_weights(run, base_weights),
                verdict=verdict,
                calibration=None if chosen == "exact" else reference.describe_calibration(calibration),
                benchmarks=reference.scored(again, tokenizer, benchmark, say),
                precision=precision,
                peak_memory_bytes=peak_memory(),
            )
            del again
            seal(folder, merged, tolerance)
    return merged


def _choose(run: Run, model: PreTrainedModel, method: Method | None, calibration: Calibration | None) -> Method:
    """Returns the method, refused where it cannot be or means nothing."""
    constant = is_constant(model)
    chosen: Method = method or ("exact" if constant else "least-squares")
    if chosen == "exact" and not constant:
        depends = run.adapter.config(model).depends_on
        raise UsageError(
            f"{run.folder}: a {run.adapter.method} adapter has no exact merge: its update depends on {depends}, so no "
            "single matrix equals it",
            "--method least-squares finds the nearest one and measures what it loses",
        )
    if chosen != "exact" and constant:
        raise UsageError(
            f"{run.folder}: a {run.adapter.method} adapter is the same for every token, so there is nothing to fit",
            "leave out --method: it is merged exactly",
        )
    if chosen in ("mean", "uniform") and calibration not in (None, replace(calibration or Calibration(), **_UNFITTED)):
        raise UsageError(f"--method {chosen} solves nothing, so --ridge and --prior change nothing", "leave them out")
    if chosen == "exact" and calibration is not None:
        raise UsageError("an exact merge fits nothing, so it has no calibration", "leave out its options")
    return chosen


def _merge(
    model: PreTrainedModel,
    method: Method,
    reference: Reference,
    calibration: Calibration,
    work: Work,
    say: Callable[[str], None],
) -> int:
    """Merges in place; returns how many linear maps were changed."""
    if method == "exact":
        return fold(model)
    rows = reference.texts.calibration.rows
    batches = batches_of(rows, reference.pad_token_id)
    say(f"fitted to {reference.texts.calibration.tokens:,} tokens of {reference.texts.calibration.origin}")
    lessons = lessons_of(model, rows, reference.pad_token_id) if calibration.distill else []
    if method == "least-squares":
        solver = Solver(calibration.ridge, calibration.prior)
        paths = list(merge_sequentially(model, batches, solver, work, say))
    else:
        paths = merge_mean(model, batches, uniform=method == "uniform")
    fold(model)  # what was trained whole
    if lessons:
        _distil(model, paths, lessons, calibration.distill, say)
    return len(paths)


def _distil(
    model: PreTrainedModel, paths: Sequence[str], lessons: Sequence[Lesson], steps: int, say: Callable[[str], None]
) -> None:
    """Teaches a merged model what the routed one says, by a LoRA beside the maps at `paths` that is folded in."""
    rank = min(DISTILLED_RANK, *(min(dense_weight(model.get_submodule(path)).shape) for path in paths))
    attach(model, LoRAConfig(target_modules=list(paths), rank=rank, alpha=float(rank)))
    distil(model, lessons, steps, say)
    fold(model)


def _hash_of(reference: Reference) -> str:
    return str([row.prompt + row.branches[0] for row in reference.texts.calibration.rows])


def _describe_weights(run: Run, base_weights: str) -> str:
    if run.quantization is None:
        return "the backbone's own weights"
    kept = describe_quantization(run.quantization)
    return f"dequantised {kept} weights" if base_weights == "trained" else f"original weights, though trained on {kept}"


def require_close(merged: Merged, tolerance: float | None) -> None:
    """Refuses a merge beyond the tolerance, and one that gives no numbers."""
    if tolerance is None:
        kind = "bfloat16" if merged.quantised else merged.dtype  # its kernels round on their own
        tolerance = TOLERANCE[kind] if merged.method == "exact" and merged.precision is None else float("inf")
    found = merged.difference.mean_kl
    if not found <= tolerance:  # also when it is not a number
        problem = f"the merged model differs from the adapter: mean KL {found:.2e} nats, {tolerance:g} allowed"
        raise CheckFailed(problem, "nothing was kept; give a larger --tolerance if that is good enough")


def seal(folder: Path, merged: Merged, tolerance: float | None) -> None:
    """Refuses what is beyond the tolerance, and writes verdict, card and manifest beside the rest."""
    require_close(merged, tolerance)
    write_text(folder / MERGE_FILE, json.dumps(merged.document(), indent=1, sort_keys=True) + "\n")
    write_text(folder / "README.md", card(merged))
    write_manifest(folder)


@contextmanager
def solved_layers(out: Path, key: str) -> Iterator[Work]:
    """Yields the work on a merge; it goes when the merge is done or has failed, and stays when it is killed."""
    work = Work.open(out, key)
    try:
        yield work
    except Exception:
        work.remove()
        raise
    work.remove()


@contextmanager
def refusing_existing(out: Path) -> Iterator[None]:
    """Inside: a folder that appears while it is made elsewhere is a mistake of the user's, in one line."""
    try:
        yield
    except FileExistsError as error:
        raise UsageError(f"{out} already exists", "it appeared while the merge was running") from error
