"""`smore train`: what it prints, and what it refuses before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from smore_cli.cli import main

Write = Callable[..., Path]


@pytest.fixture
def write(tiny_llama: Path, tmp_path: Path) -> Write:
    rows = [
        {"question": f"What is {n} and {n}?", "choices": [f"{2 * n}", f"{2 * n + 1}"], "label": 0} for n in range(24)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe(**changes: Any) -> Path:
        values: dict[str, Any] = {
            "version": 1,
            "model": {"name_or_path": str(tiny_llama)},
            "adapter": {"method": "lora", "rank": 2, "target_modules": ["q_proj"]},
            "data": {"train": [{"path": str(tmp_path / "rows.jsonl"), "format": "multiple_choice"}]},
            "train": {"max_steps": 2, "per_device_batch_size": 4},
            "output_dir": str(tmp_path / "run"),
        }
        for key, value in changes.items():
            values[key] = {**values[key], **value} if isinstance(value, dict) else value
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return recipe


def smore(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def test_it_trains_and_says_what_came_of_it(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert smore("train", write()) == 0
    printed = capsys.readouterr()
    assert "step 2/2  loss" in printed.err
    assert f"saved     {tmp_path / 'run'}" in printed.out
    assert "training loss" in printed.out
    assert "data" in printed.out.splitlines()[-2]
    assert "predicted" in printed.out.splitlines()[-1]


def test_set_and_output_dir_win_over_the_recipe(write: Write, tmp_path: Path) -> None:
    assert smore("train", write(), "--set", "train.max_steps=1", "--output-dir", tmp_path / "other") == 0
    assert json.loads((tmp_path / "other" / "run.json").read_text())["result"]["steps"] == 1
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_would_be_done(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert smore("train", write(), "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "trainable" in printed
    assert "nothing was written" in printed
    assert not (tmp_path / "run").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown model": ({"model": {"name_or_path": "nobody/no-such-model"}}, "nobody/no-such-model"),
    "missing model folder": ({"model": {"name_or_path": "./no-such-folder"}}, "no-such-folder"),
    "wrong dtype": ({"model": {"dtype": "float17"}}, "model.dtype"),
    "missing data file": ({"data": {"train": [{"path": "no.jsonl", "format": "multiple_choice"}]}}, "no.jsonl"),
    "wrong format": ({"data": {"train": [{"path": "rows.jsonl", "format": "chat"}]}}, "messages"),
    "empty data": ({"data": {"train": [{"path": "empty.jsonl", "format": "text"}]}}, "empty.jsonl"),
    "unmatched target": ({"adapter": {"target_modules": ["qproj"]}}, "'qproj' matches no linear map"),
    "no target": ({"adapter": {"target_modules": []}}, "target_modules"),
    "unknown method": ({"adapter": {"method": "lore"}}, "lore"),
    "rows too long for max_length": ({"data": {"max_length": 8}}, "max_length"),
    "output in a file": ({"output_dir": "rows.jsonl/run"}, "rows.jsonl"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_clear_line_and_nothing_is_written(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    changes, expected = REFUSED[case]
    path = write(**changes)
    before = sorted(tmp_path.rglob("*"))
    assert smore("train", path) == 2
    printed = capsys.readouterr().err
    assert expected in printed
    assert "Traceback" not in printed
    assert len(printed.strip().splitlines()) <= 5  # the line, its place in the recipe, a hint
    assert sorted(tmp_path.rglob("*")) == before
