"""Attention of packed lines, a document at a time: on a CPU, what variable-length kernels are on a GPU.

    o[a:b] = softmax(scale q[a:b] k[a:b]^T + causal) v[a:b]        for each document [a, b) of a line

n documents of t tokens cost n t^2 / 2 products. The dense mask with which transformers keeps them apart costs (n t)^2:
every pair of tokens is worked out, and nearly all of it is thrown away.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["attend_by_document", "attend_by_mask", "document_starts"]

NAME = "smore_documents"
"""In `config._attn_implementation`: this where the mask is `document_starts`, for all other masks "sdpa"."""
SHORTER_VIEWS = ("sliding_window", "attention_chunk_size")
"""What in a configuration keeps a token from seeing all of its document."""


def attend_by_document(model: PreTrainedModel) -> bool:
    """Makes a model attend document by document where its lines are packed; returns whether it does.

    Only on a CPU, and only a model of "sdpa": one whose attention is fetched from transformers' register.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(NAME, document_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return bool(model.config.get_text_config()._attn_implementation == NAME)


def attend_by_mask(model: PreTrainedModel) -> None:
    """Takes back what `attend_by_document` did."""
    model.set_attn_implementation("sdpa")


def document_starts(config: PreTrainedConfig, position_ids: Tensor) -> Tensor | None:
    """Returns where documents begin, (1, 1, 1, D) int64, or None where the model is to be given a dense mask.

    Transformers hands a mask of four dimensions on to every layer as it is.

    Args:
        config: of the text model.
        position_ids: (B, S) of packed lines, 0 at the first token of every document and of every line.
    """
    if config._attn_implementation != NAME or position_ids.device.type != "cpu":
        return None
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    views = [view for name in SHORTER_VIEWS if (view := getattr(config, name, None))]
    if views and int(position_ids.max()) >= min(views):
        return None
    return starts[None, None, None]


def document_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers: returns (B, S, H, d_head), and no weights.

    Args:
        module: the layer's attention.
        query: (B, H, S, d_head).
        key: (B, H_kv, S, d_head).
        value: (B, H_kv, S, d_head).
        attention_mask: `document_starts`, or what "sdpa" takes.
        options: as "sdpa" takes them.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype != torch.long:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    B, _, S, _ = query.shape
    starts = [*attention_mask.flatten().tolist(), B * S]
    sizes = [end - start for start, end in pairwise(starts)]
    # Split, not sliced: of slices the gradient is a whole line for each document.
    documents = zip(*(_one_line(tensor).split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
    found = [sdpa_attention_forward(module, q, k, v, None, **options)[0] for q, k, v in documents]  # (1, t, H, d_head)
    return torch.cat(found, dim=1).view(B, S, query.shape[1], -1), None


def _one_line(tensor: Tensor) -> Tensor:
    """Returns (B, H, S, d) as (1, H, B S, d)."""
    return tensor if len(tensor) == 1 else tensor.transpose(0, 1).flatten(1, 2)[None]
