"""Rows share lines and passes so that little is padding, and nothing is lost, cut or seen twice."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from smore_cli.data.batch import Row, collate, collate_packs, prompt_of
from smore_cli.data.packing import group_rows, pack_rows, padding_of

LENGTHS = [random.Random(1).choice([3, 5, 9, 17, 31, 40]) + number % 7 for number in range(500)]
ROWS = random.Random(2).sample(range(500), 500)
PAD = 0


def test_packs_hold_every_row_once_and_nearly_fill_their_lines() -> None:
    packs = pack_rows(ROWS, LENGTHS, 64, seed=0, epoch=0)
    assert sorted(row for pack in packs for row in pack) == list(range(500))
    widths = [sum(LENGTHS[row] for row in pack) for pack in packs]
    assert max(widths) <= 64
    assert len(packs) <= sum(widths) / 64 * 1.03 + 1
    assert pack_rows(ROWS, LENGTHS, 64, seed=0, epoch=0) == packs
    other = pack_rows(ROWS[::-1], LENGTHS, 64, seed=0, epoch=1)
    assert len(other) == len(packs) and sorted(map(sorted, other)) != sorted(map(sorted, packs))


def test_a_row_longer_than_a_line_has_one_to_itself() -> None:
    assert sorted(map(sorted, pack_rows([0, 1, 2], [80, 30, 34], 64, seed=0, epoch=0))) == [[0], [1, 2]]


def test_a_hole_is_filled_by_the_longest_row_that_fits_it_best() -> None:
    # 40 + 20 leave 4, 35 leaves 29: the 4 goes where it fits exactly.
    packs = pack_rows([0, 1, 2, 3], [40, 35, 20, 4], 64, seed=0, epoch=0)
    assert sorted(map(sorted, packs)) == [[0, 2, 3], [1]]


def test_groups_hold_every_row_once_and_rows_of_similar_length_together() -> None:
    order = group_rows(ROWS, LENGTHS, 8, seed=0, epoch=0)
    assert sorted(order) == list(range(500))
    passes = [order[i : i + 8] for i in range(0, 500, 8)]
    spread = [max(LENGTHS[row] for row in rows) - min(LENGTHS[row] for row in rows) for rows in passes[:-1]]
    assert sum(spread) / len(spread) < 3
    means = [sum(LENGTHS[row] for row in rows) for rows in passes[:-1]]
    assert means != sorted(means) and means != sorted(means, reverse=True)
    assert {frozenset(rows) for rows in passes} != {
        frozenset(rows) for rows in zip(*[iter(group_rows(ROWS[::-1], LENGTHS, 8, seed=0, epoch=1))] * 8, strict=False)
    }


def test_padding_is_counted_pass_by_pass() -> None:
    found = padding_of([[[0], [1]], [[2]]], [4, 2, 5])
    assert (found.share, found.lines, found.width, found.tokens) == (pytest.approx(2 / 13), 1.5, 4.5, 11)
    assert padding_of([[[0], [1]]], [4, 2], flat=True).share == 0
    assert padding_of([[[0, 1], [2]]], [4, 2, 5]).line() == "8 % of passes of 2 x 6"


# What a packed pass is made of.

A, B, C = Row([11, 12], [[13, 14, 15]], [[True] * 3]), Row([], [[21, 22]], [[True] * 2]), Row([31], [[32]], [[True]])
TWO = Row([41, 42], [[43], [44, 45]], [[True], [True, True]], gold=1)


def test_a_line_holds_its_rows_one_after_another_and_padding_is_a_document_of_its_own() -> None:
    batch = collate_packs([[A, C], [B]], pad_token_id=PAD)
    assert batch.input_ids.tolist() == [[11, 12, 13, 14, 15, 31, 32], [21, 22, 0, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 0, 1, 2, 3, 4]]
    assert batch.documents is not None and batch.places is not None
    assert batch.documents.tolist() == [[0, 0, 0, 0, 0, 1, 1], [2, 2, -1, -1, -1, -1, -1]]
    assert batch.places.tolist() == [[0, 1, 2, 3, 4], [5, 6, -1, -1, -1], [7, 8, -1, -1, -1]]
    assert batch.attention_mask is None
    assert batch.sources.tolist() == [1, 2, 3, 5, 7] and batch.targets.tolist() == [13, 14, 15, 32, 22]
    assert batch.choice.tolist() == [0, 0, 0, 1, 2] and batch.gold.tolist() == [0, 1, 2]
    flat = collate_packs([[A, C], [B]], pad_token_id=PAD, flat=True)
    assert flat.input_ids.tolist() == [[11, 12, 13, 14, 15, 31, 32, 21, 22]]
    assert flat.token_mask.all() and flat.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 1]]


def test_padding_has_no_place_that_no_row_has() -> None:
    batch = collate_packs([[C], [B, C, C, B]], pad_token_id=PAD)
    assert batch.position_ids[0].tolist() == [0, 1, 0, 1, 0, 1, 0, 1]


def test_what_belongs_to_a_row_has_an_entry_a_document() -> None:
    rows = [replace(row, group=number % 2) for number, row in enumerate((A, B, TWO, C))]
    packed = collate_packs([rows[:2], rows[2:]], pad_token_id=PAD)
    plain = collate(rows, pad_token_id=PAD)
    assert plain.documents is None and plain.places is None
    for name in ("targets", "choice", "gold", "branch_row", "groups"):
        assert torch.equal(getattr(packed, name), getattr(plain, name)), name
    assert packed.places is not None and packed.prompt_mask is not None
    for row, places in zip(rows, packed.places, strict=True):
        mine = places[places >= 0]
        prompt = packed.input_ids.flatten()[mine][packed.prompt_mask.flatten()[mine]]
        assert len(mine) == row.length and prompt.tolist() == prompt_of(row)
    moved = packed.to(torch.device("meta"))
    assert all(value.is_meta for value in vars(moved).values() if value is not None)


def test_branches_see_their_own_prompt_alone_in_a_packed_line() -> None:
    batch = collate_packs([[TWO, TWO]], pad_token_id=PAD)
    assert batch.attention_mask is not None and batch.attention_mask.shape == (1, 1, 10, 10)
    seen = batch.attention_mask[0, 0] == 0
    alone = collate([TWO], pad_token_id=PAD).attention_mask
    assert alone is not None
    assert torch.equal(seen[:5, :5], alone[0, 0] == 0) and torch.equal(seen[5:, 5:], alone[0, 0] == 0)
    assert not seen[5:, :5].any()
