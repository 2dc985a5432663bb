"""The one place where the backbone is called for log-probabilities, in training and in scoring alike.

The language-model head (vocabulary x width, a fifth of a small model) runs only where a token is learned or scored.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from smore_cli.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from smore_cli.data.batch import Batch

__all__ = ["target_logits", "target_logprobs"]


def target_logits(model: nn.Module, batch: Batch, **model_kwargs: Any) -> Tensor:
    """Returns the logits (n, vocabulary) at `batch.sources`, in the backbone's dtype.

    Args:
        model: a causal language model of transformers, with or without adapters.
        batch: on the model's device.
        model_kwargs: passed to the model's forward.
    """
    with _head_only_at(model, batch.sources):
        output = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=_attention_mask(getattr(model, "module", model), batch),
            use_cache=False,
            **model_kwargs,
        )
    logits: Tensor = output.logits
    return logits.squeeze(0)


def target_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """Returns log p(target) at every source, (n,) float32; differentiable."""
    return -F.cross_entropy(target_logits(model, batch).float(), batch.targets, reduction="none")


def _attention_mask(model: Any, batch: Batch) -> Tensor | dict[str, Tensor] | None:
    """Returns a batch's mask with the model's sliding window in it.

    Transformers applies a window to the masks that it makes itself, and takes a dense one (of rows with branches) for
    all layers as it is: a model would be trained with a view that it never has again.

    Raises:
        ModelError: flash attention was asked for, which takes no dense mask and would read this one as something else.
    """
    mask, config = batch.attention_mask, model.config.get_text_config()
    if mask is not None and mask.dim() == 4 and config._attn_implementation == "flash_attention_2":
        problem = "model.attn_implementation: flash_attention_2 cannot keep the choices of a question apart"
        raise ModelError(problem, "use sdpa")
    window = getattr(config, "sliding_window", None)
    if mask is None or mask.dim() != 4 or not window:
        return mask
    places = batch.position_ids  # of a branch they go on from the prompt's, wherever in the row it lies
    outside = places[:, None, :, None] - places[:, None, None, :] >= window  # (B, 1, S, S)
    windowed = mask.masked_fill(outside, torch.finfo(mask.dtype).min)
    layers = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if layers == {"sliding_attention"}:
        return windowed
    return {"full_attention": mask, "sliding_attention": windowed} if "sliding_attention" in layers else mask


@contextmanager
def _head_only_at(model: nn.Module, sources: Tensor) -> Iterator[None]:
    """Makes the output embedding see only the hidden states at `sources` (flat indices into B*S)."""
    unwrapped: Any = getattr(model, "module", model)  # DDP holds the model as `module`
    head = unwrapped.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(unwrapped).__name__} has no output embedding", "use a causal language model")

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]  # (B, S, d)
        rows = sources.to(hidden.device)  # of a model on several GPUs the last has the head
        return (hidden.flatten(0, 1).index_select(0, rows)[None],)  # (1, n, d)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
