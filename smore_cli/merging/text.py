"""The text on which a merged model is compared: what the run was evaluated or trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from smore_cli.data.build import build_rows
from smore_cli.data.bundled import QUICKSTART
from smore_cli.errors import DataError
from smore_cli.recipe.schema import DataConfig, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from smore_cli.recipe.schema import Recipe

__all__ = ["ComparisonText", "comparison_text"]

TOKENS = 1024
"""How many tokens are compared: logits of both models are held, 0.2 GB each for a vocabulary of 49,152."""


@dataclass(frozen=True)
class ComparisonText:
    """Tokenised text.

    Attributes:
        texts: token ids of each.
        origin: where they are from.
    """

    texts: list[list[int]]
    origin: str


def comparison_text(recipe: Recipe | None, tokenizer: PreTrainedTokenizerBase, tokens: int = TOKENS) -> ComparisonText:
    """Returns about `tokens` tokens of the run's held-out data, or of its training data where it has no other.

    An adapter without its run, or whose data is not on this machine, is compared on the bundled questions.
    """
    if recipe is not None:
        sources = recipe.data.eval or recipe.data.train
        try:
            return _first(recipe.data, sources, tokenizer, tokens)
        except DataError:  # the text only has to be text: a merge does not need the data the run was trained on
            pass
    source = Source(path=QUICKSTART, split="test", format="multiple_choice")
    return _first(DataConfig(train=[source], template="plain"), [source], tokenizer, tokens)


def _first(data: DataConfig, sources: list[Source], tokenizer: PreTrainedTokenizerBase, tokens: int) -> ComparisonText:
    texts: list[list[int]] = []
    left = tokens
    for row in build_rows(data, tokenizer, sources).rows:
        ids = [*row.prompt, *row.branches[row.gold]][:left]
        texts.append(ids)
        left -= len(ids)
        if left == 0:
            break
    return ComparisonText(texts, ", ".join(source.path for source in sources))
