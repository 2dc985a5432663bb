"""Small real computations that tell what works on a device: what `smore doctor` runs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from smore_cli.atomic import write_text
from smore_cli.kernels import use
from smore_cli.methods import Site, config_from_dict
from smore_cli.models.cache import cache_folder
from smore_cli.models.quiet import quiet
from smore_cli.models.source import one_line
from smore_cli.nn import routed_block, routed_grid, tree_recompute
from smore_cli.nn.routed_block import Form
from smore_cli.nn.selection import TopK

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Probe", "run_probes"]

_SIZE = 512
"""Rows and columns of the matrices: large enough for the speed to mean something, a few milliseconds on any device."""


@dataclass(frozen=True)
class Probe:
    """The outcome of one probe.

    Attributes:
        name: what was tried.
        works: whether it did what it should.
        required: whether nothing can be trained without it.
        detail: what was measured, or what went wrong.
    """

    name: str
    works: bool
    required: bool
    detail: str


def run_probes(device: torch.device) -> list[Probe]:
    """Runs every probe on `device`; a probe that fails is a result, not an error."""
    return [
        _probe(f"float32 forward and backward on {device}", lambda: _float32(device), required=True),
        _probe(f"bfloat16 forward and backward on {device}", lambda: _bfloat16(device), required=False),
        _probe(f"4-bit (nf4) forward and backward on {device}", lambda: _four_bit(device), required=False),
        _probe("writing into the cache folder", _cache, required=True),
        _probe("compiled kernels on the CPU (only faster)", _kernels, required=False),
    ]


def _probe(name: str, attempt: Callable[[], str], *, required: bool) -> Probe:
    try:
        return Probe(name, True, required, attempt())
    except Exception as error:  # whatever a broken installation raises is what the user wants to read
        return Probe(name, False, required, f"{type(error).__name__}: {one_line(error)}")


def _float32(device: torch.device) -> str:
    _check_product(device, torch.float32, tolerance=1e-3)
    return f"{_milliseconds(device, torch.float32):.1f} ms"


def _check_product(device: torch.device, dtype: torch.dtype, *, tolerance: float) -> None:
    weight, x = _matrices(device, dtype)
    expected = x.double() @ weight.double().t()
    y = F.linear(x, weight)
    gradient = torch.autograd.grad(y.sum(), x)[0]
    _require_close("the product", y, expected, tolerance)
    _require_close("the gradient", gradient, weight.double().sum(0).expand_as(x), tolerance)


def _bfloat16(device: torch.device) -> str:
    _check_product(device, torch.bfloat16, tolerance=2e-2)
    times = {dtype: _milliseconds(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    half, full = times[torch.bfloat16], times[torch.float32]
    return f"{half:.1f} ms, {half / full:.1f} x the {full:.1f} ms of float32"


def _four_bit(device: torch.device) -> str:
    """Compares a bitsandbytes layer with its own dequantised weight."""
    with quiet():
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn.modules import Linear4bit

        layer: Any = Linear4bit(_SIZE, _SIZE, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer = layer.to(device)
        weight = dequantize_4bit(layer.weight, layer.weight.quant_state).double()
        _, x = _matrices(device, torch.float32)
        y = layer(x)
        gradient = torch.autograd.grad(y.sum(), x)[0]
    _require_close("the product", y, x.double() @ weight.t(), 1e-3)
    _require_close("the gradient", gradient, weight.sum(0).expand_as(x), 1e-3)
    return "equal to its dequantised weight"


def _cache() -> str:
    folder = cache_folder()
    path = folder / ".doctor"
    write_text(path, "")
    path.unlink()
    return str(folder)


def _kernels() -> str:
    """Compares the compiled cores with PyTorch's."""
    use()
    config = config_from_dict({"method": "smore", "init": "normal"})
    tree: Any = config.build(Site("probe", _SIZE, _SIZE))
    latent = torch.randn(_SIZE, tree.down().height, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        parameters = [tree.get_parameter(name) for name in tree.core_names]
        if (kernel := tree_recompute.find_kernel(tree, latent, parameters)) is None:
            raise RuntimeError("no C compiler that works (cc, gcc, clang, $CC), or SMORE_KERNELS=0")
        _require_close("the state", kernel.forward(latent, parameters)[0], tree.core(latent)[0].double(), 1e-4)
        form = Form(8, 4, fan=False, select=TopK(2))
        latent = torch.randn(_SIZE, 40, generator=torch.Generator().manual_seed(0))
        if (block := routed_block.find_kernel(latent, form)) is None:
            raise RuntimeError("the C compiler that made one kernel does not make another")
        expected = routed_block.forward(latent.double(), form)[0]
        _require_close("the mixed latent", block.forward(latent, form)[0], expected, 1e-5)
        pairs = routed_grid.Form(4, 9.0, 4.0, 100.0, None)  # of the 40 numbers 4 are latents, 36 the logits of 4 x 9
        given = routed_grid.Given(latent, torch.zeros(1), torch.zeros(1))
        if (grid := routed_grid.find_kernel(latent, pairs)) is None:
            raise RuntimeError("the C compiler that made two kernels does not make the third")
        gates = routed_grid.prior_gates(latent[:, None, 4:].double().softmax(-1), given.omega, given.nu, pairs)
        expected = routed_grid.grid(latent[:, :4].double(), gates)
        _require_close("the grid", grid.forward(given, pairs)[0], expected, 1e-5)
    return "S'MoRE's trees, routed blocks and grids, equal to PyTorch"


def _matrices(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a weight and an input that wants its gradient."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(_SIZE, _SIZE, generator=generator).to(device, dtype) for _ in range(2))
    return weight, x.requires_grad_()


def _require_close(what: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())
    if not error < tolerance:
        raise ArithmeticError(f"{what} is wrong by {error:.1e}")


def _milliseconds(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Returns the shortest time of one forward and backward product."""
    weight, x = _matrices(device, dtype)
    times = []
    for _ in range(repeats):
        _synchronise(device)
        start = time.perf_counter()
        torch.autograd.grad(F.linear(x, weight).sum(), x)
        _synchronise(device)
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
