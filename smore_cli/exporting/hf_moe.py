"""`--to hf-moe`: a MixLoRA model as a checkpoint of a stock mixture of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smore_cli.exporting.compare import greedy
from smore_cli.exporting.formats import OPEN_MODEL, Options, Written
from smore_cli.exporting.merged import load_plain
from smore_cli.exporting.source import load_dense
from smore_cli.exporting.stock_moe import require_stock_moe, stock_moe_bytes, write_stock_moe
from smore_cli.exporting.stock_twins import twin_of
from smore_cli.merging.writing import require_room
from smore_cli.models.load import load_skeleton
from smore_cli.models.tokenizer_files import save_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from smore_cli.models.runs import Run

__all__ = ["write_hf_moe"]

TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
"""Mean difference in nats, by type: router and experts are rounded to the type of the weights."""


def write_hf_moe(run: Run, folder: Path, options: Options) -> Written:
    """Writes the checkpoint.

    Raises:
        UsageError: the method, its router or the backbone has no stock twin.
    """
    skeleton = load_skeleton(run.model)
    config = require_stock_moe(run.adapter.config(skeleton))
    twin = twin_of(skeleton.config)
    model, tokenizer = load_dense(run, options.device)
    require_room(folder, stock_moe_bytes(model, config.num_experts))
    dtype = str(model.dtype).removeprefix("torch.")
    write_stock_moe(model, config, folder)
    save_tokenizer(tokenizer, folder)
    return Written(
        what=f"{twin.model_type}: {config.num_experts} experts a layer, {config.top_k} a token, {dtype}, exact but for "
        "rounding",
        use=OPEN_MODEL,
        consumer="transformers",
        ours=lambda: greedy(load_dense(run, options.device)[0]),
        theirs=lambda _: greedy(load_plain(folder, options)),
        tolerance=TOLERANCE[dtype],
        facts={"architecture": twin.model_type, "dtype": dtype, "num_experts": config.num_experts},
    )
