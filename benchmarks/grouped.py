"""Where picked experts alone are faster than all of them stacked: the measurement behind `smore_cli.nn.grouped`.

    python benchmarks/grouped.py
    python benchmarks/grouped.py --shapes 4096x4096 --experts 16 --top-k 1

One adapted linear map of MoLA, forward and backward, with either form; `x stacked` is the time of the grouped form
through that of the stacked one in the same turn, `rule` which of them `grouping_pays` takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from common import DTYPES, MIB, Row, arguments, interleaved, peak_bytes, ratios, report
from layer import ROWS, Variant
from subjects import adapted_linear, frozen_linear, method_config

from smore_cli.nn.grouped import grouping_pays

if TYPE_CHECKING:
    import argparse


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    rows = [measure(shape, rank, args) for shape in args.shapes for rank in args.ranks]
    report(f"Grouped through stacked, {args.experts} experts, {args.top_k} a token", rows, args)


def measure(shape: tuple[int, int], rank: int, args: argparse.Namespace) -> Row:
    """Returns one row: a shape and a rank."""
    torch.manual_seed(0)
    dtype = DTYPES[args.dtype]
    base = frozen_linear(*shape, dtype=dtype, device=args.device, nf4=False)
    config = method_config("mola", num_experts=args.experts, rank=rank, top_k=args.top_k)
    x = torch.randn(ROWS, args.tokens // ROWS, shape[0], dtype=dtype, device=args.device, requires_grad=True)
    grad = torch.randn(*x.shape[:2], shape[1], dtype=dtype, device=args.device)
    runs = {}
    for name in ("stacked", "grouped"):
        module = adapted_linear(base, config, shape)
        module.adapter("default").sparse = name == "grouped"  # type: ignore[assignment]
        variant = Variant(module, config)
        runs[name] = lambda v=variant: v.step(x, grad, args)
    seconds = interleaved(runs, args.repeats, args.device)
    peaks = {name: peak_bytes(run, args.device) / MIB for name, run in runs.items()}
    return {
        "shape": f"{shape[0]}x{shape[1]}", "tokens": args.tokens, "total rank": args.experts * rank,
        "x stacked": ratios(seconds, "stacked")["grouped"], "stacked MiB": peaks["stacked"],
        "grouped MiB": peaks["grouped"], "rows saved a pick": rank * (args.experts - args.top_k) / args.top_k,
        "rule": "grouped" if grouping_pays(args.experts, rank, args.top_k) else "stacked",
    }  # fmt: skip


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, repeats=7)
    parser.add_argument("--shapes", nargs="+", default=["576x576", "576x1536", "2048x2048"], help="d_in x d_out")
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 32, 64], help="of each expert")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024, help="of a pass, a multiple of 4")
    args = parser.parse_args(argv)
    args.shapes = [tuple(int(width) for width in shape.split("x")) for shape in args.shapes]
    return args


if __name__ == "__main__":
    main()
