"""Contradictions among optimiser, learning rate, and what the best checkpoint is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from smore_cli.methods import available_methods, load_method
from smore_cli.recipe.document import Loc
from smore_cli.recipe.schema import EvalConfig, TrainConfig

__all__ = ["optimisation_contradictions"]

Found = Iterator[tuple[tuple[Loc, ...], str]]


def optimisation_contradictions(values: dict[str, Any]) -> Found:
    """Yields where each contradiction stands and what to say; the values may have other mistakes."""
    adapter, data, train, evaluation = (_section(values, name) for name in ("adapter", "data", "train", "eval"))
    yield from _optimiser(train, adapter.get("method"))
    yield from _learning_rate(train)
    yield from _best_checkpoint(evaluation, data, train)


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def _optimiser(train: dict[str, Any], method: object) -> Found:
    for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if train.get("optim") == "adafactor" and _is_set(train, key, TrainConfig):
            yield (("train", key),), f"'train.{key}' is set, but adafactor does not read it: remove the line"
    routed = method not in available_methods() or load_method(str(method)).routed
    if train.get("router_learning_rate") is not None and not routed:
        message = f"'train.router_learning_rate' is set, but '{method}' has no router: remove the line"
        yield (("train", "router_learning_rate"),), message


def _learning_rate(train: dict[str, Any]) -> Found:
    name, steps, total = train.get("lr_scheduler", "cosine"), train.get("warmup_steps"), train.get("max_steps")
    if steps is not None and train.get("warmup_ratio"):
        locs = (("train", "warmup_ratio"), ("train", "warmup_steps"))
        yield locs, "'train.warmup_ratio' and 'train.warmup_steps' are both set: keep one"
    elif type(steps) is int and type(total) is int and steps >= total > 0:
        message = f"'train.warmup_steps' ({steps}) leaves nothing of 'train.max_steps' ({total}) to train at the peak"
        yield (("train", "warmup_steps"), ("train", "max_steps")), message
    for key in ("decay_ratio", "decay_type"):
        if name in ("constant", "linear", "cosine") and _is_set(train, key, TrainConfig):
            message = f"'train.{key}' is for lr_scheduler wsd, but that is '{name}': remove the line"
            yield (("train", key),), message
    if name == "constant" and train.get("min_lr_ratio"):
        message = "'train.min_lr_ratio' is set, but lr_scheduler constant does not decay: remove the line"
        yield (("train", "min_lr_ratio"),), message
    warmup, decay = (_value(train, key, TrainConfig) for key in ("warmup_ratio", "decay_ratio"))
    if name == "wsd" and steps is None and _numbers(warmup, decay) and warmup + decay > 1:
        locs = (("train", "warmup_ratio"), ("train", "decay_ratio"))
        yield locs, f"'train.warmup_ratio' ({warmup}) and 'train.decay_ratio' ({decay}) are more than all steps"


def _best_checkpoint(evaluation: dict[str, Any], data: dict[str, Any], train: dict[str, Any]) -> Found:
    metric, every = _value(evaluation, "metric_for_best_model", EvalConfig), evaluation.get("steps")
    for key in ("metric_for_best_model", "greater_is_better", "early_stopping_patience", "load_best_model_at_end"):
        if every is None and _is_set(evaluation, key, EvalConfig):
            yield (("eval", key),), f"'eval.{key}' needs evaluations while training: set 'eval.steps'"
    if evaluation.get("early_stopping_threshold") and evaluation.get("early_stopping_patience") is None:
        message = "'eval.early_stopping_threshold' is set without 'eval.early_stopping_patience': set both or none"
        yield (("eval", "early_stopping_threshold"),), message
    if metric == "eval_accuracy" and data.get("objective") != "choice_ranking":
        message = "'eval.metric_for_best_model' eval_accuracy is measured for objective choice_ranking only"
        yield (("eval", "metric_for_best_model"),), message
    logging = _value(train, "logging_steps", TrainConfig)
    of_training = metric in ("loss", "aux_loss", "grad_norm")
    if of_training and type(every) is int and type(logging) is int and logging > 0 and every % logging:
        message = f"'eval.metric_for_best_model' {metric} is known every 'train.logging_steps' ({logging})"
        locs = (("eval", "metric_for_best_model"), ("eval", "steps"))
        yield locs, f"{message}: 'eval.steps' ({every}) must be a multiple of it"


def _value(section: dict[str, Any], key: str, config: type[BaseModel]) -> Any:
    return section.get(key, config.model_fields[key].default)


def _is_set(section: dict[str, Any], key: str, config: type[BaseModel]) -> bool:
    """Whether a field says something else than its default, which resolved.yaml repeats."""
    return bool(_value(section, key, config) != config.model_fields[key].default)


def _numbers(*values: object) -> bool:
    return all(isinstance(value, int | float) for value in values)
