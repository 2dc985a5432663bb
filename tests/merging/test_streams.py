"""A model taken through its layers one by one gives what it gives as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from smore_cli.errors import UsageError
from smore_cli.merging.calibration import batches_of
from smore_cli.merging.streams import context_of, layers_of, open_streams
from smore_cli.nn import adapted_modules, attach
from smore_cli.nn.prior_hooks import active_prior
from tests.contract.conftest import CASES
from tests.contract.models import PAD, backbone, rows


@pytest.mark.parametrize("name", ["trex-llama", "smore-qwen2", "mixlora-llama", "dynmole-gpt2"])
@torch.no_grad()
def test_layer_by_layer_is_the_forward_pass(name: str) -> None:
    model: Any = CASES[name].random()
    (batch,) = batches_of(rows(6), PAD)
    layers = layers_of(model, adapted_modules(model))
    states: list[Any] = []
    handle = layers.modules[-1].register_forward_hook(lambda _, __, out: states.append(out))
    with context_of(model, batch) as context:
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids)
    handle.remove()
    assert (context.prior is not None) is (active_prior(model) is not None)
    (stream,) = open_streams(model, layers, [batch])
    assert len(stream.calls) == len(layers.modules) == 2
    for number in range(2):
        stream.hidden = stream.run(layers, number)
    torch.testing.assert_close(stream.hidden, states[-1][0] if layers.tuples else states[-1])
    assert "forward" not in layers.modules[0].__dict__
    assert int(stream.real.sum()) == int(batch.token_mask.sum()) < stream.real.numel()


def test_an_adapter_outside_of_the_layers_is_refused() -> None:
    from copy import deepcopy

    from smore_cli.methods.lora import LoRAConfig

    model: Any = deepcopy(backbone("llama"))
    attach(model, LoRAConfig(rank=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(UsageError, match="outside of one stack of layers"):
        layers_of(model, adapted_modules(model))
