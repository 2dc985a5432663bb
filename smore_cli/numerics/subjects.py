"""What is put to the test: a backbone with an adapter that trains, and a few rows of random tokens.

The adapter's numbers are all drawn anew, because one that starts at zero has no gradient in half of its tensors.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from smore_cli.data.batch import Row
from smore_cli.errors import ModelError
from smore_cli.methods import config_from_dict
from smore_cli.nn import attach, detach
from smore_cli.training.objective import Objective

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["METHODS", "TINY", "TOLERANCE", "Subject", "random_rows", "subjects", "tiny_llama"]

TINY = "tiny Llama"
TOLERANCE = 1e-4
"""Of float32 in two layers. Two ways differ by 3e-6 from rounding; a mistake moves the gradient by 1 and more."""
LARGE_TOLERANCE = 1e-3
"""In thirty layers rounding has come to 1e-4."""

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "target_modules": "all-linear", "rank": 4},
    "smore": {
        "method": "smore",
        "target_modules": "all-linear",
        "rank": [2, 2],
        "num_experts": [4, 4],
        "fanout": [2, 2],
        "router_dim": 4,
        "key_dim": 4,
        "aux_loss_coefficient": 1.0,  # as large as the loss, so that a mistake in it shows in the gradient too
    },
}
"""A method that routes, with a balance loss, and one that does not."""

_SEED = 1


@dataclass(frozen=True)
class Subject:
    """A model and the rows of one step.

    Attributes:
        backbone: its name.
        name: of the method.
        model: with its adapter, in training mode, without dropout.
        rows: of the step.
        device: where the model is.
        tolerance: the largest relative difference that is rounding.
        objective: what is minimised.
    """

    backbone: str
    name: str
    model: nn.Module
    rows: list[Row]
    device: torch.device
    tolerance: float
    objective: Objective = Objective(ranking=False, completion_weight=0.0)  # noqa: RUF009


def subjects(model: Any, device: torch.device, backbone: str = TINY) -> Iterator[Subject]:
    """Yields the model with each method's adapter in turn; it is bare again afterwards.

    In the tiny Llama the routers pick some experts and have a balance loss. In a large model they take all, and so have
    none: among its many picks there is always a tie, which rounding decides in one way or the other.

    Args:
        model: a causal language model on `device`.
        device: where it is.
        backbone: its name.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    _without_dropout(model)
    for name, settings in METHODS.items():
        dense = name == "smore" and backbone != TINY
        values = settings | ({"gate": "dense"} if dense else {})
        attach(model, config_from_dict(values), seed=_SEED)
        try:
            model.train()
            _redraw([parameter for parameter in model.parameters() if parameter.requires_grad])
            title = f"{name}, dense" if dense else name
            tolerance = TOLERANCE if backbone == TINY else LARGE_TOLERANCE
            yield Subject(backbone, title, model, random_rows(vocabulary), device, tolerance)
        finally:
            detach(model)


def tiny_llama(device: torch.device) -> Any:
    """Returns a random Llama of two layers in float32, made in memory: the same numbers every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,  # at the usual 0.02 so narrow a model says the same to every input
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        return LlamaForCausalLM(config).to(device).requires_grad_(False)  # type: ignore[arg-type]


def random_rows(vocabulary: int, count: int = 7) -> list[Row]:
    """Returns rows of 8 to 40 tokens, of each of which another share is learned."""
    dice = random.Random(_SEED)
    rows = []
    for number in range(count):
        prompt = [dice.randrange(vocabulary) for _ in range(dice.randrange(4, 20))]
        answer = [dice.randrange(vocabulary) for _ in range(dice.randrange(4, 20))]
        learned = [dice.random() < (number + 1) / count for _ in answer]
        rows.append(Row(prompt, [answer], [[*learned[:-1], True]]))
    return rows


@torch.no_grad()
def _redraw(parameters: list[nn.Parameter]) -> None:
    if not parameters:
        raise ModelError("the adapter trains nothing")
    generator = torch.Generator().manual_seed(_SEED)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(0.1 * noise.to(parameter.device, parameter.dtype))


def _without_dropout(model: nn.Module) -> None:
    """Turns dropout off in training mode: two passes draw other numbers, which is no mistake."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "resid_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
