"""What a raw row says: one small class for each thing a row can be, and one parser for each format of a recipe."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smore_cli.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from smore_cli.data.sources import SourceRows

__all__ = [
    "FORMATS",
    "Conversation",
    "Example",
    "Instruction",
    "MultipleChoice",
    "PromptCompletion",
    "Text",
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


class _Misfit(Exception):
    """A row is not of a format; the message says which key is the trouble."""


def read_examples(rows: SourceRows, format_name: str) -> Iterator[Example]:
    """Yields every row of a source as what it means.

    Raises:
        DataError: a row is not of the format; names source, row, key, the keys it has, and a format that would fit.
    """
    parse = FORMATS[format_name]
    for number, row in enumerate(rows, 1):
        try:
            yield parse(row)
        except _Misfit as misfit:
            has = ", ".join(_present(row)) or "nothing"
            problem = f"{rows.origin}, row {number}: {misfit} (format {format_name}; the row has: {has})"
            raise DataError(problem, _advice(row, format_name)) from misfit


def _advice(row: Mapping[str, Any], format_name: str) -> str:
    """Returns the hint for a misfit: another format the row would fit, else the form this one wants."""
    for name, parse in FORMATS.items():
        try:
            parse(row)
        except _Misfit:
            continue
        return f"the row fits format: {name}"
    return f"wanted {_FORMS[format_name]}; a column of another name can be renamed: columns: {{wanted: present}}"


def _multiple_choice(row: Mapping[str, Any]) -> MultipleChoice:
    question = _text(row, "question")
    choices = _get(row, "choices")
    if isinstance(choices, dict):  # the hub's form of ARC, CommonsenseQA and others
        texts, names = choices.get("text"), choices.get("label")
        if not isinstance(texts, list) or not isinstance(names, list) or len(texts) != len(names):
            raise _Misfit("'choices' must hold lists 'text' and 'label' of one length")
        answer = _get(row, "answerKey")
        if answer not in names:
            raise _Misfit(f"'answerKey' is {answer!r}, which is not among the labels {names}")
        return MultipleChoice(question, _choices(texts), names.index(answer))
    texts = _choices(choices)
    return MultipleChoice(question, texts, _label(_get(row, "label"), len(texts)))


def _choices(texts: Any) -> tuple[str, ...]:
    if not isinstance(texts, list) or len(texts) < 2:
        raise _Misfit("'choices' must be a list of two or more texts")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise _Misfit("'choices' holds something that is not text, or is empty")
    return tuple(texts)


def _label(label: Any, count: int) -> int:
    """Returns the index that a label means: a whole number from 0, or a letter from A."""
    if isinstance(label, int) and not isinstance(label, bool):
        index = label
    elif isinstance(label, str) and len(label) == 1 and label.upper() in string.ascii_uppercase:
        index = string.ascii_uppercase.index(label.upper())
    else:
        raise _Misfit(f"'label' is {label!r}, it must be a whole number from 0 or a letter from A")
    if not 0 <= index < count:
        raise _Misfit(f"'label' is {label!r}, but there are {count} choices (0 or A is the first)")
    return index


def _prompt_completion(row: Mapping[str, Any]) -> PromptCompletion:
    return PromptCompletion(_text(row, "prompt", empty=True), _text(row, "completion"))


def _alpaca(row: Mapping[str, Any]) -> Instruction:
    given = _text(row, "input", empty=True) if row.get("input") is not None else ""
    return Instruction(_text(row, "instruction"), given, _text(row, "output"))


def _chat(row: Mapping[str, Any]) -> Conversation:
    messages = _get(row, "messages")
    if not isinstance(messages, list) or not messages:
        raise _Misfit("'messages' must be a list of one or more {role, content}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise _Misfit(f"message {number} is not an object {{role, content}}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                has = ", ".join(_present(message)) or "nothing"
                raise _Misfit(f"message {number} has no text '{key}' (it has: {has})")
    # Arrow fills keys that only some messages have with None; a template must not take them for being there.
    return Conversation(tuple({key: message[key] for key in _present(message)} for message in messages))


def _plain_text(row: Mapping[str, Any]) -> Text:
    return Text(_text(row, "text"))


def _present(row: Mapping[str, Any]) -> list[str]:
    return [key for key, value in row.items() if value is not None]


def _get(row: Mapping[str, Any], key: str) -> Any:
    if row.get(key) is None:
        raise _Misfit(f"no '{key}'")
    return row[key]


def _text(row: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    value = _get(row, key)
    if not isinstance(value, str):
        raise _Misfit(f"'{key}' must be text, it is a {type(value).__name__}")
    if not empty and not value.strip():
        raise _Misfit(f"'{key}' is empty")
    return value


FORMATS: dict[str, Callable[[Mapping[str, Any]], Example]] = {
    "multiple_choice": _multiple_choice,
    "prompt_completion": _prompt_completion,
    "chat": _chat,
    "alpaca": _alpaca,
    "text": _plain_text,
}
"""The parser of each format a recipe can name."""

_FORMS = {
    "multiple_choice": "{question, choices: [text, ...], label: 0} or {question, choices: {text, label}, answerKey}",
    "prompt_completion": "{prompt, completion}",
    "chat": "{messages: [{role, content}, ...]}",
    "alpaca": "{instruction, input (may be missing), output}",
    "text": "{text}",
}
