"""One adapted linear map, and one adapted Llama block: every method against PEFT's LoRA of as many trainable numbers.

    python benchmarks/layer.py                                             # the shapes of a small and a large model
    python benchmarks/layer.py --shapes 2048x2048 --tokens 512 4096 --methods mola trex smore
    python benchmarks/layer.py --shapes --blocks 576 2048                  # only blocks, whose siblings share work

Forward and backward pass; the gradients are those of the input and of the adapter. A routed method's passes contain its
routing statistics and auxiliary losses. `x frozen`: time through that of the frozen map or block alone; `x PEFT`:
through that of PEFT's LoRA of nearest rank (`PEFT r`, which trains `PEFT trains` numbers); saved: bytes kept for the
backward pass besides weights and input; peak: most bytes alive, outputs and gradients included. A row `(released)` is
the same function of the same parameters computed as the paper's released code does, checked to agree, and `x ours` what
that takes. MixLoRA adapts whole feed-forward networks, so it is among the blocks.

In bfloat16 PEFT and the released forms run under autocast, as its users train it; ours need none.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from common import DTYPES, MIB, Row, arguments, autocast, interleaved, peak_bytes, ratios, report, saved_bytes
from released import RELEASED
from subjects import (
    adapted_linear,
    context_for,
    count,
    equal_rank,
    frozen_linear,
    frozen_parts,
    linear_sites,
    method_config,
    peft_linear,
    rival,
    sharing,
    with_method,
    with_peft,
)  # fmt: skip
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from smore_cli.methods import MethodConfig, available_methods, load_method

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

ROWS = 4
"""Sequences that the tokens are cut into."""
BLOCKS = {64: (128, 4, 2), 576: (1536, 9, 3), 2048: (8192, 32, 8), 4096: (14336, 32, 8)}
"""Width of a block: that of its feed-forward network, attention heads, key-value heads."""
GROUPS = {"q,k,v": ["q_proj", "k_proj", "v_proj"], "gate,up": ["gate_proj", "up_proj"], "all seven": "all-linear"}


@dataclass
class Variant:
    """One way to compute the map.

    Attributes:
        module: takes x, (rows, tokens, d).
        config: of our method; None: it is not ours.
        peft: name of the PEFT variant with as many trainable numbers.
        of: name of our variant that computes the same function.
        call: how the module is called, where that is more than module(x).
    """

    module: nn.Module
    config: MethodConfig | None = None
    peft: str | None = None
    of: str | None = None
    call: Callable[[nn.Module, Tensor], Tensor] = field(default=lambda module, x: module(x))

    def forward(self, x: Tensor, args: argparse.Namespace) -> list[Tensor]:
        """Returns what is differentiated: the output, and the auxiliary loss if there is one."""
        ours = self.config is not None
        with context_for(self.config, *x.shape[:2], args.device) as context:
            with nullcontext() if ours else autocast(args.device, args.dtype):
                out = self.call(self.module, x)
            aux = context.aux_loss()
        return [out, aux] if aux.requires_grad else [out]

    def step(self, x: Tensor, grad: Tensor, args: argparse.Namespace) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the input and of everything that trains."""
        out = self.forward(x, args)
        wanted = [x, *(p for p in self.module.parameters() if p.requires_grad)]
        return torch.autograd.grad(out, wanted, [grad, None][: len(out)], allow_unused=True)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    rows: list[Row] = []
    for shape in args.shapes:
        for tokens in args.tokens:
            rows += measure(linear_variants(shape, args), shape[0], tokens, f"{shape[0]}x{shape[1]}", args)
    for d in args.blocks:
        for group, names in GROUPS.items():
            for tokens in args.tokens:
                rows += measure(block_variants(d, names, tokens, args), d, tokens, f"{d}: {group}", args)
    number = f"nf4, {args.dtype}" if args.quantization else args.dtype
    report(f"Layer, {number}: forward and backward, medians of {args.repeats} turns", rows, args)


def linear_variants(shape: tuple[int, int], args: argparse.Namespace) -> dict[str, Variant]:
    """Returns the frozen map, our methods on it, PEFT's LoRA of their ranks, the released forms."""
    torch.manual_seed(0)
    dtype = DTYPES[args.dtype]
    base = frozen_linear(*shape, dtype=dtype, device=args.device, nf4=args.quantization is not None)
    found, ranks = {"frozen": Variant(base)}, list[int]()
    for method in args.methods:
        if "gated_mlp" in load_method(method).sites:
            continue
        config = method_config(method)
        module = adapted_linear(base, config, shape)
        rank = rival(equal_rank(count(module), [shape]), ranks)
        if rank not in ranks:
            ranks.append(rank)
            found[f"PEFT LoRA r{rank}"] = Variant(peft_linear(base, rank))
        found[method] = Variant(module, config, f"PEFT LoRA r{rank}")
        if method in RELEASED:
            found[f"{method} (released)"] = Variant(RELEASED[method](module), of=method)
    return found


