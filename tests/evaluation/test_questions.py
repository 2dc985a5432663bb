from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smore_cli.errors import DataError, UsageError
from smore_cli.evaluation.benchmarks import read_tasks

SENTENCE = {"question": "The _ is hot.", "choices": ["sun", "moon"], "label": 0}


def write(folder: Path, name: str, *rows: dict[str, Any]) -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    "name", ["piqa_test.jsonl", "piqa_dev.jsonl", "piqa_validation.jsonl", "piqa.jsonl", "PIQA-val.jsonl"]
)
def test_a_file_is_found_by_any_of_the_usual_names(tmp_path: Path, name: str) -> None:
    row = {"question": "melt ice", "choices": ["heat it", "sing"], "label": 0}
    (task,) = read_tasks("piqa", write(write(tmp_path, name, row), "piqa_train.jsonl", row, row))
    assert [question["question"] for question in task.questions] == ["melt ice"]
    assert task.origin.endswith(name)


def test_training_rows_are_never_taken_for_questions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"wants the file piqa_test\.jsonl \(or _dev, .*, or plain piqa\.jsonl\)"):
        read_tasks("piqa", write(tmp_path, "piqa_train.jsonl", SENTENCE))


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"question": "Ice is cold.\nis ice cold"}, "Ice is cold.\nQuestion: is ice cold?"),
        ({"question": "Ice is cold.\nQuestion: is ice cold?\nAnswer:"}, "Ice is cold.\nQuestion: is ice cold?"),
        ({"question": "is ice cold?", "passage": "Ice is cold."}, "Ice is cold.\nQuestion: is ice cold?"),
        ({"question": "is ice cold"}, "Question: is ice cold?"),
    ],
)
def test_boolq_asks_the_same_however_passage_and_question_are_written(
    tmp_path: Path, row: dict[str, Any], asked: str
) -> None:
    (task,) = read_tasks("boolq", write(tmp_path, "boolq_dev.jsonl", {**row, "choices": ["no", "yes"], "label": 1}))
    assert task.questions[0]["question"] == asked
    assert (task.questions[0]["choices"], task.questions[0]["label"]) == (["no", "yes"], 1)


@pytest.mark.parametrize("choices", [["no", "yes"], ["yes", "no"], ["True", "False"]])
def test_boolqs_true_is_the_choice_that_says_so(tmp_path: Path, choices: list[str]) -> None:
    row = {"question": "is ice cold", "passage": "Ice is cold.", "choices": choices, "answer": True}
    (task,) = read_tasks("boolq", write(tmp_path, "boolq_dev.jsonl", row))
    assert choices[task.questions[0]["label"]].lower() in ("yes", "true")


def test_siqa_puts_context_and_question_on_one_line(tmp_path: Path) -> None:
    choices = {"choices": ["rest", "run", "sing"], "label": 1}
    rows = [{"question": "Anna fell.\nWhat next?"}, {"context": "Anna fell.", "question": "What next?"}]
    (task,) = read_tasks("siqa", write(tmp_path, "social_iqa_dev.jsonl", *({**row, **choices} for row in rows)))
    assert [question["question"] for question in task.questions] == ["Anna fell. What next?"] * 2


@pytest.mark.parametrize(("sentence", "blanks"), [("The sun is hot.", 0), ("The _ is _.", 2)])
def test_a_sentence_without_one_blank_is_named_with_its_row(tmp_path: Path, sentence: str, blanks: int) -> None:
    folder = write(tmp_path, "winogrande_dev.jsonl", SENTENCE, {**SENTENCE, "question": sentence})
    with pytest.raises(DataError, match=f"row 2: the sentence must have one blank '_', it has {blanks}"):
        read_tasks("winogrande", folder)


def test_a_long_blank_is_one_blank(tmp_path: Path) -> None:
    folder = write(tmp_path, "winogrande_dev.jsonl", {**SENTENCE, "question": "The ____ is hot."})
    assert read_tasks("winogrande", folder)[0].questions[0]["question"] == SENTENCE["question"]


def test_gsm8k_wants_solved_examples_too(tmp_path: Path) -> None:
    row = {"question": "How many are 2 and 3?", "answer": "#### 5"}
    with pytest.raises(DataError, match=r"gsm8k_train\.jsonl"):
        read_tasks("gsm8k", write(tmp_path, "gsm8k_test.jsonl", row))


def test_a_hub_data_set_out_of_reach_names_the_file_that_would_do() -> None:
    with pytest.raises(DataError, match="'Rowan/hellaswag' is not in the cache") as caught:
        read_tasks("hellaswag")
    assert "hellaswag_test.jsonl" in caught.value.hint


def test_commonsense_is_the_eight_tasks_of_the_papers(tmp_path: Path) -> None:
    row = {"question": "The _ is hot.", "choices": ["no", "yes"], "label": 1}
    names = ["arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "siqa", "winogrande"]
    for name in names:
        write(tmp_path, f"{name}_test.jsonl", row)
    assert sorted(task.name for task in read_tasks("commonsense", tmp_path)) == names


def test_a_file_of_ones_own_is_multiple_choice_or_exact_match_by_its_rows(tmp_path: Path) -> None:
    write(tmp_path, "mine.jsonl", {**SENTENCE, "id": "a", "family": "hot"})
    write(tmp_path, "sums.jsonl", {"question": "2 + 3?", "answer": 5})
    (choice,), (exact,) = (read_tasks(str(tmp_path / name)) for name in ("mine.jsonl", "sums.jsonl"))
    assert (choice.name, choice.questions) == ("mine", [{**SENTENCE, "id": "a", "family": "hot"}])
    assert (exact.name, exact.questions[0]["answer"]) == ("sums", "5")


def test_a_file_of_neither_form_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, "bad.jsonl", {"text": "x"})
    with pytest.raises(DataError, match="row 1: no 'question'"):
        read_tasks(str(tmp_path / "bad.jsonl"))
    with pytest.raises(DataError, match="there is no file"):
        read_tasks(str(tmp_path / "none.jsonl"))


def test_generated_answers_have_no_letters(tmp_path: Path) -> None:
    write(tmp_path, "sums.jsonl", {"question": "2 + 3?", "answer": 5})
    with pytest.raises(UsageError, match="no choices to ask as :letters"):
        read_tasks(f"{tmp_path / 'sums.jsonl'}:letters")


def test_a_task_of_lm_eval_itself_says_what_it_could_not_reach() -> None:
    with pytest.raises(DataError, match=r"truthfulqa_mc1' cannot be loaded: .*truthfulqa/truthful_qa"):
        read_tasks("truthfulqa_mc1")
