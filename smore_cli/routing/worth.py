"""What the routing that is looked at is worth, where that was asked for: each expert, and the routing as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smore_cli.errors import UsageError
from smore_cli.merging.calibration import Calibration, training_text
from smore_cli.routing.causal import CausalImportance, measure_causal
from smore_cli.routing.dividend import Dividend, measure_dividend

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from smore_cli.recipe.schema import Recipe
    from smore_cli.routing.inputs import Inputs

    Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
    """A context for a piece of work that is named; it yields what to call with the steps done and their total."""

__all__ = ["NOTHING", "Progress", "Worth", "WorthRequest", "measure_worth"]


@dataclass(frozen=True)
class WorthRequest:
    """What is to be measured.

    Attributes:
        causal: what each expert is worth, of the routers that were chosen.
        dividend: what the routing as a whole earned, and that of each layer that was named.
        layers: these layers.
    """

    causal: bool = False
    dividend: bool = False
    layers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Worth:
    """What was measured; None: it was not asked for.

    Attributes:
        causal: what each expert is worth.
        dividend: what the routing as a whole earned.
        fitted_to: the text that the static update of the dividend was fitted to.
    """

    causal: CausalImportance | None = None
    dividend: Dividend | None = None
    fitted_to: str = ""

    def document(self) -> dict[str, Any]:
        """Returns what was measured as JSON values."""
        found: dict[str, Any] = {}
        if self.causal is not None:
            found["causal"] = self.causal.document()
        if self.dividend is not None:
            found["dividend"] = {**self.dividend.document(), "fitted_to": self.fitted_to}
        return found


NOTHING = Worth()


def measure_worth(
    request: WorthRequest,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe | None,
    inputs: Inputs,
    *,
    modules: Collection[str],
    level: int | None,
    say: Callable[[str], None],
    progress: Progress,
) -> Worth:
    """Measures what was asked for, on the rows that are looked at.

    Args:
        request: what that is.
        model: with its routed adapter active; it is left as it was.
        tokenizer: its tokenizer.
        recipe: the run's; None: an adapter without its run.
        inputs: the rows.
        modules: the adapted modules that were chosen, by path.
        level: the tree level that was chosen; None: all.
        say: takes a line on how long it will take.
        progress: a context for a piece of work, which yields what to call with the steps done and their total.

    Raises:
        UsageError: a dividend was asked for, and there is no text to fit the static update to.
        DataError: that text cannot be read.
    """
    pad, found = int(tokenizer.pad_token_id or 0), NOTHING
    if request.causal:
        with progress("changing gates, expert by expert") as on_progress:
            causal = measure_causal(
                model, inputs.rows, pad_token_id=pad, modules=modules, level=level, say=say, on_progress=on_progress
            )
        found = Worth(causal)
    if not request.dividend:
        return found
    if recipe is None:
        problem = "--dividend: a static update is fitted to training data, and this adapter has no recipe that names it"
        raise UsageError(problem, "name the folder of its run")
    text = training_text(recipe, tokenizer, Calibration.tokens, without=inputs.rows)
    if not text.rows:
        problem = "--dividend: all of the run's training data are looked at, and none is left to fit a static update to"
        raise UsageError(problem, "look at fewer rows with --limit, or at others with --data")
    with progress(f"fitting a static update to {text.tokens:,} tokens of {text.origin}") as on_progress:
        dividend = measure_dividend(
            model, text.rows, inputs.rows, pad_token_id=pad, layers=request.layers, say=say, on_progress=on_progress
        )
    return Worth(found.causal, dividend, text.origin)
