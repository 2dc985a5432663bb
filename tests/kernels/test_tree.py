"""The compiled core of a tree is the core of `nn/tree.py`, whose equations have oracle tests of their own."""

from __future__ import annotations

import copy
import itertools
from operator import attrgetter
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.func import functional_call

from smore_cli import kernels
from smore_cli.kernels import compiled
from smore_cli.kernels import tree as tree_kernel
from smore_cli.nn import AdapterContext, tree_recompute
from smore_cli.nn.gate_edit import GateEdit
from tests.kernels.trees import FORMS, OTHER_FORMS, assert_close, make, step
from tests.nn.trees import randomise_

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.nn.tree import Tree

pytestmark = pytest.mark.skipif(compiled.library("tree") is None, reason="no C compiler on this machine")


def kernel_of(tree: Tree, latent: Tensor) -> tree_recompute.Kernel | None:
    return tree_kernel.find(tree, latent, [attrgetter(name)(tree) for name in tree.core_names])


@pytest.mark.parametrize("tokens", [1, 31, 200])
@pytest.mark.parametrize("form", FORMS)
def test_the_kernel_computes_what_the_equations_give_in_float64(form: str, tokens: int) -> None:
    tree = make(**FORMS[form])
    latent, slope = torch.randn(tokens, tree.down().height), torch.randn(tokens, tree.widths[-1])
    mask = torch.arange(tokens) % 5 != 3
    kernels.use()
    assert kernel_of(tree, latent) is not None
    found, loads = step(tree, latent, slope, mask)
    exact, exact_loads = step(tree.double(), latent.double(), slope.double(), mask)  # float64 goes by PyTorch
    assert_close(dict(zip(["state", "aux", "latent", *tree.core_names], found, strict=True)), exact)
    for a, b in zip(loads, exact_loads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_other_forms_of_tree_go_by_pytorch(form: str) -> None:
    tree = make(**OTHER_FORMS[form])
    assert kernel_of(tree, torch.randn(4, tree.down().height)) is None


def test_what_the_kernel_cannot_read_goes_by_pytorch() -> None:
    tree = make()
    latent = torch.randn(4, tree.down().height)
    assert kernel_of(tree, latent) is not None
    assert kernel_of(tree, latent[:0]) is None
    assert kernel_of(tree, latent.double()) is None
    assert kernel_of(tree, latent.to("meta")) is None
    edit = GateEdit("ablate", (0,), frozenset([tree.router]), 0)
    with AdapterContext(edit=edit):
        assert kernel_of(tree, latent) is None


def test_children_are_picked_as_by_pytorch_and_ties_too() -> None:
    tree = make()
    latent = torch.randn(300, tree.down().height)
    with torch.no_grad():
        for level in tree.router.levels:
            level.keys[1] = level.keys[0]  # type: ignore[index]
        kernel = kernel_of(tree, latent)
        assert kernel is not None
        state, picks = kernel.forward(latent, [attrgetter(name)(tree) for name in tree.core_names])
        for picked in picks:
            best = picked.logits.topk(2, dim=0).values
            torch.testing.assert_close(picked.logits.gather(0, picked.chosen), best, rtol=0, atol=0)
            assert (picked.chosen[0] != picked.chosen[1]).all()
            torch.testing.assert_close(picked.probabilities, picked.logits.softmax(0))
            torch.testing.assert_close(picked.alpha, best.softmax(0))
        again = tree.core(latent, [picked.choice for picked in picks])[0]
    torch.testing.assert_close(state, again)


def test_a_tokens_numbers_depend_on_no_other_token_and_on_no_thread() -> None:
    tree = make()
    latent, slope = torch.randn(1111, tree.down().height), torch.randn(1111, tree.widths[-1])
    parameters = [attrgetter(name)(tree).detach() for name in tree.core_names]
    kernel = kernel_of(tree, latent)
    assert kernel is not None
    gradients = tree_recompute.Gradients(slope, [{}, {}])

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        state, picks = kernel.forward(latent[rows], parameters)
        own = tree_recompute.Gradients(gradients.state[rows], gradients.picks)  # type: ignore[index]
        return state, kernel.backward(latent[rows], parameters, [p.chosen for p in picks], own)[0]

    whole = run(slice(None))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        more = run(slice(None))
    finally:
        torch.set_num_threads(threads)
    parts = [run(slice(at, at + 101)) for at in range(0, 1111, 101)]
    for i in range(2):
        assert torch.equal(whole[i], more[i])
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))


