"""AdamW over an adapter's many small tensors: on one thread, as smore steps, against all threads, as PyTorch would.

    python benchmarks/optimiser.py
    python benchmarks/optimiser.py --methods smore --threads 2 --model smollm2-135m

The tensors are those that train in the model with the method's adapters on all linear maps, the optimiser is that of a
recipe without changes (fused AdamW), the gradients are random. LoRA has the rank at which it trains as many numbers as
the first method named; alone, that of the other benchmarks. Two rows a method: `AdamW` is the optimiser's step,
`clip, AdamW` has the clipping of the gradients before it. `x threads`: time on one thread through that on `--threads`
in the same turn; `times as fast` the inverse. OMP_WAIT_POLICY is passive, as the command line sets it, unless the
environment says otherwise. With fewer cores than `--threads` nothing is measured.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported

from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from common import Row, arguments, interleaved, ratios, report, trainable
from subjects import count, equal_rank, linear_sites, load_model, method_config, with_method

from smore_cli.methods import MethodConfig, available_methods
from smore_cli.nn.threads import one_thread
from smore_cli.recipe.schema import TrainConfig
from smore_cli.training.optim import build_optimizer
from smore_cli.training.shard import clip

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.threads > (cores := len(os.sched_getaffinity(0))):
        print(f"{args.threads} threads need as many cores, and there are {cores}: nothing is measured")
        return
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    backbone = load_model(args.model, device=args.device, dtype=args.dtype, nf4=False)
    rows: list[Row] = []
    for method in args.methods:
        config = method_config(method)
        if method == "lora" and rows:
            config = method_config(method, rank=equal_rank(rows[0]["numbers"], linear_sites(backbone)))
        rows += measure(backbone, config, args)
    report(f"Optimiser, {args.model}, one thread through {args.threads}: medians of {args.repeats} turns", rows, args)


def measure(backbone: Any, config: MethodConfig, args: argparse.Namespace) -> list[Row]:
    """Returns the rows of one method."""
    model = with_method(backbone, config)
    parameters = list(trainable(model))
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = build_optimizer(model, TrainConfig())

    def clipped() -> None:
        clip(parameters, 1.0)
        optimizer.step()

    def alone(run: Callable[[], object]) -> None:
        with one_thread(*parameters):  # as `take_step`
            run()

    rows, rival = [], f"{args.threads} threads"
    for what, run in (("AdamW", optimizer.step), ("clip, AdamW", clipped)):
        both = {"threads": run, "one": lambda run=run: alone(run)}
        seconds = interleaved(both, args.repeats, args.device)
        rows.append({
            "method": config.method, "tensors": len(parameters), "numbers": count(model), "what": what,
            f"{rival} ms": median(seconds["threads"]) * 1e3, "one thread ms": median(seconds["one"]) * 1e3,
            "x threads": ratios(seconds, "threads")["one"], "times as fast": ratios(seconds, "one")["threads"],
        })  # fmt: skip
    return rows


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, repeats=9)
    parser.add_argument("--model", default="smollm2-135m", help="as in a recipe's model.name_or_path")
    parser.add_argument("--methods", nargs="+", default=["smore", "lora"], choices=available_methods())
    parser.add_argument("--threads", type=int, default=2, help="of the rival")
    args = parser.parse_args(argv)
    if torch.device(args.device).type != "cpu":
        parser.error("threads are a CPU's: --device cpu")
    return args


if __name__ == "__main__":
    main()
