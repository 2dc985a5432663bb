from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smore_cli.data.bundled import quickstart_files
from smore_cli.data.sources import read_source
from smore_cli.errors import DataError
from smore_cli.recipe.schema import Source

Write = Callable[..., str]


def source(path: str, **fields: Any) -> Source:
    return Source(path=path, format="text", **fields)


def refused(wanted: Source) -> DataError:
    with pytest.raises(DataError) as caught:
        list(read_source(wanted))
    return caught.value


def texts(wanted: Source) -> list[int]:
    return [row["text"] for row in read_source(wanted)]


@pytest.mark.parametrize(
    ("split", "places"),
    [
        ("train", list(range(10))),
        ("train[:3]", [0, 1, 2]),
        ("train[-2:]", [8, 9]),
        ("train[:10%]+train[90%:]", [0, 9]),
        ("train[8:100]", [8, 9]),
    ],
)
def test_split_slices_apply_to_local_files(write: Write, split: str, places: list[int]) -> None:
    path = write([{"text": place} for place in range(10)])
    assert texts(source(path, split=split)) == places


@pytest.mark.parametrize("split", ["test", "train[:3", "train[a:b]", ""])
def test_a_split_that_a_local_file_has_not_is_refused(write: Write, split: str) -> None:
    error = refused(source(write([{"text": 1}]), split=split))
    assert f"cannot use split '{split}'" in error.message and "there is train" in error.hint


def test_a_slice_without_rows_is_refused(write: Write) -> None:
    assert refused(source(write([{"text": 1}]), split="train[5:]")).message.endswith("selects no row")


def test_columns_are_renamed_and_their_old_names_are_gone(write: Write) -> None:
    path = write([{"q": "a", "text": "b", "other": "c"}])
    renamed = read_source(source(path, columns={"prompt": "q", "completion": "text"}))
    assert list(renamed) == [{"other": "c", "prompt": "a", "completion": "b"}]


def test_columns_can_be_swapped(write: Write) -> None:
    path = write([{"a": 1, "b": 2}])
    assert list(read_source(source(path, columns={"a": "b", "b": "a"}))) == [{"a": 2, "b": 1}]


def test_a_renamed_column_that_a_row_lacks_is_named(write: Write) -> None:
    error = refused(source(write([{"q": "a"}, {"x": "b"}]), columns={"prompt": "q"}))
    assert error.message.endswith("row 2: no column 'q' to use as 'prompt'")
    assert error.hint == "the row has: x"


@pytest.mark.parametrize("field", ["name", "revision"])
def test_hub_fields_on_a_local_source_are_refused(write: Write, field: str) -> None:
    error = refused(source(write([{"text": 1}]), **{field: "x"}))
    assert f"'{field}' is for hub datasets" in error.message


@pytest.mark.parametrize("path", ["./data", "data/rows.jsonl", "a/b/c", "../x", "with space"])
def test_what_cannot_be_a_hub_name_is_looked_for_as_a_file(path: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(source(path)).message == f"there is no file {path}"


def test_an_existing_folder_is_not_taken_for_a_hub_name(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert refused(source("mine")).message == "mine is a folder without a data file"


def test_a_home_folder_is_expanded(write: Write, tmp_path: Path, monkeypatch: Any) -> None:
    write([{"text": 1}])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts(source("~/rows.jsonl")) == [1]


@pytest.mark.parametrize("split", ["train", "test", "test[:5]"])
def test_the_bundled_set_is_read_by_name(split: str) -> None:
    wanted = Source(path="quickstart", format="multiple_choice", split=split)
    rows = list(read_source(wanted))
    lines = quickstart_files()[split.partition("[")[0]].read_text(encoding="utf-8").splitlines()
    assert len(rows) == (5 if "[" in split else len(lines))
    assert {"id", "family", "question", "choices", "label"} <= set(rows[0])


def test_messages_name_a_source_with_its_split(write: Write) -> None:
    path = write([{"text": 1}, {"text": 2}])
    assert read_source(source(path)).origin == path
    assert read_source(source(path, split="train[:1]")).origin == f"{path} (train[:1])"
