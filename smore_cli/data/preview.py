"""Tokenised rows as text for people: what the model reads, special tokens shown, with what it learns marked."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from smore_cli.data.batch import Row

__all__ = ["preview_row"]

LEARNED = "bold green"
READ = "dim"


def preview_row(row: Row, tokenizer: PreTrainedTokenizerBase, *, colour: bool) -> Text:
    """Returns a row as text.

    Args:
        row: with several branches, the prompt stands once and each branch on a line of its own, the right one first
            marked with `*`, the others with `-`.
        tokenizer: made the row's tokens.
        colour: mark learned tokens by colour; otherwise by [[...]], which a pipe keeps.
    """
    if len(row.branches) == 1:
        return _marked(row.prompt, row.branches[0], row.supervised[0], tokenizer, colour)
    text = Text(_decode(tokenizer, row.prompt), READ if colour else "")
    for place, (branch, mask) in enumerate(zip(row.branches, row.supervised, strict=True)):
        text.append(f"\n  {'*' if place == row.gold else '-'}")
        whole = _marked(row.prompt, branch, mask, tokenizer, colour)
        text.append_text(whole[len(_decode(tokenizer, row.prompt)) :])
    return text


def _marked(
    prompt: list[int], branch: list[int], mask: list[bool], tokenizer: PreTrainedTokenizerBase, colour: bool
) -> Text:
    text = Text()
    learned = [False] * len(prompt) + mask
    for part, supervised in _parts([*prompt, *branch], learned, tokenizer):
        if colour:
            text.append(part, LEARNED if supervised else READ)
        else:
            text.append(f"[[{part}]]" if supervised else part)
    return text


def _parts(ids: list[int], learned: Sequence[bool], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """Yields runs of tokens that are learned or not, as text.

    A run is the difference of two decodings from the row's beginning: decoded alone, it can lose its first space.
    """
    end, before = 0, ""
    for supervised, run in groupby(learned):
        start, end = end, end + len(list(run))
        through = _decode(tokenizer, ids[:end])
        # A run can begin inside a character of several tokens; then the decodings differ before the cut.
        part = through[len(before) :] if through.startswith(before) else _decode(tokenizer, ids[start:end])
        before = through
        yield part, supervised


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
