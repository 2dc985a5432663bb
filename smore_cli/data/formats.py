"""What a raw row says: one small class for each thing a row can be, and one parser for each format of a recipe."""

from __future__ import annotations

import string
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smore_cli.data.messages import Misfit, present_keys, read_messages, require_characters, shown
from smore_cli.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from smore_cli.data.sources import SourceRows

__all__ = [
    "CHAT_FORMATS",
    "FORMATS",
    "Conversation",
    "Example",
    "Instruction",
    "MultipleChoice",
    "PromptCompletion",
    "Reading",
    "Text",
    "read_example",
    "read_examples",
]


@dataclass(frozen=True)
class MultipleChoice:
    """A question with its possible answers; `label` is the index of the right one."""

    question: str
    choices: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class PromptCompletion:
    """A text and how it goes on; nothing is put between the two."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Instruction:
    """An Alpaca row: what to do, on what (may be empty), and the response."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Conversation:
    """Messages `{role, content, ...}` in order."""

    messages: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Text:
    """A text that is learned from its beginning to its end."""

    text: str


Example = MultipleChoice | PromptCompletion | Instruction | Conversation | Text


@dataclass
class Reading:
    """What a parser needs besides the row.

    Attributes:
        roles: the source's own mapping of role names, {a file's role: our role}.
        notices: counts what the rows hold and is not read, by what to say about it.
    """

    roles: Mapping[str, str] = field(default_factory=dict)
    notices: Counter[str] = field(default_factory=Counter)


def read_examples(rows: SourceRows, format_name: str) -> Iterator[Example]:
    """Yields every row of a source as what it means; `rows.notices` counts what is there and not read.

    Raises:
        DataError: a row is not of the format; names source, row, key, the keys it has, and a format that would fit.
    """
    for number, row in enumerate(rows, 1):
        yield read_example(row, format_name, rows, number)


def read_example(row: Mapping[str, Any], format_name: str, rows: SourceRows, number: int) -> Example:
    """Returns what one row of a source means; `number` is its number there, from 1.

    Raises:
        DataError: the row is not of the format.
    """
    reading = Reading(rows.roles, rows.notices)
    try:
        example = FORMATS[format_name](row, reading)
    except Misfit as misfit:
        has = ", ".join(present_keys(row)) or "nothing"
        problem = f"{rows.place(number)}: {misfit} (format {format_name}; the row has: {has})"
        raise DataError(problem, misfit.hint or _advice(row, format_name, rows.roles, str(misfit))) from misfit
    for column in _UNREAD.get(format_name, ()):
        if row.get(column):
            rows.notices[f"rows with '{column}', which is not read"] += 1
    return example


def _advice(row: Mapping[str, Any], format_name: str, roles: Mapping[str, str], misfit: str) -> str:
    """Returns the hint for a misfit: another format the row would fit, else the form this one wants."""
    for name, parse in FORMATS.items():
        try:
            parse(row, Reading(roles))
        except Misfit:
            continue
        return f"the row fits format: {name}"
    for wanted, present in (("conversations", "messages"), ("messages", "conversations")):
        name = "sharegpt" if wanted == "conversations" else "chat"
        try:
            FORMATS[name]({wanted: row.get(present)}, Reading(roles))
        except Misfit:
            continue
        return f"the row fits format: {name} with columns: {{{wanted}: {present}}}"
    if misfit.startswith("no '"):
        return f"wanted {_FORMS[format_name]}; a column of another name can be renamed: columns: {{wanted: present}}"
    return f"mend the row, or take it out; wanted {_FORMS[format_name]}"


def _multiple_choice(row: Mapping[str, Any], reading: Reading) -> MultipleChoice:
    question = _text(row, "question")
    choices = _get(row, "choices")
    if isinstance(choices, dict):  # the hub's form of ARC, CommonsenseQA and others
        texts, names = choices.get("text"), choices.get("label")
        if not isinstance(texts, list) or not isinstance(names, list) or len(texts) != len(names):
            raise Misfit("'choices' must hold lists 'text' and 'label' of one length")
        answer = _get(row, "answerKey")
        if answer not in names:
            raise Misfit(f"'answerKey' is {shown(answer)}, which is not among the labels {shown(names)}")
        return MultipleChoice(question, _choices(texts), names.index(answer))
    texts = _choices(choices)
    return MultipleChoice(question, texts, _label(_get(row, "label"), len(texts)))


def _choices(texts: Any) -> tuple[str, ...]:
    if not isinstance(texts, list) or len(texts) < 2:
        hint = "a .csv cannot hold lists: use .jsonl" if isinstance(texts, str) and texts.strip()[:1] == "[" else ""
        raise Misfit(f"'choices' must be a list of two or more texts, it is {shown(texts)}", hint)
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise Misfit("'choices' holds something that is not text, or is empty")
    return tuple(require_characters(text, "'choices'") for text in texts)


