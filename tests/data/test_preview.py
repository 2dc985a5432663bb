from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from smore_cli.data.build import build_rows
from smore_cli.data.preview import LEARNED, preview_row
from smore_cli.recipe.schema import DataConfig

Write = Callable[..., str]
Config = Callable[..., DataConfig]

QUESTION = {"question": "What falls from clouds?", "choices": ["stones", "the rain"], "label": 1}


def preview(tokenizer: PreTrainedTokenizerBase, data: DataConfig, *, colour: bool = False) -> Any:
    [row] = build_rows(data, tokenizer, data.train).rows
    return preview_row(row, tokenizer, colour=colour)


def test_learned_tokens_stand_in_brackets_with_eos_shown(
    tokenizer: PreTrainedTokenizerBase, write: Write, data_config: Config
) -> None:
    text = preview(tokenizer, data_config(write([QUESTION]), "multiple_choice")).plain
    wanted = f"Question: What falls from clouds?\nAnswer:[[ the rain{tokenizer.eos_token}]]"
    assert text.removeprefix("<s>").lstrip() == wanted


def test_colour_marks_the_same_characters_without_brackets(
    smol_tokenizer: PreTrainedTokenizerBase, write: Write, data_config: Config
) -> None:
    text = preview(smol_tokenizer, data_config(write([QUESTION]), "multiple_choice"), colour=True)
    assert text.plain == "Question: What falls from clouds?\nAnswer: the rain<|im_end|>"
    assert [text.plain[span.start : span.end] for span in text.spans if span.style == LEARNED] == [
        " the rain<|im_end|>"
    ]


@pytest.mark.parametrize("colour", [True, False])
def test_ranked_choices_stand_under_their_question_with_the_right_one_marked(
    smol_tokenizer: PreTrainedTokenizerBase, write: Write, data_config: Config, colour: bool
) -> None:
    data = data_config(write([QUESTION]), "multiple_choice", objective="choice_ranking")
    lines = preview(smol_tokenizer, data, colour=colour).plain.replace("[[", "").replace("]]", "").splitlines()
    assert lines[1:] == ["Answer:", "  - stones<|im_end|>", "  * the rain<|im_end|>"]


def test_every_learned_turn_of_a_chat_is_marked(
    smol_tokenizer: PreTrainedTokenizerBase, write: Write, data_config: Config
) -> None:
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": f"{role} é漢🙂"} for role in roles]
    text = preview(smol_tokenizer, data_config(write([{"messages": messages}]), "chat", loss_on="assistant")).plain
    turn = "<|im_start|>assistant\n[[assistant é漢🙂<|im_end|>]]\n"
    user = "<|im_start|>user\nuser é漢🙂<|im_end|>\n"
    assert text == f"<|im_start|>system\nsystem é漢🙂<|im_end|>\n{user}{turn}{user}{turn}"


def test_a_text_cut_inside_a_character_is_still_shown(
    byte_tokenizer: PreTrainedTokenizerBase, write: Write, data_config: Config
) -> None:
    text = preview(byte_tokenizer, data_config(write([{"text": "a漢🙂漢漢"}]), "text", max_length=9)).plain
    assert text == "a[[漢🙂�]]"
