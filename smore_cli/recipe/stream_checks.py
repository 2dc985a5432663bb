"""Contradictions of `data.streaming`: what asks for all rows, when no one knows how many there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from smore_cli.recipe.document import Loc
from smore_cli.recipe.schema import DataConfig

__all__ = ["stream_contradictions"]

DEFAULT_BUFFER: int = DataConfig.model_fields["shuffle_buffer"].default


def stream_contradictions(values: dict[str, Any]) -> Iterator[tuple[tuple[Loc, ...], str]]:
    """Yields where a contradiction stands and what to say about it, from plain values that may have other mistakes."""
    data, train = (part if isinstance(part := values.get(name), dict) else {} for name in ("data", "train"))
    here: Loc = ("data", "streaming")
    if data.get("streaming") is not True:
        if data.get("shuffle_buffer", DEFAULT_BUFFER) != DEFAULT_BUFFER:  # resolved.yaml repeats the default
            message = "'data.shuffle_buffer' is for streams; without 'data.streaming' all rows are shuffled: remove it"
            yield (("data", "shuffle_buffer"),), message
        return
    if train.get("max_steps") is None:
        yield (here,), "'data.streaming' needs 'train.max_steps': no one knows how many rows a stream has"
    if data.get("eval_fraction"):
        locs = (here, ("data", "eval_fraction"))
        yield locs, "'data.eval_fraction' needs all rows, which 'data.streaming' never has: name sources in 'data.eval'"
    if train.get("group_by_length") is True:
        locs = (here, ("train", "group_by_length"))
        yield locs, "'train.group_by_length' needs the length of every row: use 'data.packing' with 'data.streaming'"
    yield from _sources(data.get("train"))


def _sources(sources: Any) -> Iterator[tuple[tuple[Loc, ...], str]]:
    found = [source for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
    if len(found) > 1 and all(source.get("weight") is None for source in found):
        message = "several streams need a 'weight' each: how many rows they have, and so their shares, is not known"
        yield (("data", "streaming"),), message
    for index, source in enumerate(sources if isinstance(sources, list) else []):
        if not isinstance(source, dict):
            continue
        loc: Loc = ("data", "train", index)
        path, split = source.get("path"), source.get("split")
        if isinstance(path, str) and PurePath(path.lower().removesuffix(".gz")).suffix == ".json":
            message = f"'{path}' can only be read as a whole: make it .jsonl, or set 'data.streaming: false'"
            yield ((*loc, "path"),), message
        if isinstance(split, str) and "[" in split:
            yield ((*loc, "split"),), f"'{split}' is a slice, which a stream does not have: name a whole split"
        if isinstance(columns := source.get("columns"), dict) and "group" in columns:
            message = "groups of single rows are not known before a stream was read: use 'group' for the whole source"
            yield ((*loc, "columns"),), message