def _label(label: Any, count: int) -> int:
    """Returns the index that a label means: a whole number from 0, or a letter from A."""
    if isinstance(label, int) and not isinstance(label, bool):
        index = label
    elif isinstance(label, str) and len(label) == 1 and label.upper() in string.ascii_uppercase:
        index = string.ascii_uppercase.index(label.upper())
    else:
        raise Misfit(f"'label' is {shown(label)}, it must be a whole number from 0 or a letter from A")
    if not 0 <= index < count:
        hint = "labels count from 0: if the file counts from 1, take one off each"
        raise Misfit(f"'label' is {shown(label)}, but there are {count} choices (0 or A is the first)", hint)
    return index


def _prompt_completion(row: Mapping[str, Any], reading: Reading) -> PromptCompletion | Conversation:
    """Reads two texts, or two lists of messages (TRL's conversational form), of which the second is one answer."""
    prompt, completion = _get(row, "prompt"), _get(row, "completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return PromptCompletion(_text(row, "prompt", empty=True), _text(row, "completion"))
    asked = _messages(prompt, "prompt", reading)
    answer = _messages(completion, "completion", reading)
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        hint = "use format: chat with all messages in one list, and loss_on: assistant"
        raise Misfit("'completion' must be one message, the assistant's", hint)
    return Conversation(asked + answer)


def _alpaca(row: Mapping[str, Any], reading: Reading) -> Instruction:
    given = _text(row, "input", empty=True) if row.get("input") is not None else ""
    return Instruction(_text(row, "instruction"), given, _text(row, "output"))


def _chat(row: Mapping[str, Any], reading: Reading) -> Conversation:
    return Conversation(_with_system(row, _messages(_get(row, "messages"), "messages", reading)))


def _sharegpt(row: Mapping[str, Any], reading: Reading) -> Conversation:
    keys = (("from", "value"), ("role", "content"))
    messages = read_messages(
        _get(row, "conversations"), "conversations", keys=keys, roles=reading.roles, notices=reading.notices
    )
    return Conversation(_with_system(row, messages))


def _messages(value: Any, column: str, reading: Reading) -> tuple[dict[str, Any], ...]:
    return read_messages(value, column, keys=(("role", "content"),), roles=reading.roles, notices=reading.notices)


def _with_system(row: Mapping[str, Any], messages: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """Puts a row's own column `system` before its messages, unless they begin with a system turn themselves."""
    system = row.get("system")
    if not isinstance(system, str) or not system.strip() or messages[0]["role"] == "system":
        return messages
    return ({"role": "system", "content": require_characters(system, "'system'")}, *messages)


def _plain_text(row: Mapping[str, Any], reading: Reading) -> Text:
    return Text(_text(row, "text"))


def _get(row: Mapping[str, Any], key: str) -> Any:
    if row.get(key) is None:
        raise Misfit(f"no '{key}'")
    return row[key]


def _text(row: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    value = _get(row, key)
    if not isinstance(value, str):
        kind = shown(value) if isinstance(value, float) else f"a {type(value).__name__}"
        raise Misfit(f"'{key}' must be text, it is {kind}")
    if not empty and not value.strip():
        raise Misfit(f"'{key}' is empty")
    return require_characters(value, f"'{key}'")


FORMATS: dict[str, Callable[[Mapping[str, Any], Reading], Example]] = {
    "multiple_choice": _multiple_choice,
    "prompt_completion": _prompt_completion,
    "chat": _chat,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "text": _plain_text,
}
"""The parser of each format a recipe can name."""

CHAT_FORMATS = ("chat", "sharegpt")
"""The formats whose rows are conversations: the chat template writes them, loss_on can choose among their turns."""

_TOOLS = ("tools", "tool_calls", "functions", "function_calls")
_UNREAD = {"chat": _TOOLS, "sharegpt": _TOOLS, "prompt_completion": _TOOLS, "alpaca": ("system", "history")}
"""Columns that mean something elsewhere and are not read here; a row that has them is counted and said."""

_FORMS = {
    "multiple_choice": "{question, choices: [text, ...], label: 0} or {question, choices: {text, label}, answerKey}",
    "prompt_completion": "{prompt, completion}, both text or both lists of {role, content}",
    "chat": "{messages: [{role, content}, ...]}",
    "sharegpt": "{conversations: [{from, value}, ...]}",
    "alpaca": "{instruction, input (may be missing), output}",
    "text": "{text}",
}
