from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from smore_cli.evaluation.report import LEGEND, document, table
from smore_cli.evaluation.results import Sample, TaskResult


def result(answers: dict[str | None, str], task: str = "quiz") -> TaskResult:
    """A result from a string of right (+) and wrong (-) answers a family."""
    samples = [
        Sample(f"{family}-{i}", family, 0, [-1.0, -2.0], {"acc": mark == "+", "acc_norm": mark == "+"})
        for family, marks in answers.items()
        for i, mark in enumerate(marks)
    ]
    return TaskResult(task, samples)


def printed(*args: object) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(table(*args))  # type: ignore[arg-type]
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_families_are_reported_beside_their_task_and_add_up_to_it() -> None:
    (task,) = document([result({"sums": "+-++", "words": "--"})], None, samples=False)
    assert task["n"] == 6
    assert task["acc"] == pytest.approx(0.5)
    assert [(f["family"], f["n"], f["acc"]) for f in task["families"]] == [("sums", 4, 0.75), ("words", 2, 0.0)]
    assert "samples" not in task


def test_document_holds_base_difference_and_samples_as_json() -> None:
    ours, base = result({"a": "++++", "b": "+--+"}), result({"a": "+-+-", "b": "---+"})
    (task,) = json.loads(json.dumps(document([ours], [base], samples=True)))
    assert task["difference"]["acc"] == pytest.approx(task["acc"] - task["base"]["acc"])
    assert task["families"][0]["difference"]["acc"] == pytest.approx(0.5)
    assert [sample["acc"] for sample in task["base"]["samples"]] == [mark == "+" for mark in "+-+----+"]


def test_one_question_has_no_standard_error() -> None:
    (task,) = document([result({None: "+"})], None, samples=False)
    assert task["acc_stderr"] is None
    assert task["families"] == []
    assert "±" not in printed("run", [result({None: "+"})], None)


def test_table_with_base_fits_eighty_columns_unbroken() -> None:
    ours = result({"arithmetic": "+" * 1200, "labelling": "+-" * 600})
    base = result({"arithmetic": "-" * 1200, "labelling": "+-" * 600})
    lines = [line.strip() for line in printed("run", [ours], [base]).splitlines() if "±" in line]
    assert [line.split()[0] for line in lines] == ["quiz", "acc_norm", "arithmetic", "labelling"]
    assert lines[0].endswith("0.250 ± 0.009  0.750 ± 0.009  +0.500 [+0.480, +0.520]")


def test_table_without_base_shows_the_interval_of_each_accuracy() -> None:
    shown = printed("backbone", [result({None: "+" * 81 + "-" * 182})], None)
    assert "0.308 ± 0.029  [0.255, 0.366]" in shown
    assert "Wilson" in LEGEND
