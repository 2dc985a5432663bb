"""Groups of rows: named by a source or by a column, numbered in order, and required where a method wants them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from smore_cli.data.batch import Row
from smore_cli.data.build import RowSet, build_rows
from smore_cli.data.groups import number_labels, require_groups
from smore_cli.errors import DataError
from smore_cli.recipe.schema import DataConfig, Source

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

ROW = Row([1], [[2]], [[True]])


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps({"prompt": "Hi", "completion": " there", **row}) + "\n" for row in rows))
    return str(path)


def build(tokenizer: PreTrainedTokenizerBase, *sources: dict[str, Any], **fields: Any) -> RowSet:
    data = DataConfig(train=[Source(format="prompt_completion", **source) for source in sources], **fields)
    return build_rows(data, tokenizer, data.train)


def test_a_source_or_a_column_names_the_group_and_labels_are_numbered_in_order(
    smol_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    by_row = write(tmp_path / "a.jsonl", {"kind": "qa"}, {"kind": "arithmetic"}, {"kind": "qa"})
    whole = write(tmp_path / "b.jsonl", {}, {})
    built = build(smol_tokenizer, {"path": by_row, "columns": {"group": "kind"}}, {"path": whole, "group": "other"})
    assert built.groups == ("arithmetic", "other", "qa")
    assert [row.group for row in built.rows] == [2, 0, 2, 1, 1]


def test_rows_that_are_dropped_take_their_groups_with_them(
    smol_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    long = {"prompt": "one two three four five six seven eight nine ten eleven twelve", "kind": "a"}
    path = write(tmp_path / "a.jsonl", {"kind": "b"}, long, {"kind": "c"})
    source = {"path": path, "columns": {"group": "kind"}}
    built = build(smol_tokenizer, source, max_length=8, on_no_supervision="drop")
    assert built.report.total.dropped == (2,)
    assert built.groups == ("b", "c") and [row.group for row in built.rows] == [0, 1]


def test_a_column_called_group_means_nothing_unless_it_is_named(
    smol_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", {"group": "a"}, {"group": [0.5]})
    built = build(smol_tokenizer, {"path": path})
    assert built.groups == () and [row.group for row in built.rows] == [None, None]
    named = build(smol_tokenizer, {"path": path, "columns": {"group": "group"}, "split": "train[:1]"})
    assert named.groups == ("a",)


@pytest.mark.parametrize("label", [None, 0.5, True, ["a"]])
def test_what_names_no_group_is_refused_with_its_place(
    smol_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, label: object
) -> None:
    path = write(tmp_path / "a.jsonl", {"kind": 3}, {"kind": label})
    with pytest.raises(DataError, match=r"a\.jsonl, row 2: 'kind' is .* names no group"):
        build(smol_tokenizer, {"path": path, "columns": {"group": "kind"}})


def test_a_missing_column_and_two_ways_at_once_are_refused(
    smol_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", {"kind": "a"})
    with pytest.raises(DataError, match="no column 'typ' to use as 'group'"):
        build(smol_tokenizer, {"path": path, "columns": {"group": "typ"}})
    with pytest.raises(DataError, match="both name the rows' groups"):
        build(smol_tokenizer, {"path": path, "columns": {"group": "kind"}, "group": "a"})


def test_numbers_sort_as_numbers_and_before_texts() -> None:
    assert number_labels([10, "b", 2, None, "a"]) == ([1, 3, 0, None, 2], (2, 10, "a", "b"))


def test_a_method_with_groups_wants_one_on_every_row_and_as_many_as_it_has() -> None:
    rows, names = [replace(ROW, group=number) for number in (0, 1, 0)], ("a", "b")
    require_groups(rows, names, 2)
    with pytest.raises(DataError, match="1 of 4 rows name none") as caught:
        require_groups([*rows, ROW], names, 2)
    assert caught.value.hint is not None and "columns: {group: COLUMN}" in caught.value.hint
    with pytest.raises(DataError, match=r"are of 2 groups \(a, b\), and adapter.num_groups is 3") as caught:
        require_groups(rows, names, 3)
    assert caught.value.hint == "set adapter.num_groups: 2"
    with pytest.raises(DataError, match=r"are of 1 group \(a\), and") as caught:
        require_groups(rows[:1], ["a"], 2)
    assert caught.value.hint is not None and "name the others" in caught.value.hint
