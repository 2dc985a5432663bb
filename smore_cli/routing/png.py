"""A picture for a paper or a report: layers by experts, a panel for each tree level and projection.

colour = log2(an expert's share of the work, as a multiple of an even one), from a quarter to four times
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from smore_cli.routing.layout import places
from smore_cli.routing.statistics import levels_of
from smore_cli.routing.view import level_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

    from smore_cli.routing.layout import Place
    from smore_cli.routing.session import RoutingProfile
    from smore_cli.routing.statistics import RouterStatistics

__all__ = ["draw_png", "heat_of"]

DPI = 150
CELL, GAP, MARGIN = 0.16, 0.55, 1.1  # inches
COLOURS = LinearSegmentedColormap.from_list("routing", ["#c2571a", "#efefed", "#1d5fa8"])
"""Less than an even share, even, more: the colours of the HTML page."""
TICKS = {-2: "1/4", -1: "1/2", 0: "even", 1: "double", 2: "4-fold"}


def draw_png(profile: RoutingProfile) -> bytes:
    """Returns a profile's picture as the bytes of a PNG file."""
    found = places(router.module for router in profile.routers)
    levels = levels_of(profile.routers)
    projections = list(dict.fromkeys(found[router.module].projection for router in profile.routers))
    panels = [
        [[r for r in profile.routers if (r.level, found[r.module].projection) == (level, name)] for name in projections]
        for level in levels
    ]
    figure = Figure(figsize=_size(panels), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(len(levels), len(projections), squeeze=False)
    images = [
        _panel(axes[row, column], panel, found, title=projections[column])
        for row, panels_of_level in enumerate(panels)
        for column, panel in enumerate(panels_of_level)
    ]
    for row, level in enumerate(levels):
        axes[row, 0].set_ylabel(f"layer, level {level_name(level, levels)}" if len(levels) > 1 else "layer", fontsize=8)
    bar = figure.colorbar(next(filter(None, images)), ax=axes, shrink=0.6, aspect=30, ticks=list(TICKS))
    bar.ax.set_yticklabels(list(TICKS.values()), fontsize=7)
    figure.suptitle(f"{profile.run}: {profile.method} on {profile.backbone}", fontsize=9, parse_math=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    return content.getvalue()


def heat_of(routers: Sequence[RouterStatistics]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Returns log2 of each expert's share as a multiple of an even one, (routers, experts), NaN where there is none."""
    heat = np.full((len(routers), max(router.num_experts for router in routers)), np.nan)
    for row, router in enumerate(routers):
        with np.errstate(divide="ignore"):  # never used, or of a negative weight: -inf
            heat[row, : router.num_experts] = np.log2(np.maximum(router.usage, 0) * router.num_experts)
    return heat


def _panel(axes: Axes, routers: Sequence[RouterStatistics], found: dict[str, Place], *, title: str) -> AxesImage | None:
    """Draws the routers of one level and projection, one row each; dead experts are crossed."""
    if not routers:
        axes.set_axis_off()
        return None
    axes.set_title(title, fontsize=8, loc="left")
    layers = ["-" if (layer := found[router.module].layer) is None else str(layer) for router in routers]
    heat = np.clip(heat_of(routers), min(TICKS), max(TICKS))  # an infinite one would be left blank
    image = axes.imshow(heat, cmap=COLOURS, vmin=min(TICKS), vmax=max(TICKS), aspect="auto")
    for row, router in enumerate(routers):
        for expert in router.dead:
            axes.text(expert, row, "x", ha="center", va="center", fontsize=6)
    step = 1 if len(layers) <= 12 else 5
    axes.set_yticks(range(0, len(layers), step), layers[::step], fontsize=6)
    experts = max(router.num_experts for router in routers)
    axes.set_xticks(range(0, experts, 1 if experts <= 12 else 4))
    axes.tick_params(labelsize=6, length=0)
    axes.spines[:].set_visible(False)
    return image


def _size(panels: Sequence[Sequence[Sequence[RouterStatistics]]]) -> tuple[float, float]:
    """Returns inches: a cell is as large in every panel."""
    wide = max(sum(max((r.num_experts for r in panel), default=1) * CELL + GAP for panel in row) for row in panels)
    high = sum(max(len(panel) for panel in row) * CELL + GAP for row in panels)
    return max(wide + MARGIN, 4.5), max(high + MARGIN, 2.5)
