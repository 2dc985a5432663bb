from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from smore_cli.cli.recipe import app
from smore_cli.errors import RecipeError, UsageError
from smore_cli.recipe import dump_recipe, json_schema, load_recipe

SOUND = """\
# A recipe to test with
version: 1
model: {name_or_path: smollm2-135m}
adapter: {method: lora}
data: {train: [{path: rows.jsonl, format: chat}]}
output_dir: runs/x
"""

runner = CliRunner()


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "sound.yaml"
    path.write_text(SOUND)
    return path


def test_validate_says_ok_for_each_sound_recipe(sound: Path) -> None:
    result = runner.invoke(app, ["validate", str(sound), str(sound)])
    assert result.exit_code == 0
    assert result.stdout == f"{sound}: ok\n" * 2


def test_validate_shows_the_problems_of_every_recipe(sound: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(SOUND + "sed: 1\nlr: 1\n")
    result = runner.invoke(app, ["validate", str(broken), str(sound), str(tmp_path / "missing.yaml")])
    assert result.stdout == f"{sound}: ok\n"
    assert isinstance(result.exception, RecipeError)
    assert [problem.splitlines()[0].split(": ")[0] for problem in result.exception.problems] == [
        f"{broken}:7:1",
        f"{broken}:8:1",
        f"{tmp_path / 'missing.yaml'}",
    ]


def test_validate_checks_a_recipe_with_its_overrides(sound: Path) -> None:
    assert runner.invoke(app, ["validate", str(sound), "--set", "seed=7"]).stdout == f"{sound}: ok\n"
    result = runner.invoke(app, ["validate", str(sound), "--set", "adapter.rank=0"])
    assert isinstance(result.exception, RecipeError)
    assert "--set adapter.rank=0" in result.exception.problems[0]


def test_show_prints_the_resolved_recipe_with_overrides(sound: Path, tmp_path: Path) -> None:
    result = runner.invoke(app, ["show", str(sound), "--set", "seed=7", "--set", "train.learning_rate=1e-5"])
    shown = tmp_path / "shown.yaml"
    shown.write_text(result.stdout)
    assert load_recipe(shown) == load_recipe(sound, ["seed=7", "train.learning_rate=1e-5"])
    assert result.stdout == dump_recipe(load_recipe(shown))


def test_list_has_one_line_for_each_ready_recipe(project: Path) -> None:
    result = runner.invoke(app, ["list"])
    lines = result.stdout.splitlines()
    assert len(lines) == len(list((project / "recipes").rglob("*.yaml")))
    quickstart = next(line for line in lines if line.startswith("quickstart "))
    assert quickstart.split()[1:3] == ["smore", "smollm2-135m"]
    first = (project / "recipes" / "quickstart.yaml").read_text().splitlines()[0]
    assert quickstart.endswith(first.removeprefix("# "))


def test_schema_prints_json() -> None:
    assert json.loads(runner.invoke(app, ["schema"]).stdout) == json_schema()


def test_copy_writes_the_same_file_into_a_folder_or_under_a_new_name(project: Path, tmp_path: Path) -> None:
    original = (project / "recipes" / "quickstart.yaml").read_bytes()
    for destination, made in (
        (tmp_path, tmp_path / "quickstart.yaml"),
        (tmp_path / "mine.yaml", tmp_path / "mine.yaml"),
    ):
        result = runner.invoke(app, ["copy", "quickstart", str(destination)])
        assert result.stdout == f"{made}\n"
        assert made.read_bytes() == original


def test_copy_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    result = runner.invoke(app, ["copy", "quickstart", str(tmp_path / "mine.yaml")])
    assert isinstance(result.exception, UsageError)
    assert result.exception.message == f"{tmp_path / 'mine.yaml'} exists already"
    assert (tmp_path / "mine.yaml").read_text() == "mine"


def test_copy_into_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    result = runner.invoke(app, ["copy", "quickstart", str(tmp_path / "no" / "mine.yaml")])
    assert isinstance(result.exception, UsageError)
    assert result.exception.message == f"there is no folder {tmp_path / 'no'}"
