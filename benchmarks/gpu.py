"""A training step at the shape of Llama-3-8B on a GPU: ours against PEFT's LoRA, and against what the chip can do.

    python benchmarks/gpu.py                              # bfloat16; all 32 layers where they fit
    python benchmarks/gpu.py --quantization nf4
    python benchmarks/gpu.py --device cpu --tiny          # no figures: shows that every line of this file runs

Random weights, 8 x 1024 random tokens, all linear maps adapted, activations recomputed, fused AdamW, everything in the
same loop. PEFT's adapters are in float32 under autocast, as the Trainer of transformers has them.

    x frozen       time of the step through that of the step that trains nothing
    at 32 layers   the same, worked out for 32 layers from the time of a model without any (embedding, head and loss)
    x PEFT's       what the adapters add to the frozen step, through what PEFT's LoRA adds to it
    of ceiling     operations of the *frozen* step a second (floating point, recomputation included) through those of a
                   large matrix product in the same run: what the step makes of the chip
    launches       kernels that the adapters add to the frozen step, for each adapted map
    syncs          how often a step makes the host wait for the device
"""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from common import (
    DTYPES,
    Row,
    arguments,
    host_syncs,
    interleaved,
    launches,
    peak_bytes,
    ratios,
    report,
    synchronise,
)  # fmt: skip
from step import Step
from subjects import (
    count,
    equal_rank,
    linear_sites,
    method_config,
    quantise_,
    random_rows,
    rival,
    sharing,
    with_method,
    with_peft,
)  # fmt: skip
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from smore_cli.data.batch import collate
from smore_cli.methods import available_methods
from smore_cli.training.setup import enable_checkpointing

if TYPE_CHECKING:
    import argparse

DEPTH = 32
GIB = 2**30
SETTINGS: dict[str, dict[str, Any]] = {"lora": {"rank": 64}, "mola": {"rank": 8}, "loramoe": {"rank": 8}}
"""A total rank of 64; other methods as in the other benchmarks."""


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if torch.device(args.device).type != "cuda" and not args.tiny:
        print("no CUDA device: skipped (--device cpu --tiny runs the same code on small shapes)")
        return
    torch.manual_seed(0)
    steps, pefts, linears = variants(args)
    rows = measure(steps, pefts, linears, args)
    ceiling = f"{rows[0]['ceiling TFLOP/s']:.1f} TFLOP/s in a large product"
    for row in rows:
        del row["ceiling TFLOP/s"]
    number = "nf4, bfloat16" if args.quantization else args.dtype
    size = f"{args.layers} layers, {args.batch} x {args.tokens} tokens, {number}"
    report(f"GPU, Llama-3-8B's shape, {size}; {ceiling}; medians of {args.repeats} turns", rows, args)


