"""Settings that nothing would read, beside what the rest of the recipe says: refused, or they would seem to work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from smore_cli.methods import available_methods, load_method
from smore_cli.recipe.document import Loc
from smore_cli.recipe.schema import DataConfig, EvalConfig, LogConfig, TrainConfig

__all__ = ["idle_settings"]

Found = Iterator[tuple[tuple[Loc, ...], str]]

_COLUMNS = {
    "multiple_choice": ("question", "choices", "label", "answerKey"),
    "prompt_completion": ("prompt", "completion"),
    "chat": ("messages", "system"),
    "sharegpt": ("conversations", "system"),
    "alpaca": ("instruction", "input", "output"),
    "text": ("text",),
}
"""What each format reads of a row; `group` is read of every one."""


def idle_settings(values: dict[str, Any]) -> Found:
    """Yields where each idle setting stands and what to say; the values may have other mistakes."""
    adapter, data, train, log, evaluation = (
        part if isinstance(part := values.get(name), dict) else {}
        for name in ("adapter", "data", "train", "log", "eval")
    )
    yield from _without_router(train, adapter.get("method"))
    yield from _data(data)
    yield from _trackers(log)
    yield from _benchmarks(evaluation)


def _without_router(train: dict[str, Any], method: object) -> Found:
    if method in available_methods() and not load_method(str(method)).routed:
        for key in ("aux_statistics", "on_collapse"):
            if _is_set(train, key, TrainConfig):
                yield (("train", key),), f"'train.{key}' is set, but '{method}' has no router: remove the line"


def _benchmarks(evaluation: dict[str, Any]) -> Found:
    if evaluation.get("benchmarks"):
        return
    for key in ("benchmark_data_dir", "benchmark_limit"):
        if _is_set(evaluation, key, EvalConfig):
            yield (("eval", key),), f"'eval.{key}' is set, but 'eval.benchmarks' names none: remove the line"


def _data(data: dict[str, Any]) -> Found:
    if data.get("objective", "completion") == "completion" and _is_set(data, "ranking_completion_weight", DataConfig):
        message = "'data.ranking_completion_weight' is for objective choice_ranking: remove the line"
        yield (("data", "ranking_completion_weight"),), message
    parts = [(part, sources) for part in ("train", "eval") if isinstance(sources := data.get(part), list)]
    sources = [(("data", part, i), each) for part, found in parts for i, each in enumerate(found)]
    forms = {each.get("format") if isinstance(each, dict) else None for _, each in sources}
    if data.get("template") in ("plain", "chat") and forms == {"text"}:
        yield (("data", "template"),), "'data.template' is set, but no template writes format text: remove the line"
    for loc, source in sources:
        columns, form = (source.get("columns"), source.get("format")) if isinstance(source, dict) else (None, None)
        if not isinstance(columns, dict) or not isinstance(form, str) or form not in _COLUMNS:
            continue
        for name in columns:
            if name not in (*_COLUMNS[form], "group"):
                message = f"format {form} reads no '{name}': write {{ours: the file's}}, of ours there are "
                yield ((*loc, "columns", name),), message + ", ".join((*_COLUMNS[form], "group"))


def _trackers(log: dict[str, Any]) -> Found:
    trackers = log.get("report_to", [])
    if not isinstance(trackers, list) or not all(isinstance(name, str) for name in trackers):
        return
    if repeated := next((name for name in trackers if trackers.count(name) > 1), None):
        yield (("log", "report_to"),), f"'log.report_to' names {repeated} twice: keep one"
    for key in ("project", "run_name"):
        if _is_set(log, key, LogConfig) and not {"wandb", "mlflow"} & set(trackers):
            yield (
                (("log", key),),
                f"'log.{key}' is for wandb and mlflow, and report_to names neither: remove the line",
            )


def _is_set(section: dict[str, Any], key: str, config: type[BaseModel]) -> bool:
    """Whether a field says something else than its default, which resolved.yaml repeats."""
    default = config.model_fields[key].default
    return bool(section.get(key, default) != default)
