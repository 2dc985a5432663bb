"""`--to hf` and `--to peft`: the merged model, and the LoRA that comes nearest to the adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from smore_cli.exporting.compare import greedy
from smore_cli.exporting.formats import Options, Written
from smore_cli.exporting.source import load_dense
from smore_cli.merging.merge import merge
from smore_cli.methods import load_method
from smore_cli.models.load import load_backbone
from smore_cli.models.quiet import quiet

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from smore_cli.models.runs import Run

__all__ = ["load_plain", "merge_into", "write_hf", "write_peft"]

TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
"""Mean difference in nats, by type, of an adapter that has an exact dense form."""


def write_hf(run: Run, folder: Path, options: Options) -> Written:
    """Writes the merged model folder, with the merge's own verdict.

    Raises:
        UsageError: it cannot be merged.
    """
    merged = merge_into(run, folder / "merged", options)
    for child in (folder / "merged").iterdir():
        child.rename(folder / child.name)
    (folder / "merged").rmdir()
    dtype = str(merged["dtype"])
    return Written(
        what=f"the merged model, {dtype}; merge.json has the loss",
        use='from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        consumer="transformers",
        ours=lambda: greedy(load_dense(run, options.device)[0]),
        theirs=lambda _: greedy(load_plain(folder, options.device)),
        tolerance=None if load_method(run.adapter.method).routed else TOLERANCE[dtype],
        facts={"dtype": dtype},
    )


def merge_into(run: Run, target: Path, options: Options) -> dict[str, Any]:
    """Merges a run into the folder `target`, which does not exist; returns what merge.json holds."""
    return merge(run.folder, target, device=options.device).document()


def load_plain(folder: Path, device: torch.device | None) -> PreTrainedModel:
    """Opens a model folder as anyone would, with nothing of ours."""
    from transformers import AutoModelForCausalLM

    from smore_cli.models.device import default_device

    with quiet():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype="auto", device_map={"": device or default_device()}
        )
    return model


def write_peft(run: Run, folder: Path, options: Options) -> Written:
    """Writes a PEFT LoRA."""
    raise NotImplementedError
