from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from smore_cli.data.entries import entry_reader
from smore_cli.data.sources import read_source, source_files
from smore_cli.errors import DataError
from smore_cli.recipe.schema import Source


def source(path: Path | str, **fields: Any) -> Source:
    return Source(path=str(path), format="text", **fields)


def texts(path: Path | str, **fields: Any) -> list[str]:
    return [row["text"] for row in read_source(source(path, **fields))]


def refused(path: Path | str, **fields: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read_source(source(path, **fields))
    assert "\n" not in caught.value.message and caught.value.hint
    return caught.value


def lines(path: Path, *contents: str) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in contents))


def test_a_folder_of_files_is_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    lines(tmp_path / "b.jsonl", "3")
    lines(tmp_path / "a.jsonl", "1", "2")
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / ".hidden.jsonl").write_text("no data")
    (tmp_path / "c.csv").write_text("text\n4\n")
    assert texts(tmp_path) == texts(tmp_path / "*.[jc]*") == ["1", "2", "3", "4"]
    assert texts(tmp_path, split="train[1:3]") == ["2", "3"]
    assert [entry.row()["text"] for entry in entry_reader(source(tmp_path))()] == ["1", "2", "3", "4"]
    files = source_files(source(tmp_path))
    assert files and [file.name for file in files] == ["a.jsonl", "b.jsonl", "c.csv"]


def test_files_named_after_splits_are_these_splits(tmp_path: Path) -> None:
    lines(tmp_path / "train-0.jsonl", "1")
    lines(tmp_path / "train-1.jsonl", "2")
    lines(tmp_path / "test.jsonl", "3")
    assert texts(tmp_path) == ["1", "2"]
    assert texts(tmp_path, split="test") == ["3"]
    assert texts(tmp_path / "t*.jsonl") == ["3", "1", "2"]  # a pattern takes what it fits
    assert "there is test and train" in refused(tmp_path, split="dev").hint
    lines(tmp_path / "more.jsonl", "4")
    assert "'more.jsonl' is not" in refused(tmp_path).message


def test_a_row_of_several_files_is_named_by_its_file(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", "1", "2")
    lines(tmp_path / "b.jsonl", "3")
    for path in (tmp_path, tmp_path / "*.jsonl"):
        rows = read_source(source(path))
        assert len(rows) == 3
        assert [rows.place(number) for number in (2, 3)] == [
            f"{tmp_path}/a.jsonl, row 2",
            f"{tmp_path}/b.jsonl, row 1",
        ]


def test_what_save_to_disk_wrote_is_read_with_its_splits(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": str(number)} for number in range(4)])
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=rows, test=rows.select([3])).save_to_disk(str(tmp_path / "two"))
    assert texts(tmp_path / "one") == texts(tmp_path / "two") == ["0", "1", "2", "3"]
    assert texts(tmp_path / "two", split="test") == ["3"]
    assert texts(tmp_path / "one", split="train[:2]") == ["0", "1"]
    assert "there is train and test" in refused(tmp_path / "two", split="dev").hint
    (tmp_path / "one" / "state.json").unlink()
    assert "not a whole data set folder" in refused(tmp_path / "one").message


def test_nothing_there_is_one_line(tmp_path: Path) -> None:
    assert "no file fits the pattern" in refused(tmp_path / "*.jsonl").message
    (tmp_path / "below").mkdir()
    assert "a folder without a data file" in refused(tmp_path).message
    lines(tmp_path / "below" / "a.jsonl", "1")
    assert refused(tmp_path).hint == f"name the folder in it: {tmp_path / 'below'}"
