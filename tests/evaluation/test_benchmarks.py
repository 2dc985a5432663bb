from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from smore_cli.data.bundled import quickstart_files
from smore_cli.errors import DataError, UsageError
from smore_cli.evaluation.benchmarks import available_benchmarks, read_tasks

GOOD = {"id": "q1", "question": "Which is hot?", "choices": ["ice", "fire"], "label": 1}


def write(folder: Path, *lines: object) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "arc_easy_test.jsonl").write_text(text)
    return folder


def test_a_group_has_the_tasks_it_names(shared_data: Path) -> None:
    assert [task.name for task in read_tasks("arc", shared_data)] == ["arc_easy", "arc_challenge"]


def test_local_arc_questions_are_read_completely(shared_data: Path) -> None:
    easy, challenge = read_tasks("arc", shared_data)
    assert len(easy.questions) == 2376
    assert len(challenge.questions) == 1172
    first = json.loads((shared_data / "arc_easy_test.jsonl").read_text().splitlines()[0])
    assert easy.questions[0] == {**first, "family": None}


def test_the_quickstart_set_comes_with_the_package_and_has_families() -> None:
    (task,) = read_tasks("quickstart")
    rows = [json.loads(line) for line in quickstart_files()["test"].read_text().splitlines()]
    assert Counter(q["family"] for q in task.questions) == Counter(row["family"] for row in rows)
    assert len({q["id"] for q in task.questions}) == len(rows)


def test_arc_is_prompted_and_measured_as_in_lm_eval() -> None:
    import lm_eval.tasks

    theirs = yaml.safe_load(Path(lm_eval.tasks.__file__).with_name("arc").joinpath("arc_easy.yaml").read_text())
    ours = yaml.safe_load((Path(read_tasks.__code__.co_filename).parent / "tasks" / "arc_easy.yaml").read_text())
    for key in ("task", "output_type", "test_split", "doc_to_text", "metric_list"):
        assert ours[key] == theirs[key]
    source = ours["metadata"]["source"]
    assert (source["path"], source["name"]) == (theirs["dataset_path"], theirs["dataset_name"])


def test_an_unknown_benchmark_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown benchmark 'arc_esay'") as caught:
        read_tasks("arc_esay")
    assert "arc_easy" in caught.value.hint


def test_a_benchmark_like_none_lists_all() -> None:
    with pytest.raises(UsageError) as caught:
        read_tasks("zzz")
    assert all(name in caught.value.hint for name in available_benchmarks())


def test_a_missing_file_is_named_with_its_folder_and_the_hub_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_tasks("arc_challenge", tmp_path)
    assert "arc_challenge_test.jsonl" in caught.value.message
    assert str(tmp_path) in caught.value.message
    assert "allenai/ai2_arc (ARC-Challenge, test)" in caught.value.hint


def test_a_missing_data_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        read_tasks("arc_easy", tmp_path / "nowhere")


def test_offline_the_hub_data_set_is_named() -> None:
    with pytest.raises(DataError, match="allenai/ai2_arc"):
        read_tasks("arc_easy")


def test_the_bundled_benchmark_takes_no_data_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="brings its own questions"):
        read_tasks("quickstart", tmp_path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "empty"),
        ([GOOD, "{not json"], ":2:"),
        ([GOOD, {**GOOD, "label": 2}], "row 2: 'label' is 2, but there are 2 choices"),
        ([{**GOOD, "choices": ["ice"]}], "row 1: 'choices' must be a list of two or more"),
        ([{**GOOD, "choices": ["ice", " "]}], "is empty"),
        ([{**GOOD, "question": None}], "row 1: no 'question'"),
    ],
    ids=["empty file", "no JSON", "label out of range", "one choice", "empty choice", "no question"],
)
def test_malformed_questions_are_one_line_with_their_place(tmp_path: Path, lines: list[object], message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_tasks("arc_easy", write(tmp_path, *lines))
    assert message in caught.value.message
    assert "arc_easy_test.jsonl" in caught.value.message
    assert "\n" not in caught.value.message


def test_questions_without_ids_are_numbered(tmp_path: Path) -> None:
    plain = {key: value for key, value in GOOD.items() if key != "id"}
    (task,) = read_tasks("arc_easy", write(tmp_path, plain, plain))
    assert [question["id"] for question in task.questions] == ["1", "2"]
