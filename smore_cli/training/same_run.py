"""Resuming is only sound with the recipe, the data and, to the last bit, the machine that the run was started with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from smore_cli.errors import RecipeError, UsageError
from smore_cli.recipe import load_recipe
from smore_cli.training.checkpoint import checkpoints, step_of
from smore_cli.training.differences import Difference, find_differences
from smore_cli.training.run_folder import read_run_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from smore_cli.recipe.document import Document
    from smore_cli.recipe.schema import Recipe

__all__ = ["machine_changes", "require_same_run"]


def require_same_run(
    recipe: Recipe, run_dir: Path, document: Document | None = None, say: Callable[[str], None] = lambda _: None
) -> None:
    """Refuses to resume a run with a recipe that would have trained differently, or one that is done.

    Args:
        recipe: what to go on with.
        run_dir: the run.
        document: knows where the recipe says what.
        say: told of the differences that do not stand in the way.

    Raises:
        UsageError: with every difference that matters, one a line.
    """
    if not (run_dir / "run.json").is_file():
        raise UsageError(f"{run_dir} holds no run to resume", "start it without --resume")
    if not (run_dir / "resolved.yaml").is_file() and not checkpoints(run_dir):
        return  # killed in its first moment: nothing was trained that could differ
    try:
        before = load_recipe(run_dir / "resolved.yaml")
    except RecipeError as error:
        raise UsageError(
            f"the recipe of the run cannot be read: {error.problems[0].splitlines()[0]}",
            "resume with the version of smore that run.json names, or start a new run with --output-dir",
        ) from error
    done = next((step_of(folder) for folder in checkpoints(run_dir)), 0)
    found = find_differences(before, recipe, document, done)
    refused = [difference for difference in found if difference.verdict == "refused"]
    if refused:
        raise _refusal(run_dir, refused, [difference for difference in found if difference not in refused])
    if read_run_json(run_dir).get("finished") and not _longer(before, recipe):
        raise UsageError(f"the run in {run_dir} is finished", "nothing is left to resume")
    for difference in found:
        say(_accepted(difference))


def machine_changes(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Returns one line on what is not as it was when the run was started, or None.

    Args:
        before: `environment` of run.json.
        now: `run_folder.environment()` of this process.
    """
    old, new = _flat(before), _flat(now)
    changed = [f"{key} {old[key]} -> {new[key]}" for key in old if key in new and old[key] != new[key]]
    if not changed:
        return None
    return f"warning: resuming on another machine shape: not bit for bit ({', '.join(changed)})"


def _flat(environment: dict[str, Any]) -> dict[str, Any]:
    """What of an environment changes the rounding of a step."""
    packages = environment.get("packages", {})
    kept = {
        name: packages[name] for name in ("torch", "transformers", "accelerate", "bitsandbytes") if name in packages
    }
    return kept | {key: environment[key] for key in ("device", "threads", "processes") if key in environment}


def _longer(before: Recipe, now: Recipe) -> bool:
    """Whether a recipe asks for more steps than the run had."""
    steps, epochs = (before.train.max_steps, now.train.max_steps), (before.train.epochs or 1, now.train.epochs or 1)
    if steps[0] is not None and steps[1] is not None:
        return steps[1] > steps[0]
    return steps != (None, None) or epochs[1] > epochs[0]


def _refusal(run_dir: Path, refused: list[Difference], others: list[Difference]) -> UsageError:
    lines = [f"the run in {run_dir} was started with another recipe:", *(f"  {d.line()}" for d in refused)]
    lines += [f"  {_accepted(difference)}" for difference in others]
    return UsageError("\n".join(lines), "resume with the same settings, or start a new run with --output-dir")


def _accepted(difference: Difference) -> str:
    exact = "" if difference.verdict != "inexact" else ", not bit for bit"
    return f"accepted{exact}: {difference.line()}"
