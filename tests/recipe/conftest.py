from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from smore_cli.errors import RecipeError
from smore_cli.recipe import load_recipe

GOOD = """\
version: 1
model: {name_or_path: smollm2-135m}
adapter: {method: lora}
data: {train: [{path: rows.jsonl, format: chat}]}
output_dir: runs/x
"""

Write = Callable[[str], Path]
Problems = Callable[..., list[str]]


@pytest.fixture
def good() -> str:
    """A sound recipe of five lines, one a section."""
    return GOOD


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes recipe.yaml into an empty folder, which becomes the current one; returns its (relative) path."""
    monkeypatch.chdir(tmp_path)

    def write_recipe(text: str) -> Path:
        path = Path("recipe.yaml")
        path.write_bytes(text.encode())
        return path

    return write_recipe


@pytest.fixture
def problems(write: Write) -> Problems:
    """The first line of each problem of a recipe, without the file's name; none if it loads."""

    def find(text: str, overrides: Sequence[str] = ()) -> list[str]:
        try:
            load_recipe(write(text), overrides)
        except RecipeError as error:
            return [problem.splitlines()[0].removeprefix("recipe.yaml:") for problem in error.problems]
        return []

    return find
