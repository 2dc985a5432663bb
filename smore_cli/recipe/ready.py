"""The ready recipes that come with smore."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import smore_cli
from smore_cli.errors import UsageError

__all__ = ["ReadyRecipe", "find_ready_recipe", "ready_recipes"]


@dataclass(frozen=True)
class ReadyRecipe:
    """A recipe file that comes with smore.

    Attributes:
        name: its path in the recipe folder without the ending, as in `quickstart`.
        path: the file.
    """

    name: str
    path: Path

    @property
    def summary(self) -> str:
        """The first comment line of the file."""
        for line in self.path.read_text(encoding="utf-8").splitlines():
            text = line.removeprefix("#").strip()
            if line.startswith("#") and text and not text.startswith("yaml-language-server"):
                return text
        return ""


def ready_recipes() -> list[ReadyRecipe]:
    """Returns the ready recipes, sorted by name."""
    return sorted(_find(_folder()), key=lambda recipe: recipe.name)


def find_ready_recipe(name: str) -> ReadyRecipe:
    """Returns the ready recipe called `name`.

    Raises:
        UsageError: there is none of that name.
    """
    recipes = {recipe.name: recipe for recipe in ready_recipes()}
    wanted = name.removesuffix(".yaml")
    if wanted not in recipes:
        near = difflib.get_close_matches(wanted, recipes, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "`smore recipe list` shows the ready recipes"
        raise UsageError(f"there is no ready recipe '{name}'", hint)
    return recipes[wanted]


def _find(folder: Path) -> Iterator[ReadyRecipe]:
    for path in folder.rglob("*.yaml"):
        yield ReadyRecipe(path.relative_to(folder).with_suffix("").as_posix(), path)


def _folder() -> Path:
    package = Path(smore_cli.__file__).parent
    # In a checkout the recipes lie beside the package. Beside an installed package a folder `recipes` is a stranger's.
    checkout = package.parent
    in_checkout = checkout / "recipes"
    return in_checkout if (checkout / "pyproject.toml").is_file() and in_checkout.is_dir() else package / "_recipes"
