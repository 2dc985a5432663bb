"""Every method becomes plain weights: exactly where nothing depends on the token, else nearer than anything simpler."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch

from smore_cli.data.batch import Row
from smore_cli.errors import UsageError
from smore_cli.merging.calibration import Corpus, batches_of
from smore_cli.merging.dense import fold, is_constant
from smore_cli.merging.fitting import Solver
from smore_cli.merging.mean_merge import merge_mean
from smore_cli.merging.sequential import merge_sequentially
from smore_cli.merging.verdict import judge, read
from smore_cli.merging.work import Work
from smore_cli.methods import available_methods
from smore_cli.nn import adapted_modules, set_active
from tests.contract.conftest import CASES
from tests.contract.models import PAD, VARIANTS, token_ids

if TYPE_CHECKING:
    from pathlib import Path

MERGED = [f"{name}-qwen2" for name in available_methods()] + [f"{name}-gpt2" for name in ["smore", *VARIANTS]]


def text(count: int, seed: int) -> list[Row]:
    """Returns rows of a prompt and an answer, of uneven lengths."""
    rows = []
    for i in range(count):
        prompt, answer = token_ids(3 + i % 4, seed=seed + i).tolist(), token_ids(8, seed=seed + 5000 + i).tolist()
        rows.append(Row(prompt, [answer], [[True] * len(answer)], group=i % 2))
    return rows


@pytest.mark.parametrize("name", MERGED)
def test_the_merge_is_exact_or_nearer_to_the_adapter_than_the_backbone_is(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, judged = case.random(**case.without_dropout), [Corpus("text", text(20, seed=900))]
    before = copy.deepcopy({path: module.base.state_dict() for path, module in adapted_modules(model).items()})
    routed = read(model, judged, PAD)
    set_active(model, None)
    base = read(model, judged, PAD)
    set_active(model, "default")
    if is_constant(model):
        assert not case.config.routed
        fold(model)
    else:
        assert case.config.routed
        with pytest.raises(UsageError, match="depends on the token"):
            fold(model)
        found = merge_sequentially(
            model, batches_of(text(60, seed=0), PAD), Solver(1e-3), Work(tmp_path), lambda _: None
        )
        assert all(0 <= result.missed < 1 for result in found.values())
        assert all(module.active is None for module in adapted_modules(model).values())
        assert len(found) >= len(before)
        fold(model)
    assert not adapted_modules(model)
    merged = read(model, judged, PAD)
    apart, far = (judge(judged, "text", base, routed, each).difference.mean_kl for each in (merged, base))
    assert far > 1e-3
    assert apart < (
        1e-9 if not case.config.routed else 0.95 * far
    )  # T-REX with random centroids: 0.94, most 0.02 to 0.5


@pytest.mark.parametrize("name", ["dynmole-qwen2", "smore-gpt2", "mode-qwen2", "comol-qwen2"])
def test_the_mean_of_routing_that_never_changes_is_the_adapter_itself(name: str) -> None:
    """With router weights of zero every token has the same gates."""
    case = CASES[name]
    changes = {"activation": "identity", "gate": "dense"} if "activation" in type(case.config).model_fields else {}
    model = case.random(**case.without_dropout, **changes)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".router." in path and not path.endswith((".omega", ".g")):
                parameter.zero_()
            if path.endswith((".p", ".b.0", ".b.1", ".w.0")):  # what is added whatever x is has no place without a bias
                parameter.zero_()
    judged = [Corpus("text", text(12, seed=900))]
    routed = read(model, judged, PAD)
    merge_mean(model, batches_of(text(20, seed=0), PAD), uniform=False)
    merged = read(model, judged, PAD)
    assert judge(judged, "text", routed, routed, merged).difference.mean_kl < 1e-7


def test_a_method_whose_experts_depend_on_one_another_has_no_mean() -> None:
    case = CASES["omoe-qwen2"]
    with pytest.raises(UsageError, match="no linear map"):
        merge_mean(case.random(), batches_of(text(20, seed=0), PAD), uniform=True)
    case = CASES["mixlora-qwen2"]
    with pytest.raises(UsageError, match="gated MLP"):
        merge_mean(case.random(), batches_of(text(20, seed=0), PAD), uniform=False)


def test_one_expert_is_merged_exactly() -> None:
    case = CASES["mola-qwen2"]
    model = case.random(num_experts=1, top_k=1, **case.without_dropout)
    judged = [Corpus("text", text(12, seed=900))]
    routed = read(model, judged, PAD)
    assert is_constant(model)
    fold(model)
    assert judge(judged, "text", routed, routed, read(model, judged, PAD)).difference.mean_kl < 1e-9
