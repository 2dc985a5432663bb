"""The Triton kernels give what `nn/tree.py` gives: on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import pytest
import torch

from smore_cli.kernels import tree as tree_kernel
from smore_cli.kernels.tree_shape import MOST_PLAIN, TOKENS, shape_of
from smore_cli.nn import tree_recompute
from smore_cli.nn.tree_recompute import Gradients
from tests.kernels.trees import FORMS, assert_close, make, step

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.nn.tree import Tree

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; PyTorch for CUDA brings it"
)

NUMPY_WARNS = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
"""The interpreter computes with it."""

FEW_LEVELS: dict[str, dict[str, Any]] = {
    **{name: fields for name, fields in FORMS.items() if len(fields.get("rank", [8, 8])) < 3},
    "scaled, three children": {"num_experts": [3, 5], "fanout": [2, 3], "alpha": [4.0, 2.0]},
    "two levels of a shared pool": {"shared_pool": True, "num_experts": [3, 3], "rank": [2, 2]},
    "one level, a single child": {"rank": [3], "num_experts": [5], "fanout": [1]},
    "one level, dense": {"rank": [8], "num_experts": [3], "fanout": [1], "gate": "dense"},
    "wide": {"rank": [16, 16]},
}
LEFT_TO_PYTORCH: dict[str, dict[str, Any]] = {
    "three levels": FORMS["three levels"],
    "too wide a state": {"rank": [32, 32]},
    "too wide a router": {"key_dim": 128},
    "too many children": {"rank": [4, 4], "num_experts": [8, 16], "fanout": [2, 16]},
}


@pytest.fixture(scope="module")
def Kernel() -> Any:
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
    from smore_cli.kernels.tree_triton import TritonTree

    return TritonTree


def made(fields: dict[str, Any], Kernel: Any) -> tuple[Tree, Any, list[Tensor]]:
    tree = make(**fields).to(DEVICE)
    shape = shape_of(tree)
    assert shape is not None
    return tree, Kernel(shape, programs=2), [attrgetter(name)(tree).detach() for name in tree.core_names]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape).to(DEVICE)


@pytest.mark.parametrize("tokens", [1, 3 * TOKENS - 5])
@pytest.mark.parametrize("form", FEW_LEVELS)
def test_the_kernel_computes_what_the_equations_give_in_float64(
    form: str, tokens: int, Kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, kernel, _ = made(FEW_LEVELS[form], Kernel)
    latent, slope = draw(tokens, tree.down().height), draw(tokens, tree.widths[-1])
    mask = torch.arange(tokens, device=DEVICE) % 5 != 3
    with monkeypatch.context() as patched:
        patched.setattr(tree_recompute, "find_kernel", lambda *_: kernel)
        found, loads = step(tree, latent, slope, mask)
    monkeypatch.setattr(tree_recompute, "find_kernel", tree_recompute.no_kernel)
    exact, exact_loads = step(tree.double(), latent.double(), slope.double(), mask)
    assert_close(dict(zip(["state", "aux", "latent", *tree.core_names], found, strict=True)), exact)
    for a, b in zip(loads, exact_loads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("with_state", [True, False], ids=["with the state's", "without the state's"])
@pytest.mark.parametrize("form", ["as by default", "pool weights", "dense", "one level"])
def test_every_output_has_its_gradient(form: str, with_state: bool, Kernel: Any) -> None:
    tree, kernel, parameters = made(FEW_LEVELS[form], Kernel)
    latent = draw(40, tree.down().height)
    state, picks = kernel.forward(latent, parameters)
    names = ["alpha", "logits", "probabilities"]
    given = [{name: torch.randn_like(getattr(level, name)) for name in names} for level in picks]
    chosen = [level.chosen for level in picks]
    d_state = torch.randn_like(state) if with_state else None
    found = kernel.backward(latent, parameters, chosen, Gradients(d_state, given))
    wide = latent.double().requires_grad_()
    exact, exact_picks = tree.double().core(wide)
    for a, b in zip(picks, exact_picks, strict=True):
        assert torch.equal(a.chosen, b.chosen)
        for name in names:
            torch.testing.assert_close(getattr(a, name).double(), getattr(b, name), rtol=2e-5, atol=2e-6)
    reached = [(exact, d_state)] if d_state is not None else []
    reached += [(getattr(level, n), each[n]) for level, each in zip(exact_picks, given, strict=True) for n in names]
    outputs, slopes = zip(*reached, strict=True)
    inputs = [wide, *(attrgetter(name)(tree) for name in tree.core_names)]
    expected = torch.autograd.grad(
        outputs, inputs, [each.double() for each in slopes], allow_unused=True, materialize_grads=True
    )
    assert_close(dict(zip(["latent", *tree.core_names], found, strict=True)), expected)


@pytest.mark.parametrize("form", LEFT_TO_PYTORCH)
def test_other_forms_are_left_to_pytorch(form: str) -> None:
    assert shape_of(make(**LEFT_TO_PYTORCH[form])) is None


def test_only_what_registers_cannot_hold_is_computed_in_three_parts() -> None:
    shapes = [shape_of(make(**fields)) for fields in ({}, {"rank": [16, 16]})]
    assert [shape and shape.precision for shape in shapes] == ["ieee", "tf32x3"]
    assert shapes[0] is not None
    assert shapes[0].F * shapes[0].T * shapes[0].levels[-1].D <= MOST_PLAIN


def test_of_equal_experts_the_first_is_picked(Kernel: Any) -> None:
    tree, kernel, parameters = made({"num_experts": [4, 5], "fanout": [2, 3], "rank": [4, 4]}, Kernel)
    with torch.no_grad():
        for level in tree.router.levels:
            level.keys.copy_(level.keys[:1].expand_as(level.keys))  # type: ignore[union-attr, operator, index]
    _, picks = kernel.forward(draw(20, tree.down().height), parameters)
    for level in picks:
        first = torch.arange(len(level.chosen), device=DEVICE).view(-1, *(1 for _ in level.chosen.shape[1:]))
        assert torch.equal(level.chosen, first.expand_as(level.chosen))


@NUMPY_WARNS
def test_not_a_number_stays_one_and_in_its_token(Kernel: Any) -> None:
    """A run that diverges must be seen to."""
    tree, kernel, parameters = made({}, Kernel)
    good = draw(40, tree.down().height)
    for column in (0, -1):  # of a leaf, of the router
        bad = good.clone()
        bad[7, column] = torch.nan
        state, picks = kernel.forward(bad, parameters)
        assert state[7].isnan().any()
        assert state.isnan().any(1).sum() == 1
        for level in picks:
            assert ((level.chosen >= 0) & (level.chosen < level.logits.shape[0])).all()
        chosen = [level.chosen for level in picks]
        d_latent, *grads = kernel.backward(bad, parameters, chosen, Gradients(torch.ones_like(state), [{}, {}]))
        assert d_latent.isnan().any(1).sum() == 1
        assert any(grad.isnan().any() for grad in grads)


@NUMPY_WARNS
def test_large_numbers_saturate(Kernel: Any) -> None:
    tree, kernel, parameters = made({}, Kernel)
    latent = 1e4 * draw(20, tree.down().height)
    state, picks = kernel.forward(latent, parameters)
    assert state.isfinite().all()
    exact = tree.double().core(latent.double(), [level.choice for level in picks])[0]
    torch.testing.assert_close(state.double(), exact, rtol=1e-4, atol=1e-4)


def test_a_tokens_numbers_depend_on_no_other_token_and_gradients_are_repeated(Kernel: Any) -> None:
    tree, kernel, parameters = made({}, Kernel)
    latent, slope = draw(40, tree.down().height), draw(40, tree.widths[-1])

    def run(rows: slice) -> tuple[Tensor, ...]:
        state, picks = kernel.forward(latent[rows], parameters)
        chosen = [level.chosen for level in picks]
        return state, *kernel.backward(latent[rows], parameters, chosen, Gradients(slope[rows], [{}, {}]))

    whole, again = run(slice(None)), run(slice(None))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    parts = [run(slice(at, at + 23)) for at in (0, 23)]
    for i in range(2):  # the state, the latent's gradient
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))


def test_a_latent_with_other_strides_is_the_same(Kernel: Any) -> None:
    tree, kernel, parameters = made({}, Kernel)
    latent = draw(20, 3 * tree.down().height)[:, 5 : 5 + tree.down().height]
    state, picks = kernel.forward(latent.contiguous(), parameters)
    gradients = Gradients(torch.ones_like(state), [{}, {}])
    found = kernel.backward(latent.contiguous(), parameters, [level.chosen for level in picks], gradients)
    for other in (latent, latent.t().contiguous().t()):
        assert torch.equal(kernel.forward(other, parameters)[0], state)
        again = kernel.backward(other, parameters, [level.chosen for level in picks], gradients)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_it_is_tried_before_it_is_used(Kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, kernel, _ = made({}, Kernel)
    device = torch.device(DEVICE)
    monkeypatch.setattr(tree_kernel, "_TRITON", {})
    with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16):
        assert isinstance(tree_kernel._triton(tree, device), Kernel)
    assert tree_kernel._triton(make(), device) is tree_kernel._triton(tree, device)  # once a shape
    assert tree_kernel._triton(make(**FORMS["three levels"]), device) is None
    right = Kernel.backward
    monkeypatch.setattr(Kernel, "backward", lambda *args: [2 * each for each in right(*args)])
    assert not kernel.works(tree, device)
    monkeypatch.setattr(tree_kernel, "_TRITON", {})
    assert tree_kernel._triton(tree, device) is None


def test_without_triton_pytorch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "smore_cli.kernels.tree_triton", None)
    assert tree_kernel._triton(make(), torch.device(DEVICE)) is None


COMPILE = """
import sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from smore_cli.kernels import tree_triton
from smore_cli.kernels.tree_shape import shape_of
from tests.kernels.trees import make

