"""Messages of a conversation as files have them, brought to one form: `{role, content}` with our names of the roles.

Chat templates write an unknown role as it is, `<|human|>`, which no model has ever seen; so every role is mapped to one
of ours or refused. Files call them differently, and write the content as a text or as a list of parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Mapping

__all__ = ["ROLES", "Misfit", "present_keys", "read_messages", "require_characters", "shown"]

ROLES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard"),
    "system": ("system", "developer"),
    "tool": ("tool", "function", "observation", "ipython", "function_response", "tool_response"),
}
"""Our roles, and what files call them; letters' case does not matter."""

_OURS = {name: ours for ours, names in ROLES.items() for name in names}

_CALLS = ("tool_calls", "function_call")
"""Keys of a message that hold calls of tools, which are not learned."""

_OFF = ("weight", "train", "training")
"""Keys of a message by which other tools switch its loss off."""


class Misfit(Exception):
    """A row is not of a format; the message says which key is the trouble, `hint` what to do about it."""

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem)
        self.hint = hint


def read_messages(
    value: Any,
    column: str,
    *,
    keys: tuple[tuple[str, str], ...],
    roles: Mapping[str, str],
    notices: Counter[str],
) -> tuple[dict[str, Any], ...]:
    """Returns the messages of one row.

    Args:
        value: what the column holds.
        column: its name, for errors.
        keys: what a message may call its role and its content, in pairs; the first pair is the format's own.
        roles: the recipe's own mapping, {a file's role: our role}; goes before ours.
        notices: counts what is there and not read.

    Raises:
        Misfit: the value is not a list of messages, a role is unknown, or a content is not text.
    """
    role_key, content_key = keys[0]
    if isinstance(value, str):
        hint = "a .csv cannot hold lists: use .jsonl" if value.lstrip()[:1] in ("[", "{") else ""
        raise Misfit(f"'{column}' must be a list of messages, it is text", hint)
    if not isinstance(value, list) or not value:
        raise Misfit(f"'{column}' must be a list of one or more {{{role_key}, {content_key}}}")
    return tuple(_message(message, number, keys, roles, notices) for number, message in enumerate(value, 1))


def present_keys(row: Mapping[str, Any]) -> list[str]:
    """Returns the keys that hold something; Arrow fills keys that only some rows have with None."""
    return [str(key) for key, value in row.items() if value is not None]


def shown(value: Any) -> str:
    """Returns a value for a message: on one line, cut where it is long."""
    if isinstance(value, float) and value != value:
        return "NaN, a missing value (write null, or leave it out)"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _message(
    message: Any, number: int, keys: tuple[tuple[str, str], ...], roles: Mapping[str, str], notices: Counter[str]
) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise Misfit(f"message {number} is not an object {{{keys[0][0]}, {keys[0][1]}}}")
    role_key, content_key = next((pair for pair in keys if message.get(pair[0]) is not None), keys[0])
    if not isinstance(name := message.get(role_key), str):
        has = ", ".join(present_keys(message)) or "nothing"
        raise Misfit(f"message {number} has no text '{role_key}' (it has: {has})")
    role = roles.get(name) or _OURS.get(name.strip().lower())
    if role is None:
        known = f"known are {', '.join(_OURS)}"
        raise Misfit(f"message {number} has the role {shown(name)}, which is not known", _map_it(name, known))
    content = _content(message, number, content_key)
    if role == "assistant" and not content.strip():
        calls = next((key for key in _CALLS if message.get(key)), None)
        what = f"only '{calls}', and calls of tools are not learned" if calls else "no text: there is nothing to answer"
        raise Misfit(f"message {number}, the assistant's, has {what}", "take the row out, or write the answer as text")
    for key in _CALLS:
        if message.get(key):
            notices[f"messages with '{key}', which is not learned"] += 1
    for key in _OFF:
        if message.get(key) in (0, False):
            notices[f"messages with '{key}: {message[key]}', which is not read: data.loss_on says what is learned"] += 1
    return {"role": role, "content": content} | _kept(message)


def _kept(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the other keys that templates read: a model's reasoning, and what says which tool has answered."""
    return {key: message[key] for key in ("reasoning_content", "thinking", "name", "tool_call_id") if message.get(key)}


def _map_it(name: str, known: str) -> str:
    written = name if name.isidentifier() else f'"{name}"'
    return f"say what it means in the source: roles: {{{written}: user}} (or assistant, system, tool); {known}"


def _content(message: Mapping[str, Any], number: int, key: str) -> str:
    """Returns a message's text; a list of text parts is joined by line breaks, as inference servers do."""
    content = message.get(key)
    if content is None and any(message.get(call) for call in _CALLS):
        return ""
    if isinstance(content, list) and content:
        return "\n".join(_part(part, number) for part in content)
    if not isinstance(content, str):
        has = ", ".join(present_keys(message)) or "nothing"
        why = f"it is {shown(content)}" if content is not None else f"it has: {has}"
        raise Misfit(f"message {number} has no text '{key}' ({why})")
    return require_characters(content, f"message {number}")


def _part(part: Any, number: int) -> str:
    if isinstance(part, str):
        return require_characters(part, f"message {number}")
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return require_characters(part["text"], f"message {number}")
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise Misfit(f"message {number} has a part of type {shown(kind)}", "only text is learned: take such rows out")


def require_characters(text: str, where: str) -> str:
    r"""Returns the text; half a surrogate pair (`"\ud83d"` in a file) is no character and has no token."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            hint = "the text was cut inside an emoji: mend it, or take the row out"
            raise Misfit(f"{where} holds half a character at place {error.start + 1}", hint) from error
    return text
