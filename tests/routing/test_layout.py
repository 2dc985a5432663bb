from __future__ import annotations

import pytest

from smore_cli.errors import UsageError
from smore_cli.routing.layout import choose_level, choose_modules, parse_layers, places
from tests.routing.traces import router

LLAMA = [f"model.layers.{layer}.{name}" for layer in (0, 1, 10) for name in ("self_attn.q_proj", "mlp.up_proj")]


def shown(*paths: str) -> list[str]:
    return [str(place) for place in places(paths).values()]


def test_a_place_is_a_layer_and_a_short_projection() -> None:
    assert shown(*LLAMA) == ["0.q", "0.up", "1.q", "1.up", "10.q", "10.up"]


def test_projections_of_one_name_keep_what_tells_them_apart() -> None:
    assert shown("h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.c_fc") == ["0.attn.c", "0.mlp.c", "0.c_fc"]
    assert shown("l.0.q_proj", "l.0.q") == ["0.q_proj", "0.q"]
    assert shown("l.0.experts.0.up_proj", "l.0.experts.1.up_proj") == ["0.0.up", "0.1.up"]


def test_maps_outside_of_layers_and_several_stacks_have_places_too() -> None:
    assert shown("model.project_in", "model.layers.0.fc1") == ["project_in", "0.fc1"]
    assert shown("proj", "l.0.attn.proj") == ["proj", "0.attn.proj"]
    assert shown("encoder.0.q_proj", "decoder.0.q_proj") == ["0.encoder.q", "0.decoder.q"]


@pytest.mark.parametrize(("text", "layers"), [("3", {3}), ("0-2", {0, 1, 2}), ("0-1, 29", {0, 1, 29})])
def test_layers_are_numbers_and_ranges(text: str, layers: set[int]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "5-3", "1,", "-1", "1-2-3"])
def test_what_names_no_layers_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="names no layers"):
        parse_layers(text)


def test_modules_are_chosen_by_layer() -> None:
    assert choose_modules(LLAMA, layers={1, 10}, name=None) == set(LLAMA[2:])
    assert choose_modules(LLAMA, layers=None, name=None) == set(LLAMA)
    with pytest.raises(UsageError, match=r"no router in layer 2-3$") as caught:
        choose_modules(LLAMA, layers={1, 2, 3}, name=None)
    assert caught.value.hint == "there are: 0-1, 10"


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj", "layers.1.self_attn.q_proj", "1.q"])
def test_one_module_is_chosen_by_its_path_its_end_or_its_place(name: str) -> None:
    assert choose_modules(LLAMA, layers=None, name=name) == {"model.layers.1.self_attn.q_proj"}


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("q_proj", "'q_proj' fits 3 linear maps", "name one, as in 0.q or model.layers.0.self_attn.q_proj"),
        ("1.qq", "no router at '1.qq'", "did you mean 1.q?"),
        ("zzz", "no router at 'zzz'", "name one, as in 0.q"),
    ],
)
def test_a_name_that_fits_none_or_several_is_refused(name: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        choose_modules(LLAMA, layers=None, name=name)
    assert caught.value.hint == hint


def test_a_level_is_chosen_or_refused() -> None:
    routers = [router([1, 1], level=1), router([1, 1], level=0)]
    assert choose_level(routers, None) == routers
    assert choose_level(routers, 0) == routers[1:]
    with pytest.raises(UsageError, match="no level 2"):
        choose_level(routers, 2)
