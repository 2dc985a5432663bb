"""What a model does to its head's logits: nothing, a scale, or a soft cap.

    Llama, Qwen, GPT-2, ...     z
    Cohere                      z * logit_scale
    Granite                     z / logits_scaling
    Gemma 2                     cap tanh(z / cap)

The head's logits are made in chunks outside the model's own forward pass, which then has to be matched. No list of
models says how: a model is asked once, by a pass of two tokens whose logits are replaced by known numbers, and must
give exactly what the rule makes of them. Where no rule does, the model's own logits are used, all at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch._subclasses.fake_tensor import is_fake

from smore_cli.models.embedders import bare
from smore_cli.nn.prior_hooks import without_prior

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["LogitRule", "logit_rule"]

WIDEST = 64.0
"""The known logits reach from minus this to this: far enough to bend every soft cap in use (30)."""


@dataclass(frozen=True)
class LogitRule:
    """A function of each logit by itself.

    Attributes:
        kind: what is done; with None nothing is.
        value: with what.
    """

    kind: Literal["multiply", "divide", "cap"] | None = None
    value: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        """Maps logits, in their dtype and in the order of operations of the models."""
        if self.kind == "multiply":
            return logits * self.value
        if self.kind == "divide":
            return logits / self.value
        if self.kind == "cap":
            return torch.tanh(logits / self.value) * self.value
        return logits

    def slope(self, mapped: Tensor) -> Tensor | float | None:
        """Returns the derivative, of what came out; None: 1."""
        if self.kind == "multiply":
            return self.value
        if self.kind == "divide":
            return 1 / self.value
        return 1 - (mapped / self.value).square() if self.kind == "cap" else None


_KNOWN: WeakKeyDictionary[nn.Module, tuple[list[LogitRule], LogitRule | None]] = WeakKeyDictionary()


def logit_rule(model: Any) -> LogitRule | None:
    """Returns a causal language model's rule, or None where it has another.

    The first call for a model runs it on two tokens; where it is sharded, all processes call this together.
    """
    head = model.get_output_embeddings()
    candidates = _candidates(model.config.get_text_config())
    if is_fake(next(head.parameters())) or next(head.parameters()).is_meta:
        return candidates[-1]  # there are only shapes, which all have in common
    known = _KNOWN.get(model)
    if known is None or known[0] != candidates:
        known = _KNOWN[model] = candidates, _ask(model, head, candidates)
    return known[1]


def _candidates(config: Any) -> list[LogitRule]:
    found = [LogitRule()]
    if scale := getattr(config, "logit_scale", None):
        found.append(LogitRule("multiply", scale))
    if divisor := getattr(config, "logits_scaling", None):
        found.append(LogitRule("divide", divisor))
    if cap := getattr(config, "final_logit_softcapping", None):
        found.append(LogitRule("cap", cap))
    return found


def _ask(model: Any, head: nn.Module, candidates: list[LogitRule]) -> LogitRule | None:
    """Returns the rule that gives what the model gives for logits that are known."""
    asked: list[Tensor] = []

    def replaced(_: nn.Module, __: Any, logits: Tensor) -> Tensor:
        rising = torch.linspace(-WIDEST, WIDEST, logits.shape[-1], device=logits.device)
        asked.append(torch.stack([rising, -rising]).to(logits.dtype)[None])  # (1, 2, V)
        return asked[-1]

    device = model.get_input_embeddings().weight.device
    ones = torch.ones(1, 2, dtype=torch.long, device=device)
    places = torch.arange(2, device=device)[None]
    handle = head.register_forward_hook(replaced)
    try:
        with bare(model), without_prior(model):
            given = model(input_ids=ones, position_ids=places, attention_mask=ones, use_cache=False).logits
    finally:
        handle.remove()
    if len(asked) != 1:
        return None
    return next((rule for rule in candidates if torch.equal(rule(asked[0]).to(given), given)), None)
