"""The settings with which a method has as many parameters as another: the nearest to those that were given.

    among all values of `vary` with |N(values) / N_0 - 1| <= tolerance:   the least sum |log(value / given)|

N is counted from the methods' formulas and the backbone's shapes; no weight is loaded.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from smore_cli.errors import UsageError
from smore_cli.models.load import load_skeleton
from smore_cli.nn.targets import find_targets, sites_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from smore_cli.comparing.spec import Comparison, Contender
    from smore_cli.methods import MethodConfig

__all__ = ["Sized", "match_sizes"]

LARGEST = 4
"""A setting is changed at most by this factor."""
MOST = 20_000
"""Combinations that are looked at."""


@dataclass(frozen=True)
class Sized:
    """A method with its settings matched.

    Attributes:
        contender: as it was given.
        adapter: with the settings that match.
        trainable: numbers that train.
        active: of these, what one token's updates are made of, at most.
        changed: the settings that are not as given, and what they are.
    """

    contender: Contender
    adapter: MethodConfig
    trainable: int
    active: int
    changed: dict[str, Any]


def match_sizes(comparison: Comparison) -> list[Sized]:
    """Returns every method with the settings that make its number of parameters the baseline's.

    Raises:
        UsageError: there are none within the tolerance; the message says what comes nearest.
        AdapterError: an adapter does not fit the backbone.
    """
    config, baseline = comparison.config, comparison.baseline
    model = load_skeleton(baseline.recipe.model)
    reference = baseline.recipe.adapter
    target = _Counter(model, reference)
    found = [Sized(baseline, reference, *target(reference), {})]
    for contender in comparison.contenders[1:]:
        counter = _Counter(model, contender.recipe.adapter)
        if config.match == "none":
            adapter = contender.recipe.adapter
            found.append(Sized(contender, adapter, *counter(adapter), {}))
        else:
            wanted = found[0].trainable if config.match == "trainable" else found[0].active
            found.append(_matched(contender, counter, wanted, config.match == "active", config.tolerance))
    return found


class _Counter:
    """Counts the parameters of a method on a backbone: sites that are alike once."""

    def __init__(self, model: nn.Module, adapter: MethodConfig) -> None:
        sites = sites_of(model, find_targets(model, adapter.target_modules, adapter.sites)).values()
        self.sites = list(sites)

    def __call__(self, adapter: MethodConfig) -> tuple[int, int]:
        """Returns all trainable parameters, and those of one token."""
        trainable = sum(adapter.num_parameters(site) for site in self.sites)
        return trainable, sum(adapter.num_active_parameters(site) for site in self.sites)


def _matched(contender: Contender, count: _Counter, wanted: int, active: bool, tolerance: float) -> Sized:
    """Returns the settings nearest to the given ones that have the wanted number of parameters."""
    nearest: tuple[float, str] = (math.inf, "")
    given = contender.recipe.adapter.model_dump()
    for settings in _around(contender, given):
        try:
            adapter = type(contender.recipe.adapter).model_validate(_rescaled(given | settings, given))
        except ValidationError:  # a rule of the method's own
            continue
        counts = count(adapter)
        off = abs(counts[active] / wanted - 1)
        if off <= tolerance:
            final = adapter.model_dump()
            changed = {key: value for key, value in final.items() if value != given[key]}
            return Sized(contender, adapter, *counts, changed)
        nearest = min(nearest, (off, f"{settings} has {counts[active]:,}"))
    what = "active" if active else "trainable"
    raise UsageError(
        f"{_place(contender)}: no {' and '.join(contender.vary)} gives {wanted:,} {what} parameters within "
        f"{100 * tolerance:g} %; nearest: {nearest[1]} ({100 * nearest[0]:.1f} % off)",
        "let more settings change (vary: [rank, num_experts]), or raise compare.tolerance",
    )


def _rescaled(settings: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Returns settings whose alpha has the ratio to the rank that was given: another size, the same scale."""
    rank, alpha = given.get("rank"), given.get("alpha")
    if isinstance(rank, int) and isinstance(alpha, float):
        settings["alpha"] = alpha * settings["rank"] / rank
    return settings


def _place(contender: Contender) -> str:
    """Returns where a method stands, for a message."""
    return ".".join(map(str, contender.loc))


def _around(contender: Contender, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields settings, those nearest to the given ones first; each number goes up to a factor `LARGEST` by itself."""
    numbers: list[tuple[str, int | None, int]] = []
    for name in contender.vary:
        value = given[name]
        entries = enumerate(value) if isinstance(value, list) else [(None, value)]
        numbers += [(name, index, entry) for index, entry in entries]
    ranges = [range(max(1, value // LARGEST), value * LARGEST + 1) for _, _, value in numbers]
    if (size := math.prod(map(len, ranges))) > MOST:
        raise UsageError(
            f"{_place(contender)}: {size:,} combinations of {', '.join(contender.vary)} are too many",
            "vary fewer of them",
        )

    def distance(values: tuple[int, ...]) -> float:
        return sum(abs(math.log(value / old)) for (_, _, old), value in zip(numbers, values, strict=True))

    for values in sorted(itertools.product(*ranges), key=distance):
        settings = {name: list(given[name]) if isinstance(given[name], list) else given[name] for name, *_ in numbers}
        for (name, index, _), value in zip(numbers, values, strict=True):
            if index is None:
                settings[name] = value
            else:
                settings[name][index] = value
        yield settings
