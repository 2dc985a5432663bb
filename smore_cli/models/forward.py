"""The one place where the backbone is called for log-probabilities, in training and in scoring alike.

The language-model head (vocabulary x width, a fifth of a small model) runs only where a token is learned or scored.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

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
            attention_mask=batch.attention_mask,
            use_cache=False,
            **model_kwargs,
        )
    logits: Tensor = output.logits
    return logits.squeeze(0)


def target_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """Returns log p(target) at every source, (n,) float32; differentiable."""
    return -F.cross_entropy(target_logits(model, batch).float(), batch.targets, reduction="none")


@contextmanager
def _head_only_at(model: nn.Module, sources: Tensor) -> Iterator[None]:
    """Makes the output embedding see only the hidden states at `sources` (flat indices into B*S)."""
    unwrapped: Any = getattr(model, "module", model)  # DDP holds the model as `module`
    head = unwrapped.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(unwrapped).__name__} has no output embedding", "use a causal language model")

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]  # (B, S, d)
        return (hidden.flatten(0, 1).index_select(0, sources)[None],)  # (1, n, d)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
