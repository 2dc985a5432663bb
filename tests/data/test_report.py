from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace

import pytest

from smore_cli.data.batch import Row
from smore_cli.data.report import DataReport, SourceReport, content_hash, name_rows

ROW = Row([1, 2], [[3, 4], [5]], [[True, False], [True]], gold=1)
OTHERS = [
    replace(ROW, gold=0),
    replace(ROW, group=0),
    replace(ROW, prompt=[1]),
    replace(ROW, prompt=[2, 1]),
    replace(ROW, prompt=[1, 2, 3], branches=[[4], [5]], supervised=[[False], [True]]),
    replace(ROW, branches=[[3, 4], [6]]),
    replace(ROW, supervised=[[True, True], [True]]),
    replace(ROW, branches=[[3], [4, 5]], supervised=[[True], [False, True]]),
]


def test_the_hash_is_the_same_on_every_machine() -> None:
    numbers = [2, 1, 2, 2, 1, 2, 2, 3, 4, 2, 1, 0, 1, 5, 1, 1]  # each list after its length: header, prompt, branches
    assert content_hash([ROW]) == hashlib.sha256(struct.pack("<16q", *numbers)).hexdigest()


@pytest.mark.parametrize("other", OTHERS)
def test_the_hash_tells_any_difference(other: Row) -> None:
    assert content_hash([other]) != content_hash([ROW])


def test_the_hash_tells_order_and_number() -> None:
    assert content_hash([ROW, OTHERS[0]]) != content_hash([OTHERS[0], ROW])
    assert content_hash([ROW]) != content_hash([ROW, ROW])


def test_a_source_is_reported_in_one_line() -> None:
    report = SourceReport("x", rows=2, truncated=1, dropped=(4,), tokens=8, supervised=4, longest=5)
    line = "x: 2 rows, 8 tokens, 4 supervised, longest row 5, 1 truncated, 1 dropped (row 4: nothing to learn)"
    assert report.line() == line


def test_the_total_adds_the_sources() -> None:
    part = SourceReport("x", rows=1, truncated=1, dropped=(4,), tokens=5, supervised=2, longest=5)
    total = DataReport((part, part), "hash").total
    assert (total.rows, total.tokens, total.supervised, total.longest, total.truncated) == (2, 10, 4, 5, 2)
    assert len(total.dropped) == 2


def test_a_report_can_be_written_as_json() -> None:
    report = DataReport(
        (SourceReport("x", rows=1, truncated=0, dropped=(4,), tokens=5, supervised=2, longest=5),), "hash"
    )
    assert json.loads(json.dumps(report.as_dict()))["sources"][0]["dropped"] == [4]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([7], "row 7"),
        ([1, 2], "rows 1, 2"),
        (list(range(1, 1212)), "rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 1,201 more"),
    ],
)
def test_the_first_ten_rows_are_named(numbers: list[int], text: str) -> None:
    assert name_rows(numbers) == text


def test_many_rows_that_end_early_are_worth_a_warning_and_few_are_not() -> None:
    few = SourceReport("x", rows=1000, truncated=50, dropped=(), tokens=8, supervised=4, longest=5)
    assert few.cut(5) is None
    many = SourceReport("x", rows=1000, truncated=170, dropped=(), tokens=8, supervised=4, longest=5)
    assert many.cut(256) == (
        "warning: 170 of 1,000 training rows (17 %) end early, after 256 tokens: raise data.max_length"
    )
    assert SourceReport("x", rows=0, truncated=0, dropped=(), tokens=0, supervised=0, longest=0).cut(5) is None
