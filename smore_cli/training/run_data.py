"""The rows of a run, all of them or a stream, and the plan of which steps see which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from smore_cli.data.build import split_eval
from smore_cli.data.cache import cached_rows
from smore_cli.data.groups import require_groups
from smore_cli.data.sources import describe_source
from smore_cli.data.stream import StreamRows
from smore_cli.errors import DataError
from smore_cli.training.schedule import StepPlan, make_plan
from smore_cli.training.stream_plan import StreamPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

    from smore_cli.data.batch import Row
    from smore_cli.data.report import SourceReport
    from smore_cli.recipe.schema import Recipe

__all__ = ["RunData", "load_run_data"]

LOOKED_AT = 64
"""Rows of a stream that are tokenised before anything else: what is wrong with all rows shows in them."""
CLUSTERED = 10_000
"""Rows of a stream that a prior is fitted to, where the recipe does not say how many."""


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
        train_rows: tokenised training rows; of a stream its first ones.
        eval_rows: tokenised held-out rows, maybe none.
        hash: of the training rows; of a stream of its first ones, and of how all are written and tokenised.
        sources: what became of each source; of a stream nothing is known.
        stream: the stream, where there is one.
    """

    train_rows: Sequence[Row]
    eval_rows: Sequence[Row]
    hash: str
    sources: tuple[SourceReport, ...]
    stream: StreamRows | None = None

    def plan(self, recipe: Recipe) -> StepPlan | StreamPlan:
        """Returns which rows each step sees."""
        if self.stream is not None:
            return StreamPlan(recipe, self.stream)
        return make_plan(recipe, self.train_rows, self.sources)

    def used_by(self, plan: StepPlan | StreamPlan) -> Sequence[int]:
        """Returns which of `train_rows` the steps see; of a stream some that they do."""
        return plan.rows_used() if isinstance(plan, StepPlan) else range(min(LOOKED_AT, len(self.train_rows)))


def load_run_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]) -> RunData:
    """Reads and tokenises a recipe's rows, or takes them from the cache, or opens a stream.

    Raises:
        DataError: they cannot be used; the message says what and where.
        ModelError: the tokenizer cannot do what is asked.
    """
    data, wanted = recipe.data, recipe.adapter.row_groups
    if data.streaming:
        return _open_stream(recipe, tokenizer, say)
    train = cached_rows(data, tokenizer, data.train, say)
    if warning := train.report.total.cut(data.max_length):
        say(warning)
    if wanted is not None:
        require_groups(train.rows, train.groups, wanted)
    hashed = train.report.content_hash, train.report.sources
    if data.eval:
        return RunData(train.rows, cached_rows(data, tokenizer, data.eval, lambda _: None).rows, *hashed)
    train_rows, eval_rows = split_eval(train.rows, data.eval_fraction, recipe.seed)
    if not train_rows:
        raise DataError("no training row is left after holding out data.eval_fraction", "lower it, or add data")
    return RunData(train_rows, eval_rows, *hashed)


def _open_stream(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]) -> RunData:
    data, adapter = recipe.data, recipe.adapter
    stream = StreamRows(data, tokenizer, recipe.seed)
    count = LOOKED_AT
    if hasattr(adapter, "kmeans_max_prompts"):  # T-REX: what its prior is clustered from
        count = max(count, adapter.kmeans_max_prompts or CLUSTERED)
    stream.tokenise(range(count))
    first = [stream[number] for number in range(count)]
    if adapter.row_groups is not None:
        require_groups(first, stream.groups, adapter.row_groups)
    names = ", ".join(describe_source(source) for source in data.train)
    tokens = sum(row.length for row in first) / count
    say(f"{names}: streamed; {count:,} rows looked at, {tokens:.0f} tokens on average")
    held_out = cached_rows(data, tokenizer, data.eval, lambda _: None).rows if data.eval else []
    return RunData(first, held_out, stream.reached(count).hash, (), stream)
