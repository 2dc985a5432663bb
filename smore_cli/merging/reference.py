"""Backbone and routed adapter, measured before the merge changes the model they are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smore_cli.merging.calibration import Texts, read_texts
from smore_cli.merging.verdict import Reading, Verdict, judge, read
from smore_cli.nn import set_active

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from smore_cli.merging.calibration import Calibration
    from smore_cli.models.runs import Run
    from smore_cli.recipe.schema import Recipe

__all__ = ["NO_BENCHMARK", "Benchmark", "Reference", "measure_reference"]


@dataclass(frozen=True)
class Benchmark:
    """Questions that all three models are scored on.

    Attributes:
        names: of benchmarks.
        data_dir: folder with their questions; None: each task's own source.
        limit: the first so many of each task; None: all.
    """

    names: tuple[str, ...] = ()
    data_dir: Path | None = None
    limit: int | None = None


NO_BENCHMARK = Benchmark()


@dataclass(frozen=True)
class Reference:
    """What the merged model is held against.

    Attributes:
        texts: what the merge is fitted to and judged on.
        pad_token_id: the tokenizer's.
        recipe: the run's; None: an adapter without its run.
        routed, base: the readings of adapter and backbone.
        scores: accuracy by task of each, where a benchmark was named.
    """

    texts: Texts
    pad_token_id: int
    recipe: Recipe | None
    routed: list[Reading]
    base: list[Reading]
    scores: dict[str, dict[str, Any]]

    def judged_by(self, model: PreTrainedModel) -> Verdict:
        """Returns the verdict on a merged model."""
        merged = read(model, self.texts.judged, self.pad_token_id)
        return judge(self.texts.judged, self.texts.role, self.base, self.routed, merged)

    def scored(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        benchmark: Benchmark,
        say: Callable[[str], None],
    ) -> list[dict[str, Any]]:
        """Returns the accuracy of all three models, task by task."""
        found = _accuracies(model, tokenizer, self.recipe, benchmark, "merged model", say)
        return [{"task": task, **self.scores[task], "merged": one["acc"]} for task, one in found.items()]

    def describe_calibration(self, options: Calibration) -> dict[str, Any]:
        """Returns what the merge was fitted to and how, as JSON values."""
        corpus = self.texts.calibration
        settings = {name: getattr(options, name) for name in ("ridge", "prior", "distill")}
        return {"source": corpus.origin, "tokens": corpus.tokens, **settings}


def measure_reference(
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Calibration,
    benchmark: Benchmark,
    say: Callable[[str], None],
) -> Reference:
    """Reads the texts, and measures the adapter and its backbone on them.

    Args:
        run: the run.
        model: its model, the adapter active; it is so again afterwards.
        tokenizer: its tokenizer.
        calibration: which text a merge is fitted to.
        benchmark: questions to score both on.
        say: takes lines of progress.
    """
    texts, pad = read_texts(run.recipe, tokenizer, calibration), int(tokenizer.pad_token_id or 0)
    say("reading the text to judge by with the adapter and with the backbone")
    routed = read(model, texts.judged, pad)
    scores = _accuracies(model, tokenizer, run.recipe, benchmark, "adapter", say)
    set_active(model, None)
    base = read(model, texts.judged, pad, logits=False)
    plain = _accuracies(model, tokenizer, run.recipe, benchmark, "backbone", say)
    set_active(model, "default")
    both = {task: {"n": one["n"], "base": plain[task]["acc"], "routed": one["acc"]} for task, one in scores.items()}
    return Reference(texts, pad, run.recipe, routed, base, both)


def _accuracies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe | None,
    benchmark: Benchmark,
    what: str,
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Returns n and accuracy of each task of the benchmarks."""
    if not benchmark.names:
        return {}
    from smore_cli.evaluation.harness import evaluate
    from smore_cli.evaluation.session import training_template

    say(f"scoring the {what} on {', '.join(benchmark.names)}")
    results = evaluate(
        model,
        tokenizer,
        benchmark.names,
        data_dir=benchmark.data_dir,
        limit=benchmark.limit,
        template="plain" if recipe is None else training_template(recipe.data),
    )
    return {result.task: {"n": result.n, "acc": result.acc} for result in results}
