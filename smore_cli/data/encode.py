"""From text to tokens: one BOS where the tokenizer has one, EOS learned, the mask from spans of characters.

What stands before a learned span is tokenised as it is at inference, where nothing follows it yet. Mostly that is what
the whole text gives; where it is not (white space of a generation prompt that merges with the answer's first letters),
the text is tokenised in two parts.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from smore_cli.data.batch import Row
from smore_cli.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from smore_cli.data.chat import Span
    from smore_cli.data.templates import Branch, Rendered

__all__ = ["Encoded", "Encoder"]


MANY_TAILS = 1000
"""How many openings of turns are remembered; a template has a handful."""


@dataclass(frozen=True)
class Encoded:
    """A tokenised row.

    Attributes:
        row: the row, at most `max_length` tokens of prompt and any one branch.
        truncated: whether tokens were cut off on the right.
        spans: for each branch, the tokens [start, end) of each learned span, EOS with the last; as if nothing was cut.
    """

    row: Row
    truncated: bool
    spans: tuple[tuple[Span, ...], ...]

    @property
    def learnable(self) -> bool:
        """Whether every branch has a token to learn."""
        return all(any(mask) for mask in self.row.supervised)


@dataclass(frozen=True)
class _Tokens:
    ids: list[int]
    offsets: list[Span]

    def __getitem__(self, part: slice) -> _Tokens:
        return _Tokens(self.ids[part], self.offsets[part])

    def shifted(self, by: int) -> _Tokens:
        return _Tokens(self.ids, [(start + by, end + by) for start, end in self.offsets])


class Encoder:
    """Tokenises rendered rows.

    Special tokens are placed here and not by the tokenizer: what it would put before a text (BOS, if anything) comes
    once, also where a chat template writes it too; EOS is put by id, so that a pad token of the same id cannot hide it.

    Args:
        tokenizer: a fast tokenizer, which knows the characters of each token.
        max_length: the most tokens of a prompt with one branch.

    Raises:
        ModelError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        if not tokenizer.is_fast:
            problem = f"{type(tokenizer).__name__} cannot tell which characters a token covers"
            raise ModelError(problem, "use a model whose folder has a tokenizer.json")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.leading = _leading_special_tokens(tokenizer)
        self._special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._tails: dict[str, list[int]] = {}
        self._anchor = self._plain_special_token()

    def encode(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """Returns rendered rows as tokens, in order; one call of the tokenizer for all of them."""
        texts = [text for row in rendered for text in (row.prompt, *(row.prompt + b.text for b in row.branches))]
        tokens = iter(self._tokenize(texts))
        return [self._row(row, next(tokens), [next(tokens) for _ in row.branches]) for row in rendered]

    def _row(self, rendered: Rendered, prompt: _Tokens, joint: list[_Tokens]) -> Encoded:
        prompt_ids = [*self.leading, *prompt.ids]
        room = max(self.max_length - len(prompt_ids), 0)
        ids, masks, spans, truncated = [], [], [], len(prompt_ids) > self.max_length
        for branch, whole in zip(rendered.branches, joint, strict=True):
            branch_ids, mask, places = self._branch(rendered, branch, prompt, whole)
            if not prompt_ids:
                mask[:1] = [False]  # nothing stands before the first token that could predict it
            truncated |= len(branch_ids) > room
            ids.append(branch_ids[:room])
            masks.append(mask[:room])
            spans.append(places)
        return Encoded(Row(prompt_ids[: self.max_length], ids, masks, rendered.gold), truncated, tuple(spans))

    def _branch(
        self, rendered: Rendered, branch: Branch, prompt: _Tokens, whole: _Tokens
    ) -> tuple[list[int], list[bool], tuple[Span, ...]]:
        """Returns a branch's ids, mask and spans: tokenised after the prompt, or alone where the two would merge."""
        if whole.ids[: len(prompt.ids)] == prompt.ids:
            tokens = whole[len(prompt.ids) :].shifted(-len(rendered.prompt))
        else:
            tokens = self._tokenize([branch.text])[0]
        cuts = {edge for span in branch.spans for edge in span if _splits_a_token(edge, tokens.offsets)}
        cuts |= {start for start, _ in branch.spans if start and not self._opens_as_alone(branch.text, start, tokens)}
        if cuts:  # as in generation, where the text before an answer is tokenised without it
            tokens = self._tokenize_apart(branch.text, sorted(cuts))
        ids = tokens.ids
        starts = [start for start, _ in tokens.offsets]
        spans = tuple((bisect_left(starts, first), bisect_left(starts, end)) for first, end in branch.spans)
        mask = [False] * len(ids)
        for first, end in spans:
            mask[first:end] = [True] * (end - first)
        eos = self._eos() if branch.eos else None
        if eos is not None and ids[-1:] != [eos]:
            return [*ids, eos], [*mask, True], (*spans[:-1], (spans[-1][0], len(ids) + 1))
        return ids, mask, spans

    def _opens_as_alone(self, text: str, start: int, tokens: _Tokens) -> bool:
        """Whether the tokens right before a span are those that its text gives when nothing follows.

        Tokens never reach over a special one, so it is enough to look back to the last of these: the few characters of
        a turn's opening, which are the same in every row.
        """
        end = bisect_left([first for first, _ in tokens.offsets], start)
        begin = next((place for place in range(end - 1, -1, -1) if tokens.ids[place] in self._special), None)
        if begin is None:
            return self._tokenize([text[:start]])[0].ids == tokens.ids[:end]
        tail = text[tokens.offsets[begin][0] : start]
        if tail not in self._tails:
            if len(self._tails) > MANY_TAILS:
                self._tails.clear()
            self._tails[tail] = list(self.tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"])
        return self._tails[tail] == tokens.ids[begin:end]

    def _tokenize(self, texts: list[str]) -> list[_Tokens]:
        """Tokenises texts without special tokens; those that a text begins with itself are taken off as well."""
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        count = len(self.leading)
        result = []
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            tokens = _Tokens(list(ids), _tiled(offsets))
            result.append(tokens[count:] if count and tokens.ids[:count] == self.leading else tokens)
        return result

    def _tokenize_apart(self, text: str, cuts: Sequence[int]) -> _Tokens:
        """Tokenises a text so that no token reaches over a cut.

        A tokenizer of words puts a space before the first of a text. So what follows a cut is tokenised after a special
        token, as no space stands before an answer that the model begins.
        """
        edges = [0, *cuts, len(text)]
        texts = [text[start:end] for start, end in pairwise(edges)]
        parts = self._tokenize([texts[0], *(self._anchor + part for part in texts[1:])])
        if self._anchor:
            parts = [parts[0], *(part[1:].shifted(-len(self._anchor)) for part in parts[1:])]
        shifted = [part.shifted(start) for part, start in zip(parts, edges, strict=False)]
        return _Tokens([i for part in shifted for i in part.ids], [span for part in shifted for span in part.offsets])

    def _plain_special_token(self) -> str:
        """Returns a special token that takes no white space beside it in; empty where there is none."""
        added = self.tokenizer.added_tokens_decoder.items()
        plain = (token for number, token in added if token.special and number not in self.leading and not token.rstrip)
        return next((token.content for token in plain if not token.normalized), "")

    def _eos(self) -> int:
        eos = self.tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise ModelError(
                "the tokenizer has no end-of-text token, so no answer can end", "set eos_token in its config"
            )
        return eos


def _splits_a_token(edge: int, offsets: Sequence[Span]) -> bool:
    return any(start < edge < end for start, end in offsets)


def _tiled(offsets: Sequence[Span]) -> list[Span]:
    """Returns offsets in which each token starts no later than the one before it ends.

    Some tokenizers trim white space off the offsets. Then a token that begins with the last space of a prompt seems to
    begin with the answer, and a token of white space alone seems to begin where the next one does.
    """
    tiled, before = [], 0
    for start, end in offsets:
        tiled.append((min(start, before), end))
        before = end
    return tiled


def _leading_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the special tokens that the tokenizer itself puts before a text: usually BOS or nothing."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    return ids[: special.index(0)]
