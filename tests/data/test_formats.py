from __future__ import annotations

from typing import Any

import pytest

from smore_cli.data.formats import (
    FORMATS,
    Conversation,
    Instruction,
    MultipleChoice,
    PromptCompletion,
    Text,
    read_examples,
)
from smore_cli.data.sources import SourceRows
from smore_cli.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
HUB = {"question": "Q", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, "answerKey": "B"}


def parse(format_name: str, *rows: dict[str, Any]) -> list[Any]:
    return list(read_examples(SourceRows("data.jsonl", rows, {}), format_name))


def refused(format_name: str, *rows: dict[str, Any]) -> DataError:
    with pytest.raises(DataError) as caught:
        parse(format_name, *rows)
    return caught.value


@pytest.mark.parametrize(
    ("format_name", "row", "meaning"),
    [
        ("multiple_choice", {"question": "Q", "choices": ["x", "y"], "label": 1}, MultipleChoice("Q", ("x", "y"), 1)),
        ("multiple_choice", {"question": "Q", "choices": ["x", "y"], "label": "A"}, MultipleChoice("Q", ("x", "y"), 0)),
        ("multiple_choice", {"question": "Q", "choices": ["x", "y"], "label": "b"}, MultipleChoice("Q", ("x", "y"), 1)),
        ("multiple_choice", HUB, MultipleChoice("Q", ("x", "y", "z"), 1)),
        ("prompt_completion", {"prompt": "P", "completion": " C"}, PromptCompletion("P", " C")),
        ("prompt_completion", {"prompt": "", "completion": "C"}, PromptCompletion("", "C")),
        ("alpaca", {"instruction": "I", "output": "O"}, Instruction("I", "", "O")),
        ("alpaca", {"instruction": "I", "input": None, "output": "O"}, Instruction("I", "", "O")),
        ("alpaca", {"instruction": "I", "input": "X", "output": "O"}, Instruction("I", "X", "O")),
        ("chat", {"messages": [USER, ASSISTANT]}, Conversation((USER, ASSISTANT))),
        ("text", {"text": " T "}, Text(" T ")),
    ],
)
def test_a_row_of_its_format_is_understood(format_name: str, row: dict[str, Any], meaning: Any) -> None:
    assert parse(format_name, row | {"id": "extra columns are ignored"}) == [meaning]


def test_numbered_answers_of_the_hub_form_are_found_among_their_labels() -> None:
    row = {"question": "Q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    assert parse("multiple_choice", row) == [MultipleChoice("Q", ("x", "y"), 1)]


def test_keys_that_arrow_filled_with_none_are_not_handed_to_a_template() -> None:
    [conversation] = parse("chat", {"messages": [USER | {"tool_calls": None}]})
    assert conversation.messages == (USER,)


def test_a_misfit_names_source_row_key_and_the_keys_there_are() -> None:
    good = {"prompt": "p", "completion": "c"}
    error = refused("prompt_completion", good, good, {"prompt": "p", "answer": "c", "completion": None})
    wanted = "data.jsonl, row 3: no 'completion' (format prompt_completion; the row has: prompt, answer)"
    assert error.message == wanted
    assert "{prompt, completion}" in error.hint and "columns" in error.hint


@pytest.mark.parametrize(
    ("fits", "row"),
    [
        ("multiple_choice", {"question": "Q", "choices": ["x", "y"], "label": 1}),
        ("prompt_completion", {"prompt": "P", "completion": "C"}),
        ("chat", {"messages": [USER]}),
        ("alpaca", {"instruction": "I", "output": "O"}),
        ("text", {"text": "T"}),
    ],
)
def test_a_misfit_is_told_which_format_would_fit(fits: str, row: dict[str, Any]) -> None:
    for name in FORMATS:
        if name != fits:
            assert refused(name, row).hint == f"the row fits format: {fits}"


@pytest.mark.parametrize(
    ("format_name", "row", "problem"),
    [
        ("multiple_choice", {"question": "Q", "choices": "x", "label": 0}, "'choices' must be a list"),
        ("multiple_choice", {"question": "Q", "choices": ["x"], "label": 0}, "list of two or more"),
        ("multiple_choice", {"question": "Q", "choices": ["x", 3], "label": 0}, "something that is not text"),
        ("multiple_choice", {"question": "Q", "choices": ["x", " "], "label": 0}, "or is empty"),
        ("multiple_choice", {"question": "Q", "choices": ["x", "y"], "label": 2}, "'label' is 2, but there are 2"),
        ("multiple_choice", {"question": "Q", "choices": ["x", "y"], "label": -1}, "'label' is -1, but there are 2"),
        ("multiple_choice", {"question": "Q", "choices": ["x", "y"], "label": "C"}, "'label' is 'C', but"),
        ("multiple_choice", {"question": "Q", "choices": ["x", "y"], "label": True}, "'label' is True, it must"),
        ("multiple_choice", {"question": "Q", "choices": ["x", "y"], "label": 1.0}, "'label' is 1.0, it must"),
        ("multiple_choice", {"question": "Q", "choices": ["x", "y"], "label": "1"}, "'label' is '1', it must"),
        ("multiple_choice", HUB | {"answerKey": "D"}, "'answerKey' is 'D', which is not among"),
        ("multiple_choice", HUB | {"choices": {"text": ["x", "y"], "label": ["A"]}}, "of one length"),
        ("prompt_completion", {"prompt": "P", "completion": 7}, "'completion' must be text, it is a int"),
        ("prompt_completion", {"prompt": "P", "completion": "\n"}, "'completion' is empty"),
        ("alpaca", {"instruction": "I", "input": 3, "output": "O"}, "'input' must be text"),
        ("chat", {"messages": []}, "list of one or more"),
        ("chat", {"messages": "Hi"}, "must be a list of messages, it is text"),
        ("chat", {"messages": [USER, "Hi"]}, "message 2 is not an object"),
        (
            "chat",
            {"messages": [{"from": "human", "value": "Hi"}]},
            "message 1 has no text 'role' (it has: from, value)",
        ),
        ("chat", {"messages": [{"role": "user", "content": None}]}, "message 1 has no text 'content'"),
        ("text", {}, "no 'text' (format text; the row has: nothing)"),
    ],
)
def test_an_odd_value_is_refused_in_one_line(format_name: str, row: dict[str, Any], problem: str) -> None:
    error = refused(format_name, row)
    assert problem in error.message and "\n" not in error.message


def test_the_usual_names_of_roles_mean_ours() -> None:
    names = {"Human": "user", "prompter": "user", "gpt": "assistant", "bard": "assistant", "observation": "tool"}
    turns = [{"from": name, "value": "x"} for name in names]
    [conversation] = parse("sharegpt", {"conversations": turns})
    assert [message["role"] for message in conversation.messages] == list(names.values())
    [same] = parse("sharegpt", {"conversations": [{"role": name, "content": "x"} for name in names]})
    [chat] = parse("chat", {"messages": [{"role": name, "content": "x"} for name in names]})
    assert conversation == same == chat


@pytest.mark.parametrize("format_name", ["chat", "sharegpt"])
def test_roles_of_the_recipe_go_before_the_usual_ones(format_name: str) -> None:
    messages = [{"role": "Kunde", "content": "a"}, {"role": "user", "content": "b"}]
    column = {"chat": "messages", "sharegpt": "conversations"}[format_name]
    rows = SourceRows("x.jsonl", [{column: messages}], {}, {"Kunde": "user", "user": "assistant"})
    [conversation] = read_examples(rows, format_name)
    assert isinstance(conversation, Conversation)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]