class Absent:  # a GPU of which only the kind is known
    get_current_target = lambda self: GPUTarget("cuda", int(sys.argv[1]), 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

driver.set_active(Absent())
floats, ids, shape = torch.empty(16), torch.empty(16, dtype=torch.int64), shape_of(make())
common = {"q": shape, "grid": (1,), **tree_triton.OPTIONS}
start, level, slopes = (floats, floats, 96, 100, floats), (ids, floats, floats, floats), (ids, None, None, floats)
for made in (
    tree_triton._forward.warmup(*start, *level, *level, **common),
    tree_triton._backward.warmup(*start, *slopes, *slopes, floats, floats, **common),
):
    print(len(made.asm["cubin"]), made.metadata.shared, *(made.asm["ptx"].count(word) for word in ("tf32", "atom")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [80, 90])
def test_it_compiles_for_a_gpu_that_is_not_here(kind: int) -> None:
    pytest.importorskip("triton.backends.nvidia", reason="this Triton compiles for no NVIDIA GPU")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COMPILE, str(kind)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    sizes = [[int(number) for number in line.split()] for line in done.stdout.splitlines()]
    assert len(sizes) == 2
    for cubin, shared, tf32, atomic in sizes:
        assert cubin > 0
        assert shared <= 48 * 1024
        assert tf32 == atomic == 0
