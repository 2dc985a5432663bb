"""Contradictions: settings that are sound by themselves but not together.

They are looked for in the plain values, not in validated ones, so that they are found beside any other mistake.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, NamedTuple, get_args

from smore_cli.recipe.document import Loc
from smore_cli.recipe.idle_checks import idle_settings
from smore_cli.recipe.optimisation_checks import optimisation_contradictions
from smore_cli.recipe.schema import Source, TrainConfig
from smore_cli.recipe.stream_checks import stream_contradictions

__all__ = ["Contradiction", "find_contradictions"]

_FILE_ENDINGS = {".jsonl", ".json", ".csv", ".parquet", ".arrow", ".gz"}
_FORMATS = get_args(Source.model_fields["format"].annotation)
_CHATS = ("chat", "sharegpt")
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
    yield from _eight_bits(_section(values, "quantization"))
    yield from _mixture(data, sources)
    yield from (Contradiction(locs, message) for locs, message in optimisation_contradictions(values))
    yield from (Contradiction(locs, message) for locs, message in idle_settings(values))
    yield from (Contradiction(locs, message) for locs, message in stream_contradictions(values))
    yield from _what_is_learned(data, sources)
    yield from _names(values, sources)
    for loc, source in sources:
        yield from _local_file(loc, source)
        yield from _roles(loc, source)


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
    if data.get("packing") is True and train.get("group_by_length") is True:
        locs = (("data", "packing"), ("train", "group_by_length"))
        yield Contradiction(locs, "'data.packing' and 'train.group_by_length' both save padding: keep one")
    if data.get("eval") and data.get("eval_fraction"):
        locs = (("data", "eval"), ("data", "eval_fraction"))
        yield Contradiction(locs, "'data.eval' and 'data.eval_fraction' are both set: keep one")
    evaluation, held_out = _section(values, "eval"), data.get("eval") or data.get("eval_fraction")
    best = any(evaluation.get(key) for key in ("early_stopping_patience", "load_best_model_at_end"))
    if evaluation.get("steps") is not None and not held_out and (best or not evaluation.get("benchmarks")):
        message = "'eval.steps' is set but nothing is held out: set 'data.eval' or 'data.eval_fraction'"
        yield Contradiction((("eval", "steps"),), message)


def _mixture(data: dict[str, Any], sources: list[tuple[Loc, dict[str, Any]]]) -> Iterator[Contradiction]:
    weighted = [loc for loc, source in sources if source.get("weight") is not None]
    training = [loc for loc, _ in sources if loc[1] == "train"]
    if held_out := next((loc for loc in weighted if loc[1] == "eval"), None):
        message = f"'{_dotted(held_out)}.weight' is set, but every held-out row counts once: remove the line"
        yield Contradiction(((*held_out, "weight"),), message)
    missing = next((loc for loc in training if loc not in weighted), None)
    if missing and (named := next((loc for loc in weighted if loc[1] == "train"), None)):
        message = f"'{_dotted(named)}' has a weight and '{_dotted(missing)}' has none: give all sources one, or none"
        yield Contradiction(((*named, "weight"),), message)


def _eight_bits(quantization: dict[str, Any]) -> Iterator[Contradiction]:
    if quantization.get("bits") == 8:
        for key in ("type", "double_quant"):
            if quantization.get(key) is not None:
                message = f"'quantization.{key}' is for 4 bits, and bits is 8: remove the line"
                yield Contradiction((("quantization", key),), message)


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
            if (form := source.get("format")) in _FORMATS and form not in _CHATS:
                message = f"loss_on: {loss_on} needs format chat, but '{_dotted(loc)}' is '{form}': use completion"
                yield Contradiction((("data", "loss_on"),), message)
                return


def _roles(loc: Loc, source: dict[str, Any]) -> Iterator[Contradiction]:
    form = source.get("format")
    if source.get("roles") and form in _FORMATS and form not in (*_CHATS, "prompt_completion"):
        message = f"'roles' names who speaks in a chat, but format '{form}' has no roles: remove the line"
        yield Contradiction(((*loc, "roles"),), message)


def _names(values: dict[str, Any], sources: list[tuple[Loc, dict[str, Any]]]) -> Iterator[Contradiction]:
    """Refuses what no file system takes for a name: Python would say so in the middle of the work."""
    model: tuple[Loc, Any] = (("model", "name_or_path"), _section(values, "model").get("name_or_path"))
    output: tuple[Loc, Any] = (("output_dir",), values.get("output_dir"))
    for loc, name in (model, *(((*loc, "path"), source.get("path")) for loc, source in sources), output):
        parts = name.encode("utf-8", "replace").split(b"/") if isinstance(name, str) else []
        if sum(len(part) + 1 for part in parts) > 4096 or any(len(part) > 255 for part in parts):
            yield Contradiction((loc,), f"'{_dotted(loc)}' is longer than the name of a file can be: shorten it")


def _local_file(loc: Loc, source: dict[str, Any]) -> Iterator[Contradiction]:
    path = source.get("path")
    if isinstance(path, str) and "://" in path:
        yield Contradiction(((*loc, "path"),), f"'{path}' is an address: download the file, and name that")
    elif isinstance(path, str) and PurePath(path).suffix.lower() in _FILE_ENDINGS:
        for key in ("name", "revision"):
            if source.get(key) is not None:
                message = f"'{key}' is for hub datasets, but '{path}' is a file: remove the line"
                yield Contradiction(((*loc, key),), message)


def _dotted(loc: Loc) -> str:
    return ".".join(map(str, loc))
