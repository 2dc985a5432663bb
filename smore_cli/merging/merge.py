"""`smore merge`: an adapter and its backbone become one ordinary model folder, which is reopened and compared first."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smore_cli import __version__
from smore_cli.atomic import atomic_folder, write_text
from smore_cli.errors import CheckFailed, UsageError
from smore_cli.merging.dense import merge_lora
from smore_cli.merging.precision import PrecisionGap, precision_gap, require_quantised
from smore_cli.merging.text import comparison_text
from smore_cli.merging.verify import Difference, difference, logits_of
from smore_cli.methods import load_method
from smore_cli.models.quiet import quiet
from smore_cli.models.runs import open_run
from smore_cli.models.tokenizer_files import save_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel

    from smore_cli.models.runs import Run

__all__ = ["TOLERANCE", "Merged", "merge"]

TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2}
"""Largest mean KL in nats that counts as equal, by type of the weights: rounding alone gave 1e-11 in float32 and
2e-3 in bfloat16 (SmolLM2-135M, rank 16 on all linear maps, updates a sixtieth of the weights' size)."""


@dataclass(frozen=True)
class Merged:
    """What was written.

    Attributes:
        out: the model folder.
        run: where the adapter came from.
        linears: how many linear maps were changed.
        dtype: type of the weights.
        text: what the models were compared on.
        difference: the folder, reopened, against the adapter model.
        precision: what the full-precision weights changed, where training had quantised ones.
    """

    out: Path
    run: Path
    linears: int
    dtype: str
    text: str
    difference: Difference
    precision: PrecisionGap | None = None

    def document(self) -> dict[str, Any]:
        """Returns what merge.json holds."""
        values = asdict(self)
        return {**values, "out": str(self.out), "run": str(self.run), "smore_version": __version__}


def merge(
    path: Path,
    out: Path,
    *,
    tolerance: float | None = None,
    full_precision: bool = False,
    device: torch.device | None = None,
) -> Merged:
    """Merges the LoRA adapter of a run into its backbone and writes the result as a Hugging Face folder.

    Args:
        path: a run, a checkpoint or an adapter folder.
        out: must not exist.
        tolerance: largest mean KL, in nats, of the written model from the adapter; default: by `TOLERANCE`.
        full_precision: merge into the unquantised weights, though the adapter was trained on quantised ones.
        device: default: the first CUDA device, else the CPU.

    Raises:
        UsageError: it cannot be merged exactly, or `out` exists; nothing was written.
        CheckFailed: the written model differs by more than the tolerance; nothing is left of it.
    """
    if out.exists():
        raise UsageError(f"{out} already exists", "name a new folder; a merge replaces nothing")
    run = open_run(path)
    _require_mergeable(run, full_precision)
    precision = precision_gap(run, device) if full_precision else None
    model, tokenizer = run.load(device, full_precision=full_precision)
    text = comparison_text(run.recipe, tokenizer)
    before = logits_of(model, text.texts)
    linears = merge_lora(model)
    dtype, place = str(model.dtype).removeprefix("torch."), model.device
    allowed = TOLERANCE[dtype] if tolerance is None else tolerance
    with _refusing_existing(out), atomic_folder(out) as folder:
        with quiet():
            model.save_pretrained(folder)
            save_tokenizer(tokenizer, folder)
        del model  # the folder is reopened beside it otherwise: two models in memory
        apart = difference(before, logits_of(_reopen(folder, place), text.texts))
        merged = Merged(out, run.folder, linears, dtype, text.origin, apart, precision)
        if not apart.mean_kl <= allowed:  # also when it is not a number
            problem = (
                f"the merged model differs from the adapter: mean KL {apart.mean_kl:.2e} nats, {allowed:g} allowed"
            )
            raise CheckFailed(problem, "nothing was kept; give a larger --tolerance if that is good enough")
        write_text(folder / "merge.json", json.dumps(merged.document(), indent=1, sort_keys=True) + "\n")
    return merged


def _require_mergeable(run: Run, full_precision: bool) -> None:
    """Refuses what has no exact dense form, before anything is loaded."""
    name = run.adapter.method
    if load_method(name).routed:
        raise UsageError(
            f"{run.folder}: a {name} adapter has no dense form: its update depends on the token, so no single matrix "
            "equals it",
            f"it stays usable as an adapter: smore eval {run.folder}",
        )
    if full_precision:
        require_quantised(run)
    elif run.quantization is not None:
        bits = run.quantization.bits
        raise UsageError(
            f"{run.folder} was trained on a {bits}-bit backbone: merging into {bits} bits would round the "
            "update away, and the unquantised weights are not the ones it was trained on",
            "--full-precision merges into the unquantised ones and says what that changes; or keep it as an adapter: "
            f"smore eval {run.folder}",
        )


def _reopen(folder: Path, device: torch.device) -> PreTrainedModel:
    """Loads the folder as anyone would, with nothing of ours."""
    from transformers import AutoModelForCausalLM

    with quiet():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype="auto", device_map={"": device}
        )
    return model


@contextmanager
def _refusing_existing(out: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError as error:
        raise UsageError(f"{out} already exists", "it appeared while the merge was running") from error
