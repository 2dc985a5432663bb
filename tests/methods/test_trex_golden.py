"""T-REX's layer gives the numbers of the released code: outputs and all gradients, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from smore_cli.methods import Site
from smore_cli.methods.trex import TRexConfig, from_original
from smore_cli.nn import AdapterContext

if TYPE_CHECKING:
    from pathlib import Path

    from smore_cli.nn.prior import PriorBank

CASES = ["flex_small", "flex_no_prior", "flex_init_router", "flex_init_all", "flex_saturated_token"]
CLOSE: dict[str, float] = {"rtol": 1e-10, "atol": 1e-12}
NAMES = {"A": "A", "B": "B", "R": "router.weight", "omega": "router.omega", "g": "router.g"}


@pytest.fixture(scope="module")
def golden(shared_golden: Path) -> dict[str, torch.Tensor]:
    with np.load(shared_golden / "trex.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def bank_of(case: dict[str, torch.Tensor], **fields: Any) -> PriorBank:
    """Returns the adapter that the case's tensors, under their released names, load into."""
    config = TRexConfig(num_down=len(case["A"]), num_up=case["B"].shape[1], token_scale=32.0, **fields)
    bank: PriorBank = config.build(Site("site", 10, 7)).double()  # type: ignore[assignment]
    original = {
        "lora_A.weight": case["A"],
        "lora_B.weight": case["B"],
        "router.weight": case["R"],
        "omg.weight": case["omega"].view(1, 1),
        "binary_main_gate_weight.weight": case["g"].view(1, 1),
    }
    bank.load_state_dict(from_original(original))
    return bank


@pytest.mark.parametrize("of_prior", [False, True], ids=["one node", "a prior with a gradient"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_the_released_codes(
    golden: dict[str, torch.Tensor], name: str, of_prior: bool
) -> None:
    case = {key.removeprefix(f"{name}/"): value for key, value in golden.items() if key.startswith(f"{name}/")}
    bank = bank_of(case, **({"prior": "none"} if name == "flex_no_prior" else {}))
    x, s = case["x"].clone().requires_grad_(), case["s"].clone().requires_grad_(of_prior)
    torch.testing.assert_close(case["emb"] @ case["centroids"].T, case["s"], **CLOSE)
    traces: list[Any] = []
    with AdapterContext(aux=False, observe=traces.append, prior=s):
        y = bank(x, F.linear(x, case["W"], case["bias"]))
    torch.testing.assert_close(y, case["y"], **CLOSE)
    torch.testing.assert_close(traces[0].probabilities.view_as(case["p"]), case["p"], **CLOSE)
    scaled = torch.sigmoid(100 * case["g"]) * case["pi"]
    torch.testing.assert_close(traces[0].gates.view_as(case["pi"]), scaled, **CLOSE)
    (y * case["dy"]).sum().backward()
    parameters = dict(bank.named_parameters())
    for theirs, ours in NAMES.items():
        wanted = case[f"grad_{theirs}"]
        torch.testing.assert_close(parameters[ours].grad.view_as(wanted), wanted, **CLOSE)  # type: ignore[union-attr]
    torch.testing.assert_close(x.grad, case["grad_x"], **CLOSE)
    if of_prior and "grad_s" in case:  # the file has finite differences here: the released code treats s as data
        torch.testing.assert_close(s.grad, case["grad_s"], rtol=1e-6, atol=1e-8)


def test_with_b_zero_the_golden_case_moves_b_alone(golden: dict[str, torch.Tensor]) -> None:
    gradients = {key: golden[f"flex_init_all/grad_{key}"] for key in NAMES}
    assert [key for key, gradient in gradients.items() if gradient.any()] == ["B"]