def test_a_latent_with_other_strides_is_the_same() -> None:
    tree = make()
    wide = torch.randn(70, 3 * tree.down().height)
    latent = wide[:, 5 : 5 + tree.down().height]
    turned = latent.t().contiguous().t()
    slope, mask = torch.randn(70, tree.widths[-1]), torch.ones(70)
    kernels.use()
    found = [step(tree, each, slope, mask)[0] for each in (latent.contiguous(), turned)]
    with torch.no_grad():
        states = [tree.middle(each) for each in (latent, turned)]
    for a, b in itertools.chain(zip(*found, strict=True), [(found[0][0], state) for state in states]):
        assert torch.equal(a, b)


def test_not_a_number_stays_one() -> None:
    """A run that diverges must be seen to."""
    tree = make()
    latent = torch.randn(40, tree.down().height)
    for column in (0, -1):  # of a leaf, of the router
        bad = latent.clone()
        bad[7, column] = torch.nan
        kernel = kernel_of(tree, bad)
        assert kernel is not None
        state = kernel.forward(bad, [attrgetter(name)(tree).detach() for name in tree.core_names])[0]
        assert state[7].isnan().any()
        assert state.isnan().any(1).sum() == 1


def test_whoever_does_not_listen_gets_the_same_state() -> None:
    tree = make()
    latent = torch.randn(5, tree.down().height)
    kernel = kernel_of(tree, latent)
    assert kernel is not None
    (state, picks), (alone, none) = (
        kernel.forward(latent, tree.core_parameters(), heard=heard) for heard in (True, False)
    )
    assert torch.equal(state, alone)
    assert len(picks) == 2 and none == []


@pytest.mark.parametrize("use", [True, False], ids=["kernel", "PyTorch"])
def test_parameters_are_those_of_now(use: bool) -> None:
    """Changed in place, replaced, lent for a call, copied, in another memory layout."""
    tree, other = make(), make()
    randomise_(other)
    other.load_state_dict({name: -2 * value for name, value in tree.state_dict().items()})
    x, y = torch.randn(3, 24), torch.zeros(3, 20)
    if use:
        kernels.use()
    with torch.no_grad():
        before, after = tree(x, y), other(x, y)
        assert not torch.equal(before, after)
        assert torch.equal(functional_call(tree, dict(other.state_dict()), (x, y)), after)
        assert torch.equal(tree(x, y), before)
        copied = copy.deepcopy(tree)
        copied.load_state_dict(other.state_dict(), assign=True)
        assert torch.equal(copied(x, y), after)
        copied.W[0] = nn.Parameter(other.W[0].t().contiguous().t())
        assert torch.equal(copied(x, y), after)
        for parameter, value in zip(tree.parameters(), other.parameters(), strict=True):
            parameter.copy_(value)
        assert torch.equal(tree(x, y), after)
        torch.testing.assert_close(copied.double()(x.double(), y.double()).float(), after, rtol=1e-4, atol=1e-4)


def test_large_numbers_saturate() -> None:
    tree = make()
    latent = 1e4 * torch.randn(40, tree.down().height)
    kernels.use()
    with torch.no_grad():
        state = tree.middle(latent)
    assert state.isfinite().all()
    torch.testing.assert_close(state, tree.double().middle(latent.double()).float(), rtol=1e-4, atol=1e-4)


def test_a_parameter_changed_between_the_passes_is_an_error() -> None:
    tree = make()
    kernels.use()
    state = tree.middle(torch.randn(4, tree.down().height).requires_grad_())
    with torch.no_grad():
        tree.W[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        state.sum().backward()


def test_frozen_parameters_have_no_gradient() -> None:
    tree = make()
    tree.W.requires_grad_(False)
    kernels.use()
    tree.middle(torch.randn(4, tree.down().height)).sum().backward()
    assert tree.W[0].grad is None
    assert tree.B[0].grad is not None


def test_kernels_are_switched_off_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMORE_KERNELS", "0")
    kernels.use()
    assert tree_recompute.find_kernel is tree_recompute.no_kernel


def test_unused_is_for_a_block_of_code() -> None:
    kernels.use()
    used = tree_recompute.find_kernel
    with kernels.unused():
        assert tree_recompute.find_kernel is tree_recompute.no_kernel
    assert tree_recompute.find_kernel is used
