r"""Conversations as text: the tokenizer's own chat template, and where in its output each assistant turn stands.

Few templates mark assistant turns. They are found by rendering prefixes of the conversation: the messages before a turn
with the generation prompt, and the messages through the turn,

    <|im_start|>user\n Hi <|im_end|>\n <|im_start|>assistant\n | Hello! <|im_end|> | \n <|im_start|>user\n ...
    \_______ before the turn, with generation prompt _________/ \__ learned ____/

which holds only where each rendering is a prefix of the whole one. So what stands before a learned turn is, character
by character, what the model is given at inference. A template that writes an earlier turn in another way once there are
later ones (Qwen3 drops its reasoning) is refused with `TurnsRewritten` rather than learned from at the wrong places.
"""

from __future__ import annotations

import re
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError, UndefinedError

from smore_cli.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "Span", "TurnsRewritten"]

Span = tuple[int, int]
"""Characters [start, end) of a text."""

FIXED_DATE = date(2024, 7, 26)
"""What a template that asks for today's date gets: the date that Llama 3.1's template has by default. With the real one
the rows would be others tomorrow, and a run could not be resumed after midnight."""

_NOW = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TurnsRewritten(DataError):
    """A template writes an assistant turn in another way once later turns follow."""


class ChatTemplate:
    """A tokenizer's chat template.

    Raises:
        DataError: the tokenizer has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            hint = "use template: plain, or an instruction-tuned model's tokenizer, which carries one"
            raise DataError("the tokenizer has no chat template", hint)
        self.tokenizer = tokenizer
        given = str(tokenizer.get_chat_template())
        self.source = _NOW.sub(lambda call: repr(FIXED_DATE.strftime(call["format"])), given)
        self.writes_date = self.source != given

    @cached_property
    def _special(self) -> tuple[str, ...]:
        """Every special token; end-of-turn tokens are often not among `all_special_tokens`."""
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        return tuple({*added, *self.tokenizer.all_special_tokens})

    def render(self, messages: Sequence[dict[str, Any]], *, generation_prompt: bool = False) -> str:
        """Returns the text of a conversation; `generation_prompt` adds the opening of the assistant's next turn.

        Raises:
            DataError: the template refuses these messages (roles out of order, a role that it does not know).
        """
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt, chat_template=self.source
            )
        except (UndefinedError, TypeError, ValueError) as error:  # code in the template that fails
            hint = "mend the tokenizer's chat template, or use another tokenizer"
            raise DataError(f"the chat template fails on these messages: {error}", hint) from error
        except TemplateError as error:
            hint = "bring the turns into the order it wants, leave out roles it does not know, or map them with `roles`"
            raise DataError(f"the chat template refuses these messages: {error}", hint) from error
        return str(text)

    def turns(self, messages: Sequence[dict[str, Any]], *, last_only: bool) -> tuple[str, list[Span]]:
        """Returns a conversation's text and, in it, each assistant turn with its end-of-turn token.

        Args:
            messages: the conversation; it may end in another turn than the assistant's.
            last_only: look only for the last assistant turn, which also works where the template rewrites earlier ones.

        Raises:
            TurnsRewritten: the template writes a turn differently depending on what follows.
            DataError: the assistant speaks first, or the template does not open a turn as its generation prompt does.
        """
        full = self.render(messages)
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if _MARK.search(self.source):
            return full, self._marked_turns(full, messages, places, last_only=last_only)
        return full, [self._turn(full, messages, place) for place in (places[-1:] if last_only else places)]

    def closes(self, text: str) -> bool:
        """Whether a text ends with a special token, white space after it aside."""
        return text.rstrip().endswith(self._special)

    def left_out(self, messages: Sequence[dict[str, Any]], text: str) -> int | None:
        """Returns the index of the first message whose content the template does not write, or None.

        Some templates skip roles that they do not know in silence: then the answer after a tool's result, say, would be
        learned without the result.
        """
        for place, message in enumerate(messages):
            content = message["content"].strip()
            found = content in text and message["role"] in ("user", "assistant")  # which every template writes
            if content and not found:
                changed = {**message, "content": message["content"] + " (changed)"}
                if self.render([*messages[:place], changed, *messages[place + 1 :]]) == text:
                    return place
        return None

    def _turn(self, full: str, messages: Sequence[dict[str, Any]], place: int) -> Span:
        before = self._before(messages, place)
        through = full if place + 1 == len(messages) else self.render(messages[: place + 1])
        if not full.startswith(through) and self.tokenizer.eos_token:
            through = through.removesuffix(self.tokenizer.eos_token)  # Phi's templates close every rendering with it
        if not through.startswith(before):
            raise _opens_differently(place)
        if not full.startswith(through):
            problem = f"the chat template writes turn {place + 1} differently depending on what stands after it"
            raise TurnsRewritten(problem, "use loss_on: last_turn, or a template that marks its turns")
        return len(before), self._end(full, len(before), len(through))

    def _before(self, messages: Sequence[dict[str, Any]], place: int) -> str:
        """Returns what generation starts from to answer the messages before a place."""
        if place == 0:
            problem = "the conversation opens with an assistant turn, which answers nothing"
            raise DataError(problem, "begin with the user, or leave this turn out")
        return self.render(messages[:place], generation_prompt=True)

    def _end(self, full: str, start: int, end: int) -> int:
        """Returns where the learned part of a turn ends: with its end-of-turn token, not what stands after that."""
        turn = full[start:end].rstrip()
        while self.closes(inner := self._without_special(turn)):  # Phi's last turn: ...<|end|>, then <|endoftext|>
            turn = inner
        return start + len(turn)

    def _without_special(self, text: str) -> str:
        ending = max((token for token in self._special if text.endswith(token)), key=len, default="")
        return text.removesuffix(ending).rstrip() if ending else ""

    def _marked_turns(
        self, full: str, messages: Sequence[dict[str, Any]], places: list[int], *, last_only: bool
    ) -> list[Span]:
        """Returns the turns that a template with {% generation %} marks itself, less what generation starts from."""
        marked = [self._with_end(full, span) for span in self._marked(messages) if span[0] < span[1]]
        if len(marked) != len(places):
            problem = f"the chat template marks {len(marked)} turns with {{% generation %}}, there are {len(places)}"
            raise DataError(problem, "mend the template, or take the marks out: turns are found without them")
        spans = []
        for place, (start, end) in list(zip(places, marked, strict=True))[-1 if last_only else 0 :]:
            before = self._before(messages, place)
            if not full.startswith(before) and full.startswith(self.render(messages[:place])):
                raise _opens_differently(place)
            if not full.startswith(before):
                problem = f"the chat template writes what stands before turn {place + 1} otherwise once it is answered"
                raise TurnsRewritten(problem, "use loss_on: last_turn")
            if not start <= len(before) < end:
                raise _opens_differently(place)
            spans.append((len(before), end))
        return spans

    def _marked(self, messages: Sequence[dict[str, Any]]) -> list[Span]:
        from transformers.utils.chat_template_utils import render_jinja_template

        names: dict[str, Any] = self.tokenizer.special_tokens_map  # what a template may call bos_token and so on
        rendered: Any = render_jinja_template(
            [list(messages)], chat_template=self.source, return_assistant_tokens_mask=True, **names
        )
        _, spans = rendered
        return [(start, end) for start, end in spans[0]]

    def _with_end(self, full: str, span: Span) -> Span:
        """Returns a marked turn that also holds the special token right after it: ending is learned too."""
        start, end = span[0], self._end(full, *span)
        if self.closes(full[start:end]):
            return start, end
        following = max((token for token in self._special if full.startswith(token, span[1])), key=len, default="")
        return (start, span[1] + len(following)) if following else (start, end)


def _opens_differently(place: int) -> DataError:
    problem = f"the chat template does not open turn {place + 1} as its generation prompt opens an answer"
    return DataError(problem, "mend the template: what is learned must follow what the model is given at inference")