def build(args: argparse.Namespace) -> Any:
    """Returns the random frozen model, made where it will run."""
    widths = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    if args.tiny:
        widths = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        **widths, num_hidden_layers=args.layers, vocab_size=128 if args.tiny else 128_256, rope_theta=5e5,
        max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[args.dtype])
    try:
        with torch.device(args.device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.requires_grad_(False)
    return quantise_(model, DTYPES[args.dtype], args.device) if args.quantization else model


def variants(args: argparse.Namespace) -> tuple[dict[str, Step], dict[str, str], int]:
    """Returns the steps by name, the rival of each of ours, and how many linear maps are adapted."""
    backbone = build(args)
    rows = random_rows(args.batch, args.tokens, backbone.config.vocab_size, supervised=args.supervised)
    batch = collate(rows, pad_token_id=0)

    def ready(model: Any, cast: str = "float32") -> Step:
        model.train()
        enable_checkpointing(model)
        return Step(model, batch, args.device, cast)

    frozen, head = sharing(backbone), sharing(backbone)
    for bare in (frozen, head):
        bare.enable_input_require_grads()
    head.model.layers = head.model.layers[:0]
    head.config.num_hidden_layers = 0
    steps = {"frozen": ready(frozen), "no layers": ready(head)}
    sites, ranks, pefts = linear_sites(backbone), list[int](), dict[str, str]()
    for method in args.methods:
        model = with_method(backbone, method_config(method, **({} if args.tiny else SETTINGS.get(method, {}))))
        rank = rival(equal_rank(count(model), sites), ranks)
        pefts[method] = f"PEFT LoRA r{rank}"
        if rank not in ranks:
            ranks.append(rank)
            steps[pefts[method]] = ready(with_peft(backbone, rank), args.dtype)
        steps[method] = ready(model)
    return steps, pefts, len(sites)


def measure(steps: dict[str, Step], pefts: dict[str, str], linears: int, args: argparse.Namespace) -> list[Row]:
    """Returns one row a variant."""
    ceiling = matmul_ceiling(args)
    with FlopCounterMode(display=False) as counter:
        steps["frozen"]()
    flops = counter.get_total_flops()
    seconds = interleaved(steps, args.repeats, args.device)
    base = ratios(seconds, "frozen")
    deep = {name: at_depth(seconds, name, args.layers) for name in steps}
    kernels = {name: launches(step, args.device) for name, step in steps.items()}
    rows = []
    for name, step in steps.items():
        row: Row = {"variant": name, "trains": count(step.model), "ms": median(seconds[name]) * 1e3}
        row["x frozen"] = base[name]
        if name != "no layers":
            row["at 32 layers"] = deep[name]
            row["of ceiling"] = flops / median(seconds[name]) / ceiling
        row["peak GiB"] = peak_bytes(step, args.device) / GIB
        row["launches"] = (kernels[name] - kernels["frozen"]) / linears if step.optimizer else None
        row["syncs"] = host_syncs(step, args.device)
        row["ceiling TFLOP/s"] = ceiling / 1e12
        if (peft := pefts.get(name)) is not None:
            row |= {"x PEFT": ratios(seconds, peft)[name], "x PEFT's": (deep[name] - 1) / (deep[peft] - 1)}
        rows.append(row)
    return rows


def at_depth(seconds: dict[str, list[float]], name: str, layers: int) -> float:
    """Returns the ratio to the frozen step that a model of 32 layers would have: what a layer costs, 32 times."""

    def stretched(variant: str, turn: int) -> float:
        rest = seconds["no layers"][turn]
        return rest + (seconds[variant][turn] - rest) * DEPTH / layers

    turns = range(len(seconds[name]))
    return median(stretched(name, turn) / stretched("frozen", turn) for turn in turns)


def matmul_ceiling(args: argparse.Namespace) -> float:
    """Returns floating-point operations a second of a large product, the best of ten."""
    n = 128 if args.tiny else 8192
    a, b = (torch.randn(n, n, device=args.device, dtype=DTYPES[args.dtype]) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronise(args.device)
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        synchronise(args.device)
        best = min(best, (time.perf_counter() - started) / 10)
    return 2 * n**3 / best


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, repeats=5)
    parser.set_defaults(dtype="bfloat16")
    methods = ["lora", "mola", "loramoe", "trex", "smore"]
    parser.add_argument("--methods", nargs="+", default=methods, choices=available_methods())
    parser.add_argument("--layers", type=int, help="default: 32 where the GPU has 64 GiB, else 8")
    parser.add_argument("--batch", type=int, help="rows of a batch; default: 8")
    parser.add_argument("--tokens", type=int, help="tokens of a row; default: 1024")
    parser.add_argument("--supervised", type=float, default=1.0, help="share of the tokens that are learned")
    parser.add_argument("--quantization", choices=["nf4"], help="a 4-bit backbone")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that it runs")
    args = parser.parse_args(argv)
    if args.layers is None:
        cuda = torch.device(args.device).type == "cuda"
        large = cuda and torch.cuda.get_device_properties(args.device).total_memory >= 64 * GIB
        args.layers = 2 if args.tiny else DEPTH if large else 8
    args.batch = args.batch or (2 if args.tiny else 8)
    args.tokens = args.tokens or (16 if args.tiny else 1024)
    return args


if __name__ == "__main__":
    main()
