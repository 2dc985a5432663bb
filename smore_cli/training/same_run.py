"""Resuming is only sound with the recipe that the run was started with."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from smore_cli.errors import UsageError
from smore_cli.recipe import load_recipe
from smore_cli.training.run_folder import is_finished

if TYPE_CHECKING:
    from pathlib import Path

    from smore_cli.recipe.schema import Recipe

__all__ = ["require_same_run"]

# What does not change the adapter that comes out.
FREE_TO_CHANGE = {
    ("output_dir",),
    ("train", "gradient_census"),
    ("train", "on_collapse"),
    ("train", "logging_steps"),
    ("train", "save_steps"),
    ("train", "save_total_limit"),
    ("eval",),
}


def require_same_run(recipe: Recipe, run_dir: Path) -> None:
    """Refuses to resume a run with a recipe that would have trained differently, or one that is done.

    Raises:
        UsageError: with the first differences.
    """
    if not (run_dir / "run.json").is_file():
        raise UsageError(f"{run_dir} holds no run to resume", "start it without --resume")
    if is_finished(run_dir):
        raise UsageError(f"the run in {run_dir} is finished", "nothing is left to resume")
    before = load_recipe(run_dir / "resolved.yaml").model_dump(mode="json")
    now = recipe.model_dump(mode="json")
    changed = [
        path for path in _differences(before, now) if not any(path[: len(free)] == free for free in FREE_TO_CHANGE)
    ]
    if changed:
        shown = ", ".join(f"{'.'.join(path)} (was {_at(before, path)}, now {_at(now, path)})" for path in changed[:5])
        raise UsageError(
            f"the recipe differs from the run in {run_dir}: {shown}",
            "resume with the same recipe, or start a new run with --output-dir",
        )


def _differences(a: Any, b: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in sorted({*a, *b}) for d in _differences(a.get(key), b.get(key), (*path, key))]
    return [] if a == b else [path]


def _at(values: Any, path: tuple[str, ...]) -> str:
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return json.dumps(values)