def block_variants(d: int, names: list[str] | str, tokens: int, args: argparse.Namespace) -> dict[str, Variant]:
    """Returns the same of a whole Llama block, of which the named maps are adapted."""
    torch.manual_seed(0)
    hidden, heads, kv_heads = BLOCKS[d]
    config = LlamaConfig(
        hidden_size=d, intermediate_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads,
        num_hidden_layers=1, vocab_size=32, head_dim=d // heads, dtype=args.dtype,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(args.device, DTYPES[args.dtype]).requires_grad_(False)
    positions = torch.arange(tokens // ROWS, device=args.device)[None]
    rotation = model.model.rotary_emb(torch.zeros(1, device=args.device, dtype=DTYPES[args.dtype]), positions)

    def call(model: Any, x: Tensor) -> Tensor:
        return model.model.layers[0](x, position_embeddings=rotation, position_ids=positions)

    found, ranks, sites = {"frozen": Variant(sharing(model), call=call)}, list[int](), linear_sites(model, names)
    for method in args.methods:
        if "gated_mlp" in load_method(method).sites and names != "all-linear":
            continue
        settings = method_config(method, names)
        adapted = with_method(model, settings)
        rank = rival(equal_rank(count(adapted), sites), ranks)
        if rank not in ranks:
            ranks.append(rank)
            found[f"PEFT LoRA r{rank}"] = Variant(with_peft(model, rank, names), call=call)
        found[method] = Variant(adapted, settings, f"PEFT LoRA r{rank}", call=call)
    return found


def measure(variants: dict[str, Variant], d: int, tokens: int, where: str, args: argparse.Namespace) -> list[Row]:
    """Returns one row a variant."""
    x = torch.randn(ROWS, tokens // ROWS, d, device=args.device, dtype=DTYPES[args.dtype], requires_grad=True)
    with torch.no_grad():
        grad = torch.randn_like(variants["frozen"].forward(x, args)[0])
    runs = {name: lambda v=v: v.step(x, grad, args) for name, v in variants.items()}
    for name, variant in variants.items():
        if variant.of is not None and args.dtype == "float32":
            require_equal(name, runs[name](), variants[variant.of], x, grad, args)
    saved, peaks = {}, {}
    for name, variant in variants.items():
        given = [x, *frozen_parts(variant.module)]
        saved[name] = saved_bytes(lambda v=variant: v.forward(x, args), given) / MIB
        peaks[name] = peak_bytes(runs[name], args.device) / MIB
    seconds = interleaved(runs, args.repeats, args.device)
    base = ratios(seconds, "frozen")
    rows = []
    for name, variant in variants.items():
        row: Row = {"where": where, "tokens": tokens, "variant": name, "trains": count(variant.module)}
        row |= {"x frozen": base[name], "saved MiB": saved[name], "peak MiB": peaks[name]}
        if (peft := variant.peft) is not None:
            row |= {"x PEFT": ratios(seconds, peft)[name], "peak x PEFT": peaks[name] / peaks[peft]}
            row |= {"PEFT r": int(peft.rpartition("r")[2]), "PEFT trains": count(variants[peft].module)}
        if (ours := variant.of) is not None:
            row |= {"x ours": ratios(seconds, ours)[name], "saved x ours": saved[name] / max(saved[ours], 1e-9)}
        rows.append(row)
    return rows


def require_equal(
    name: str, gradients: tuple[Tensor | None, ...], ours: Variant, x: Tensor, grad: Tensor, args: argparse.Namespace
) -> None:
    """Ends the benchmark where a released form is not the function that it stands for.

    Its router's gradient may differ: our passes have the auxiliary losses too.
    """
    out = ours.forward(x, args)[0]
    wanted = [x, *(p for p in ours.module.parameters() if p.requires_grad)]
    own = torch.autograd.grad(out, wanted, grad, allow_unused=True)
    for number, (a, b) in enumerate(zip(gradients, own, strict=True)):
        if a is None or b is None:
            continue
        if (off := float((a - b).norm() / b.norm().clamp_min(1e-12))) > 1e-3:
            raise SystemExit(f"{name} is another function: gradient {number} differs by {off:.1e}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, repeats=7)
    shapes = ["576x576", "576x1536", "2048x2048", "4096x4096"]
    parser.add_argument("--shapes", nargs="*", default=shapes, help="linear maps, d_in x d_out; none: only blocks")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024], help="tokens of a pass, a multiple of 4")
    parser.add_argument("--methods", nargs="+", default=available_methods(), choices=available_methods())
    parser.add_argument("--blocks", nargs="*", type=int, default=[576], choices=BLOCKS, help="widths of Llama blocks")
    parser.add_argument("--quantization", choices=["nf4"], help="4-bit weights of the linear maps (not of the blocks)")
    args = parser.parse_args(argv)
    args.shapes = [tuple(int(width) for width in shape.split("x")) for shape in args.shapes]
    return args


if __name__ == "__main__":
    main()
