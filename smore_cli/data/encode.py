"""From text to tokens: one BOS where the tokenizer has one, EOS learned, the mask from spans of characters."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Encoded:
    """A tokenised row.

    Attributes:
        row: the row, at most `max_length` tokens of prompt and any one branch.
        truncated: whether tokens were cut off on the right.
    """

    row: Row
    truncated: bool

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

    def encode(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """Returns rendered rows as tokens, in order; one call of the tokenizer for all of them."""
        texts = [text for row in rendered for text in (row.prompt, *(row.prompt + b.text for b in row.branches))]
        tokens = iter(self._tokenize(texts))
        return [self._row(row, next(tokens), [next(tokens) for _ in row.branches]) for row in rendered]

    def _row(self, rendered: Rendered, prompt: _Tokens, joint: list[_Tokens]) -> Encoded:
        prompt_ids = [*self.leading, *prompt.ids]
        room = max(self.max_length - len(prompt_ids), 0)
        ids, masks, truncated = [], [], len(prompt_ids) > self.max_length
        for branch, whole in zip(rendered.branches, joint, strict=True):
            branch_ids, mask = self._branch(rendered, branch, prompt, whole)
            if not prompt_ids:
                mask[:1] = [False]  # nothing stands before the first token that could predict it
            truncated |= len(branch_ids) > room
            ids.append(branch_ids[:room])
            masks.append(mask[:room])
        return Encoded(Row(prompt_ids[: self.max_length], ids, masks, rendered.gold), truncated)

    def _branch(
        self, rendered: Rendered, branch: Branch, prompt: _Tokens, whole: _Tokens
    ) -> tuple[list[int], list[bool]]:
        """Returns a branch's ids and mask: as it is tokenised after the prompt, or alone where the two would merge."""
        if whole.ids[: len(prompt.ids)] == prompt.ids:
            tokens = whole[len(prompt.ids) :].shifted(-len(rendered.prompt))
        else:
            tokens = self._tokenize([branch.text])[0]
        cuts = sorted({edge for span in branch.spans for edge in span if _splits_a_token(edge, tokens.offsets)})
        if cuts:  # as in generation, where the text before an answer is tokenised without it
            tokens = self._tokenize_apart(branch.text, cuts)
        ids = tokens.ids
        mask = [_inside(start, branch.spans) for start, _ in tokens.offsets]
        eos = self._eos() if branch.eos else None
        if eos is not None and ids[-1:] != [eos]:
            return [*ids, eos], [*mask, True]
        return ids, mask

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
        """Tokenises a text so that no token reaches over a cut."""
        edges = [0, *cuts, len(text)]
        parts = self._tokenize([text[start:end] for start, end in pairwise(edges)])
        shifted = [part.shifted(start) for part, start in zip(parts, edges, strict=False)]
        return _Tokens([i for part in shifted for i in part.ids], [span for part in shifted for span in part.offsets])

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


def _inside(start: int, spans: Sequence[Span]) -> bool:
    """Whether a token that starts at a character belongs to a span."""
    return any(first <= start < end for first, end in spans)


def _leading_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the special tokens that the tokenizer itself puts before a text: usually BOS or nothing."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    return ids[: special.index(0)]
