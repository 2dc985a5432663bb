"""Attention of packed lines: document by document against the dense mask with which transformers keeps them apart.

    python benchmarks/attention.py
    python benchmarks/attention.py --documents 16x170 8x45+4x170 --heads 9 3 64 --lines 2

A mix `16x170` is a line of 16 documents of 170 tokens each; `8x45+4x170` has documents of two lengths. Both ways get
the same weights and inputs and are checked to agree. Forward and backward pass of

    function   the attention function: scores, softmax and sum, with the gradients of queries, keys and values
    layer      transformers' LlamaAttention: frozen projections and rotation around it, with the gradient of its input

The default heads are those of SmolLM2-135M (9 heads, 3 of keys and values, 64 numbers each). The mask is made once and
outside of the time, as a model makes it once for all layers. `x mask`: time by document through that by mask in the
same turn; `times as fast` the inverse; MiB: most bytes alive that a pass makes, outputs and gradients included, the
mask itself not. On a CPU only: elsewhere smore leaves the mask, too.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from common import DTYPES, MIB, Row, arguments, interleaved, peak_bytes, ratios, report
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask

from smore_cli.models.document_attention import attend_by_document, document_attention, document_starts

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

WAYS = {"mask": sdpa_attention_forward, "document": document_attention}


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = [row for mix in args.documents for row in measure(mix, args)]
    report(f"Attention of packed lines, by document through mask: medians of {args.repeats} turns", rows, args)


def measure(mix: str, args: argparse.Namespace) -> list[Row]:
    """Returns the rows of one mix of documents: the function's, and the layer's."""
    torch.manual_seed(0)
    heads, kv_heads, size = args.heads
    dtype, lengths = DTYPES[args.dtype], documents(mix)
    config = LlamaConfig(
        hidden_size=heads * size, intermediate_size=8, num_attention_heads=heads, num_key_value_heads=kv_heads,
        num_hidden_layers=1, vocab_size=32, head_dim=size, dtype=args.dtype, attn_implementation="sdpa",
        max_position_embeddings=max(lengths),
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).to(dtype).requires_grad_(False).train()
    layer = model.model.layers[0].self_attn
    places = torch.cat([torch.arange(length) for length in lengths])[None].expand(args.lines, -1)
    x = torch.randn(args.lines, sum(lengths), heads * size, dtype=dtype, requires_grad=True)
    masks = {
        "mask": create_causal_mask(
            config=model.config, inputs_embeds=x, attention_mask=None, past_key_values=None, position_ids=places
        )
    }
    if not attend_by_document(model) or (starts := document_starts(model.config, places)) is None:
        raise SystemExit("this model would keep the mask")
    masks["document"] = starts
    rotation = model.model.rotary_emb(x, places)

    def of_layer(way: str) -> list[Tensor]:
        model.set_attn_implementation({"mask": "sdpa", "document": "smore_documents"}[way])
        out = layer(x, position_embeddings=rotation, attention_mask=masks[way], position_ids=places)[0]
        return [out, *torch.autograd.grad(out, x, slope)]

    kinds = [torch.randn(args.lines, n, sum(lengths), size, dtype=dtype) for n in (heads, kv_heads, kv_heads)]
    kinds = [each.requires_grad_() for each in kinds]
    slope = torch.randn_like(x)

    def of_function(way: str) -> list[Tensor]:
        out = WAYS[way](layer, *kinds, masks[way], scaling=layer.scaling)[0]
        return [out, *torch.autograd.grad(out, kinds, slope.view(out.shape))]

    size_of = {"documents": mix, "lines": args.lines, "tokens": args.lines * sum(lengths)}
    return [size_of | compared(what, run, args) for what, run in (("function", of_function), ("layer", of_layer))]


def compared(what: str, run: Callable[[str], list[Tensor]], args: argparse.Namespace) -> Row:
    """Returns a row that compares both ways, after a check that they are the same function."""
    for a, b in zip(run("document"), run("mask"), strict=True):
        a, b = a.detach().float(), b.detach().float()
        if (off := float((a - b).norm() / b.norm())) > (1e-3 if args.dtype == "float32" else 3e-2):
            raise SystemExit(f"{what}: the two ways differ by {off:.1e}")
    runs = {way: lambda way=way: run(way) for way in WAYS}
    seconds = interleaved(runs, args.repeats, args.device)
    peaks = {way: peak_bytes(each, args.device) / MIB for way, each in runs.items()}
    return {
        "what": what, "mask ms": median(seconds["mask"]) * 1e3, "document ms": median(seconds["document"]) * 1e3,
        "x mask": ratios(seconds, "mask")["document"], "times as fast": ratios(seconds, "document")["mask"],
        "mask MiB": peaks["mask"], "document MiB": peaks["document"],
    }  # fmt: skip


def documents(mix: str) -> list[int]:
    """Returns the lengths of a line's documents, of 2x3+1x5: 3, 3, 5."""
    found: list[int] = []
    for part in mix.split("+"):
        number, length = (int(each) for each in part.split("x"))
        found += [length] * number
    return found


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, repeats=7)
    parser.add_argument("--documents", nargs="+", default=["16x170", "16x45"], help="lines, number x tokens [+ ...]")
    parser.add_argument("--lines", type=int, default=1, help="such lines of a pass")
    parser.add_argument("--heads", nargs=3, type=int, default=[9, 3, 64], metavar=("HEADS", "KV_HEADS", "SIZE"))
    parser.add_argument("--threads", type=int, help="default: as the environment says")
    args = parser.parse_args(argv)
    if torch.device(args.device).type != "cpu":
        parser.error("documents attend one by one on a CPU only: --device cpu")
    return args


if __name__ == "__main__":
    main()
