"""The gradient of a step does not depend on how the step is split, recomputed or padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from smore_cli.data.batch import Row, collate
from smore_cli.nn import AdapterContext
from smore_cli.recipe.schema import Recipe
from smore_cli.training.objective import Counts
from smore_cli.training.setup import Setup, prepare
from smore_cli.training.step import StepResult, accumulate_gradients

MakeRecipe = Callable[..., Recipe]
NOISY = {
    "method": "smore",
    "target_modules": ["q_proj", "up_proj"],
    "rank": [2, 2],
    "num_experts": [4, 4],
    "fanout": [2, 2],
    "gate": "noisy_topk",
    "router_dim": 4,
    "key_dim": 4,
    "init": "normal",
}
SWITCH = {**NOISY, "gate": "switch"}
LORA = {"method": "lora", "rank": 4}


def silent(_: str) -> None:
    """Says nothing."""


def gradients(setup: Setup, splits: Sequence[Sequence[Row]], **options: bool) -> tuple[StepResult, dict[str, Tensor]]:
    setup.model.zero_grad()
    batches = [collate(rows, pad_token_id=2, mask_dtype=torch.float64) for rows in splits]
    result = accumulate_gradients(
        setup.model, batches, setup.objective, device=torch.device("cpu"), backward=Tensor.backward, **options
    )
    grads = {name: p.grad.clone() for name, p in setup.model.named_parameters() if p.grad is not None}
    assert grads
    return result, grads


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("objective", ["completion", "choice_ranking"])
@pytest.mark.parametrize("adapter", [LORA, SWITCH], ids=["lora", "smore"])
def test_loss_aux_and_gradient_do_not_depend_on_the_split(recipe: MakeRecipe, adapter: dict, objective: str) -> None:
    setup = prepare(recipe(adapter=adapter, data={"objective": objective}), silent)
    setup.model.double()
    rows = setup.train_rows[:8]
    whole, expected = gradients(setup, [rows])
    for size in (1, 3, 4):
        split, found = gradients(setup, [rows[i : i + size] for i in range(0, 8, size)])
        assert_equal(expected, found)
        torch.testing.assert_close(whole.loss, split.loss)
        torch.testing.assert_close(whole.aux, split.aux)
    assert (whole.aux > 0) == (adapter is SWITCH)


def test_per_pass_statistics_do_depend_on_the_split(recipe: MakeRecipe) -> None:
    """What `aux_statistics: micro_batch` gives up, so that the test above could fail."""
    setup = prepare(recipe(adapter=SWITCH), silent)
    setup.model.double()
    rows = setup.train_rows[:8]
    whole, _ = gradients(setup, [rows])
    split, _ = gradients(setup, [[row] for row in rows], aux_over_step=False)
    assert abs(float(whole.aux - split.aux)) > 1e-6


def test_the_statistics_pass_leaves_no_trace_in_the_noise(recipe: MakeRecipe) -> None:
    """With a weightless balance loss, the step draws the same noise with and without the extra pass."""
    setup = prepare(recipe(adapter={**NOISY, "aux_loss_coefficient": 0.0}), silent)
    setup.model.double()
    splits = [setup.train_rows[:3], setup.train_rows[3:6]]
    found = []
    for aux_over_step in (True, False):
        torch.manual_seed(3)
        found.append(gradients(setup, splits, aux_over_step=aux_over_step)[1])
    assert_equal(found[0], found[1], 0)


def test_a_noisy_step_evaluates_its_balance_loss_on_the_sums_of_all_passes(recipe: MakeRecipe) -> None:
    """The value that each pass reports, computed from the extra pass, is what the sums of the real passes give."""
    setup = prepare(recipe(adapter=NOISY), silent)
    setup.model.double()
    splits = [setup.train_rows[:3], setup.train_rows[3:6]]
    torch.manual_seed(3)
    whole, _ = gradients(setup, splits)
    torch.manual_seed(3)
    sums: list[Tensor] = []
    for rows in splits:
        batch = collate(rows, pad_token_id=2)
        with torch.no_grad(), AdapterContext(token_mask=batch.token_mask) as context:
            setup.objective(setup.model, batch, Counts.of([batch]))
        found = context.statistics()
        sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
    expected = sum(float(record.loss(total)) for record, total in zip(context.records, sums, strict=True))
    assert float(whole.aux) == pytest.approx(expected, rel=1e-6)  # reported in float32


@pytest.mark.parametrize("adapter", [LORA, SWITCH, NOISY], ids=["lora", "switch", "noisy"])
def test_checkpointing_changes_no_gradient(recipe: MakeRecipe, adapter: dict) -> None:
    plain = prepare(recipe(adapter=adapter), silent)
    recomputed = prepare(recipe(adapter=adapter, train={"gradient_checkpointing": True}), silent)
    assert recomputed.model.is_activation_checkpointing
    results = []
    for setup in (plain, recomputed):
        setup.model.double()
        torch.manual_seed(5)
        results.append(gradients(setup, [setup.train_rows[:4], setup.train_rows[4:8]]))
    (a, grads_a), (b, grads_b) = results
    assert_equal(grads_a, grads_b)
    torch.testing.assert_close(a.aux, b.aux)
    assert len(a.loads) == len(b.loads)
    assert bool(a.loads) == (adapter is not LORA)


def test_padding_changes_neither_loss_nor_aux(recipe: MakeRecipe) -> None:
    setup = prepare(recipe(adapter=SWITCH), silent)
    setup.model.double()
    rows = sorted(setup.train_rows[:40], key=lambda row: row.length)
    short, long = rows[:2], rows[-1]
    _, padded = gradients(setup, [[*short, long]])
    _, split = gradients(setup, [short, [long]])
    assert_equal(padded, split)


def test_aux_loss_alone_moves_the_router(recipe: MakeRecipe) -> None:
    """With P = 0 no completion gradient reaches the router, so all it gets comes from the balance loss."""
    setup = prepare(recipe(), silent)
    _, grads = gradients(setup, [setup.train_rows[:4]])
    router = {name: g for name, g in grads.items() if ".router." in name}
    inner = {name: g for name, g in grads.items() if name.rsplit(".", 2)[-2] in ("A", "B", "W", "a", "b", "w")}
    assert max(float(g.abs().max()) for g in router.values()) > 0
    assert max(float(g.abs().max()) for g in inner.values()) == 0
