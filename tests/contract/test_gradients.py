"""Gradients: against finite differences, and the same however a step is computed."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from smore_cli.data.batch import collate
from smore_cli.nn import checkpoint_contexts
from smore_cli.training.objective import Objective
from smore_cli.training.step import StepResult, accumulate_gradients
from tests.contract.models import PAD, Case, assert_same, batch, gradients, kind, logits, loss_of, rows, token_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from smore_cli.data.batch import Batch, Row

STEPS = (1e-4, 1e-5, 1e-6)


def test_gradients_equal_finite_differences(case: Case) -> None:
    """For each kind of parameter (over all modules), along a direction half of which is random."""
    model, data = case.random(torch.float64, **case.without_dropout).train(), batch()
    seeded_loss(model, data).backward()
    found = gradients(model)
    parameters: dict[str, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameters[kind(name)].append((parameter, found[name]))
    assert parameters
    generator = torch.Generator().manual_seed(5)
    if getattr(case.config, "use_dora", False):  # holds the length of W + s B A constant; `test_dora.py` checks that
        parameters = {"lora_magnitude_vector": parameters["lora_magnitude_vector"]}
    for name, group in parameters.items():
        tensors, slopes = zip(*group, strict=True)
        length = torch.stack([slope.square().sum() for slope in slopes]).sum().sqrt()
        assert length.isfinite() and length > 0, name
        noise = [torch.randn(slope.shape, dtype=torch.float64, generator=generator) for slope in slopes]
        size = torch.stack([part.square().sum() for part in noise]).sum().sqrt()
        direction = [slope / length + part / size for slope, part in zip(slopes, noise, strict=True)]
        expected = float(sum((slope * part).sum() for slope, part in zip(slopes, direction, strict=True)))
        # A step may cross a tie between experts or the bend of a ReLU; a wrong gradient is wrong at every step.
        errors: list[float] = []
        while not errors or min(errors) >= 1e-5:
            assert len(errors) < len(STEPS), f"{name}: relative errors {errors}"
            found_slope = slope_along(model, data, tensors, direction, STEPS[len(errors)])
            errors.append(abs(found_slope - expected) / abs(expected))


def seeded_loss(model: nn.Module, data: Batch) -> Tensor:
    """Returns the loss with the same noise, where a router draws any, in every pass."""
    torch.manual_seed(0)
    return loss_of(model, data)


@torch.no_grad()
def slope_along(
    model: nn.Module, data: Batch, tensors: Sequence[Tensor], direction: Sequence[Tensor], h: float
) -> float:
    """Returns the central difference of the loss, and puts the parameters back."""
    before, losses = [tensor.clone() for tensor in tensors], []
    for sign in (1, -1):
        for tensor, value, part in zip(tensors, before, direction, strict=True):
            tensor.copy_(value + sign * h * part)
        losses.append(float(seeded_loss(model, data)))
    for tensor, value in zip(tensors, before, strict=True):
        tensor.copy_(value)
    return (losses[0] - losses[1]) / (2 * h)


def step(model: nn.Module, splits: Sequence[Sequence[Row]]) -> tuple[StepResult, dict[str, Tensor]]:
    """Runs the trainer's own step, with the same random numbers whenever it is called."""
    torch.manual_seed(0)
    result = accumulate_gradients(
        model,
        [collate(part, pad_token_id=PAD) for part in splits],
        Objective(ranking=False, completion_weight=0.0),
        device=torch.device("cpu"),
        backward=torch.Tensor.backward,
    )
    return result, gradients(model)


def deterministic(model: nn.Module) -> bool:
    """Whether two passes give the same."""
    first, second = (logits(model, token_ids(2, 7)) for _ in range(2))
    return torch.equal(first, second)


def test_splitting_a_step_into_passes_changes_neither_gradients_nor_auxiliary_loss(case: Case) -> None:
    model, data = case.random(torch.float64, **case.without_dropout), rows(5)
    # Noise of a router's own cannot be the same in every split.
    model.train(deterministic(model.train()))
    whole, expected = step(model, [data])
    parts, found = step(model, [data[:1], data[1:3], data[3:]])
    assert_same(found, expected, 1e-9)
    torch.testing.assert_close(parts.aux, whole.aux)
    torch.testing.assert_close(parts.loss, whole.loss)


def test_recomputing_activations_changes_neither_gradients_nor_auxiliary_loss(case: Case) -> None:
    model, data = case.random().train(), [rows(4)]
    plain, expected = step(model, data)
    model.activation_checkpointing_enable(  # type: ignore[operator]
        activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": checkpoint_contexts}
    )
    again, found = step(model, data)
    assert_same(found, expected)
    assert torch.equal(again.aux, plain.aux) and torch.equal(again.loss, plain.loss)
    assert [each.load.tolist() for each in again.loads] == [each.load.tolist() for each in plain.loads]
