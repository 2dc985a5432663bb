"""An adapter treats every token by itself, and padding counts for nothing (dossier, section 8: 7 and 8)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from smore_cli.methods.smore import SMoREConfig
from smore_cli.nn import AdapterContext, adapted_modules, attach
from tests.nn.trees import aux_of, random_tree, randomise_, rows, update_of, with_picks

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

TWO: dict[str, Any] = {"rank": [2, 3], "num_experts": [4, 4], "fanout": [2, 2]}
GATES = ["dense", "switch", "noisy_topk"]
CLOSE: dict[str, float] = {"rtol": 1e-11, "atol": 1e-11}


# 7. Token independence.


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("position", ["all", "child_v2", "child"])
def test_any_split_order_or_shape_of_rows_gives_the_same_rows(gate: str, position: str) -> None:
    tree, x = random_tree(gate=gate, activation_position=position, **TWO), rows(12, 6)
    whole = update_of(tree, x)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(update_of(tree, x[order]), whole[order], **CLOSE)
    torch.testing.assert_close(torch.cat([update_of(tree, part) for part in x.split([1, 4, 7])]), whole, **CLOSE)
    torch.testing.assert_close(update_of(tree, x.view(2, 2, 3, 6)), whole.view(2, 2, 3, 5), **CLOSE)
    torch.testing.assert_close(update_of(tree, x[3]), whole[3], **CLOSE)
    strided = x.repeat_interleave(2, 0)[::2]
    torch.testing.assert_close(update_of(tree, strided), whole, **CLOSE)


def test_a_token_has_no_gradient_to_another_token() -> None:
    tree, x = random_tree(**TWO), rows(5, 6).requires_grad_()
    update_of(tree, x)[2].sum().backward()
    assert [bool(row.any()) for row in x.grad] == [False, False, True, False, False]


@pytest.fixture(scope="module", params=GATES)
def model(request: pytest.FixtureRequest, tiny_llama: Path) -> nn.Module:
    """A tiny Llama in float64 whose adapters do something."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).double().eval()
    with torch.no_grad():
        bare = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    attach(model, SMoREConfig(gate=request.param, router_dim=4, key_dim=4))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in adapted_modules(model).values():
            adapter = module.adapters["default"].double()
            randomise_(adapter)
            adapter.P.data.mul_(0.2)
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=torch.tensor([[5, 6, 7]])).logits, bare, atol=0.1)
    return model


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 512, (n,), generator=generator).tolist() for n in lengths]


def alone(model: nn.Module, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def greedy(model: nn.Module, ids: list[int], steps: int) -> list[int]:
    """Without a cache, a whole forward pass for every token."""
    out = list(ids)
    for _ in range(steps):
        out.append(int(alone(model, out)[-1].argmax()))
    return out[len(ids) :]


@pytest.mark.parametrize("lengths", [(6,), (6, 3, 4)])
def test_generation_with_a_cache_equals_full_forward_passes(model: nn.Module, lengths: tuple[int, ...]) -> None:
    rows_ = prompts(*lengths)
    width = max(lengths)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows_])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows_])
    generated = model.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0
    )
    blocked = model.generation_config.eos_token_id  # type: ignore[union-attr]
    for row, out in zip(rows_, generated[:, width:].tolist(), strict=True):
        expected = greedy(model, row, 5)
        assert blocked not in expected  # `min_new_tokens` would have changed the choice
        assert out == expected


# 8. Masks.


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gate", ["switch", "noisy_topk"])
def test_masked_tokens_change_neither_the_balance_loss_nor_real_rows(gate: str, training: bool) -> None:
    tree, x = random_tree(gate=gate, **TWO).train(training), rows(8, 6)
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]])
    other = x.clone()
    other[mask.flatten() == 0] = 100 * rows(3, 6, seed=9)
    results = []
    for variant in (x, other):
        torch.manual_seed(0)  # the noisy gate's draws
        with AdapterContext(token_mask=mask) as context:
            update = update_of(tree, variant.view(2, 4, 6))
        results.append((update[mask != 0], context.aux_loss()))
    torch.testing.assert_close(results[0], results[1], **CLOSE)
    assert results[0][1] > 0


@pytest.mark.parametrize("gate", ["switch", "noisy_topk"])
def test_the_balance_loss_of_masked_rows_is_that_of_the_real_rows_alone(gate: str) -> None:
    tree, x = random_tree(gate=gate, **TWO), rows(8, 6)
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0])
    torch.testing.assert_close(aux_of(tree, x, mask), aux_of(tree, x[mask != 0]), **CLOSE)


@pytest.mark.parametrize("gate", ["switch", "noisy_topk"])
@pytest.mark.parametrize("mask", [[True, False, True], [1, 0, 2], [7, 0, -1], [0.5, 0.0, 3.0]])
def test_any_mask_value_but_zero_counts_once(gate: str, mask: list[float]) -> None:
    tree, x = random_tree(gate=gate, **TWO), rows(3, 6)
    torch.testing.assert_close(aux_of(tree, x, torch.tensor(mask)), aux_of(tree, x[[0, 2]]), **CLOSE)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gate", ["dense", "switch", "noisy_topk"])
def test_a_batch_of_padding_alone_has_a_balance_loss_of_zero_and_finite_gradients(gate: str, training: bool) -> None:
    tree, x = random_tree(gate=gate, **TWO).train(training), rows(4, 6).requires_grad_()
    with AdapterContext(token_mask=torch.zeros(4)) as context:
        update = update_of(tree, x)
    aux = context.aux_loss()
    assert aux.item() == 0
    (aux + 0 * update.sum()).backward()
    assert all(not p.grad.any() for p in tree.parameters() if p.grad is not None)


@pytest.mark.parametrize("fanout", [1, 2])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gate", ["switch", "noisy_topk"])
def test_the_load_of_a_record_counts_the_picks_of_real_tokens(gate: str, training: bool, fanout: int) -> None:
    tree = random_tree(gate=gate, **TWO | {"fanout": [2, fanout]}).train(training)
    with AdapterContext(token_mask=torch.tensor([1, 1, 0, 1, 0])) as context:
        _, picks = with_picks(tree, rows(5, 6))
    assert len(context.loads) == 2
    for each in context.loads:
        ids = picks[each.level].ids[[0, 1, 3]].flatten()
        assert each.load.tolist() == torch.bincount(ids, minlength=4).tolist()
        assert not each.load.requires_grad


def test_a_mask_of_the_wrong_size_is_refused() -> None:
    tree = random_tree(**TWO)
    with (
        AdapterContext(token_mask=torch.ones(2, 3)),
        pytest.raises(ValueError, match="token_mask has 6 tokens, the hidden states have 4"),
    ):
        update_of(tree, rows(4, 6))


def test_without_a_context_nothing_is_recorded_and_the_rows_are_the_same() -> None:
    tree, x = random_tree(**TWO), rows(4, 6)
    with AdapterContext() as context:
        recorded = update_of(tree, x)
    assert torch.equal(update_of(tree, x), recorded)
    assert len(context.records) == 2


def test_a_context_without_aux_records_nothing_but_shows_traces() -> None:
    tree, x = random_tree(**TWO), rows(4, 6)
    traces = []
    with AdapterContext(aux=False, observe=traces.append) as context:
        update_of(tree, x)
    assert context.records == []
    assert [trace.level for trace in traces] == [1, 0]
    for trace in traces:
        torch.testing.assert_close(trace.probabilities.sum(-1), torch.ones(trace.probabilities.shape[:2]).double())
        assert ((trace.gates > 0).sum(-1) == 2).all()
        assert trace.owner is tree and not trace.gates.requires_grad
