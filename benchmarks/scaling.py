"""What an adapted linear map costs as one number of the method grows; everything else stays as it is.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --shape 1024x1024 --sweeps "mola: experts" "smore: levels"

`x smallest` is the time of forward and backward pass through that of the sweep's first value (a token's share of it, in
the sweeps over tokens), in one turn; `operations` how many of them there are. A sweep is `flat` where the equation says
that the cost does not depend on the number: there the time may rise by a quarter (small products are slower for their
size) and the operations not at all, or the row says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from common import DTYPES, MIB, Row, arguments, interleaved, launches, ratios, report, saved_bytes
from layer import ROWS, Variant
from subjects import adapted_linear, frozen_linear, frozen_parts, method_config

if TYPE_CHECKING:
    import argparse

TOLERANCE = 1.25


@dataclass(frozen=True)
class Sweep:
    """One number that grows.

    Attributes:
        method: whose settings these are.
        settings: value of the number, as the table shows it, and the settings that give it.
        flat: whether the cost should not depend on it.
        tokens: tokens of a pass by value, where that is what grows.
    """

    method: str
    settings: dict[str, dict[str, Any]]
    flat: bool = False
    tokens: dict[str, int] = field(default_factory=dict)


def _lengths(method: str) -> Sweep:
    tokens = {str(n): n for n in (256, 512, 1024, 2048, 4096)}
    return Sweep(method, {each: {} for each in tokens}, flat=True, tokens=tokens)


SWEEPS = {
    # Twice as many experts of half the rank: the stacked products keep their size, the router gets a row an expert.
    "mola: experts": Sweep("mola", {str(s): {"num_experts": s, "rank": 32 // s} for s in (4, 8, 16, 32)}, flat=True),
    "mola: picks": Sweep("mola", {str(k): {"top_k": k} for k in (2, 4, 8)}, flat=True),
    "mola: total rank": Sweep("mola", {str(8 * r): {"rank": r} for r in (2, 4, 8, 16, 32, 64)}),
    "mola: tokens": _lengths("mola"),
    "trex: experts": Sweep("trex", {f"{2 * a}x{4 * a}": {"num_down": 2 * a, "num_up": 4 * a} for a in (1, 2, 3)}),
    # A tree's states are as wide as before, but each of twice as many experts has one.
    "smore: experts": Sweep(
        "smore", {f"{s}-{s}": {"num_experts": [s, s], "rank": [32 // s, 32 // s]} for s in (2, 4, 8)}
    ),
    "smore: fanout": Sweep("smore", {f"{f}-{f}": {"fanout": [f, f]} for f in (1, 2, 3, 4)}),
    "smore: rank": Sweep("smore", {str(r): {"rank": [r, r]} for r in (2, 4, 8, 16)}),
    "smore: levels": Sweep(
        "smore",
        {str(n): {"num_experts": [4] * n, "rank": [24 // n // 2] * n, "fanout": [2] * n} for n in (1, 2, 3)},
    ),
    "smore: tokens": _lengths("smore"),
}


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    rows = [row for name in args.sweeps for row in measure(name, SWEEPS[name], args)]
    shape = "x".join(str(width) for width in args.shape)
    report(f"Scaling, {shape}, {args.tokens} tokens, {args.dtype}: medians of {args.repeats} turns", rows, args)
    args.failed = [row for row in rows if row.get("flat") == "NO"]


def measure(name: str, sweep: Sweep, args: argparse.Namespace) -> list[Row]:
    """Returns one row a value."""
    torch.manual_seed(0)
    dtype = DTYPES[args.dtype]
    base = frozen_linear(*args.shape, dtype=dtype, device=args.device, nf4=False)
    runs, saved = {}, {}
    tokens = {value: min(sweep.tokens.get(value, args.tokens), args.longest) for value in sweep.settings}
    for value, settings in sweep.settings.items():
        config = method_config(sweep.method, **settings)
        variant = Variant(adapted_linear(base, config, args.shape), config)
        x = torch.randn(ROWS, tokens[value] // ROWS, args.shape[0], device=args.device, dtype=dtype, requires_grad=True)
        grad = torch.randn(*x.shape[:2], args.shape[1], device=args.device, dtype=dtype)
        runs[value] = lambda v=variant, x=x, g=grad: v.step(x, g, args)
        given = [x, *frozen_parts(variant.module)]
        saved[value] = saved_bytes(lambda v=variant, x=x: v.forward(x, args), given) / MIB
    first = next(iter(runs))
    times = ratios(interleaved(runs, args.repeats, args.device), first)
    operations = {value: launches(run, args.device) for value, run in runs.items()}
    rows = []
    for value in runs:
        ratio = times[value] * tokens[first] / tokens[value]
        row: Row = {"sweep": name, "value": value, "x smallest": ratio, "saved MiB": saved[value]}
        row["operations"] = operations[value]
        if sweep.flat:
            row["flat"] = "yes" if ratio <= TOLERANCE and operations[value] <= operations[first] else "NO"
        rows.append(row)
    return rows


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, repeats=7)
    parser.add_argument("--shape", default="2048x2048", help="d_in x d_out")
    parser.add_argument("--tokens", type=int, default=512, help="of a pass, where they are not what grows")
    parser.add_argument("--longest", type=int, default=4096, help="most tokens of a pass")
    parser.add_argument("--sweeps", nargs="+", default=list(SWEEPS), choices=list(SWEEPS))
    args = parser.parse_args(argv)
    args.shape = tuple(int(width) for width in args.shape.split("x"))
    return args


if __name__ == "__main__":
    main()
