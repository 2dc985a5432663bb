"""Reading a recipe: all that is wrong with it is found in one pass, each with its file, line and column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smore_cli.recipe.checks import find_contradictions
from smore_cli.recipe.document import Document, order
from smore_cli.recipe.explain import explain, explain_removed, without_unknown_keys
from smore_cli.recipe.overrides import apply_overrides
from smore_cli.recipe.reading import read_document
from smore_cli.recipe.schema import Recipe

__all__ = ["checked", "load_recipe", "read_recipe"]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Returns the recipe in the file `path`.

    Args:
        path: a YAML file.
        overrides: `--set` values, as in `train.learning_rate=2e-4`, applied in order before anything is checked.

    Raises:
        RecipeError: with every problem, each as `file:line:column: what` (or `--set ...: what`) and the source line.
    """
    return read_recipe(path, overrides)[0]


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Document]:
    """Returns what `load_recipe` does, and the document, which knows where everything stands."""
    document = read_document(path)
    apply_overrides(document, overrides)
    return checked(document.values, document), document


def checked(values: dict[str, Any], document: Document) -> Recipe:
    """Returns the recipe of some values.

    Args:
        values: of a whole recipe.
        document: where they stand.

    Raises:
        RecipeError: with every problem, those noted in the document before included.
    """
    _check(values, document)
    explain_removed(document, values)
    for locs, message in find_contradictions(values):
        # Of two settings that exclude each other, the override is pointed at, or else the one further down.
        document.add(max(locs, key=lambda loc: order(document.where(loc, key=True))), message, key=True)
    document.fail_if_any()
    return Recipe.model_validate(values)


def _check(values: dict[str, Any], document: Document) -> None:
    """Notes all that the schema refuses.

    A section's own rules run only where all its keys are known, so unknown keys are set aside and it is checked again.
    """
    try:
        Recipe.model_validate(values)
    except ValidationError as error:
        explain(error, document, values)
        known = without_unknown_keys(error, values)
        if known != values:
            _check(known, document)
