"""Tokenised rows come from the cache exactly where nothing they depend on has changed."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from smore_cli.cli import main
from smore_cli.data import cache
from smore_cli.data.build import RowSet, build_rows
from smore_cli.data.cache import cache_entries, cached_rows
from smore_cli.data.report import content_hash
from smore_cli.errors import DataError
from smore_cli.recipe.schema import DataConfig

FROM_CACHE = " (from the cache)"
QUESTIONS = [
    {"question": "What do plants need?", "choices": ["water", "gold", "a very long answer"], "label": 0, "kind": "b"},
    {"question": "Which of these is a metal?", "choices": ["wood", "iron"], "label": "B", "kind": "a"},
]
CHATS = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]}]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMORE_TOKEN_CACHE", str(tmp_path / "tokens"))
    return tmp_path / "tokens"


@pytest.fixture
def read(byte_tokenizer: PreTrainedTokenizerBase) -> Callable[..., tuple[RowSet, bool]]:
    """Gives the rows, and whether they are from the cache."""

    def rows(data: DataConfig, tokenizer: PreTrainedTokenizerBase = byte_tokenizer) -> tuple[RowSet, bool]:
        lines: list[str] = []
        found = cached_rows(data, tokenizer, data.train, lines.append)
        cached = [line.endswith(FROM_CACHE) for line in lines]
        assert any(cached) == all(cached)
        return found, cached[0]

    return rows


def test_cached_rows_are_the_fresh_ones_with_their_report_hash_and_groups(
    read: Any, byte_tokenizer: PreTrainedTokenizerBase, write: Any, data_config: Any, folder: Path
) -> None:
    long = {"question": "one two three four five six seven " * 4, "choices": ["a", "b"], "label": 1, "kind": "c"}
    data = data_config(
        write([QUESTIONS[0], long, QUESTIONS[1]]), "multiple_choice",
        objective="choice_ranking", max_length=40, on_no_supervision="drop", source={"columns": {"group": "kind"}},
    )  # fmt: skip
    fresh = build_rows(data, byte_tokenizer, data.train)
    (first, from_cache), (again, from_cache_again) = read(data), read(data)
    assert (from_cache, from_cache_again) == (False, True)
    for found in (first, again):
        assert list(found.rows) == list(fresh.rows) and found == fresh
        assert content_hash(found.rows) == found.report.content_hash == fresh.report.content_hash
    assert fresh.groups == ("a", "b") and again.report.sources[0].dropped == (2,)
    assert isinstance(again.rows.tokens, np.memmap)
    assert again.rows.lengths.tolist() == [row.length for row in fresh.rows]
    assert (again.rows[-1], again.rows[:1]) == (fresh.rows[1], [fresh.rows[0]])


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 20},
        {"loss_on": "all"},
        {"template": "chat"},
        {"objective": "choice_ranking"},
        {"on_no_supervision": "drop"},
        {"source": {"split": "train[:1]"}},
        {"source": {"group": "x"}},
        {"source": {"columns": {"group": "kind"}}},
    ],
    ids=str,
)
def test_another_setting_is_another_entry(read: Any, write: Any, data_config: Any, change: dict[str, Any]) -> None:
    path = write(QUESTIONS)
    read(data_config(path, "multiple_choice"))
    changed = data_config(path, "multiple_choice", **change)
    assert not read(changed)[1]
    assert read(changed)[1] and read(data_config(path, "multiple_choice"))[1]


def test_a_setting_that_no_row_depends_on_is_the_same_entry(read: Any, write: Any, data_config: Any) -> None:
    path = write(QUESTIONS)
    read(data_config(path, "multiple_choice"))
    same = {"packing": True, "eval_fraction": 0.5, "ranking_completion_weight": 0.7, "source": {"weight": 2.0}}
    assert read(data_config(path, "multiple_choice", **same))[1]


def test_a_file_changed_to_the_same_size_at_the_same_time_is_read_again(
    read: Any, write: Any, data_config: Any
) -> None:
    path = write(QUESTIONS)
    data = data_config(path, "multiple_choice")
    before, times = read(data)[0], os.stat(path)
    Path(path).write_text(Path(path).read_text().replace("water", "sugar"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (os.stat(path).st_size, os.stat(path).st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    after, from_cache = read(data)
    assert not from_cache and after.report.content_hash != before.report.content_hash
    os.utime(path)
    assert read(data)[1]  # and a file that is only touched is not


def test_another_tokenizer_or_chat_template_is_another_entry(
    read: Any, write: Any, data_config: Any, with_template: Any, tmp_path: Path
) -> None:
    data = data_config(write(CHATS), "chat")
    chatml = with_template("chatml")
    read(data, chatml)
    assert read(data, chatml)[1]
    chatml.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    saved("used once, with settings of its own", padding="max_length", truncation=True, max_length=4)
    assert read(data, type(chatml).from_pretrained(tmp_path / "saved"))[1]
    changed = with_template("chatml")
    changed.chat_template = changed.chat_template.replace("{% for", "{{ 'Chat: ' }}{% for")
    assert not read(data, changed)[1]
    changed = with_template("chatml")
    changed.eos_token = "<|im_end|>"
    assert not read(data, changed)[1]
    changed = with_template("chatml")
    changed.add_tokens(["Hello"])
    assert not read(data, changed)[1]


def test_other_code_and_other_libraries_are_other_entries(
    read: Any, write: Any, data_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_config(write(QUESTIONS), "multiple_choice")
    read(data)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "version", lambda name: "0" if name == "tokenizers" else "1")
        assert not read(data)[1]
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_code", lambda: "changed")
        assert not read(data)[1]
    assert read(data)[1]


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    read: Any, write: Any, data_config: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(QUESTIONS)

    def build(*args: Any) -> RowSet:
        built = build_rows(*args)
        with open(path, "a") as file:
            file.write(json.dumps(QUESTIONS[0]) + "\n")
        return built

    monkeypatch.setattr(cache, "build_rows", build)
    with pytest.raises(DataError, match="changed while it was read"):
        read(data_config(path, "multiple_choice"))
    assert cache_entries() == []


def test_of_several_that_ask_at_once_one_tokenises(
    byte_tokenizer: PreTrainedTokenizerBase, write: Any, data_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, built, found = data_config(write(QUESTIONS * 50), "multiple_choice"), [], []

    def build(*args: Any) -> RowSet:
        built.append(args)
        return build_rows(*args)

    monkeypatch.setattr(cache, "build_rows", build)
    ask = lambda: found.append(cached_rows(data, byte_tokenizer, data.train, lambda _: None))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and [len(rows.rows) for rows in found] == [100] * 4


def test_a_damaged_entry_is_made_again(read: Any, write: Any, data_config: Any) -> None:
    data = data_config(write(QUESTIONS), "multiple_choice")
    fresh = read(data)[0]
    [entry] = cache_entries()
    for name, damage in (("tokens.npy", b"\x93NUMPY"), ("report.json", b"{")):
        (entry.folder / name).unlink()  # what is mapped stays as it was
        (entry.folder / name).write_bytes(damage)
        again, from_cache = read(data)
        assert again == fresh and not from_cache
        assert read(data)[1]


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    byte_tokenizer: PreTrainedTokenizerBase, write: Any, data_config: Any, folder: Path
) -> None:
    folder.write_text("a file stands where the folder would be")
    lines: list[str] = []
    data = data_config(write(QUESTIONS), "multiple_choice")
    assert len(cached_rows(data, byte_tokenizer, data.train, lines.append).rows) == 2
    assert "(not cached: " in lines[0]


def test_it_can_be_switched_off_listed_and_cleared(
    read: Any, write: Any, data_config: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = data_config(write(QUESTIONS), "multiple_choice")
    with monkeypatch.context() as patch:
        patch.setenv("SMORE_TOKEN_CACHE", "0")
        assert not read(data)[1] and not read(data)[1]
    assert cache_entries() == []
    read(data)
    for arguments, shown in ((["data", "cache"], "2 rows"), (["data", "cache", "--clear"], "removed 1 entries")):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0 and shown in capsys.readouterr().out
    assert cache_entries() == [] and not read(data)[1]


def test_a_source_that_is_not_there_is_said_as_without_a_cache(read: Any, data_config: Any) -> None:
    with pytest.raises(DataError, match=r"there is no file nowhere\.jsonl"):
        read(data_config("nowhere.jsonl", "text"))
