"""The contrast between experts, against the loss written out on the experts' whole outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from smore_cli.nn import AdapterContext
from smore_cli.nn.balance import SwitchBalanceLoss
from smore_cli.nn.contrastive import ContrastiveBank, ExpertContrastLoss, evenly_spaced
from smore_cli.nn.router import Router
from smore_cli.nn.selection import All, TopK
from tests.methods.flat import silent_parameters
from tests.nn.test_gradients import gradcheck
from tests.nn.trees import randomise_, rows

LOSS = ExpertContrastLoss(0.5, 0.3, top_k=2, max_tokens=64)


def bank(*losses: Any, s: int = 4, k: int = 2, r: int = 2, d_in: int = 6, d_out: int = 5) -> ContrastiveBank:
    select = TopK(k) if k < s else All()
    made = ContrastiveBank(
        d_in, d_out, down=s * r, up=s * r, router=Router(d_in, s, select=select), losses=losses or (LOSS,)
    ).double()
    torch.manual_seed(0)
    randomise_(made)
    return made


def value(module: ContrastiveBank, x: Tensor, mask: Tensor | None = None) -> Tensor:
    with AdapterContext(token_mask=mask) as context:
        module(x, x.new_zeros(*x.shape[:-1], len(module.B)))
    return context.aux_loss()


@torch.no_grad()
def written_out(module: ContrastiveBank, sequences: list[Tensor]) -> float:
    """0.5 * the mean of loss_i over all anchors of all sequences, anchor by anchor."""
    s, losses = module.router.num_experts, list[float]()
    r = len(module.A) // s
    for x in sequences:
        anchors = []
        for row in x:
            p = torch.softmax(module.router.weight @ row, 0)
            for e in sorted(range(s), key=lambda e: -p[e].item())[:2]:
                v = module.B[:, e * r : (e + 1) * r] @ (module.A[e * r : (e + 1) * r] @ row)
                anchors.append((e, v / v.norm()))
        for i, (e, v) in enumerate(anchors):
            others = [(f, (v @ w / 0.3).exp()) for j, (f, w) in enumerate(anchors) if j != i]
            total = sum(term for _, term in others)
            positives = [term for f, term in others if f == e]
            if positives and len(positives) < len(others):
                losses.append(-sum(float((term / total).log()) for term in positives) / len(positives))
    return 0.5 * sum(losses) / len(losses)


def test_the_loss_equals_the_one_written_out() -> None:
    module, x = bank(), rows(3 * 7, 6).view(3, 7, 6)
    found = value(module, x, torch.ones(3, 7))
    torch.testing.assert_close(found.item(), written_out(module, list(x)), rtol=1e-9, atol=0)


def test_only_real_tokens_count_wherever_the_padding_is() -> None:
    module, x = bank(), rows(2 * 9, 6).view(2, 9, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1, 0, 0, 0]])
    expected = written_out(module, [row[keep == 1] for row, keep in zip(x, mask, strict=True)])
    for filler in (0.0, 50.0):
        padded = torch.where(mask[..., None] == 1, x, filler)
        torch.testing.assert_close(value(module, padded, mask).item(), expected, rtol=1e-9, atol=0)


def test_a_sequence_of_padding_alone_adds_nothing() -> None:
    module, x = bank(), rows(2 * 5, 6).view(2, 5, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    torch.testing.assert_close(value(module, x, mask), value(module, x[:1], mask[:1]), rtol=1e-12, atol=0)


def test_the_sums_add_up_over_forward_passes() -> None:
    module, x, mask = bank(), rows(4 * 5, 6).view(4, 5, 6), torch.ones(4, 5)
    whole = value(module, x, mask)
    whole.backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    contexts = []
    for part in (x[:1], x[1:]):
        with AdapterContext(token_mask=torch.ones(part.shape[:2])) as context:
            module(part, part.new_zeros(*part.shape[:2], 5))
        contexts.append(context)
    totals = [a + b for a, b in zip(*(context.statistics() for context in contexts), strict=True)]
    for context in contexts:
        loss = context.aux_loss(totals)
        torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
        loss.backward()
    for name in ("A", "B"):
        torch.testing.assert_close(dict(module.named_parameters())[name].grad, gradients[name], rtol=1e-9, atol=1e-12)


def test_at_most_so_many_evenly_spaced_real_tokens_are_taken() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0, 0, 0, 0, 0], [0] * 10]).bool()
    places, real = evenly_spaced(mask, 5)
    assert places[0].tolist() == [0, 2, 4, 6, 8] and real[0].all()
    assert places[1, :3].tolist() == [11, 13, 14] and real[1].tolist() == [True, True, True, False, False]
    assert not real[2].any()
    wider = torch.cat([torch.zeros(3, 4, dtype=torch.bool), mask], 1)
    again, real_again = evenly_spaced(wider, 5)
    assert torch.equal(real_again, real)
    shift = torch.arange(3)[:, None] * 14 + 4 - torch.arange(3)[:, None] * 10
    assert torch.equal(again[real], (places + shift)[real])


def test_few_tokens_of_a_long_sequence_stand_for_it() -> None:
    sparse = bank(ExpertContrastLoss(0.5, 0.3, top_k=2, max_tokens=4))
    x = rows(12, 6)[None]
    torch.testing.assert_close(
        value(sparse, x, torch.ones(1, 12)).item(), written_out(sparse, [x[0, ::3]]), rtol=1e-9, atol=0
    )


def test_without_a_mask_the_pass_is_one_sequence() -> None:
    module, x = bank(), rows(10, 6)
    torch.testing.assert_close(value(module, x), value(module, x[None], torch.ones(1, 10)), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("s", "k", "n"), [(1, 1, 6), (4, 2, 1)])
def test_there_is_no_loss_where_there_is_nothing_to_contrast(s: int, k: int, n: int) -> None:
    module = bank(ExpertContrastLoss(0.5, 0.3, top_k=k, max_tokens=64), s=s, k=k)
    assert value(module, rows(n, 6)).item() == 0


def test_similar_outputs_of_one_expert_and_unlike_ones_of_others_cost_least() -> None:
    """Experts 0 and 1 write along their own axis, or along the same one."""
    module = bank(s=2, k=2, r=1)
    with torch.no_grad():
        module.A.copy_(rows(1, 6).abs().repeat(2, 1))
        module.B.zero_()
        module.B[0, 0] = module.B[1, 1] = 1.0
        x = rows(6, 6).abs()
        apart = value(module, x)
        module.B.zero_()
        module.B[0] = 1.0
        together = value(module, x)
    assert apart < together


def test_gradients_equal_finite_differences() -> None:
    gradcheck(bank(s=3, r=1, d_in=4, d_out=3), rows(3, 4))
    gradcheck(bank(LOSS, SwitchBalanceLoss(0.3), s=3, r=1, d_in=4, d_out=3), rows(3, 4))


@pytest.mark.parametrize(
    ("losses", "silent"),
    [((LOSS,), {"A", "router.weight"}), ((LOSS, SwitchBalanceLoss(0.3)), {"A"})],
)
def test_while_b_is_zero_the_contrast_is_flat_and_finite(losses: tuple[Any, ...], silent: set[str]) -> None:
    module = bank(*losses)
    module.reset_parameters()
    assert value(module, rows(9, 6)).isfinite()
    assert silent_parameters(module, torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])) == silent  # type: ignore[arg-type]
    assert module.silent_at_start() == silent


def test_nothing_wide_is_kept_for_the_backward_pass() -> None:
    d_out, tokens = 512, 300
    module, sizes = bank(ExpertContrastLoss(0.5, 0.3, top_k=2, max_tokens=16), d_out=d_out), list[int]()
    x = rows(tokens, 6)[None]
    routing = module.router(x[0])
    routing = type(routing)(**{**vars(routing), "latent": x[0] @ module.A.T, "owner": module})

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sums = module.losses[0].sums(routing, AdapterContext(token_mask=torch.ones(1, tokens)))
    assert sums.requires_grad and sizes
    assert max(sizes) < tokens * d_out // 8
