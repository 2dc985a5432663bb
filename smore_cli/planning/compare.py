"""Predicted against measured peak memory of a run that is over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from smore_cli.models.source import one_line
from smore_cli.planning.planner import Planner

if TYPE_CHECKING:
    from smore_cli.training.setup import Setup

__all__ = ["compare", "comparison_line"]


def compare(setup: Setup, measured: dict[str, int]) -> dict[str, Any]:
    """Returns both peaks and the prediction by component, in bytes.

    The run is over and saved, so a prediction that cannot be made is said and ends nothing.

    Args:
        setup: the run.
        measured: `peak_memory`, taken before anything else is done.
    """
    found: dict[str, Any] = {"measured": measured.get("device", measured["resident"]), "predicted": None}
    if setup.sharded:
        return found | {"why": "the model is sharded over processes"}
    try:
        plan = Planner.of_setup(setup).memory()
    except Exception as error:  # whatever a model without weights may raise
        return found | {"why": f"{type(error).__name__}: {one_line(error)}"}
    return found | {"predicted": plan.peak, "components": plan.components, "phases": plan.phases}


def comparison_line(values: dict[str, Any]) -> str:
    """Returns it in a few words."""
    measured = f"peak {values['measured'] / 2**30:.2f} GiB"
    if values["predicted"] is None:
        return f"{measured}; no prediction ({values['why']})"
    off = 100 * (values["predicted"] / values["measured"] - 1)
    return f"{measured}, predicted {values['predicted'] / 2**30:.2f} GiB ({off:+.0f} %)"
