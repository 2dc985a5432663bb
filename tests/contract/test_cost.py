"""What an adapted linear map costs, counted: operations of a forward and backward pass, bytes kept between them.

Seconds belong to a machine and are measured in `benchmarks/`; these counts are the same everywhere. PEFT's LoRA, plain
autograd around two linear maps, runs 14 operations and keeps 4 bytes a token for each of its ranks. A count that rises
is a regression, one that falls is good news: write the new one down.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest
import torch

from smore_cli.methods import available_methods, load_method
from smore_cli.nn import AdapterContext
from tests.conftest import PROJECT

if TYPE_CHECKING:
    from torch import Tensor

D, ROWS, LENGTH = 64, 4, 32
TOKENS = ROWS * LENGTH

# A softmax over few experts counts a copy as well: they are laid out first, where it takes a fifth of the time.
# method: (operations, bytes kept a token), with the settings of the benchmarks: a total rank of 32, a tree of 4-4.
COUNTED: dict[str, tuple[int, int]] = {
    "comol": (33, 736),
    "dynmole": (76, 464),
    "goat": (52, 752),
    "hydralora": (31, 208),
    "lora": (16, 128),
    "loramoe": (48, 326),
    "mode": (30, 400),
    "moelora": (107, 2802),
    "mola": (47, 368),
    "mor": (63, 580),
    "omoe": (110, 770),
    "smore": (225, 596),
    "trex": (58, 565),
}


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The modules that the benchmarks share."""
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    return importlib.import_module("common"), importlib.import_module("subjects")


@pytest.mark.parametrize("method", [name for name in available_methods() if "gated_mlp" not in load_method(name).sites])
def test_no_method_runs_more_operations_or_keeps_more_than_it_did(
    method: str, benchmarks: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMORE_KERNELS", "0")  # what PyTorch does: everything there is on a machine without a compiler
    common, subjects = benchmarks
    base = subjects.frozen_linear(D, D, dtype=torch.float32, device="cpu", nf4=False)
    config = subjects.method_config(method)
    module = subjects.adapted_linear(base, config, (D, D))
    x = torch.randn(ROWS, LENGTH, D, requires_grad=True)
    context: AdapterContext = subjects.context_for(config, ROWS, LENGTH, "cpu")

    def forward() -> Tensor:
        with context:
            return module(x)  # type: ignore[no-any-return]

    def step() -> None:
        forward().sum().backward()

    step()
    kept = common.saved_bytes(forward, [x, *subjects.frozen_parts(module)]) / TOKENS
    found = (common.launches(step, "cpu"), kept)
    assert method in COUNTED, f"{method}: write down {found}"
    operations, most = COUNTED[method]
    assert found[0] <= operations
    assert found[1] <= most


def test_no_method_asks_the_device_for_a_number_in_a_step(benchmarks: tuple[Any, Any]) -> None:
    """On a GPU the host would wait for all work that is queued, once for every adapted map."""
    common, subjects = benchmarks
    base = subjects.frozen_linear(D, D, dtype=torch.float32, device="cpu", nf4=False)
    x = torch.randn(ROWS, LENGTH, D, requires_grad=True)
    asking = {}
    for method in available_methods():
        if "gated_mlp" in load_method(method).sites:
            continue
        config = subjects.method_config(method)
        module = subjects.adapted_linear(base, config, (D, D))

        def step(module: Any = module, config: Any = config) -> None:
            with subjects.context_for(config, ROWS, LENGTH, "cpu") as context:
                out = module(x)
            (out.sum() + context.aux_loss()).backward()

        step()
        if count := common.host_syncs(step, "cpu"):
            asking[method] = count
    assert asking == {}
