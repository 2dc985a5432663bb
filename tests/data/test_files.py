from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smore_cli.data.files import read_file
from smore_cli.errors import DataError


def read(path: Path) -> list[dict[str, Any]]:
    return [dict(row) for row in read_file(path, path.name)]


def refused(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path)
    assert "\n" not in caught.value.message
    return caught.value


ROWS = [
    {"prompt": "When?", "completion": "2024-01-05"},
    {"prompt": "Which agent?", "completion": "007"},
    {"prompt": "Sodium?", "completion": "NA"},
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_text_that_looks_like_a_date_a_number_or_nothing_stays_text(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=2))
    elif kind == "csv":
        path.write_text("prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in ROWS))
    else:
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    assert read(path) == ROWS


def test_rows_may_differ_in_keys_and_types(tmp_path: Path) -> None:
    rows = [{"label": 1, "choices": ["a"]}, {"label": "B", "choices": {"text": []}}, {"other": None}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert read(path) == rows


@given(text=st.text())
def test_any_text_in_json_lines_is_read_back_exactly(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    rows = [{"text": text}, {"text": "next"}]
    path.write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("utf-8", "surrogatepass"))
    assert read(path) == rows


def test_a_json_file_of_json_lines_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert read(path) == [{"text": "a"}, {"text": "b"}]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("\ufeffprompt,completion\na,b\n".encode())
    assert read(path) == [{"prompt": "a", "completion": "b"}]


def test_a_csv_cell_may_hold_commas_and_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"a, b","c\nd"\n')
    assert read(path) == [{"prompt": "a, b", "completion": "c\nd"}]


def test_a_missing_file_is_answered_with_near_names(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    error = refused(tmp_path / "trian.jsonl")
    assert error.message == "there is no file trian.jsonl"
    assert error.hint == f"did you mean {tmp_path / 'train.jsonl'}?"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path / "nowhere" / "a.jsonl").hint == f"there is no folder {tmp_path / 'nowhere'} either"


def test_an_unknown_suffix_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "rows.xlsx"
    path.write_text("x")
    error = refused(path)
    assert "'.xlsx'" in error.message and ".jsonl, .json, .csv, .parquet" in error.hint


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", ""), ("a.json", "[]"), ("a.csv", ""), ("a.csv", "x,y\n"),
     ("a.parquet", "")],
)  # fmt: skip
def test_an_empty_file_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert refused(tmp_path / name).message == f"{name} is empty: it holds no row"


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a":\n{"a": 3}\n', "a.jsonl:3:6: not valid JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl:2: a row must be a JSON object, this is a list"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', "a.json:2:7: not valid JSON"),
        ("a.json", '[{"a": 1}, 2]', "a.json, row 2: a row must be a JSON object, this is a int"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "a.csv:3: 3 cells where the header has 2"),
        ("a.csv", "a,b\n1\n", "a.csv:2: 1 cells where the header has 2"),
        ("a.csv", 'a,b\n1,"2\n', "a.csv:2: not valid CSV"),
        ("a.csv", "a,a\n1,2\n", "a.csv:1: the header names a column twice: a"),
        ("a.parquet", "this is not parquet", "a.parquet: not a parquet file"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(tmp_path: Path, name: str, content: str, place: str) -> None:
    (tmp_path / name).write_text(content)
    assert refused(tmp_path / name).message.startswith(place)


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    assert refused(tmp_path / "a.jsonl").message == "a.jsonl:2: not UTF-8 text"


def test_reading_parquet_writes_nothing_to_a_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "rows.parquet"))
    capfd.readouterr()
    shown = datasets.is_progress_bar_enabled()
    assert read(tmp_path / "rows.parquet") == ROWS
    (tmp_path / "bad.parquet").write_text("this is not parquet")
    refused(tmp_path / "bad.parquet")
    assert capfd.readouterr() == ("", "")
    assert datasets.is_progress_bar_enabled() == shown


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "rows.csv.gz"])
def test_compressed_text_is_read_as_what_it_is(tmp_path: Path, name: str) -> None:
    text = {
        ".jsonl": "\n".join(json.dumps(row) for row in ROWS),
        ".json": json.dumps(ROWS),
        ".csv": "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in ROWS),
    }[Path(name).suffixes[0]]
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    assert read(tmp_path / name) == ROWS


def test_both_kinds_of_arrow_files_are_read(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(str(tmp_path / "saved"))
    stream = next((tmp_path / "saved").glob("*.arrow"))
    assert read(stream) == ROWS
    import pyarrow

    with pyarrow.ipc.new_file(str(tmp_path / "file.arrow"), rows.data.table.schema) as writer:
        writer.write_table(rows.data.table)
    assert read(tmp_path / "file.arrow") == ROWS


def test_windows_line_breaks_are_those_of_the_file_and_not_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'prompt,completion\r\n"a\r\nb",c\r\n')
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\r\n\r\n{"a": 2}\r\n')
    assert read(tmp_path / "a.csv") == [{"prompt": "a\nb", "completion": "c"}]
    assert read(tmp_path / "a.jsonl") == [{"a": 1}, {"a": 2}]
