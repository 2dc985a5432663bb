"""What must hold of every tokenised row before anything is trained, looked at in the tokens themselves.

    bos:     a text begins with one BOS where tokenizer or template begin texts with it, and no second one follows
    end:     each learned answer ends with a learned end-of-turn or end-of-text token (also where that is the pad token)
    prompt:  the tokens before a learned turn are those of `apply_chat_template(..., add_generation_prompt=True)`

Everything that builds rows is written so that these hold. They are checked again, and in another way, because where one
fails nothing else would say so: the loss falls all the same, and the model is asked for what it has not learned, or
never stops. The check tokenises the prompts of chats once more: a quarter of the time that preparing them takes (1.4
of 6.2 seconds for 3,000 chats of 214 tokens, on one core).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from smore_cli.data.encode import Encoded
    from smore_cli.data.templates import Rendered

__all__ = ["DOUBLE_BOS", "HINTS", "NO_BOS", "NO_END", "OTHER_PROMPT", "Invariants"]

NO_BOS = "the text does not begin with the tokenizer's BOS"
DOUBLE_BOS = "there is a second BOS where no new text begins"
NO_END = "a learned answer does not end with a learned end-of-turn token, so the model would not learn to stop"
OTHER_PROMPT = "the tokens before a learned turn are not those that the model is given at inference"


HINTS = {
    NO_BOS: "mend the chat template, so that it writes bos_token first, or the tokenizer's bos_token",
    DOUBLE_BOS: "the chat template writes bos_token twice, or the data holds its text: mend the one or the other",
    NO_END: "use loss_on: last_turn, or a chat template that closes turns with a special token, as chat models have",
    OTHER_PROMPT: "mend the chat template: what it writes before an answer must not depend on the answer",
}
"""What to do about each."""

MANY_TAILS = 1000
"""How many openings of turns are remembered; a template has a handful."""


class Invariants:
    """Checks rows of one tokenizer.

    Args:
        tokenizer: made the rows.
        leading: the special tokens that it puts before every text itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, leading: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.leading = list(leading)
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.special = {
            number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.ends = {*tokenizer.added_tokens_decoder, self.eos} - ({self.bos} - {self.eos})
        self._tails: dict[str, list[int]] = {}
        self._spaces: dict[int, bool] = {}
        self.template_writes_bos = "bos_token" in str(tokenizer.chat_template or "")

    def problems(self, rendered: Sequence[Rendered], encoded: Sequence[Encoded]) -> list[str | None]:
        """Returns for each row what it violates first, or None.

        Args:
            rendered: the rows as text.
            encoded: the same rows as tokens.
        """
        prompts = iter(self._tokenize([_last_prompt(row) for row in rendered]))
        return [
            self._bos(text, row) or self._end(row) or self._prompt(text, row, next_prompt)
            for text, row, next_prompt in zip(rendered, encoded, prompts, strict=True)
        ]

    def _bos(self, rendered: Rendered, encoded: Encoded) -> str | None:
        ids = [*encoded.row.prompt, *encoded.row.branches[0]]
        if self.bos is None or not ids:
            return None
        text = rendered.prompt or rendered.branches[0].text
        begins = self.template_writes_bos and text.startswith(str(self.tokenizer.bos_token))
        if (begins or self.bos in self.leading) and ids[0] != self.bos:
            return NO_BOS
        before = self.eos
        for place, token in enumerate(ids):  # a later BOS may only open a text of its own: Llama 2 puts it after EOS
            if token == self.bos and place and before not in self.ends:
                return DOUBLE_BOS
            if token == self.bos or token in self.ends or not self._is_space(token):
                before = token
        return None

    def _end(self, encoded: Encoded) -> str | None:
        for branch, mask, spans in zip(encoded.row.branches, encoded.row.supervised, encoded.spans, strict=True):
            for start, end in spans:
                if end > len(branch):  # cut off by max_length, and counted as truncated
                    continue
                while end > start and branch[end - 1] not in self.ends and self._is_space(branch[end - 1]):
                    end -= 1  # the line break after the last turn, where a whole conversation is learned
                if end == start or branch[end - 1] not in self.ends or not mask[end - 1]:
                    return NO_END
        return None

    def _prompt(self, rendered: Rendered, encoded: Encoded, last: list[int]) -> str | None:
        """Compares all that stands before the last learned turn, and the openings of the turns before it."""
        branch = encoded.row.branches[0]
        if rendered.prompt or not encoded.spans[0]:
            return None
        before = branch[: encoded.spans[0][-1][0]]
        if before != last[: len(before)] or (len(before) < len(branch) and len(before) != len(last)):
            return OTHER_PROMPT
        for (start, _), (first, _) in zip(encoded.spans[0][:-1], rendered.branches[0].spans, strict=False):
            if first and start < len(branch) and not self._opens(branch[:start], rendered.branches[0].text[:first]):
                return OTHER_PROMPT
        return None

    def _opens(self, before: list[int], text: str) -> bool:
        """Whether tokens end as their text, tokenised alone, does: from the last special token on."""
        begin = next((place for place in range(len(before) - 1, -1, -1) if before[place] in self.special), None)
        place = -1 if begin is None else text.rfind(self.special[before[begin]])
        if place < 0:
            return self._tokenize([text])[0] == before
        tail = text[place:]
        if tail not in self._tails:
            if len(self._tails) > MANY_TAILS:
                self._tails.clear()
            self._tails[tail] = list(self.tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"])
        return self._tails[tail] == before[begin:]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Returns the tokens of texts, without those that the tokenizer itself puts before a text."""
        found = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        count = len(self.leading)
        return [list(ids[count:]) if count and ids[:count] == self.leading else list(ids) for ids in found]

    def _is_space(self, token: int) -> bool:
        if token not in self._spaces:
            self._spaces[token] = str(self.tokenizer.decode([token])).isspace()
        return self._spaces[token]


def _last_prompt(rendered: Rendered) -> str:
    """Returns what stands before the last learned turn of a chat; nothing for other rows, whose prompt is apart."""
    branch = rendered.branches[0]
    return branch.text[: branch.spans[-1][0]] if branch.spans and not rendered.prompt else ""
