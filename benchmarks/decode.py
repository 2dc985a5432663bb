"""How long a token takes while text is generated, one sequence at a time: ours against PEFT's LoRA of equal size.

    python benchmarks/decode.py
    python benchmarks/decode.py --methods mola smore --new-tokens 64

First one linear map, called with one token; then a model that generates greedily, with its cache. Nothing is kept for a
backward pass. `x frozen` and `x PEFT` are ratios of times in one turn.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from common import DTYPES, Row, arguments, interleaved, launches, ratios, report
from subjects import (
    adapted_linear,
    context_for,
    count,
    equal_rank,
    frozen_linear,
    linear_sites,
    load_model,
    method_config,
    peft_linear,
    rival,
    with_method,
    with_peft,
)  # fmt: skip

from smore_cli.methods import available_methods, load_method

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from torch import nn

CALLS = 50
"""Calls of a linear map in one turn: one alone is too short for a clock."""
ROUTED = [name for name in available_methods() if load_method(name).routed]


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    torch.manual_seed(0)
    rows = [row for shape in args.shapes for row in linear_rows(shape, args)]
    rows += generation_rows(args) if args.new_tokens else []
    report(f"Decoding, batch 1, {args.dtype}: medians of {args.repeats} turns", rows, args)


def linear_rows(shape: tuple[int, int], args: argparse.Namespace) -> list[Row]:
    """Returns the rows of one linear map."""
    base = frozen_linear(*shape, dtype=DTYPES[args.dtype], device=args.device, nf4=False)
    x = torch.randn(1, 1, shape[0], device=args.device, dtype=DTYPES[args.dtype])
    modules: dict[str, nn.Module] = {"frozen": base}
    runs: dict[str, Callable[[], object]] = {"frozen": lambda: repeated(base, x)}
    pefts, ranks = {}, list[int]()
    for method in args.methods:
        if "gated_mlp" in load_method(method).sites:
            continue
        config = method_config(method)
        module = adapted_linear(base, config, shape).eval()
        context = replace(context_for(config, 1, 1, args.device), aux=False)
        rank = rival(equal_rank(count(module), [shape]), ranks)
        pefts[method] = name = f"PEFT LoRA r{rank}"
        if rank not in ranks:
            ranks.append(rank)
            modules[name] = peft_linear(base, rank).eval()
            runs[name] = lambda m=modules[name]: repeated(m, x)
        modules[method] = module
        runs[method] = lambda m=module, c=context: repeated(m, x, c)
    where = f"{shape[0]}x{shape[1]}"
    return table(where, modules, runs, pefts, CALLS, args)


def repeated(module: nn.Module, x: torch.Tensor, context: Any = None) -> None:
    """Calls a map with one token, again and again."""
    with torch.inference_mode():
        if context is None:
            for _ in range(CALLS):
                module(x)
            return
        with context:
            for _ in range(CALLS):
                module(x)


def generation_rows(args: argparse.Namespace) -> list[Row]:
    """Returns the rows of a model that generates."""
    backbone = load_model(args.model, device=args.device, dtype=args.dtype, nf4=False)
    prompt = torch.randint(3, backbone.config.vocab_size, (1, 16), device=args.device)
    sites, ranks, pefts = linear_sites(backbone), list[int](), {}
    modules: dict[str, nn.Module] = {"frozen": backbone}
    for method in args.methods:
        model = with_method(backbone, method_config(method)).eval()
        rank = rival(equal_rank(count(model), sites), ranks)
        pefts[method] = name = f"PEFT LoRA r{rank}"
        if rank not in ranks:
            ranks.append(rank)
            modules[name] = with_peft(backbone, rank).eval()
        modules[method] = model

    def generate(model: Any) -> None:
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
            min_new_tokens=args.new_tokens, max_new_tokens=args.new_tokens,
        )  # fmt: skip

    runs = {name: lambda m=model: generate(m) for name, model in modules.items()}
    return table(args.model, modules, runs, pefts, args.new_tokens, args)


def table(
    where: str,
    modules: dict[str, nn.Module],
    runs: dict[str, Callable[[], object]],
    pefts: dict[str, str],
    calls: int,
    args: argparse.Namespace,
) -> list[Row]:
    """Returns one row a variant; `pefts` names the rival of each of ours."""
    seconds = interleaved(runs, args.repeats, args.device)
    base = ratios(seconds, "frozen")
    rows = []
    for name in runs:
        row: Row = {"where": where, "variant": name, "trains": count(modules[name])}
        row |= {"us a token": median(seconds[name]) / calls * 1e6, "x frozen": base[name]}
        row["operations"] = launches(runs[name], args.device) // calls
        if name in pefts:
            row |= {"x PEFT": ratios(seconds, pefts[name])[name], "rival": pefts[name]}
        rows.append(row)
    return rows


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, repeats=7)
    parser.add_argument("--model", default="smollm2-135m", help="as in a recipe's model.name_or_path")
    parser.add_argument("--methods", nargs="+", default=ROUTED, choices=available_methods())
    parser.add_argument("--shapes", nargs="*", default=["576x576", "2048x2048"], help="linear maps, d_in x d_out")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate; 0: only the linear maps")
    args = parser.parse_args(argv)
    args.shapes = [tuple(int(width) for width in shape.split("x")) for shape in args.shapes]
    return args


if __name__ == "__main__":
    main()
