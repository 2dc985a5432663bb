"""Any adapter as a true PEFT LoRA: exactly for LoRA and DoRA, by reduced-rank regression for routed ones.

    routed    D of least squares, layer by layer, and of it the best rank-r part for the inputs that occur: B A
              (`merging.sequential`; what a layer misses at this rank, the next ones are fitted around)
    in PEFT   lora_B = B, lora_A = A, lora_alpha = r, so that the scale is 1

The folder is reopened beside a fresh backbone and judged like a merged model.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from smore_cli.atomic import atomic_folder, writing
from smore_cli.errors import UsageError
from smore_cli.merging.calibration import Calibration, batches_of
from smore_cli.merging.dense import adapters_of, dequantise
from smore_cli.merging.distillation import distil, lessons_of
from smore_cli.merging.fitting import MapResult, Solver
from smore_cli.merging.merge import refusing_existing, seal, solved_layers
from smore_cli.merging.outcome import Merged, peak_memory
from smore_cli.merging.reference import NO_BENCHMARK, Benchmark, Reference, measure_reference
from smore_cli.merging.sequential import linear_maps, merge_sequentially
from smore_cli.merging.work import fingerprint, key_of
from smore_cli.merging.writing import require_room
from smore_cli.methods.lora import LoRAConfig
from smore_cli.models.adapter_files import load_adapter, save_adapter
from smore_cli.models.load import load_backbone
from smore_cli.models.quantised import describe_quantization
from smore_cli.models.runs import open_run
from smore_cli.models.tokenizer_files import save_tokenizer
from smore_cli.nn import attach
from smore_cli.nn.full_copy import FullCopy
from smore_cli.nn.low_rank import LowRank
from smore_cli.nn.targets import widths

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from smore_cli.merging.distillation import Lesson
    from smore_cli.merging.work import Work
    from smore_cli.models.runs import Run

__all__ = ["export_peft"]


def export_peft(
    path: Path,
    out: Path,
    *,
    rank: int = 16,
    options: Calibration | None = None,
    tolerance: float | None = None,
    benchmark: Benchmark = NO_BENCHMARK,
    say: Callable[[str], None] = lambda line: None,
    device: torch.device | None = None,
) -> Merged:
    """Writes the adapter of a run as a PEFT LoRA folder.

    Args:
        path: a run, a checkpoint or an adapter folder.
        out: must not exist.
        rank: of the LoRA that stands in for a routed adapter; one of LoRA or DoRA keeps its own.
        options: what a routed adapter is fitted to, and how; default: `Calibration()`.
        tolerance: largest mean KL in nats of the LoRA from the adapter; default: for exact ones as for a merge.
        benchmark: to score backbone, adapter and LoRA on.
        say: takes lines of progress.
        device: default: the first CUDA device, else the CPU.

    Raises:
        UsageError: it cannot be, or `out` exists; nothing was written.
        CheckFailed: the LoRA differs by more than the tolerance; nothing is left of it.
        SmoreError: the folder could not be written; nothing is left of it.
    """
    if out.exists():
        raise UsageError(f"{out} already exists", "name a new folder; an export replaces nothing")
    run = open_run(path)
    model, tokenizer = run.load(device)
    exact = all(isinstance(module.adapter("default"), LowRank | FullCopy) for module in adapters_of(model).values())
    if exact and options is not None:
        raise UsageError("a LoRA is exported as it is, so there is nothing to calibrate", "leave out its options")
    options = options or Calibration()
    reference = measure_reference(run, model, tokenizer, options, benchmark, say)
    config = cast("LoRAConfig", run.adapter.config(model)) if exact else None
    rows = reference.texts.calibration.rows
    key = key_of(run.folder, "peft", rank, str(options), fingerprint(model), str(run.quantization), str(rows))
    place = model.device
    require_room(out, _bytes_needed(model, rank))
    with writing(out), solved_layers(out, key) as work:
        if config is None:
            fitted = _fit(run, model, reference, rank, options, work, say)
            config = fitted.config
            del model  # its weights hold the update now
            gc.collect()
            model = load_backbone(run.model, run.quantization, place).model
            _give(model, fitted)
            if options.distill:
                distil(model, fitted.lessons, options.distill, say)
        with refusing_existing(out), atomic_folder(out) as folder:
            save_adapter(model, config, folder, base=run.model)
            save_tokenizer(tokenizer, folder)
            linears = sum(isinstance(module.adapter("default"), LowRank) for module in adapters_of(model).values())
            del model
            gc.collect()
            again = _reopen(run, folder, place)
            verdict = reference.judged_by(again)
            merged = Merged(
                out=out,
                run=run.folder,
                adapter=run.adapter.method,
                backbone=run.model.name_or_path,
                method="exact" if exact else "least-squares",
                linears=linears,
                dtype=str(again.dtype).removeprefix("torch."),
                quantised=run.quantization is not None,
                weights=f"beside the backbone's {describe_quantization(run.quantization)} weights",
                verdict=verdict,
                calibration=None if exact else reference.describe_calibration(options),
                benchmarks=reference.scored(again, tokenizer, benchmark, say),
                precision=None,
                peak_memory_bytes=peak_memory(),
                rank=config.rank,
            )
            del again
            seal(folder, merged, tolerance)
    return merged


def _bytes_needed(model: PreTrainedModel, rank: int) -> int:
    """Returns the bytes of a LoRA of that rank, and of the fitted weights that lie beside it until it is done."""
    adapted = adapters_of(model).items()
    maps = [widths(base) for path, module in adapted for _, base in linear_maps(path, module.base)]
    return sum(4 * rank * (d_in + d_out) + model.dtype.itemsize * d_in * d_out for d_in, d_out in maps)


@dataclass(frozen=True)
class _Fitted:
    """The LoRA that is nearest to a routed adapter.

    Attributes:
        config: its settings.
        maps: its factors, by path.
        copies: the tensors of what was trained whole, by path.
        lessons: what the routed model says of the text; none where nothing is distilled.
    """

    config: LoRAConfig
    maps: dict[str, MapResult]
    copies: dict[str, dict[str, Tensor]]
    lessons: list[Lesson]


def _fit(
    run: Run,
    model: PreTrainedModel,
    reference: Reference,
    rank: int,
    options: Calibration,
    work: Work,
    say: Callable[[str], None],
) -> _Fitted:
    """Fits a LoRA to the routed adapter of a model, whose weights change on the way."""
    copies = {
        path: {name: tensor.detach().clone() for name, tensor in adapter.copy.state_dict().items()}
        for path, module in adapters_of(model).items()
        if isinstance(adapter := module.adapter("default"), FullCopy)
    }
    corpus, saved = reference.texts.calibration, run.adapter.config(model).modules_to_save
    lessons = lessons_of(model, corpus.rows, reference.pad_token_id) if options.distill else []
    if run.quantization is not None:
        dequantise(model)
    say(f"fitted to {corpus.tokens:,} tokens of {corpus.origin}")
    batches = batches_of(corpus.rows, reference.pad_token_id)
    found = merge_sequentially(model, batches, Solver(options.ridge, options.prior, rank), work, say)
    config = LoRAConfig(target_modules=list(found), rank=rank, alpha=float(rank), modules_to_save=saved)
    return _Fitted(config, found, copies, lessons)


@torch.no_grad()
def _give(model: PreTrainedModel, fitted: _Fitted) -> None:
    """Attaches a LoRA with the factors that were found to a backbone, and what was trained whole."""
    attach(model, fitted.config)
    for path, module in adapters_of(model).items():
        adapter = module.adapter("default")
        if isinstance(adapter, FullCopy):
            adapter.copy.load_state_dict(fitted.copies[path])
            continue
        lora, factors = cast("LowRank", adapter), fitted.maps[path].factors
        if factors is None or factors[0].shape != lora.lora_B.shape:
            widths = " and ".join(map(str, (lora.lora_B.shape[0], lora.lora_A.shape[1])))
            raise UsageError(f"--rank: {path} has widths {widths}, so no rank {lora.lora_A.shape[0]}", "lower it")
        lora.lora_B.copy_(factors[0])
        lora.lora_A.copy_(factors[1])


def _reopen(run: Run, folder: Path, device: torch.device) -> PreTrainedModel:
    """Loads what was written beside the backbone as it was trained."""
    backbone = load_backbone(run.model, run.quantization, device)
    load_adapter(backbone.model, folder)
    return backbone.model
