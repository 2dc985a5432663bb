"""The one place where the backbone is called for log-probabilities, in training and in scoring alike.

The language-model head (vocabulary x width, a fifth of a small model) runs only where a token is learned or scored,
and there in chunks (`chunked_loss`): no more logits exist at a time than one chunk has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from smore_cli.errors import ModelError
from smore_cli.models.chunked_loss import Scores, head_scores, scores_of
from smore_cli.models.document_attention import document_starts
from smore_cli.models.logit_rule import logit_rule

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from smore_cli.data.batch import Batch

__all__ = ["target_logits", "target_logprobs", "target_scores", "target_states"]


def target_logits(model: nn.Module, batch: Batch, **model_kwargs: Any) -> Tensor:
    """Returns the logits (n, vocabulary) at `batch.sources`, in the backbone's dtype.

    Args:
        model: a causal language model of transformers, with or without adapters.
        batch: on the model's device.
        model_kwargs: passed to the model's forward.
    """
    sources = batch.sources

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (_rows_at(inputs[0], sources)[None],)  # (1, n, d)

    logits: Tensor = _run(model, batch, select, model_kwargs).logits
    return logits.squeeze(0)


def target_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """Returns log p(target) at every source, (n,), float32 (float64 of a float64 model); differentiable."""
    return target_scores(model, batch).logprobs


def target_scores(model: nn.Module, batch: Batch, *, best: bool = False) -> Scores:
    """Returns log p(target) at every source and, where asked, whether the target is the most probable token.

    Args:
        model: a causal language model of transformers, with or without adapters.
        batch: on the model's device.
        best: whether to look for the most probable tokens.
    """
    head = _head(model)
    rule = logit_rule(_unwrapped(model))
    if rule is None:
        return scores_of(target_logits(model, batch), batch.targets, best=best)
    found: list[Scores] = []

    def score(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Inside the model's own forward pass, where a sharded head is whole.
        rows = _rows_at(inputs[0], batch.sources)
        on_device = rows.to(next(head.parameters()).device)
        found.append(head_scores(head, on_device, batch.targets.to(on_device.device), rule, best=best))
        return (rows[None, :0],)  # and no logits for the model

    nothing = _run(model, batch, score, {}).logits.sum()
    # What shards a model waits for a gradient of the head's output: of no rows here, so that it adds zero.
    logprobs, hits = found[0]
    return Scores(logprobs + nothing.to(logprobs), hits)


def target_states(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the states (n, d) in front of the output embedding at `batch.sources`; differentiable, no logits made."""
    found: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found.append(_rows_at(inputs[0], batch.sources))
        return (found[0][None, :0],)

    _run(model, batch, keep, {})
    return found[0]


def _run(model: nn.Module, batch: Batch, at_head: Callable[..., Any], model_kwargs: dict[str, Any]) -> Any:
    """Calls the model, with `at_head` before its output embedding."""
    handle = _head(model).register_forward_pre_hook(at_head)
    try:
        return model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=_attention_mask(_unwrapped(model), batch),
            use_cache=False,
            **model_kwargs,
        )
    finally:
        handle.remove()


def _rows_at(hidden: Tensor, sources: Tensor) -> Tensor:
    """Returns the hidden states (n, d) at `sources`, flat indices into the B*S of `hidden` (B, S, d)."""
    return hidden.flatten(0, 1).index_select(0, sources.to(hidden.device))  # the last of several GPUs has the head


def _unwrapped(model: nn.Module) -> Any:
    return getattr(model, "module", model)  # DDP holds the model as `module`


def _head(model: nn.Module) -> nn.Module:
    """Returns the output embedding.

    Raises:
        ModelError: the model has none.
    """
    unwrapped = _unwrapped(model)
    head: nn.Module | None = unwrapped.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(unwrapped).__name__} has no output embedding", "use a causal language model")
    return head


def _attention_mask(model: Any, batch: Batch) -> Tensor | dict[str, Tensor] | None:
    """Returns a batch's mask with the model's sliding window in it; of packed lines, where documents begin.

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
    if mask is None:
        return document_starts(config, batch.position_ids)
    if mask.dim() != 4 or not window:
        return mask
    places = batch.position_ids  # of a branch they go on from the prompt's, wherever in the row it lies
    outside = places[:, None, :, None] - places[:, None, None, :] >= window  # (B, 1, S, S)
    windowed = mask.masked_fill(outside, torch.finfo(mask.dtype).min)
    layers = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if layers == {"sliding_attention"}:
        return windowed
    return {"full_attention": mask, "sliding_attention": windowed} if "sliding_attention" in layers else mask
