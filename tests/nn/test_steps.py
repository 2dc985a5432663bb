"""One optimisation step, split, watched or under autocast; see also `tests/contract` (dossier, section 8: 13)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional as F

from smore_cli.nn import AdapterContext, adapted_modules, checkpoint_contexts
from smore_cli.nn.context import current_context
from tests.nn.models import adapter_gradients, add_random, llama, small_smore, token_ids
from tests.nn.trees import random_tree, rows

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

    from smore_cli.nn.context import RoutingTrace

GATES = ["dense", "switch", "noisy_topk"]


# Gradient checkpointing.


def checkpointed(model: nn.Module) -> nn.Module:
    model.activation_checkpointing_enable(  # type: ignore[operator]
        activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": checkpoint_contexts}
    )
    return model.train()


def step(
    model: nn.Module, observe: Callable[[RoutingTrace], None] | None = None
) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Returns the balance loss, the number of records and the gradients of one step."""
    ids = token_ids(2, 7)
    torch.manual_seed(0)  # the noisy gate's draws
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with AdapterContext(token_mask=mask, observe=observe) as context:
        loss = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
    aux = context.aux_loss()
    (loss + aux).backward()
    return aux.detach(), len(context.records), adapter_gradients(model)


@pytest.mark.parametrize("gate", GATES)
def test_watching_the_routing_does_not_disturb_gradient_checkpointing(tiny_llama: Path, gate: str) -> None:
    model = checkpointed(add_random(llama(tiny_llama), small_smore(gate=gate)))
    expected = step(model)[2]
    traces: list[RoutingTrace] = []
    watched = step(model, traces.append)[2]
    assert len(traces) == 2 * len(adapted_modules(model))
    assert all(torch.equal(watched[name], gradient) for name, gradient in expected.items())


def test_a_backward_pass_inside_another_context_records_nothing_there(tiny_llama: Path) -> None:
    model, ids = checkpointed(add_random(llama(tiny_llama), small_smore())), token_ids(2, 7)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    with AdapterContext() as other:
        loss.backward()
    assert other.records == []


# Gradient accumulation.


def batch() -> tuple[Tensor, Tensor]:
    """Eight rows of uneven length, right-padded."""
    lengths = torch.tensor([9, 4, 7, 2, 9, 5, 3, 8])
    mask = torch.arange(9) < lengths[:, None]
    return token_ids(8, 9) * mask, mask


def loss_sum(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """The summed cross-entropy of every next real token."""
    logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * mask[:, 1:].flatten()).sum()


def accumulated(model: nn.Module, parts: int) -> tuple[list[float], dict[str, Tensor]]:
    """Returns the balance loss that every micro-batch reports, and the summed gradient of loss + balance loss."""
    ids, mask = batch()
    supervised = mask[:, 1:].sum()
    passes = []
    for ids_part, mask_part in zip(ids.chunk(parts), mask.chunk(parts), strict=True):
        with AdapterContext(token_mask=mask_part) as context:
            passes.append((loss_sum(model, ids_part, mask_part) / supervised, context))
    statistics = zip(*(context.statistics() for _, context in passes), strict=True)
    totals = [torch.stack(sums).sum(0) for sums in statistics]
    values = []
    for loss, context in passes:
        aux = context.aux_loss(totals)
        values.append(aux.item())
        (loss + aux).backward()
    return values, adapter_gradients(model)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches(
    tiny_llama: Path, gate: str, training: bool
) -> None:
    config = small_smore(gate=gate, aux_loss_coefficient=1.0, target_modules=["q_proj", "down_proj"])
    model = add_random(llama(tiny_llama).double(), config).double().train(training)
    for module in adapted_modules(model).values():  # noise that depends on the expert alone, not on the split
        tree: Any = module.adapters["default"]
        tree.router.draw_noise = lambda like: torch.linspace(-1, 1, like.shape[-1], dtype=like.dtype).expand_as(like)
    values, whole = accumulated(model, 1)
    assert (values[0] > 0) == (gate != "dense")
    for parts in (2, 8):
        split_values, split = accumulated(model, parts)
        assert split_values == pytest.approx([values[0]] * parts, rel=1e-9)
        assert split.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(split[name], gradient, rtol=1e-5, atol=1e-7)


def test_the_gradient_of_the_balance_loss_of_a_split_step_is_exactly_that_of_the_whole_step() -> None:
    tree, x = random_tree(rank=[2, 3], num_experts=[4, 4], fanout=[2, 2], gate="noisy_topk"), rows(16, 6)
    gradients = []
    for sizes in ([16], [1, 5, 10], [2] * 8):
        passes = []
        for part in x.split(sizes):
            with AdapterContext() as context:
                tree(part, part.new_zeros(len(part), 5))
            passes.append(context)
        totals = [torch.stack(sums).sum(0) for sums in zip(*(c.statistics() for c in passes), strict=True)]
        loss = torch.stack([context.aux_loss(totals) for context in passes]).sum()
        gradients.append(torch.autograd.grad(loss, [tree.router.down.weight, tree.router.levels[0].keys]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-10, atol=1e-12)


def test_an_average_of_micro_batch_losses_would_have_been_another_gradient() -> None:
    tree, x = random_tree(rank=[2], num_experts=[4], fanout=[2]), rows(16, 6)

    def loss(*parts: Tensor) -> Tensor:
        losses = []
        for part in parts:
            with AdapterContext() as context:
                tree(part, part.new_zeros(len(part), 5))
            losses.append(context.aux_loss())
        return torch.stack(losses).mean()

    weight = tree.router.down.weight
    whole, averaged = torch.autograd.grad(loss(x), weight)[0], torch.autograd.grad(loss(*x.split(2)), weight)[0]
    assert not torch.allclose(whole, averaged, rtol=0.05)


def test_nested_contexts_are_restored() -> None:
    with AdapterContext() as outer:
        with AdapterContext() as inner:
            assert current_context() is inner
        with pytest.raises(KeyError), AdapterContext():
            raise KeyError
        assert current_context() is outer
    assert current_context() is None


def test_under_autocast_statistics_count_every_token() -> None:
    tree = random_tree(rank=[2], num_experts=[2], fanout=[1]).float()
    with torch.no_grad():
        tree.router.levels[0].keys[0].zero_()
    x = torch.randn(1001, 6)
    with torch.autocast("cpu", torch.bfloat16), AdapterContext() as context:
        tree(x, x.new_zeros(1001, 5))
    sums = context.records[0].sums
    assert sums.dtype == torch.float32
    assert sums[0].sum().item() == 1001 and sums[2].tolist() == [1001, 1001]
