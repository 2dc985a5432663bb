"""Streams: every row once an epoch in an order of the seed's, found again from any place, read a row at a time."""

from __future__ import annotations

import gzip
import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from smore_cli.data import entries
from smore_cli.data.build import build_rows
from smore_cli.data.entries import entry_reader
from smore_cli.data.stream import StreamRows
from smore_cli.errors import DataError
from smore_cli.recipe.schema import DataConfig, Source

Stream = Callable[..., StreamRows]
ROWS = [{"prompt": f"{number}:", "completion": f" {number * number}"} for number in range(50)]


@pytest.fixture
def stream(byte_tokenizer: PreTrainedTokenizerBase) -> Stream:
    """Opens one; keyword arguments are those of `data:`."""

    def opened(*sources: dict[str, Any], seed: int = 0, **fields: Any) -> StreamRows:
        named = [Source(**{"format": "prompt_completion"} | source) for source in sources]
        return StreamRows(DataConfig(train=named, streaming=True, **fields), byte_tokenizer, seed)

    return opened


def test_an_epoch_is_every_row_once_and_the_next_one_in_another_order(
    stream: Stream, write: Any, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(ROWS)
    data = DataConfig(train=[Source(path=path, format="prompt_completion")])
    whole = list(build_rows(data, byte_tokenizer, data.train).rows)
    rows = stream({"path": path}, shuffle_buffer=10)
    epochs = [[rows[number] for number in range(start, start + 50)] for start in (0, 50)]
    for epoch in epochs:
        assert sorted(epoch, key=whole.index) == whole
    assert epochs[0] != epochs[1] and whole not in epochs
    assert [rows.reached(count).epochs for count in (50, 51, 100, 101)] == [0, 1, 1, 2]
    assert [stream({"path": path}, shuffle_buffer=10)[i] for i in range(50)] == epochs[0]
    assert [stream({"path": path}, shuffle_buffer=10, seed=1)[i] for i in range(50)] != epochs[0]
    unshuffled = stream({"path": path}, shuffle_buffer=1)
    assert [unshuffled[i] for i in range(50)] == whole


def test_any_draw_is_found_without_tokenising_those_before_and_also_backwards(
    stream: Stream, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(ROWS)
    first = stream({"path": path}, shuffle_buffer=20)
    expected = [first[number] for number in range(120)]
    rows = stream({"path": path}, shuffle_buffer=20)
    tokenised = []
    inner = StreamRows._tokenised
    monkeypatch.setattr(StreamRows, "_tokenised", lambda *args: (tokenised.append(args), inner(*args))[1])
    assert rows[110] == expected[110] and len(tokenised) == 1
    rows.forget(100)
    assert rows[3] == expected[3] and rows.reached(7) == first.reached(7)
    copied = pickle.loads(pickle.dumps(rows))  # what a process that is not forked gets
    assert copied[111] == expected[111]
    rows.tokenise(range(40))
    assert [rows[number] for number in range(40)] == expected[:40]


def test_only_what_is_needed_of_a_file_is_read(stream: Stream, write: Any) -> None:
    path = write(ROWS)
    with open(path, "a") as file:
        file.write("this is not JSON\n")
    rows = stream({"path": path}, shuffle_buffer=10)
    for number in range(39):
        assert rows[number]
    rows = stream({"path": path}, shuffle_buffer=1)
    with pytest.raises(DataError, match=r"rows\.jsonl:51:1: not valid JSON"):
        _ = rows[50]


def test_weights_mix_sources_which_each_go_through_all_their_rows(stream: Stream, write: Any) -> None:
    few = write([{"prompt": f"few {n}:", "completion": " yes"} for n in range(10)], "few.jsonl")
    rows = stream(
        {"path": write(ROWS), "weight": 3, "group": "many"},
        {"path": few, "weight": 1, "group": "few"},
        shuffle_buffer=5,
    )
    assert rows.groups == ("few", "many")
    drawn = [rows[number] for number in range(400)]
    share = Counter(row.group for row in drawn)
    assert 0.2 < share[0] / 400 < 0.3
    seen = Counter(str(row.prompt) for row in drawn if row.group == 0)
    assert len(seen) == 10 and max(seen.values()) - min(seen.values()) <= 1


def test_the_hash_tells_rows_that_were_drawn_and_settings_and_nothing_of_what_comes_later(
    stream: Stream, write: Any
) -> None:
    path = write(ROWS)
    source = {"path": path}
    before = stream(source, shuffle_buffer=1).reached(30).hash
    assert stream(source, shuffle_buffer=1, max_length=9).reached(30).hash != before
    write([*ROWS[:30], {"prompt": "another", "completion": " row"}, *ROWS[31:]])
    assert stream(source, shuffle_buffer=1).reached(30).hash == before
    write([*ROWS[:29], {"prompt": "another", "completion": " row"}, *ROWS[30:]])
    assert stream(source, shuffle_buffer=1).reached(30).hash != before


def test_every_kind_of_file_streams_what_it_holds_when_it_is_read_as_a_whole(
    stream: Stream, write: Any, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "rows.parquet")
    table.to_csv(tmp_path / "rows.csv", index=False)
    table.save_to_disk(str(tmp_path / "saved"))
    lines = Path(write(ROWS)).read_bytes()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, part in enumerate((ROWS[:20], ROWS[20:])):
        (folder / f"{number}.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(map(json.dumps, part)).encode())
    paths = ["rows.parquet", "rows.csv", "saved", "rows.jsonl.gz", "shards", "shards/*.jsonl", "rows.jsonl"]
    for path in (str(tmp_path / name) for name in paths):
        data = DataConfig(train=[Source(path=path, format="prompt_completion")])
        whole = build_rows(data, byte_tokenizer, data.train).rows
        rows = stream({"path": path}, shuffle_buffer=1)
        assert [rows[number] for number in range(50)] == list(whole), path


def test_a_row_that_cannot_be_used_is_named_by_file_and_line(stream: Stream, write: Any) -> None:
    path = write([*ROWS[:2], {"prompt": "no answer"}, {"prompt": "one two three four five", "completion": " six"}])
    rows = stream({"path": path}, shuffle_buffer=1, max_length=8)
    with pytest.raises(DataError, match=r"rows\.jsonl:3: no 'completion'"):
        _ = rows[2]
    with pytest.raises(DataError, match=r"rows\.jsonl:4: no token to learn") as caught:
        _ = rows[3]
    assert "on_no_supervision: drop" in caught.value.hint
    dropping = stream({"path": path}, shuffle_buffer=1, max_length=8, on_no_supervision="drop")
    assert dropping[3] == dropping[4] == rows[0]  # its place is taken by the next


def test_a_stream_with_nothing_to_learn_is_named_by_its_source(
    stream: Stream, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smore_cli.data.stream.FRUITLESS", 5)
    path = write([{"prompt": "one two three four five", "completion": " six"}] * 9)
    with pytest.raises(DataError, match=r"rows\.jsonl: 5 rows one after another have no token to learn") as caught:
        _ = stream({"path": path}, max_length=8, on_no_supervision="drop")[0]
    assert "raise data.max_length" in caught.value.hint


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({"path": "rows.json"}, "can only be read as a whole"),
        ({"path": "rows.jsonl", "split": "train[:10]"}, "a stream has no slices"),
        ({"path": "rows.jsonl", "split": "test"}, "there is no such split"),
        ({"path": "row.jsonl"}, "there is no file"),
        ({"path": "quickstart", "split": "dev"}, "there is no such split"),
    ],
)
def test_what_cannot_be_streamed_is_refused_before_anything_runs(
    stream: Stream, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: dict[str, Any], problem: str
) -> None:
    write(ROWS)
    write([], "rows.json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=problem):
        stream(source)


def test_a_damaged_file_is_an_error_of_one_line_with_its_place(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "wide.csv").write_text("prompt,completion\na,b\na,b,c\n")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 and nothing else")
    wanted = {"cut.jsonl.gz": "cannot be read", "wide.csv": "wide.csv:3: 3 cells", "no.parquet": "not a parquet file"}
    for name, problem in wanted.items():
        with pytest.raises(DataError, match=problem) as caught:
            list(entry_reader(Source(path=str(tmp_path / name), format="prompt_completion"))())
        assert "\n" not in caught.value.message

    def breaking(*_: Any, **__: Any) -> Any:
        yield from ROWS[:3]
        raise ConnectionError("the other side hung up")

    monkeypatch.setattr("smore_cli.data.hub.load_hub_dataset", breaking)
    read = entries.entry_reader(Source(path="someone/rows", format="prompt_completion"))()
    assert [next(read).row() for _ in range(3)] == ROWS[:3]
    with pytest.raises(DataError, match=r"someone/rows: broke off after row 3: the other side hung up"):
        next(read)


def test_a_csv_is_read_and_refused_in_a_stream_as_it_is_in_memory(tmp_path: Path, stream: Stream) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"text\n{'long ' * 40_000}\n")  # Python's own limit is 131,072 characters a cell
    assert stream({"path": str(path), "format": "text"}, max_length=8)[0].length == 8
    for content, wrong in (("text;a\nx;y\n", ":1: columns are separated by ';'"), ("text\na\0\n", ":2: a NUL byte")):
        path.write_text(content)
        with pytest.raises(DataError, match=wrong):
            stream({"path": str(path), "format": "text"})[0]
