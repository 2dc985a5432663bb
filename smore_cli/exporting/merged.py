"""`--to hf` and `--to peft`: the merged model, and the LoRA that comes nearest to the adapter."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from smore_cli.exporting.compare import Writer, greedy
from smore_cli.exporting.formats import OPEN_MODEL, Options, Written
from smore_cli.exporting.source import load_dense
from smore_cli.merging.merge import merge
from smore_cli.merging.outcome import MERGE_FILE
from smore_cli.merging.writing import reopen
from smore_cli.models.device import default_device
from smore_cli.models.load import load_backbone
from smore_cli.models.runs import open_run

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from smore_cli.merging.outcome import Merged
    from smore_cli.models.runs import Run

__all__ = ["load_plain", "merge_into", "write_hf", "write_peft"]

TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
"""Mean difference in nats, by type, of what is the same function."""
RANK = 16


def write_hf(run: Run, folder: Path, options: Options) -> Written:
    """Writes the merged model folder, with the merge's own verdict.

    Raises:
        UsageError: it cannot be merged.
    """
    merged = merge_into(run, folder, options)
    return Written(
        what=f"the merged model ({merged['method']}), {merged['dtype']}; {MERGE_FILE} has the loss",
        use=OPEN_MODEL,
        consumer="transformers",
        ours=lambda: greedy(load_dense(run, options.device)[0]),
        theirs=lambda _: greedy(load_plain(folder, options)),
        tolerance=TOLERANCE[merged["dtype"]] if merged["method"] == "exact" else None,
    )


def write_peft(run: Run, folder: Path, options: Options) -> Written:
    """Writes a PEFT LoRA: the adapter's own, or the one nearest to a routed adapter.

    Raises:
        UsageError: it cannot be one.
    """
    from smore_cli.exporting.peft_lora import export_peft

    rank = RANK if options.rank is None else options.rank
    part = folder / "part"
    done = export_peft(run.folder, part, rank=rank, options=options.calibration, say=options.say, device=options.device)
    lora = _unpacked(part, folder, done)
    return Written(
        what=f"a LoRA of rank {lora['rank']} ({lora['method']}); {MERGE_FILE} has the loss",
        use='from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(backbone, "THIS_FOLDER")',
        consumer="PEFT",
        ours=lambda: greedy(open_run(folder).load(options.device)[0]),
        theirs=lambda _: _open_peft(run, folder, options),
        tolerance=TOLERANCE[lora["dtype"]],
    )


def merge_into(run: Run, folder: Path, options: Options) -> dict[str, Any]:
    """Merges a run into a folder that is there; returns what merge.json holds."""
    part = folder / "part"
    done = merge(run.folder, part, calibration=options.calibration, say=options.say, device=options.device)
    return _unpacked(part, folder, done)


def load_plain(folder: Path, options: Options) -> PreTrainedModel:
    """Opens a model folder as anyone would, with nothing of ours."""
    return reopen(folder, options.device or default_device())


def _unpacked(part: Path, folder: Path, done: Merged) -> dict[str, Any]:
    """Moves what was written up into the folder that is still under its temporary name, which nothing should keep."""
    values = {key: value for key, value in done.document().items() if key != "out"}
    for child in part.iterdir():
        child.rename(folder / child.name)
    part.rmdir()
    (folder / MERGE_FILE).write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return values


def _open_peft(run: Run, folder: Path, options: Options) -> Writer:
    from peft import PeftModel

    backbone = load_backbone(run.model, run.quantization, options.device)
    return greedy(PeftModel.from_pretrained(backbone.model, folder))
