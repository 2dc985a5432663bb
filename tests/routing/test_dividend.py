"""What routing earned, on models whose routing is known to matter, or not to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from smore_cli.merging.calibration import Corpus
from smore_cli.merging.verdict import read
from smore_cli.nn import adapted_modules, set_active
from smore_cli.routing.dividend import measure_dividend
from tests.contract.conftest import CASES
from tests.contract.models import PAD
from tests.contract.test_merging import text


def _state(model: Any) -> dict[str, Any]:
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("name", ["mola-llama", "smore-qwen2", "mixlora-llama", "trex-gpt2"])
def test_the_three_losses_are_those_of_the_models_and_the_model_stays_as_it_was(name: str) -> None:
    case = CASES[name]
    model: Any = case.random()
    model.train()
    before, judged = _state(model), text(12, seed=900)
    steps: list[tuple[int, int]] = []
    found = measure_dividend(
        model, text(60, seed=0), judged, pad_token_id=PAD, per_layer=True, on_progress=lambda *s: steps.append(s)
    )
    assert model.training and all(m.active == "default" for m in adapted_modules(model).values())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert steps == [(n, len(steps)) for n in range(1, len(steps) + 1)]
    (routed,) = read(model, [Corpus("", judged)], PAD, logits=False)
    set_active(model, None)
    (base,) = read(model, [Corpus("", judged)], PAD, logits=False)
    assert found.routed == pytest.approx(routed.loss, rel=1e-6) and found.supervised == routed.supervised
    assert found.base == pytest.approx(base.loss, rel=1e-6)
    assert [layer.layer for layer in found.layers] == [0, 1]
