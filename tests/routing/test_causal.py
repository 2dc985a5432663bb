"""What experts are worth, against models that were changed by hand, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from smore_cli.merging.calibration import Corpus
from smore_cli.merging.verdict import read
from smore_cli.methods.mola import MoLAConfig
from smore_cli.nn import AdapterContext, adapted_modules
from smore_cli.nn.gate_edit import GateEdit
from smore_cli.routing.causal import measure_causal
from tests.contract.conftest import CASES
from tests.contract.models import PAD, Case, adapters
from tests.contract.test_merging import text
from tests.routing.test_dividend import make_alike

ROWS = text(12, seed=900)


def _loss(model: Any) -> float:
    (found,) = read(model, [Corpus("", ROWS)], PAD, logits=False)
    return found.loss


def _block(bank: Any, expert: int) -> slice:
    rank = len(bank.A) // bank.router.num_experts
    return slice(expert * rank, (expert + 1) * rank)


def _without(model: Any, layer: int, expert: int) -> Any:
    changed = copy.deepcopy(model)
    for path, bank in adapters(changed).items():
        if f".layers.{layer}." in path:
            with torch.no_grad():
                bank.B[:, _block(bank, expert)] = 0  # type: ignore
    return changed


def _nothing_but(model: Any, layer: int, expert: int) -> Any:
    """As its gates sum to one, all on one expert is the same as all experts like that one."""
    changed = copy.deepcopy(model)
    for path, bank in adapters(changed).items():
        if f".layers.{layer}." in path:
            own: Any = bank
            s = own.router.num_experts
            with torch.no_grad():
                own.A.copy_(own.A[_block(own, expert)].repeat(s, 1))
                own.B.copy_(own.B[:, _block(own, expert)].repeat(1, s))
    return changed


def test_every_change_is_that_of_a_model_changed_by_hand() -> None:
    """Layers with different numbers of experts; the second is measured from its input on."""
    config = MoLAConfig(num_experts=[2, 3], top_k=2, rank=2, target_modules=["q_proj", "down_proj"])
    model: Any = Case("llama", config).random(torch.float64)
    model.train()
    steps: list[tuple[int, int]] = []
    lines: list[str] = []
    found = measure_causal(model, ROWS, pad_token_id=PAD, say=lines.append, on_progress=lambda *s: steps.append(s))
    assert model.training
    loss = _loss(model)
    assert found.loss == pytest.approx(loss, abs=1e-12)
    assert [(e.layer, e.level, e.expert) for e in found.effects] == [
        (0, 0, 0),
        (0, 0, 1),
        *((1, 0, e) for e in range(3)),
    ]
    assert steps == [(2 * n, 10) for n in range(1, 6)]
    assert lines[0].startswith("10 passes that come to 7 through all layers")
    for effect in found.effects:
        expected = _loss(_without(model, effect.layer, effect.expert)) - loss
        assert effect.ablated.value == pytest.approx(expected, abs=1e-10)
        expected = _loss(_nothing_but(model, effect.layer, effect.expert)) - loss
        assert effect.forced.value == pytest.approx(expected, abs=1e-10)
        assert abs(effect.forced.value) > 1e-4 and effect.forced.stderr > 0


def test_chosen_modules_and_levels_alone_are_changed() -> None:
    model: Any = CASES["smore-llama"].random()
    path = "model.layers.1.mlp.up_proj"
    one = measure_causal(model, ROWS, pad_token_id=PAD, modules=[path], level=1)
    every = measure_causal(model, ROWS, pad_token_id=PAD)
    assert one.modules == (path,)
    assert {(e.layer, e.level) for e in one.effects} == {(1, 1)}
    assert [(e.layer, e.level) for e in every.effects][::4] == [(0, 1), (0, 0), (1, 1), (1, 0)]
    others = [e for e in every.effects if (e.layer, e.level) == (1, 1)]
    assert [e.ablated for e in one.effects] != [e.ablated for e in others]


def test_experts_that_are_all_alike_can_be_forced_without_any_change_but_not_taken_away() -> None:
    model: Any = CASES["mola-llama"].random(torch.float64)
    make_alike(model)
    found = measure_causal(model, ROWS, pad_token_id=PAD, modules=["model.layers.0.mlp.up_proj"])
    assert all(abs(effect.forced.value) < 1e-12 for effect in found.effects)
    assert any(abs(effect.ablated.value) > 1e-4 for effect in found.effects)


@pytest.mark.parametrize("kind", ["noisy shared", "dense prelu"])
def test_below_a_forced_child_is_routed_as_below_one_that_was_picked(kind: str) -> None:
    model: Any = CASES[f"smore {kind}-gpt2"].random()
    tree: Any = next(iter(adapted_modules(model).values())).adapter("default")
    x = torch.randn(7, tree.router.down.out_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = tree.router(x)
        top, expert = len(plain) - 1, 1
        with AdapterContext(edit=GateEdit("force", (expert,), frozenset([tree.router]), top)):
            forced = tree.router(x)
        assert (forced[top].chosen == expert).any(0).all()
        again = tree.router(x, [picks.choice for picks in forced])
        assert forced[0].logits.equal(again[0].logits)
        if kind != "dense prelu":  # there every expert was picked anyway
            assert not forced[0].logits.equal(plain[0].logits)
