from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from smore_cli.data.chat import ChatTemplate
from smore_cli.errors import DataError

Make = Callable[..., PreTrainedTokenizerBase]


def say(*contents: str, first: str = "user") -> list[dict[str, Any]]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]


def turns(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, last_only: bool = False) -> list[str]:
    text, spans = ChatTemplate(tokenizer).turns(messages, last_only=last_only)
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("gemma", "<end_of_turn>"),
        ("phi", "<|end|>"),
        ("marked", "<|im_end|>"),
        ("roles", ""),
    ],
)
def test_each_assistant_turn_is_found_with_its_end_and_without_what_follows(
    with_template: Make, template: str, end: str
) -> None:
    messages = say("Hi", "Hello", "How are you?", "Hello", "Bye")
    assert turns(with_template(template), messages) == [f"Hello{end}", f"Hello{end}"]
    assert turns(with_template(template), messages[:4]) == [f"Hello{end}", f"Hello{end}"]


def test_turns_of_the_real_template_are_found_after_the_system_turn_it_adds(
    smol_tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert turns(smol_tokenizer, say("Hi", "Hello", "Bye", "See you")) == ["Hello<|im_end|>", "See you<|im_end|>"]


def test_a_turn_is_told_from_the_same_words_of_the_user(with_template: Make) -> None:
    template = ChatTemplate(with_template("chatml"))
    text, spans = template.turns(say("Hello", "Hello"), last_only=False)
    assert spans == [(text.rindex("Hello"), text.rindex("\n"))]


def test_only_the_last_assistant_turn_is_found_where_that_is_wanted(with_template: Make) -> None:
    messages = say("Hi", "First", "And?", "Second", "Bye")
    for template in ("chatml", "marked"):
        assert turns(with_template(template), messages, last_only=True) == ["Second<|im_end|>"]


def test_a_conversation_without_an_assistant_has_no_turns(with_template: Make) -> None:
    assert turns(with_template("chatml"), say("Hi")) == []


def test_a_template_that_rewrites_earlier_turns_is_refused_and_its_last_turn_still_found(with_template: Make) -> None:
    tokenizer, messages = with_template("rewriting"), say("2+2?", "<think>easy</think>4", "3+3?", "<think>hm</think>6")
    with pytest.raises(DataError, match="writes turn 2 differently") as caught:
        turns(tokenizer, messages)
    assert "loss_on: last_turn" in caught.value.hint
    assert turns(tokenizer, messages, last_only=True) == ["<think>hm</think>6<|im_end|>"]


def test_a_rewriting_template_with_marks_is_learned_where_it_says(with_template: Make) -> None:
    messages = say("2+2?", "<think>easy</think>4", "3+3?", "<think>hm</think>6")
    assert turns(with_template("marked"), messages) == ["4<|im_end|>", "<think>hm</think>6<|im_end|>"]


def test_what_a_template_refuses_is_one_error(with_template: Make) -> None:
    with pytest.raises(DataError, match="the chat template refuses these messages: no system role"):
        turns(with_template("gemma"), [{"role": "system", "content": "Be kind"}, *say("Hi", "Hello")])


def test_a_conversation_that_the_assistant_opens_is_refused(with_template: Make) -> None:
    with pytest.raises(DataError, match="opens with an assistant turn"):
        turns(with_template("chatml"), say("Hello", "Hi", first="assistant"))


def test_a_tokenizer_without_a_template_is_refused(with_template: Make) -> None:
    tokenizer = with_template("chatml")
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        ChatTemplate(tokenizer)
