from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smore_cli.cli import main

RECIPE = """\
version: 1
model: {{name_or_path: {model}}}
adapter: {{method: lora, target_modules: [q_proj], rank: 2}}
data:
  train:
    - {{path: {folder}/questions.jsonl, format: multiple_choice}}
  eval:
    - {{path: {folder}/chats.jsonl, format: chat}}
output_dir: {folder}/run
"""
QUESTIONS = [
    {"question": f"What is {n} + {n}?", "choices": [f"{n} [bold]", str(2 * n)], "label": "B"} for n in range(5)
]
CHATS = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]}]


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path) -> Path:
    for name, rows in (("questions", QUESTIONS), ("chats", CHATS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_llama, folder=tmp_path))
    return path


def show_in_a_process(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "smore_cli", "data", "show", *map(str, arguments)]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )


Show = Callable[..., tuple[int, str, str]]


@pytest.fixture
def show(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Show:
    """Runs the command in this process, which has torch imported already; gives exit code, stdout and stderr."""
    monkeypatch.setenv("SMORE_DEBUG", "0")

    def run(*arguments: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            main(["data", "show", *map(str, arguments)])
        return int(exited.value.code or 0), *capfd.readouterr()

    return run


def test_the_first_rows_of_each_source_and_the_counts_are_printed(recipe: Path) -> None:
    done = show_in_a_process(recipe, "--rows", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Question: What is") == 2
    assert "Question: What is 1 + 1?\nAnswer:[[ 2<|im_end|>]]\n" in done.stdout
    assert "<|im_start|>assistant\n[[Hello there<|im_end|>]]\n" in done.stdout
    counts = [line for line in done.stdout.splitlines() if "supervised" in line]
    assert [line.partition(": ")[2].partition(",")[0] for line in counts] == ["5 rows", "1 row"]
    assert all("0 truncated, 0 dropped" in line for line in counts)
    assert not (recipe.parent / "run").exists()


def test_a_change_of_the_recipe_shows_and_text_is_not_taken_for_markup(recipe: Path, show: Show) -> None:
    code, out, _ = show(recipe, "--rows", "1", "--set", "data.objective=choice_ranking", "--set", "data.eval=[]")
    assert code == 0
    assert "Answer:\n  -[[ 0 [bold]<|im_end|>]]\n  *[[ 0<|im_end|>]]\n" in out


def test_learned_tokens_are_coloured_where_there_is_colour(recipe: Path) -> None:
    done = show_in_a_process(recipe, "--rows", "1", FORCE_COLOR="1", TERM="xterm-256color")
    assert "\x1b[1;32m 0<|im_end|>\x1b[0m" in done.stdout and "[[" not in done.stdout


def test_long_rows_are_not_wrapped(recipe: Path) -> None:
    (recipe.parent / "questions.jsonl").write_text(json.dumps(QUESTIONS[0] | {"question": "why " * 100}) + "\n")
    assert "Question: " + "why " * 100 + "\n" in show_in_a_process(recipe, COLUMNS="80").stdout


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is empty: it holds no row"),
        ('{"question": "Q"\n', "questions.jsonl:1:17: not valid JSON"),
        (
            '{"question": "Q", "answer": "A"}\n',
            "row 1: no 'choices' (format multiple_choice; the row has: question, answer)",
        ),
    ],
)
def test_bad_data_is_one_clear_line_and_exit_code_2(recipe: Path, show: Show, content: str, problem: str) -> None:
    (recipe.parent / "questions.jsonl").write_text(content)
    code, out, err = show(recipe)
    assert (code, out) == (2, "")
    error, *hint = err.splitlines()
    assert error.startswith("error: ") and problem in error
    assert all(line.startswith("hint: ") for line in hint) and len(hint) < 2


def test_rows_that_learn_nothing_are_named(recipe: Path, show: Show) -> None:
    code, _, err = show(recipe, "--set", "data.max_length=8")
    assert code == 2
    assert "5 of 5 rows have no token to learn (rows 1, 2, 3, 4, 5)" in err
