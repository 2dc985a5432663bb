"""A whole training step: every routed method against PEFT's LoRA of as many trainable numbers, in the same loop.

    python benchmarks/step.py                                    # SmolLM2-135M, 4 x 256 tokens, all linear maps
    python benchmarks/step.py --methods mola trex smore --supervised 0.25
    python benchmarks/step.py --quantization nf4 --checkpointing

Every variant runs the step of `smore train` on one and the same batch: forward pass, loss, auxiliary losses, backward
pass, clipping, fused AdamW. `x frozen` is through the step that trains nothing (forward pass, and the gradient down to
the embeddings), `x PEFT` through that of PEFT's LoRA of nearest rank. `adapter MiB` is how far the variant's peak of
live bytes lies above that of the frozen step: what the adapters cost in activations, temporaries and gradients; the
optimiser's state, which is there before the step, is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from common import MIB, Row, arguments, autocast, interleaved, launches, peak_bytes, ratios, report, trainable
from subjects import (
    count,
    equal_rank,
    linear_sites,
    load_model,
    method_config,
    random_rows,
    rival,
    sharing,
    with_method,
    with_peft,
)  # fmt: skip

from smore_cli.data.batch import collate
from smore_cli.methods import available_methods, load_method
from smore_cli.training.objective import Objective
from smore_cli.training.optim import take_step
from smore_cli.training.setup import enable_checkpointing
from smore_cli.training.step import accumulate_gradients

if TYPE_CHECKING:
    import argparse

    from torch import nn

    from smore_cli.data.batch import Batch

ROUTED = [name for name in available_methods() if load_method(name).routed]


@dataclass
class Step:
    """A model, the optimiser of what trains in it, and one batch.

    Attributes:
        model: with an adapter, or with none.
        batch: on the CPU.
        device: where the model is.
        cast: the dtype to autocast to; float32: none.
    """

    model: nn.Module
    batch: Batch
    device: str
    cast: str = "float32"

    def __post_init__(self) -> None:
        parameters = list(trainable(self.model))
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None

    def __call__(self) -> None:
        """Runs one step."""
        with autocast(self.device, self.cast):
            accumulate_gradients(
                self.model, [self.batch], Objective(ranking=False, completion_weight=0.0),
                device=torch.device(self.device), backward=torch.Tensor.backward,
            )  # fmt: skip
        if self.optimizer is not None:
            take_step(self.optimizer, list(trainable(self.model)), 1.0)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    torch.manual_seed(0)
    backbone = load_model(args.model, device=args.device, dtype=args.dtype, nf4=args.quantization is not None)
    rows = measure(variants(backbone, args), args)
    size = f"{args.batch} x {args.tokens} tokens, {args.supervised:.0%} supervised"
    report(f"Step, {args.model}, {size}: medians of {args.repeats} turns", rows, args)


def variants(backbone: Any, args: argparse.Namespace) -> dict[str, tuple[Step, str | None]]:
    """Returns the steps by name, and for each of ours the name of PEFT's."""
    rows = random_rows(args.batch, args.tokens, backbone.config.vocab_size, supervised=args.supervised)
    batch = collate(rows, pad_token_id=0)

    def ready(model: Any, cast: str = "float32") -> Step:
        model.train()
        if args.checkpointing:
            enable_checkpointing(model)
        return Step(model, batch, args.device, cast)

    frozen = sharing(backbone)
    frozen.enable_input_require_grads()
    found: dict[str, tuple[Step, str | None]] = {"frozen": (ready(frozen), None)}
    sites, ranks = linear_sites(backbone), list[int]()
    for method in args.methods:
        model = with_method(backbone, method_config(method))
        rank = rival(equal_rank(count(model), sites), ranks)
        if rank not in ranks:
            ranks.append(rank)
            # In bfloat16 PEFT's adapters stay in float32 and run under autocast, as in the Trainer of transformers.
            found[f"PEFT LoRA r{rank}"] = ready(with_peft(backbone, rank), args.dtype), None
        found[method] = ready(model), f"PEFT LoRA r{rank}"
    return found


def measure(found: dict[str, tuple[Step, str | None]], args: argparse.Namespace) -> list[Row]:
    """Returns one row a variant."""
    seconds = interleaved({name: step for name, (step, _) in found.items()}, args.repeats, args.device)
    peaks = {name: peak_bytes(step, args.device) / MIB for name, (step, _) in found.items()}
    base = ratios(seconds, "frozen")
    rows = []
    for name, (step, peft) in found.items():
        row: Row = {"variant": name, "trains": count(step.model), "x frozen": base[name]}
        own = peaks[name] - peaks["frozen"]
        row |= {"peak MiB": peaks[name], "adapter MiB": own, "operations": launches(step, args.device)}
        if peft is not None:
            row |= {"x PEFT": ratios(seconds, peft)[name], "adapter MiB x PEFT": own / (peaks[peft] - peaks["frozen"])}
            row |= {"PEFT r": int(peft.rpartition("r")[2]), "PEFT trains": count(found[peft][0].model)}
        rows.append(row)
    return rows


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--model", default="smollm2-135m", help="as in a recipe's model.name_or_path")
    parser.add_argument("--methods", nargs="+", default=ROUTED, choices=available_methods())
    parser.add_argument("--batch", type=int, default=4, help="rows of a batch")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a row")
    parser.add_argument("--supervised", type=float, default=1.0, help="share of the tokens that are learned")
    parser.add_argument("--quantization", choices=["nf4"], help="a 4-bit backbone")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
