"""What a changed recipe means for a run that is half done: one line a difference, and whether going on is sound.

refused    the steps to come would not be those of the run that was started
inexact    the same mathematics, but other roundings or other random draws: not bit for bit
accepted   does not touch what is learned
content    another place of the data; the rows themselves are compared once they are read (`same_data`)
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from smore_cli.recipe.document import Mark

if TYPE_CHECKING:
    from smore_cli.recipe.document import Document, Loc
    from smore_cli.recipe.schema import Recipe, TrainConfig

__all__ = ["FREE_TO_CHANGE", "Difference", "find_differences", "place_of"]

Verdict = Literal["refused", "inexact", "accepted", "content"]

FREE_TO_CHANGE: dict[Loc, str] = {
    ("output_dir",): "the folder may be moved",
    ("log",): "what is learned stays the same",
    ("eval",): "the steps stay the same; what is measured and kept of them may not",
    ("train", "gradient_census"): "what is learned stays the same",
    ("train", "on_collapse"): "what is learned stays the same",
    ("train", "logging_steps"): "what is learned stays the same",
    ("train", "save_steps"): "what is learned stays the same",
    ("train", "save_total_limit"): "what is learned stays the same",
    ("train", "dataloader_num_workers"): "the batches stay the same",
}
"""What does not change the steps, and so the adapter that comes out of them, with the reason given to the user."""

SAME_MATHEMATICS: dict[Loc, str] = {
    ("train", "gradient_checkpointing"): "the same gradients up to rounding",
    ("model", "attn_implementation"): "the same attention up to rounding",
    ("model", "device_map"): "the same model up to rounding",
}
"""What changes the rounding of a step and nothing else."""

_REASONS: dict[Loc, str] = {
    ("model",): "another backbone",
    ("model", "dtype"): "every number is rounded differently",
    ("quantization",): "the backbone's weights are other numbers",
    ("adapter",): "another adapter, or one that trains differently",
    ("data",): "other training rows",
    ("data", "objective"): "another loss",
    ("data", "loss_on"): "another loss",
    ("data", "ranking_completion_weight"): "another loss",
    ("data", "packing"): "other rows in every step",
    ("train",): "changes every step",
    ("train", "global_batch_size"): "other rows in every step",
    ("train", "group_by_length"): "other rows in every step",
    ("train", "warmup_ratio"): "another learning rate",
    ("train", "warmup_steps"): "another learning rate",
    ("seed",): "another initialisation, order of the rows and dropout",
}
_PLACE = ("path", "name", "split", "revision")  # of a source: where its rows are, not what is made of them


@dataclass(frozen=True)
class Difference:
    """One setting that is not what it was.

    Attributes:
        loc: the setting.
        before: its value in the run.
        now: its value in the recipe.
        verdict: what it means for the run.
        reason: why, in a few words.
        where: `file:line: ` or `--set ...: `; empty where nobody knows.
    """

    loc: Loc
    before: Any
    now: Any
    verdict: Verdict
    reason: str
    where: str = ""

    def line(self) -> str:
        """Returns it for people: `r.yaml:12: train.learning_rate: 2e-4 -> 1e-4 (changes every step)`."""
        return f"{self.where}{_dotted(self.loc)}: {_shown(self.before)} -> {_shown(self.now)} ({self.reason})"


def find_differences(before: Recipe, now: Recipe, document: Document | None = None, done: int = 0) -> list[Difference]:
    """Returns everything in which two recipes differ, in the order of the recipe.

    Args:
        before: the recipe of the run.
        now: the recipe it is to go on with.
        document: knows where `now` says what.
        done: steps of the newest checkpoint.
    """
    found = []
    for loc, old, new in _changed(before.model_dump(mode="json"), now.model_dump(mode="json"), ()):
        verdict, reason = _judge(loc, before, now, done)
        found.append(Difference(loc, old, new, verdict, reason, place_of(document, loc)))
    return found


def place_of(document: Document | None, loc: Loc) -> str:
    """Returns where a recipe says something: `r.yaml:12: ` or `--set ...: `; empty where nobody knows."""
    if document is None:
        return ""
    place = document.where(loc)
    return f"{document.name}:{place.line}: " if isinstance(place, Mark) else f"--set {place}: "


def _changed(before: Any, now: Any, loc: Loc) -> list[tuple[Loc, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*now, *(key for key in before if key not in now)]
        return [change for key in keys for change in _changed(before.get(key), now.get(key), (*loc, key))]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now) and loc[:1] == ("data",):
        pairs = enumerate(zip(before, now, strict=True))
        return [change for index, (old, new) in pairs for change in _changed(old, new, (*loc, index))]
    return [] if before == now else [(loc, before, now)]


def _judge(loc: Loc, before: Recipe, now: Recipe, done: int) -> tuple[Verdict, str]:
    if loc in (("train", "max_steps"), ("train", "epochs")):
        return _judge_length(before.train, now.train, done)
    if loc in (("train", "per_device_batch_size"), ("train", "global_batch_size")):
        return _judge_split(loc, before, now)
    depends = any(r.eval.load_best_model_at_end or r.eval.early_stopping_patience for r in (before, now))
    if depends and (loc[:1] == ("eval",) or loc[:2] == ("data", "eval")):
        return "refused", "early stopping and the best checkpoint depend on the evaluations"
    if loc[:2] == ("data", "eval") and bool(before.data.eval) == bool(now.data.eval):
        return "accepted", "held-out rows only"
    if loc[:2] == ("data", "eval") and before.data.eval_fraction == now.data.eval_fraction == 0:
        return "accepted", "held-out rows only"
    if loc[:2] == ("data", "train") and len(loc) == 4 and loc[3] in _PLACE:
        return "content", "the rows are compared"
    if reason := _longest(FREE_TO_CHANGE, loc):
        return "accepted", reason
    if reason := _longest(SAME_MATHEMATICS, loc):
        return "inexact", reason
    return "refused", _longest(_REASONS, loc) or "changes the run"


def _judge_length(before: TrainConfig, now: TrainConfig, done: int) -> tuple[Verdict, str]:
    """A run of another length is the same run so far if no learning rate up to here depends on the length."""
    if now.max_steps is not None and now.max_steps < done:
        return "refused", f"the run is past that: its newest checkpoint is of step {done}"
    warmup_moves = before.warmup_ratio > 0 and getattr(before, "warmup_steps", None) is None
    if before.lr_scheduler == "constant" and not warmup_moves:
        return "accepted", "the learning rate is constant, so the steps so far are the same"
    if before.lr_scheduler == "wsd" and not warmup_moves and before.max_steps is not None:
        decay = math.floor(before.max_steps * (1 - before.decay_ratio))
        longer = now.max_steps is not None and now.max_steps >= before.max_steps
        if longer and done <= decay:
            return "accepted", f"the decay of wsd had not begun at step {done}, so the steps so far are the same"
        return "refused", f"wsd was to decay from step {decay} on: the learning rate would be another"
    what = "its warm-up" if before.lr_scheduler == "constant" else f"lr_scheduler {before.lr_scheduler}"
    return "refused", f"{what} is stretched over the whole run, so every step's learning rate would be another"


def _judge_split(loc: Loc, before: Recipe, now: Recipe) -> tuple[Verdict, str]:
    """A step of the same rows in other forward passes is the same step, unless a loss is made pass by pass."""
    sizes = {recipe.train.global_batch_size or recipe.train.per_device_batch_size for recipe in (before, now)}
    if len(sizes) > 1:
        old, new = (r.train.global_batch_size or r.train.per_device_batch_size for r in (before, now))
        return "refused", f"{new} rows a step instead of {old}"
    if before.train.per_device_batch_size == now.train.per_device_batch_size or loc[1] == "global_batch_size":
        return "accepted", "as many rows a step as before"
    if now.train.group_by_length:
        return "refused", "with group_by_length the rows of a step depend on the split"
    if now.train.aux_statistics == "micro_batch":
        return "refused", "with aux_statistics: micro_batch the balance loss depends on the split"
    return "inexact", "the same rows a step, in other forward passes"


def _longest(table: dict[Loc, str], loc: Loc) -> str | None:
    return next((table[loc[:depth]] for depth in range(len(loc), 0, -1) if loc[:depth] in table), None)


def _dotted(loc: Loc) -> str:
    return ".".join(str(part) for part in loc)


def _shown(value: Any) -> str:
    """Returns a value as a recipe would say it; small numbers with an exponent."""
    if value is None:
        return "not set"
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if isinstance(value, list) and value and isinstance(value[0], dict) and "path" in value[0]:
        return f"{len(value)} source{'s' if len(value) > 1 else ''} ({', '.join(source['path'] for source in value)})"
    return value if isinstance(value, str) else json.dumps(value)
