"""Contradictions: settings that are sound by themselves but not together.

They are looked for in the plain values, not in validated ones, so that they are found beside any other mistake.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, NamedTuple, get_args

from smore_cli.recipe.document import Loc
from smore_cli.recipe.schema import Source, TrainConfig

__all__ = ["Contradiction", "find_contradictions"]

_FILE_ENDINGS = {".jsonl", ".json", ".csv", ".parquet"}
_FORMATS = get_args(Source.model_fields["format"].annotation)
_DEFAULT_BATCH_SIZE: int = TrainConfig.model_fields["per_device_batch_size"].default


class Contradiction(NamedTuple):
    """Settings that exclude each other: where they stand, and what to say."""

    locs: tuple[Loc, ...]
    message: str


def find_contradictions(values: dict[str, Any]) -> Iterator[Contradiction]:
    """Yields every contradiction in a recipe's values, which may have other mistakes."""
    data, train = _section(values, "data"), _section(values, "train")
    sources = [pair for part in ("train", "eval") for pair in _sources(data.get(part), ("data", part))]
    yield from _exclusive_settings(values, data, train)
    yield from _batch_sizes(train)
    yield from _what_is_learned(data, sources)
    for loc, source in sources:
        yield from _local_file(loc, source)


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def _sources(value: Any, loc: Loc) -> Iterator[tuple[Loc, dict[str, Any]]]:
    for index, source in enumerate(value if isinstance(value, list) else []):
        if isinstance(source, dict):
            yield (*loc, index), source


def _exclusive_settings(values: dict[str, Any], data: dict[str, Any], train: dict[str, Any]) -> Iterator[Contradiction]:
    if train.get("epochs") is not None and train.get("max_steps") is not None:
        locs = (("train", "epochs"), ("train", "max_steps"))
        yield Contradiction(locs, "'train.epochs' and 'train.max_steps' are both set: keep one")
    if data.get("eval") and data.get("eval_fraction"):
        locs = (("data", "eval"), ("data", "eval_fraction"))
        yield Contradiction(locs, "'data.eval' and 'data.eval_fraction' are both set: keep one")
    if _section(values, "eval").get("steps") is not None and not data.get("eval") and not data.get("eval_fraction"):
        message = "'eval.steps' is set but nothing is held out: set 'data.eval' or 'data.eval_fraction'"
        yield Contradiction((("eval", "steps"),), message)


def _batch_sizes(train: dict[str, Any]) -> Iterator[Contradiction]:
    total, each = train.get("global_batch_size"), train.get("per_device_batch_size", _DEFAULT_BATCH_SIZE)
    if type(total) is int and type(each) is int and total > 0 and each > 0 and total % each:
        default = "" if "per_device_batch_size" in train else ", the default"
        names = "'train.global_batch_size' ({}) is not a multiple of 'train.per_device_batch_size' ({})"
        locs = (("train", "per_device_batch_size"), ("train", "global_batch_size"))
        yield Contradiction(locs, names.format(total, f"{each}{default}"))


def _what_is_learned(data: dict[str, Any], sources: list[tuple[Loc, dict[str, Any]]]) -> Iterator[Contradiction]:
    loss_on, ranking = data.get("loss_on", "completion"), data.get("objective") == "choice_ranking"
    if ranking:
        for loc, source in sources:
            if (form := source.get("format")) in _FORMATS and form != "multiple_choice":
                message = f"objective choice_ranking needs format multiple_choice, but '{_dotted(loc)}' is '{form}'"
                yield Contradiction(((*loc, "format"),), message)
        if loss_on in ("assistant", "last_turn", "all"):
            message = f"objective choice_ranking scores the completion, so 'data.loss_on' cannot be '{loss_on}'"
            yield Contradiction((("data", "objective"), ("data", "loss_on")), message)
    elif loss_on in ("assistant", "last_turn"):
        for loc, source in sources:
            if (form := source.get("format")) in _FORMATS and form != "chat":
                message = f"loss_on: {loss_on} needs format chat, but '{_dotted(loc)}' is '{form}': use completion"
                yield Contradiction((("data", "loss_on"),), message)
                return


def _local_file(loc: Loc, source: dict[str, Any]) -> Iterator[Contradiction]:
    path = source.get("path")
    if isinstance(path, str) and PurePath(path).suffix.lower() in _FILE_ENDINGS:
        for key in ("name", "revision"):
            if source.get(key) is not None:
                message = f"'{key}' is for hub datasets, but '{path}' is a file: remove the line"
                yield Contradiction(((*loc, key),), message)


def _dotted(loc: Loc) -> str:
    return ".".join(map(str, loc))
