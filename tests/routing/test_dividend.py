"""What routing earned, on models whose routing is known to matter, or not to."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from smore_cli.data.batch import Row
from smore_cli.errors import UsageError
from smore_cli.merging.calibration import Corpus
from smore_cli.merging.verdict import read
from smore_cli.nn import adapted_modules, attach, set_active
from smore_cli.routing.dividend import measure_dividend
from tests.contract.conftest import CASES
from tests.contract.models import PAD, adapters, randomised, token_ids
from tests.contract.quantised import quantised
from tests.contract.test_merging import text


def answered(model: Any, count: int = 80) -> list[Row]:
    """Returns rows whose answer is what the model itself finds most likely: for no other model are they easier."""
    rows = []
    for seed in range(count):
        prompt = token_ids(1, 3 + seed % 5, seed=4000 + seed)
        with torch.no_grad():
            answer = int(model(input_ids=prompt).logits[0, -1].argmax())
        rows.append(Row(prompt[0].tolist(), [[answer]], [[True]]))
    return rows


def make_alike(model: Any) -> None:
    """Gives every expert of a block bank the matrices of the first."""
    for bank in adapters(model).values():
        s: int = bank.router.num_experts  # type: ignore
        with torch.no_grad():
            A, B = bank.A.view(s, -1, bank.A.shape[1]), bank.B.view(len(bank.B), s, -1)  # type: ignore
            A.copy_(A[:1].expand_as(A).clone())
            B.copy_(B[:, :1].expand_as(B).clone())


@pytest.mark.parametrize("name", ["smore-qwen2", "mixlora-llama", "trex-llama"])
def test_the_three_losses_are_those_of_the_models_and_the_model_stays_as_it_was(name: str) -> None:
    model: Any = CASES[name].random()
    model.train()
    before, judged = copy.deepcopy(model.state_dict()), text(12, seed=900)
    steps: list[tuple[int, int]] = []
    found = measure_dividend(
        model, text(40, seed=0), judged, pad_token_id=PAD, layers=[1], on_progress=lambda *s: steps.append(s)
    )
    assert model.training and all(m.active == "default" for m in adapted_modules(model).values())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert steps == [(n, 6) for n in range(1, 7)]  # three losses, two layers, and one of these by itself
    (routed,) = read(model, [Corpus("", judged)], PAD, logits=False)
    set_active(model, None)
    (base,) = read(model, [Corpus("", judged)], PAD, logits=False)
    assert found.routed == pytest.approx(routed.loss, rel=1e-6) and found.supervised == routed.supervised
    assert found.base == pytest.approx(base.loss, rel=1e-6)
    assert [layer.layer for layer in found.layers] == [1]


def test_experts_that_are_all_alike_earn_nothing_by_being_chosen_among_and_others_do() -> None:
    model: Any = CASES["mola-llama"].random()
    fit_rows = text(80, seed=0)
    chosen = measure_dividend(model, fit_rows, answered(model), pad_token_id=PAD, layers=[0, 1])
    assert chosen.base > chosen.static > chosen.routed + 4 * chosen.stderr
    assert chosen.share is not None and 0.1 < chosen.share < 0.95
    assert all(layer.value > layer.stderr for layer in chosen.layers)
    make_alike(model)
    alike = measure_dividend(model, fit_rows, answered(model), pad_token_id=PAD, ridge=1e-6, layers=[0, 1])
    assert alike.base > alike.routed + 0.5
    assert abs(alike.value) < 1e-3 * (alike.base - alike.routed)
    assert all(abs(layer.value) < 1e-3 for layer in alike.layers)


def test_an_adapter_that_is_static_itself_earns_exactly_nothing_and_is_fitted_to_nothing() -> None:
    model: Any = CASES["dora-gpt2"].random()
    found = measure_dividend(model, [], text(12, seed=900), pad_token_id=PAD, layers=[0])
    assert (found.value, found.stderr, found.fitted, found.layers) == (0, 0, 0, ())
    assert found.base != found.routed


def test_a_layer_made_static_is_numpys_least_squares_with_an_intercept() -> None:
    """In float64 and by another way: the last layer's only adapted map, whose inputs nothing else changes."""
    model: Any = CASES["mola-llama"].random(torch.float64, target_modules=["down_proj"])
    fit_rows, judged = text(80, seed=0), text(20, seed=900)
    module = adapted_modules(model)["model.layers.1.mlp.down_proj"]
    seen: list[tuple[Any, Any]] = []
    handle = module.register_forward_hook(
        lambda m, x, y: seen.append((x[0].flatten(0, -2), (y - m.base(x[0])).flatten(0, -2)))  # type: ignore
    )
    with torch.no_grad():
        for row in fit_rows:
            model(input_ids=torch.tensor([row.prompt + row.branches[0]]))
    handle.remove()
    x, f = (torch.cat(each).numpy() for each in zip(*seen, strict=True))
    D = np.linalg.lstsq(np.concatenate([x, np.ones((len(x), 1))], 1), f, rcond=None)[0].T
    static = copy.deepcopy(model)
    base: Any = adapted_modules(static)["model.layers.1.mlp.down_proj"]
    base.active = None
    base.base.weight = torch.nn.Parameter(base.base.weight + torch.from_numpy(D[:, :-1]))
    base.base.bias = torch.nn.Parameter(torch.from_numpy(D[:, -1]))
    (expected,) = read(static, [Corpus("", judged)], PAD, logits=False)
    found = measure_dividend(model, fit_rows, judged, pad_token_id=PAD, ridge=0.0, layers=[1])
    (layer,) = found.layers
    assert layer.static == pytest.approx(expected.loss, rel=1e-5)
    assert layer.value == pytest.approx(expected.loss - found.routed, rel=1e-3)
    assert abs(layer.value) > 1e-3


def test_rows_without_anything_to_predict_or_to_fit_to_are_refused() -> None:
    model: Any = CASES["mola-llama"].random()
    rows = [Row([3, 4], [[5]], [[False]])]
    with pytest.raises(UsageError, match="no token of the held-out rows"):
        measure_dividend(model, text(4, seed=0), rows, pad_token_id=PAD)
    with pytest.raises(UsageError, match="no text to fit"):
        measure_dividend(model, [], text(4, seed=0), pad_token_id=PAD)


def test_a_quantised_backbone_is_measured_as_the_weights_it_stands_for_and_stays_quantised() -> None:
    model: Any = copy.deepcopy(quantised("nf4"))
    attach(model, CASES["mola-llama"].config.model_copy(update={"target_modules": ["down_proj"]}))
    randomised(model)
    judged = text(12, seed=900)
    before = [(path, type(module)) for path, module in model.named_modules()]
    (routed,) = read(model, [Corpus("", judged)], PAD, logits=False)
    found = measure_dividend(model, text(60, seed=0), judged, pad_token_id=PAD)
    assert before == [(path, type(module)) for path, module in model.named_modules()]
    assert any("4bit" in kind.__name__ for _, kind in before)
    assert found.routed == pytest.approx(routed.loss, rel=1e-4)
    assert found.static != found.base
    (again,) = read(model, [Corpus("", judged)], PAD, logits=False)
    assert again.loss == routed.loss
