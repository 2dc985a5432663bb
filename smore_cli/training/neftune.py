"""NEFTune: uniform noise on the embeddings while training (Jain et al. 2023, https://arxiv.org/abs/2310.05914).

    e' = e + alpha / sqrt(L d) u          u ~ Uniform(-1, 1)

d is the width of the embeddings, L the number of real tokens of the sequence a token belongs to: of its row, or of its
document where several share a row. Padding gets none, so L does not depend on what a row is batched with.

The noise is drawn as dropout is, from the generator whose state a checkpoint keeps; there is none in evaluation.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from smore_cli.nn.context import current_context

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from smore_cli.nn.context import AdapterContext

__all__ = ["add_neftune", "noise_scale"]


def add_neftune(model: Any, alpha: float) -> RemovableHandle:
    """Makes a model add noise to its embeddings, inside a training pass's context only.

    Args:
        model: a transformers model.
        alpha: size of the noise.
    """

    def add_noise(module: nn.Module, _: tuple[Any, ...], embedded: Tensor) -> Tensor:
        context = current_context()
        if not module.training or context is None or not context.aux:
            return embedded
        scale = noise_scale(context, embedded.shape[:2], embedded.device) * (alpha / math.sqrt(embedded.shape[-1]))
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * scale[:, :, None].to(embedded.dtype)

    handle: RemovableHandle = model.get_input_embeddings().register_forward_hook(add_noise)
    return handle


def noise_scale(context: AdapterContext, shape: torch.Size, device: torch.device) -> Tensor:
    """Returns 1 / sqrt(L) for every real token, 0 on padding, (B, S) float32.

    Args:
        context: knows which tokens are real, and which document each belongs to.
        shape: (B, S).
        device: of the result.
    """
    if context.documents is not None:
        documents = context.documents.to(device)  # (B, S), -1 on padding
        lengths = torch.bincount((documents + 1).flatten(), minlength=1)[documents + 1]
        return torch.where(documents >= 0, lengths.float().rsqrt(), 0.0)
    mask = torch.ones(shape, device=device) if context.token_mask is None else (context.token_mask.to(device) != 0)
    mask = mask.view(shape).float()
    return mask * mask.sum(1, keepdim=True).clamp_min(1).rsqrt()
