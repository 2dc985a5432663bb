r"""Conversations as text: the tokenizer's own chat template, and where in its output each assistant turn stands.

Few templates mark assistant turns. They are found by rendering prefixes of the conversation: the messages before a turn
with the generation prompt, and the messages through the turn,

    <|im_start|>user\n Hi <|im_end|>\n <|im_start|>assistant\n | Hello! <|im_end|> | \n <|im_start|>user\n ...
    \_______ before the turn, with generation prompt _________/ \__ learned ____/

which holds only where each rendering is a prefix of the whole one; a template that rewrites earlier turns (by dropping
their reasoning, for instance) is refused rather than learned from at the wrong places.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from smore_cli.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "Span"]

Span = tuple[int, int]
"""Characters [start, end) of a text."""

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


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
                list(messages), tokenize=False, add_generation_prompt=generation_prompt
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses these messages: {error}", "see the roles it allows") from error
        return str(text)

    def turns(self, messages: Sequence[dict[str, Any]], *, last_only: bool) -> tuple[str, list[Span]]:
        """Returns a conversation's text and, in it, each assistant turn with its end-of-turn token.

        Args:
            messages: the conversation; it may end in another turn than the assistant's.
            last_only: look only for the last assistant turn, which also works where the template rewrites earlier ones.

        Raises:
            DataError: the template rewrites the turns before, or the assistant speaks first.
        """
        full = self.render(messages)
        if _MARK.search(str(self.tokenizer.get_chat_template())):
            spans = [self._with_end(full, span) for span in self._marked(messages)]
            return full, spans[-1:] if last_only else spans
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        return full, [self._turn(full, messages, place) for place in (places[-1:] if last_only else places)]

    def closes(self, text: str) -> bool:
        """Whether a text ends with a special token, white space after it aside."""
        return text.rstrip().endswith(self._special)

    def _turn(self, full: str, messages: Sequence[dict[str, Any]], place: int) -> Span:
        if place == 0:
            raise DataError(
                "the conversation opens with an assistant turn, which answers nothing", "begin with the user"
            )
        before = self.render(messages[:place], generation_prompt=True)
        through = full if place + 1 == len(messages) else self.render(messages[: place + 1])
        if not full.startswith(through) and self.tokenizer.eos_token:
            through = through.removesuffix(self.tokenizer.eos_token)  # Phi's templates close every rendering with it
        if not (full.startswith(through) and through.startswith(before)):
            problem = f"the chat template writes turn {place + 1} differently depending on what stands after it"
            raise DataError(problem, "use loss_on: last_turn, or a template that marks its turns with {% generation %}")
        return len(before), self._end(full, len(before), len(through))

    def _end(self, full: str, start: int, end: int) -> int:
        """Returns where the learned part of a turn ends: with its end-of-turn token, not what stands after that."""
        turn = full[start:end].rstrip()
        while self.closes(inner := self._without_special(turn)):  # Phi's last turn: ...<|end|>, then <|endoftext|>
            turn = inner
        return start + len(turn)

    def _without_special(self, text: str) -> str:
        ending = max((token for token in self._special if text.endswith(token)), key=len, default="")
        return text.removesuffix(ending).rstrip() if ending else ""

    def _marked(self, messages: Sequence[dict[str, Any]]) -> list[Span]:
        """Returns the turns that a template with {% generation %} marks itself."""
        from transformers.utils.chat_template_utils import render_jinja_template

        names: dict[str, Any] = self.tokenizer.special_tokens_map  # what a template may call bos_token and so on
        rendered: Any = render_jinja_template(
            [list(messages)],
            chat_template=self.tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **names,
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
