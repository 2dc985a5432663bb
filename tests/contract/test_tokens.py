"""A token's output depends on itself and on the tokens before it, in its own row, and on nothing else."""

from __future__ import annotations

import pytest
import torch

from tests.contract.models import Case, forward, logits, padded, token_ids

CLOSE: dict[str, float] = {"rtol": 1e-6, "atol": 1e-6}
LENGTHS = (6, 3, 4)


def prompts(*lengths: int) -> list[list[int]]:
    return [token_ids(length, seed=i).tolist() for i, length in enumerate(lengths)]


def test_later_tokens_do_not_change_earlier_outputs(case: Case) -> None:
    model, ids = case.random(torch.float64), token_ids(2, 9)
    other = torch.cat([ids[:, :5], ids[:, 5:].flip(1)], 1)
    assert not torch.equal(other, ids)
    a, b = logits(model, ids), logits(model, other)
    torch.testing.assert_close(a[:, :5], b[:, :5], **CLOSE)
    assert not torch.allclose(a[:, 5:], b[:, 5:], **CLOSE)


def test_a_row_alone_gives_what_it_gives_in_a_batch_in_any_order(case: Case) -> None:
    model, ids = case.random(torch.float64), token_ids(4, 6)
    whole = logits(model, ids)
    torch.testing.assert_close(logits(model, ids[2:3]), whole[2:3], **CLOSE)
    order = torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(logits(model, ids[order]), whole[order], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_output_of_a_real_token(case: Case, side: str) -> None:
    model, rows = case.random(torch.float64), prompts(*LENGTHS)
    ids, mask, positions = padded(rows, side)
    out = logits(model, ids, mask, position_ids=positions)
    for i, row in enumerate(rows):
        torch.testing.assert_close(out[i, mask[i] == 1], logits(model, torch.tensor([row]))[0], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_decoding_with_a_cache_equals_full_forward_passes(case: Case, side: str) -> None:
    model, rows, new = case.random(torch.float64), prompts(*LENGTHS), prompts(2, 2, 2)
    ids, mask, positions = padded(rows, side)
    with torch.no_grad():
        out = forward(model, ids, mask, position_ids=positions, use_cache=True)
        for step in range(2):
            mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=mask.dtype)], 1)
            out = model(  # as `generate` calls it: one token a row, the mask of all tokens so far
                input_ids=torch.tensor([[row[step]] for row in new]),
                attention_mask=mask,
                position_ids=torch.tensor([[len(row) + step] for row in rows]),
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            for i, row in enumerate(rows):
                whole = logits(model, torch.tensor([row + new[i][: step + 1]]))
                torch.testing.assert_close(out.logits[i, -1], whole[0, -1], **CLOSE)
