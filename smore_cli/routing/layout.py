"""Where a router sits, in a reader's terms: layer 3, projection q. And choosing routers in these terms."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smore_cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from smore_cli.routing.statistics import RouterStatistics

__all__ = ["Place", "choose_level", "choose_modules", "parse_layers", "places"]

_LAYER = re.compile(r"(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<inside>.+)")


@dataclass(frozen=True)
class Place:
    """Where an adapted linear map sits.

    Attributes:
        layer: number of the layer; None: outside of the layers.
        projection: the shortest name that tells it from the others of a layer, `_proj` left out.
    """

    layer: int | None
    projection: str

    def __str__(self) -> str:
        """Returns `3.q`, as `--detail` takes it."""
        return self.projection if self.layer is None else f"{self.layer}.{self.projection}"


def places(modules: Iterable[str]) -> dict[str, Place]:
    """Returns the place of each module path; no two are alike."""
    found = {path: _LAYER.fullmatch(path) for path in dict.fromkeys(modules)}
    several = len({match["stack"] for match in found.values() if match}) > 1  # as in an encoder and a decoder
    layers: dict[str, int | None] = {}
    inside: dict[str, str] = {}
    for path, match in found.items():
        layers[path] = int(match["layer"]) if match else None
        inside[path] = (f"{match['stack']}.{match['inside']}" if several else match["inside"]) if match else path
    names = _short_names(set(inside.values()))
    return {path: Place(layers[path], names[inside[path]]) for path in found}


def _short_names(paths: set[str]) -> dict[str, str]:
    """Returns for each path as many of its last parts as no other path ends with: attn.c_proj and mlp.c_proj."""
    endings: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        parts = path.split(".")
        for count in range(1, len(parts) + 1):
            endings[".".join(parts[-count:])].add(path)
    shortest = {path: path for path in paths}
    for ending in sorted(endings, key=len, reverse=True):
        if len(endings[ending]) == 1:
            shortest[next(iter(endings[ending]))] = ending
    bare = {path: ending.removesuffix("_proj") for path, ending in shortest.items()}
    return bare if len(set(bare.values())) == len(bare) else shortest


def parse_layers(text: str) -> set[int]:
    """Returns the layers that a text such as `0-5,29` names.

    Raises:
        UsageError: it is none.
    """
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None or int(match[1]) > int(match[2] or match[1]):
            raise UsageError(f"--layers: '{text}' names no layers", "write them as 3, as 0-5, or as 0-5,29")
        layers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return layers


def choose_modules(modules: Iterable[str], *, layers: set[int] | None, name: str | None) -> set[str]:
    """Returns the modules that were asked for.

    Args:
        modules: paths of all adapted linear maps.
        layers: only these layers; None: all.
        name: only this linear map: its path, the end of it, or its place as in `3.q`; None: all.

    Raises:
        UsageError: there is no such layer or module, or several modules of that name.
    """
    found = places(modules)
    if name is not None:
        return {_find(name, found)}
    if layers is None:
        return set(found)
    present = {place.layer for place in found.values() if place.layer is not None}
    if missing := layers - present:
        raise UsageError(f"--layers: no router in layer {_ranges(missing)}", f"there are: {_ranges(present)}")
    return {path for path, place in found.items() if place.layer in layers}


def choose_level(routers: Sequence[RouterStatistics], level: int | None) -> list[RouterStatistics]:
    """Returns the routers of one tree level, or all of them where it is None.

    Raises:
        UsageError: there is no such level.
    """
    chosen = [router for router in routers if level in (None, router.level)]
    if not chosen:
        present = _ranges({router.level for router in routers})
        raise UsageError(f"--level: the trees have no level {level}", f"there are: {present} (0: the leaves)")
    return chosen


def _find(module: str, found: dict[str, Place]) -> str:
    matches = [p for p, place in found.items() if p == module or p.endswith(f".{module}") or str(place) == module]
    if len(matches) == 1:
        return matches[0]
    if matches:
        example = f"name one, as in {found[matches[0]]} or {matches[0]}"
        raise UsageError(f"--detail: '{module}' fits {len(matches)} linear maps", example)
    known = [*found, *(str(place) for place in found.values())]
    near = difflib.get_close_matches(module, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"name one, as in {next(iter(found.values()))}"
    raise UsageError(f"--detail: no router at '{module}'", hint)


def _ranges(numbers: set[int]) -> str:
    """Returns `0-5, 29`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
