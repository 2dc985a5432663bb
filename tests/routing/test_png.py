from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from smore_cli.routing.inputs import Inputs
from smore_cli.routing.png import draw_png, heat_of
from smore_cli.routing.session import RoutingProfile
from tests.routing.traces import router


def profile(*loads: list[float]) -> RoutingProfile:
    routers = [router(load, module=f"model.layers.{layer}.self_attn.q_proj") for layer, load in enumerate(loads)]
    return RoutingProfile(Path("run $x_1$"), "tiny", "smore", Inputs("given", [], [], 0), routers, {})


def test_colours_are_the_doublings_of_an_even_share() -> None:
    heat = heat_of([router([0.5] * 4), router([1.0, 0.25, 0.75, 0.0]), router([1.0, 0.5, 0.5])])
    assert heat[0].tolist() == [0] * 4
    assert heat[1].tolist() == pytest.approx([1, -1, np.log2(1.5), -np.inf])
    assert heat[2, :3].tolist() == pytest.approx([np.log2(1.5), np.log2(0.75), np.log2(0.75)])
    assert np.isnan(heat[2, 3])


def test_the_picture_shows_what_is_used_more_and_less() -> None:
    image = imread(io.BytesIO(draw_png(profile([1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]))))[..., :3]
    even = imread(io.BytesIO(draw_png(profile([0.5] * 4, [0.5] * 4))))[..., :3]
    assert image.shape == even.shape

    def pixels(picture: np.ndarray, colour: str) -> int:  # type: ignore[type-arg]
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        return int((np.abs(picture - rgb) < 0.02).all(-1).sum())

    assert pixels(image, "c2571a") > pixels(even, "c2571a") + 500  # the dead ones
    assert pixels(even, "efefed") > pixels(image, "efefed") + 1000
