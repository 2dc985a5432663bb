"""Changes to a recipe that make a run smaller, tried by prediction until enough of them fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from smore_cli.data.batch import Row
from smore_cli.recipe.schema import Recipe
from smore_cli.training.schedule import StepPlan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from smore_cli.planning.planner import Planner

__all__ = ["Fitting", "changed", "what_would_fit"]

WANTED = 3
MARGIN = 0.95
"""A prediction may be this share of the limit: it is not exact."""


@dataclass(frozen=True)
class Fitting:
    """A change that would fit.

    Attributes:
        settings: new values, by their dotted names.
        peak: predicted bytes.
        same_run: whether an interrupted run can go on with it.
    """

    settings: dict[str, Any]
    peak: int
    same_run: bool

    @property
    def flags(self) -> str:
        """The change as it is written on a command line."""
        written = {name: str(value).lower() for name, value in self.settings.items()}
        return " ".join(f"--set {name}={value}" for name, value in written.items())


def what_would_fit(planner: Planner, limit: int, *, evaluating: bool = False) -> list[Fitting]:
    """Returns up to three changes whose predicted peak is below the limit, those that change least first.

    Args:
        planner: of the recipe that did not fit.
        limit: bytes that there are.
        evaluating: memory ran out in an evaluation.
    """
    found: list[Fitting] = []
    for family in _families(planner, evaluating=evaluating):
        for settings in family:  # from the smallest change to the largest
            peak = _planner_with(planner, settings).memory().peak
            if peak <= MARGIN * limit:
                free = all(name.startswith(("train.", "eval.")) for name in settings)
                found.append(Fitting(settings, peak, free))
                break
        if len(found) == WANTED:
            break
    return found


def changed(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """Returns the recipe with other values at dotted names."""
    values = recipe.model_dump()
    for name, value in settings.items():
        *sections, key = name.split(".")
        place = values
        for section in sections:
            place[section] = place[section] or {}
            place = place[section]
        place[key] = value
    return Recipe.model_validate(values)


def _families(planner: Planner, *, evaluating: bool) -> Iterator[list[dict[str, Any]]]:
    """Yields changes of one kind at a time, each list from small to large."""
    recipe, train = planner.recipe, planner.recipe.train
    size = train.per_device_batch_size
    whole = train.global_batch_size or size
    split = [
        {"train.per_device_batch_size": count, "train.global_batch_size": whole}
        for count in _halves(size)
        if whole % count == 0 or recipe.data.packing
    ]
    recompute = {} if train.gradient_checkpointing else {"train.gradient_checkpointing": True}
    quantised = {"quantization.bits": 4} if recipe.quantization is None else {}
    width = min(recipe.data.max_length, planner.heaviest.width)
    shorter = [{"data.max_length": length} for length in _halves(width) if length >= 8]
    held_out = [{"eval.batch_size": count} for count in _halves(recipe.eval.batch_size)]
    if evaluating:
        yield held_out
    yield split
    if recompute:
        yield [recompute]
        yield [recompute | change for change in split]
    if quantised:
        yield [quantised]
        yield [quantised | recompute | change for change in split or [{}]]
    yield shorter
    smallest = quantised | recompute | (split[-1] if split else {})
    yield [smallest | change for change in shorter]
    yield [smallest | change | held_out[-1] for change in shorter if held_out]


def _halves(number: int) -> list[int]:
    found = []
    while number > 1:
        number //= 2
        found.append(number)
    return found


def _planner_with(planner: Planner, settings: dict[str, Any]) -> Planner:
    """Returns the planner of a changed recipe; what the change leaves alone is not made again."""
    recipe = changed(planner.recipe, settings)
    batches = planner.batches
    eval_rows, first_rows, length = planner.eval_rows, planner.first_rows, recipe.data.max_length
    if "data.max_length" in settings:
        eval_rows, first_rows = [_cut(row, length) for row in eval_rows], [_cut(row, length) for row in first_rows]
    if batches is not None:
        plan = batches.plan
        assert isinstance(plan, StepPlan)
        rows = batches.rows
        fields: dict[str, Any] = {"per_pass": min(recipe.train.per_device_batch_size, plan.global_batch_size)}
        if "data.max_length" in settings:
            rows = [_cut(rows[i], length) for i in range(plan.num_rows)]
            fields |= {"lengths": [row.length for row in rows], "max_length": length}
        batches = replace(batches, rows=rows, plan=replace(plan, **fields))
    found = replace(planner, recipe=recipe, batches=batches, eval_rows=eval_rows, first_rows=first_rows)
    if not any(name.startswith("quantization") for name in settings):
        found.__dict__["skeleton"] = planner.skeleton
    return found


def _cut(row: Row, length: int) -> Row:
    """Returns a row of at most so many tokens, cut on the right; at least one token of each branch is left."""
    prompt = row.prompt[:length]
    room = max((length - len(prompt)) // len(row.branches), 1)
    branches = [branch[:room] for branch in row.branches]
    return replace(row, prompt=prompt, branches=branches, supervised=[s[:room] for s in row.supervised])