def test_an_unknown_role_is_named_with_how_to_map_it() -> None:
    good = {"conversations": [{"from": "human", "value": "Hi"}]}
    error = refused("sharegpt", good, {"conversations": [{"from": "Mensch", "value": "Hi"}]})
    assert error.message.startswith("data.jsonl, row 2: message 1 has the role 'Mensch', which is not known")
    assert "roles: {Mensch: user}" in error.hint


def test_a_system_column_opens_the_conversation() -> None:
    row = {"system": "Be kind.", "conversations": [{"from": "human", "value": "Hi"}]}
    [conversation] = parse("sharegpt", row)
    assert conversation.messages[0] == {"role": "system", "content": "Be kind."}
    row["conversations"] = [{"from": "system", "value": "Be brief."}, *row["conversations"]]  # type: ignore[misc]
    [conversation] = parse("sharegpt", row)
    assert [message["content"] for message in conversation.messages] == ["Be brief.", "Hi"]


def test_text_parts_are_joined_and_others_refused() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}]
    [conversation] = parse("chat", {"messages": [{"role": "user", "content": parts}]})
    assert conversation.messages[0]["content"] == "a\nb"
    error = refused("chat", {"messages": [{"role": "user", "content": [*parts, {"type": "image", "url": "x"}]}]})
    assert "message 1 has a part of type 'image'" in error.message


def test_messages_on_both_sides_of_a_completion_are_a_conversation() -> None:
    assert parse("prompt_completion", {"prompt": [USER], "completion": [ASSISTANT]}) == [
        Conversation((USER, ASSISTANT))
    ]
    error = refused("prompt_completion", {"prompt": [USER], "completion": [ASSISTANT, USER]})
    assert "must be one message" in error.message and "format: chat" in error.hint


def test_what_is_not_read_is_counted() -> None:
    call = ASSISTANT | {"tool_calls": [{"function": {"name": "f"}}]}
    rows = [{"messages": [USER, call], "tools": [{"name": "f"}]}, {"messages": [USER, ASSISTANT | {"weight": 0}]}]
    source = SourceRows("data.jsonl", rows, {})
    assert [len(example.messages) for example in read_examples(source, "chat")] == [2, 2]  # type: ignore[union-attr]
    assert source.notices == {
        "rows with 'tools', which is not read": 1,
        "messages with 'tool_calls', which is not learned": 1,
        "messages with 'weight: 0', which is not read: data.loss_on says what is learned": 1,
    }
    alone = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert "has only 'tool_calls'" in refused("chat", {"messages": [USER, alone]}).message


def test_a_chat_in_the_other_formats_column_is_told_how_to_name_it() -> None:
    turns = [{"from": "human", "value": "Hi"}]
    wanted = "the row fits format: sharegpt with columns: {conversations: messages}"
    assert refused("chat", {"messages": turns}).hint == wanted
    assert refused("chat", {"conversations": turns}).hint == "the row fits format: sharegpt"
