from __future__ import annotations

from pathlib import Path

import pytest

from smore_cli.comparing.spec import is_comparison, read_comparison
from smore_cli.errors import UsageError
from smore_cli.recipe import load_recipe
from smore_cli.recipe.ready import find_ready_recipe, ready_recipes


def test_every_ready_recipe_is_sound_and_says_what_it_is_for() -> None:
    recipes = ready_recipes()
    assert "quickstart" in [recipe.name for recipe in recipes]
    for recipe in recipes:
        if is_comparison(recipe.path):
            assert len(read_comparison(recipe.path).contenders) > 1
        else:
            assert load_recipe(recipe.path).version == 1
        assert len(recipe.summary) > 10
        assert not recipe.summary.startswith("#")


def test_a_ready_recipe_is_found_by_its_name() -> None:
    assert find_ready_recipe("quickstart").path == find_ready_recipe("quickstart.yaml").path


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        find_ready_recipe("quickstrat")
    assert caught.value.message == "there is no ready recipe 'quickstrat'"
    assert caught.value.hint == "did you mean 'quickstart'?"


def test_an_installed_package_does_not_look_beside_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Beside an installed package lies site-packages, where a folder `recipes` belongs to somebody else.
    package = tmp_path / "smore_cli"
    for folder, name in ((tmp_path / "recipes", "strange"), (package / "_recipes", "ours")):
        folder.mkdir(parents=True)
        (folder / f"{name}.yaml").write_text("# text\n")
    monkeypatch.setattr("smore_cli.__file__", str(package / "__init__.py"))
    assert [recipe.name for recipe in ready_recipes()] == ["ours"]
