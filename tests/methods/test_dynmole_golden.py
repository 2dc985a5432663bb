"""DynMoLE's layer and loss against the numbers of the released code (float64, and float32 within its rounding)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from smore_cli.methods import Site
from smore_cli.methods.dynmole import DynMoLEConfig
from smore_cli.methods.lora import LoRAConfig
from smore_cli.methods.mola import MoLAConfig
from smore_cli.nn import AdapterContext
from tests.methods.dynmole_oracle import route_by_loops
from tests.nn.routings import routing_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from smore_cli.methods import MethodConfig
    from smore_cli.nn.bank import Bank

PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])


@pytest.fixture(scope="module")
def golden(shared_golden: Path) -> dict[str, Tensor]:
    with np.load(shared_golden / "dynmole.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


# One linear map.

LAYERS: dict[str, type[MethodConfig] | Any] = {
    "y_soft": lambda **c: DynMoLEConfig(threshold=0.0, eps=0.0, **c),
    "y_top2": lambda **c: MoLAConfig(**c),
    "y_dynmole_code": lambda **c: DynMoLEConfig(preset="released", **c),
}


def layer_of(golden: Mapping[str, Tensor], config: MethodConfig) -> Bank:
    s, r, d_in = golden["L_A"].shape
    bank: Bank = config.build(Site("site", d_in, len(golden["L_W"]))).double().eval()  # type: ignore[assignment]
    with torch.no_grad():
        bank.A.copy_(golden["L_A"].reshape(s * r, d_in))
        bank.B.copy_(golden["L_B"].permute(1, 0, 2).reshape(-1, s * r))
        bank.router.weight.copy_(golden["L_Wg"])
    return bank


def shape_of(golden: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"num_experts": 6, "rank": 3, "alpha": 3 * golden["L_scale"].item()}


@PRECISIONS
@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_equals_the_reference(
    golden: dict[str, Tensor], name: str, dtype: torch.dtype, tolerance: float
) -> None:
    bank, x = layer_of(golden, LAYERS[name](**shape_of(golden))).to(dtype), golden["L_x"].to(dtype)
    out = bank(x, x @ golden["L_W"].to(dtype).T)
    torch.testing.assert_close(out, golden[f"L_{name}"].to(dtype), rtol=tolerance, atol=tolerance)


@PRECISIONS
def test_the_layers_weights_equal_the_reference(
    golden: dict[str, Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    bank = layer_of(golden, DynMoLEConfig(**shape_of(golden))).to(dtype)
    traces = []
    with AdapterContext(aux=False, observe=traces.append):
        bank(golden["L_x"].to(dtype), torch.zeros(32, 9, dtype=dtype))
    torch.testing.assert_close(
        traces[0].gates[:, 0], golden["L_w_dynmole_code"].to(dtype), rtol=tolerance, atol=tolerance
    )
    probabilities = torch.softmax(golden["L_z"], -1).to(dtype)
    torch.testing.assert_close(traces[0].probabilities[:, 0], probabilities, rtol=tolerance, atol=tolerance)


@PRECISIONS
@pytest.mark.parametrize("method", ["lora", "dynmole", "mola"])
def test_a_single_expert_equals_the_reference_lora(
    golden: dict[str, Tensor], method: str, dtype: torch.dtype, tolerance: float
) -> None:
    settings: dict[str, Any] = {"rank": 3, "alpha": 3 * golden["L_scale"].item()}
    site, x = Site("site", 10, 9), golden["L_x"].to(dtype)
    configs: dict[str, MethodConfig] = {
        "lora": LoRAConfig(**settings),
        "dynmole": DynMoLEConfig(num_experts=1, top_k=1, **settings),
        "mola": MoLAConfig(num_experts=1, top_k=1, **settings),
    }
    adapter: Any = configs[method].build(site).to(dtype).eval()
    A, B = (adapter.lora_A, adapter.lora_B) if method == "lora" else (adapter.A, adapter.B)
    with torch.no_grad():
        A.copy_(golden["L_A"][0])
        B.copy_(golden["L_B"][0])
    out = adapter(x, x @ golden["L_W"].to(dtype).T)
    torch.testing.assert_close(out, golden["L_y_lora_expert0"].to(dtype), rtol=tolerance, atol=tolerance)


def test_the_layer_with_the_crossing_expert_and_renormalised_weights_equals_a_loop(golden: dict[str, Tensor]) -> None:
    config = DynMoLEConfig(crossing=True, renormalise=True, **shape_of(golden))
    x, expected = golden["L_x"], golden["L_x"] @ golden["L_W"].T
    for t, p in enumerate(torch.softmax(golden["L_z"], -1).tolist()):
        for e, weight in enumerate(route_by_loops(p, config)[1]):
            expected[t] += weight * golden["L_scale"] * (golden["L_B"][e] @ (golden["L_A"][e] @ x[t]))
    out = layer_of(golden, config)(x, x @ golden["L_W"].T)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


# The auxiliary loss: [total, mean entropy, balance].


def terms(config: DynMoLEConfig, z: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The entropy and the balance term, times their coefficients, of a router with these logits."""
    bank: Bank = config.build(Site("site", 4, 4))  # type: ignore[assignment]
    routing = routing_of(z, bank.router.select)
    with AdapterContext(token_mask=mask) as context:
        return [loss(loss.sums(routing, context)[None]).sum() for loss in bank.losses]


CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "": ({}, False),
    "_mask": ({"preset": "released"}, True),
    "_mask_entmask": ({}, True),
    "_hard": ({"balance_fractions": "hard"}, False),
}


@PRECISIONS
@pytest.mark.parametrize("case", CASES)
def test_the_loss_equals_the_reference(
    golden: dict[str, Tensor], case: str, dtype: torch.dtype, tolerance: float
) -> None:
    fields, masked = CASES[case]
    mask = golden["mask"].view(4, 8) if masked else None
    entropy, balance = terms(DynMoLEConfig(**fields), golden["z6"].to(dtype), mask)
    expected = golden[f"dynloss6{case}"].tolist()
    found = [(entropy + balance).item(), entropy.item() / 0.01, balance.item() / 0.001]
    assert found == pytest.approx(expected, rel=tolerance)


@PRECISIONS
@pytest.mark.parametrize("case", ["", "_mask"])
def test_the_gradient_of_the_loss_equals_the_reference(
    golden: dict[str, Tensor], case: str, dtype: torch.dtype, tolerance: float
) -> None:
    fields, masked = CASES[case]
    z = golden["z6"].to(dtype, copy=True).requires_grad_()
    sum(terms(DynMoLEConfig(**fields), z, golden["mask"].view(4, 8) if masked else None)).backward()  # type: ignore[union-attr]
    expected = golden["dynloss6_grad" + case].to(dtype)
    torch.testing.assert_close(z.grad, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_the_reference_losses_tell_the_variants_apart(golden: dict[str, Tensor]) -> None:
    totals = [golden[f"dynloss6{case}"][0].item() for case in CASES]
    assert all(abs(a - b) > 1e-6 for i, a in enumerate(totals) for b in totals[:i])
