"""The rank-space core of an adapter alone: PyTorch's equations against the compiled kernel, forward and backward pass.

    python benchmarks/cores.py
    python benchmarks/cores.py --methods mola smore --tokens 512 4096 --threads 1

What is timed is what lies between an adapter's two wide products, `middle(latent)`, with the gradients of the latent
and of the core's own parameters. The latents are those of random inputs of a map of `--width`, on which their size does
not depend. Auxiliary losses are left out (`--aux` takes them and the routing statistics in; kernels make neither).

`x PyTorch`: time compiled through that by PyTorch in the same turn, `times as fast` the inverse; both are medians of
ratios, not ratios of medians. `operations`: what PyTorch is asked for in a pass, without and with the kernel. Both
forms are checked to agree. Where the columns of the kernel are blank there is none: for this method, on this device, or
at all (no compiler, SMORE_KERNELS=0). A tree by PyTorch makes its states again in the backward pass, as the kernel
does.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

import torch
from common import Row, arguments, interleaved, launches, ratios, report
from layer import ROWS
from subjects import adapted_linear, context_for, frozen_linear, method_config
from torch import Tensor

from smore_cli.kernels import unused
from smore_cli.methods import available_methods, load_method
from smore_cli.nn.factored import Factored
from smore_cli.nn.threads import one_thread
from smore_cli.nn.wide import plain_down

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

METHODS = [name for name in available_methods() if "gated_mlp" not in load_method(name).sites]


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = [measure(method, tokens, args) for method in args.methods for tokens in args.tokens]
    report(f"Cores, compiled through PyTorch: medians of {args.repeats} turns", rows, args)


def measure(method: str, tokens: int, args: argparse.Namespace) -> Row:
    """Returns one row: a method and a number of tokens."""
    torch.manual_seed(0)
    config, shape = method_config(method), (args.width, args.width)
    base = frozen_linear(*shape, dtype=torch.float32, device=args.device, nf4=False)
    adapter = adapted_linear(base, config, shape).adapter("default")
    if not isinstance(adapter, Factored):
        raise SystemExit(f"{method} has no core between two wide products")
    x = torch.randn(tokens, args.width, device=args.device)
    with torch.no_grad():
        latent = plain_down(x, adapter.down())
    latent.requires_grad_()
    wanted = [latent, *(p for p in adapter.parameters() if p.requires_grad)]
    context = replace(context_for(config, ROWS, tokens // ROWS, args.device), aux=args.aux)
    with context, torch.no_grad():
        slope = torch.randn_like(adapter.middle(latent))

    def compiled() -> list[Tensor | None]:
        with replace(context, records=[], loads=[]) as told:
            with one_thread(latent):  # as `Factored.added`
                out = adapter.middle(latent)
            aux = told.aux_loss()
        outs, slopes = ([out, aux], [slope, None]) if aux.requires_grad else ([out], [slope])
        return [out, *torch.autograd.grad(outs, wanted, slopes, allow_unused=True)]

    def by_pytorch() -> list[Tensor | None]:
        with unused():
            return compiled()

    operations = [launches(run, args.device) for run in (by_pytorch, compiled)]
    row: Row = {"method": method, "tokens": tokens, "latent": latent.shape[1], "operations": operations[0]}
    if operations[0] == operations[1]:  # no kernel took part
        seconds = interleaved({"PyTorch": by_pytorch}, args.repeats, args.device)
        return row | {"compiled operations": None, "PyTorch ms": median(seconds["PyTorch"]) * 1e3, "compiled ms": None}
    require_equal(method, compiled(), by_pytorch())
    seconds = interleaved({"PyTorch": by_pytorch, "compiled": compiled}, args.repeats, args.device)
    milliseconds = {f"{name} ms": median(each) * 1e3 for name, each in seconds.items()}
    return {
        **row, "compiled operations": operations[1], **milliseconds,
        "x PyTorch": ratios(seconds, "PyTorch")["compiled"], "times as fast": ratios(seconds, "compiled")["PyTorch"],
    }  # fmt: skip


def require_equal(method: str, found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """Ends the benchmark where a kernel gives anything else than PyTorch: the output first, then the gradients."""
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a is None or b is None:
            if a is not b:
                raise SystemExit(f"{method}: only one form has gradient {number}")
            continue
        if (off := float((a - b).detach().norm() / b.detach().norm().clamp_min(1e-12))) > 1e-3:
            raise SystemExit(f"{method}: tensor {number} of the kernel differs from PyTorch's by {off:.1e}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, repeats=30)
    compiled = ["mola", "loramoe", "dynmole", "hydralora", "trex", "smore"]
    parser.add_argument("--methods", nargs="+", default=compiled, choices=METHODS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024], help="tokens of a pass, a multiple of 4")
    parser.add_argument("--width", type=int, default=576, help="of the adapted map")
    parser.add_argument("--aux", action="store_true", help="with auxiliary losses and routing statistics")
    parser.add_argument("--threads", type=int, help="of PyTorch and the kernels; default: as the environment says")
    args = parser.parse_args(argv)
    if args.dtype != "float32":
        parser.error("a core is in float32 beside any backbone")
    return args


if __name__ == "__main__":
    main()
