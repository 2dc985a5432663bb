"""What a changed recipe, a changed data file and another machine mean for a run that is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smore_cli.errors import UsageError
from smore_cli.recipe import load_recipe, read_recipe
from smore_cli.training.differences import find_differences
from smore_cli.training.loop import train
from smore_cli.training.run_folder import read_run_json, write_run_json
from smore_cli.training.same_run import machine_changes, require_same_run

MakeRecipe = Callable[..., Path]
LORA = {"method": "lora", "target_modules": ["q_proj"], "rank": 2}
TRAIN = {"save_steps": 2, "lr_scheduler": "constant", "gradient_census": False}


@pytest.fixture
def started(make_recipe: MakeRecipe, tmp_path: Path, questions: Path) -> Callable[..., Path]:
    """Writes the recipe of a run whose data lie in a file of its own, and the folder of that run as it was killed."""
    data = tmp_path / "sums.jsonl"
    data.write_text(questions.read_text())

    def write(**sections: Any) -> Path:
        source = {"path": str(data), "format": "multiple_choice"}
        sections = {"data": {"train": [source]}, "adapter": LORA, **sections}
        path = make_recipe(**sections | {"train": {**TRAIN, **sections.get("train", {})}})
        train(load_recipe(path), path.read_text())
        values = read_run_json(tmp_path / "run")
        write_run_json(tmp_path / "run", {**values, "finished": False})
        return path

    return write


def resume(path: Path, *overrides: str) -> dict[str, Any]:
    recipe, document = read_recipe(path, overrides)
    return train(recipe, path.read_text(), resume=True, document=document)


def line_of(path: Path, text: str) -> int:
    return next(number for number, line in enumerate(path.read_text().splitlines(), 1) if text in line)


def test_every_difference_that_matters_is_a_line_with_its_place(started: Callable[..., Path], tmp_path: Path) -> None:
    path = started()
    path.write_text(path.read_text().replace("learning_rate: 0.01", "learning_rate: 2.0e-4"))
    with pytest.raises(UsageError) as caught:
        resume(path, "adapter.rank=4", "train.logging_steps=3")
    assert caught.value.message.splitlines() == [
        f"the run in {tmp_path / 'run'} was started with another recipe:",
        "  --set adapter.rank=4: adapter.rank: 2 -> 4 (another adapter, or one that trains differently)",
        f"  {path}:{line_of(path, 'learning_rate')}: train.learning_rate: 0.01 -> 2e-4 (changes every step)",
        "  accepted: --set train.logging_steps=3: train.logging_steps: 1 -> 3 (what is learned stays the same)",
    ]
    assert caught.value.exit_code == 2


def test_a_moved_file_of_the_same_content_is_the_same_data(
    started: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = started()
    before = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "sums.jsonl").rename(tmp_path / "moved.jsonl")
    text = path.read_text().replace("sums.jsonl", "moved.jsonl")
    path.write_text("# a comment\n" + text + "\nquantization: null\n")  # a default written out
    resume(path, "train.save_steps=3")
    said = capsys.readouterr().err
    accepted = [line for line in said.splitlines() if line.startswith("accepted")]
    assert len(accepted) == 2, said
    assert "moved.jsonl (the rows are compared)" in accepted[0]
    assert "train.save_steps: 2 -> 3" in accepted[1]
    assert "resuming from" in said
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == before


def test_changed_rows_are_named(started: Callable[..., Path], tmp_path: Path) -> None:
    path, data = started(), tmp_path / "sums.jsonl"
    lines = data.read_text().splitlines()
    lines[16] = lines[16].replace("apples", "pears")
    data.write_text("\n".join(lines) + "\n")
    place = f"{path}:{line_of(path, 'path:')}"
    with pytest.raises(UsageError, match="training rows are not those") as caught:
        resume(path)
    assert f"{data} has another content: row 17 is the first that differs" in caught.value.message
    assert place.rpartition(":")[0] in caught.value.message
    data.write_text("\n".join([*lines[:16], "", json.dumps(json.loads(lines[16].replace("pears", "apples")))]) + "\n")
    with pytest.raises(UsageError, match="17 rows instead of 240"):
        resume(path)


def test_the_same_files_read_by_another_tokenizer_say_so(started: Callable[..., Path], tmp_path: Path) -> None:
    path = started()
    values = read_run_json(tmp_path / "run")
    write_run_json(tmp_path / "run", {**values, "data": {**values["data"], "hash": "of other tokens"}})
    with pytest.raises(UsageError, match="the files are as they were: the tokenizer"):
        resume(path)


def test_a_longer_run_goes_on_where_the_learning_rate_is_constant(
    started: Callable[..., Path], tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    path = started()
    write_run_json(tmp_path / "run", {**read_run_json(tmp_path / "run"), "finished": True})
    with pytest.raises(UsageError, match="is finished"):
        resume(path)
    resume(path, "train.max_steps=9")
    recipe, _ = read_recipe(path, ["train.max_steps=9", f"output_dir={tmp_path / 'whole'}"])
    train(recipe, path.read_text())
    runs = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("run", "whole")]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("before", "now", "done", "verdict", "reason"),
    [
        ({"lr_scheduler": "cosine"}, {"max_steps": 9}, 4, "refused", "lr_scheduler cosine is stretched"),
        ({"warmup_ratio": 0.5}, {"max_steps": 9}, 4, "refused", "its warm-up is stretched"),
        ({"warmup_steps": 2}, {"max_steps": 9}, 4, "accepted", "constant"),
        ({}, {"max_steps": 3}, 4, "refused", "newest checkpoint is of step 4"),
        ({"lr_scheduler": "wsd"}, {"max_steps": 9}, 4, "accepted", "decay of wsd had not begun"),
        ({"lr_scheduler": "wsd"}, {"max_steps": 9}, 5, "refused", "decay from step 4 on"),
        ({"global_batch_size": 8}, {"per_device_batch_size": 2}, 4, "inexact", "the same rows a step"),
        ({}, {"per_device_batch_size": 2}, 4, "refused", "2 rows a step instead of 4"),
        ({}, {"global_batch_size": 4}, 4, "accepted", "as many rows"),
        (
            {"global_batch_size": 8, "aux_statistics": "micro_batch"},
            {"per_device_batch_size": 2},
            4,
            "refused",
            "micro_batch",
        ),
        ({}, {"gradient_checkpointing": True}, 4, "inexact", "up to rounding"),
        ({}, {"weight_decay": 0.1}, 4, "refused", "changes every step"),
    ],
)
def test_what_a_difference_means(
    make_recipe: MakeRecipe, before: dict[str, Any], now: dict[str, Any], done: int, verdict: str, reason: str
) -> None:
    old = load_recipe(make_recipe(train=TRAIN | before))
    new = load_recipe(make_recipe(train=TRAIN | before | now))
    found = find_differences(old, new, None, done)
    assert [(each.loc[1], each.verdict) for each in found] == [(next(iter(now)), verdict)]
    assert reason in found[0].reason


def test_sources_that_came_or_went_are_one_line(make_recipe: MakeRecipe, questions: Path) -> None:
    source = {"path": str(questions), "format": "multiple_choice"}
    old = load_recipe(make_recipe(data={"train": [source]}))
    new = load_recipe(make_recipe(data={"train": [source, source], "eval": [source]}))
    found = find_differences(old, new)
    assert [each.verdict for each in found] == ["refused", "accepted"]
    assert "1 source" in found[0].line()
    assert "2 sources" in found[0].line()


def test_another_machine_is_a_warning() -> None:
    before = {"packages": {"torch": "2.1", "datasets": "4"}, "device": "cpu (x86_64)", "threads": 2, "started": "then"}
    now = {"packages": {"torch": "2.2", "datasets": "5"}, "device": "cpu (x86_64)", "threads": 4, "started": "now"}
    assert machine_changes(before, before | {"started": "now"}) is None
    assert machine_changes(before, now) == (
        "warning: resuming on another machine shape: not bit for bit (torch 2.1 -> 2.2, threads 2 -> 4)"
    )


def test_a_resumed_run_warns_of_another_machine(
    started: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = started()
    values = read_run_json(tmp_path / "run")
    write_run_json(tmp_path / "run", {**values, "environment": {**values["environment"], "threads": 64}})
    resume(path)
    assert "not bit for bit (threads 64 ->" in capsys.readouterr().err


def test_a_run_of_another_version_whose_recipe_cannot_be_read_is_one_line(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    path = make_recipe()
    (tmp_path / "run").mkdir()
    write_run_json(tmp_path / "run", {"finished": False})
    (tmp_path / "run" / "resolved.yaml").write_text("version: 1\nnonsense: 3\n")
    with pytest.raises(UsageError, match="recipe of the run cannot be read") as caught:
        require_same_run(load_recipe(path), tmp_path / "run")
    assert "\n" not in caught.value.message
