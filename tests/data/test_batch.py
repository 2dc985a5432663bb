"""Batches: branches that share a prompt and do not see one another, and which hidden state predicts what."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM

from smore_cli.data.batch import Batch, Row, collate

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

PAD = 2


def plain(prompt: list[int], branch: list[int]) -> Row:
    return Row(prompt, [branch], [[True] * len(branch)])


THREE = Row([11, 12, 13], [[21, 22], [31], [41, 42, 43]], [[True, True], [True], [True, False, True]], gold=2)
TWO = Row([51, 52], [[61], [71, 72]], [[True], [True, True]], gold=1)
TEXT = Row([], [[81, 82, 83, 84]], [[True, True, False, True]])


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def logits(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(  # type: ignore[no-any-return]
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
        ).logits


def alone(model: nn.Module, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]  # type: ignore[no-any-return]


# What is where.


def test_single_branches_are_laid_out_side_by_side_and_padded_on_the_right() -> None:
    batch = collate([plain([11, 12], [13, 14, 15]), plain([21], [22])], pad_token_id=PAD)
    assert batch.input_ids.tolist() == [[11, 12, 13, 14, 15], [21, 22, PAD, PAD, PAD]]
    assert batch.attention_mask.tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch.token_mask.tolist() == [[True] * 5, [True, True, False, False, False]]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4] and batch.position_ids[1, :2].tolist() == [0, 1]
    assert batch.sources.tolist() == [1, 2, 3, 5] and batch.targets.tolist() == [13, 14, 15, 22]
    assert batch.choice.tolist() == [0, 0, 0, 1] and batch.gold.tolist() == [0, 1]
    assert batch.branch_row.tolist() == [0, 1]


def test_every_branch_continues_the_positions_of_its_prompt() -> None:
    batch = collate([THREE], pad_token_id=PAD)
    assert batch.input_ids[0].tolist() == [11, 12, 13, 21, 22, 31, 41, 42, 43]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 3, 3, 4, 5]


def test_the_last_prompt_token_predicts_the_first_token_of_every_branch() -> None:
    batch = collate([THREE], pad_token_id=PAD)
    assert batch.sources.tolist() == [2, 3, 2, 2, 7]
    assert batch.targets.tolist() == [21, 22, 31, 41, 43]  # 42 is not supervised
    assert batch.choice.tolist() == [0, 0, 1, 2, 2]


def test_choices_and_gold_count_branches_over_the_whole_batch() -> None:
    batch = collate([THREE, TWO, TEXT], pad_token_id=PAD)
    assert batch.branch_row.tolist() == [0, 0, 0, 1, 1, 2]
    assert batch.gold.tolist() == [2, 4, 5]
    assert batch.choice.tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5, 5]
    width = batch.input_ids.shape[1]
    assert (batch.sources // width == batch.branch_row[batch.choice]).all()


def test_a_text_without_a_prompt_predicts_from_its_own_tokens_and_never_its_first() -> None:
    batch = collate([TEXT], pad_token_id=PAD)
    assert batch.input_ids.tolist() == [[81, 82, 83, 84]]
    assert batch.sources.tolist() == [0, 2] and batch.targets.tolist() == [82, 84]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_branch_mask_is_exactly_prompt_and_own_branch(dtype: torch.dtype) -> None:
    batch = collate([TWO, plain([91], [92])], pad_token_id=PAD, mask_dtype=dtype)
    assert batch.attention_mask.shape == (2, 1, 5, 5) and batch.attention_mask.dtype == dtype
    assert set(batch.attention_mask.unique().tolist()) == {0.0, torch.finfo(dtype).min}
    allowed = (batch.attention_mask == 0).int()[:, 0].tolist()
    assert allowed[0] == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert allowed[1] == [  # padding attends to itself alone, and nothing attends to it
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_a_row_knows_how_many_tokens_it_takes() -> None:
    assert [row.length for row in (THREE, TWO, TEXT)] == [9, 5, 4]


def test_moving_a_batch_keeps_every_tensor() -> None:
    batch = collate([replace(THREE, group=1), replace(TWO, group=0)], pad_token_id=PAD)
    assert batch.groups is not None and batch.groups.tolist() == [1, 0]
    moved = batch.to(torch.device("meta"))
    assert all(getattr(moved, name).is_meta for name, value in vars(batch).items() if value is not None)
    assert moved.attention_mask.shape == batch.attention_mask.shape


def test_rows_without_a_group_make_a_batch_without_groups() -> None:
    batch = collate([replace(THREE, group=1), TWO], pad_token_id=PAD)
    assert batch.groups is None and batch.to(torch.device("cpu")).groups is None


# What a model makes of it.


def test_a_branch_has_the_logits_of_its_own_row(model: nn.Module) -> None:
    batch = collate([THREE, TWO, TEXT], pad_token_id=PAD)
    together = logits(model, batch)
    for b, row in enumerate((THREE, TWO, TEXT)):
        start = len(row.prompt)
        for branch in row.branches:
            expected = alone(model, row.prompt + branch)
            here = torch.cat([together[b, : len(row.prompt)], together[b, start : start + len(branch)]])
            torch.testing.assert_close(here, expected, rtol=1e-5, atol=1e-5)
            start += len(branch)


def test_another_branch_changes_nothing(model: nn.Module) -> None:
    changed = Row(THREE.prompt, [[21, 22], [99], [41, 42, 43]], THREE.supervised)
    before, after = (logits(model, collate([row], pad_token_id=PAD))[0] for row in (THREE, changed))
    others = [0, 1, 2, 3, 4, 6, 7, 8]
    torch.testing.assert_close(after[others], before[others], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after[5], before[5], atol=1e-2)


@pytest.mark.parametrize("rows", [[TEXT, plain([11], [12])], [THREE, TWO]])
def test_what_stands_in_the_padding_is_never_attended_to(model: nn.Module, rows: list[Row]) -> None:
    batches = [collate(rows, pad_token_id=pad) for pad in (PAD, 400)]
    assert not torch.equal(batches[0].input_ids, batches[1].input_ids)
    first, second = (logits(model, batch)[batch.token_mask] for batch in batches)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    assert logits(model, batches[0]).isfinite().all()
