"""Mutual information of routers whose answer is known, and what chance makes of those that know nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoTokenizer

from smore_cli.routing.information import TOKEN_CLASSES, mutual_information, of_rows, of_tokens, token_class

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def one_hot(experts: Tensor, count: int) -> Tensor:
    return torch.nn.functional.one_hot(experts, count).float()


def test_an_expert_a_data_set_tells_one_bit_and_is_beyond_chance() -> None:
    labels = torch.tensor([0, 1] * 20)  # forty rows of five tokens
    units = torch.arange(40).repeat_interleave(5)
    usage = one_hot(labels[units], 2)
    (found,) = of_rows(usage, [2], labels, units)
    assert found.bits == pytest.approx(1.0) and found.most == pytest.approx(1.0)
    assert found.p == pytest.approx(1 / 201) and found.high < 0.3


def test_two_routers_side_by_side_are_told_apart() -> None:
    labels = torch.tensor([0, 1, 2, 3] * 50)
    half = one_hot(labels // 2, 3)  # knows one of two bits
    known = mutual_information(torch.cat([half, one_hot(labels, 4)], 1), [3, 4], labels)
    assert [round(each.bits, 6) for each in known] == [1.0, 2.0]


def test_soft_gates_by_hand() -> None:
    # p(e, l): 3/8 1/8 / 1/8 3/8
    usage = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    (found,) = mutual_information(usage, [2], torch.tensor([0, 1]))
    assert found.bits == pytest.approx(0.75 * math.log2(1.5) + 0.25 * math.log2(0.5))


def test_a_router_that_knows_nothing_is_inside_what_chance_makes() -> None:
    generator = torch.Generator().manual_seed(1)
    inside = 0
    for _ in range(20):
        labels = torch.randint(0, 3, (60,), generator=generator)
        usage = one_hot(torch.randint(0, 8, (60,), generator=generator), 8)
        (found,) = mutual_information(usage, [8], labels)
        assert found.bits > 0.05  # not 0, with so few tokens: that is what the shuffles are for
        inside += found.low <= found.bits <= found.high
    assert inside >= 17


def test_rows_are_shuffled_as_a_whole() -> None:
    """Tokens of a row are alike; dealt out one by one they would make any row effect look like knowledge."""
    generator = torch.Generator().manual_seed(2)
    experts = torch.randint(0, 4, (12,), generator=generator)  # one expert a row, whatever its data set
    labels, units = torch.tensor([0, 1] * 6), torch.arange(12).repeat_interleave(50)
    usage = one_hot(experts[units], 4)
    (by_rows,) = of_rows(usage, [4], labels, units)
    (by_tokens,) = mutual_information(usage, [4], labels[units])
    assert by_rows.bits == pytest.approx(by_tokens.bits)
    assert by_rows.p > 0.05 and by_tokens.p < 0.01


def _text(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """24 rows of 40 tokens of 60 types, a few of them frequent, whose kinds differ from row to row."""
    kind_of = torch.arange(60) % 3
    frequency = 1.0 / torch.arange(1, 61)
    ids, rows = [], torch.arange(24).repeat_interleave(40)
    for _ in range(24):
        mix = frequency * (0.2 + torch.rand(3, generator=generator))[kind_of]
        ids.append(torch.multinomial(mix, 40, replacement=True, generator=generator))
    tokens = torch.cat(ids)
    return tokens, rows, kind_of[tokens]


def test_routers_that_follow_the_row_or_the_type_know_nothing_of_the_kind_and_one_that_does_is_found() -> None:
    generator = torch.Generator().manual_seed(3)
    ids, rows, labels = _text(generator)
    experts = 4
    by_row = [torch.randint(0, experts, (24,), generator=generator)[rows] for _ in range(40)]
    by_type = [torch.randint(0, experts, (60,), generator=generator)[ids] for _ in range(40)]
    by_kind = [labels]
    picks = [*by_row, *by_type, *by_kind]
    usage = torch.cat([one_hot(pick, experts) for pick in picks], 1)
    found = of_tokens(usage, [experts] * len(picks), labels, rows, ids)
    for alike in (found[:40], found[40:80]):
        assert sum(one.p <= 0.05 for one in alike) <= 6  # two of forty are to be expected
    assert found[80].p < 0.01 and found[80].bits > found[80].high
    freely = mutual_information(usage, [experts] * len(picks), labels)
    assert sum(one.p <= 0.05 for one in freely[:80]) > 60  # what dealing tokens out one by one would have said


def test_token_classes(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = tokenizer(" water 12. \n", add_special_tokens=False).input_ids
    named = [(tokenizer.decode([token]), TOKEN_CLASSES[token_class(tokenizer, token)]) for token in ids]
    for text, name in named:
        if text.strip().isdigit():
            assert name == "number"
        elif not text.strip():
            assert name == "space"
        elif text.strip() == ".":
            assert name == "punctuation"
        else:
            assert name == ("word" if text.startswith(" ") else "inside of a word")
    assert {"word", "number", "punctuation", "space"} <= {name for _, name in named}
    assert TOKEN_CLASSES[token_class(tokenizer, tokenizer.eos_token_id)] == "special"
