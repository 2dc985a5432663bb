"""Matching sizes: within the tolerance for every method, counted on the real adapter, and what cannot be is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from smore_cli.comparing.sizes import Sized, match_sizes
from smore_cli.comparing.spec import read_comparison
from smore_cli.errors import RecipeError, UsageError
from smore_cli.methods import available_methods
from smore_cli.nn import attach

if TYPE_CHECKING:
    from pathlib import Path


SETTINGS: dict[str, dict[str, Any]] = {
    "comol": {"num_experts": 4, "rank": 4},
    "dynmole": {"num_experts": 4, "rank": 4},
    "goat": {"num_experts": 4, "rank": 8},
    "hydralora": {"num_experts": 4, "rank": 4},
    "lora": {"rank": 8, "use_dora": True},
    "loramoe": {"num_experts": 4, "num_groups": 2, "rank": 4},
    "mixlora": {"target_modules": ["mlp"], "num_experts": 4, "rank": 4},
    "mode": {"num_experts": 4, "rank": 4},
    "moelora": {"num_experts": 4, "rank": 4},
    "mola": {"num_experts": [2, 4], "rank": 4},
    "mor": {"num_experts": 4, "rank": 4},
    "omoe": {"num_experts": 2, "rank": 8},
    "smore": {"rank": [4, 4], "num_experts": [4, 4], "fanout": [2, 2], "router_dim": 4, "key_dim": 4},
    "trex": {"num_down": 4, "num_up": 8},
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A backbone with maps wide enough that ranks are small steps; its weights are never made."""
    folder = tmp_path_factory.mktemp("shapes")
    config: LlamaConfig = AutoConfig.from_pretrained(tiny_llama)
    config.hidden_size, config.intermediate_size = 64, 192
    config.save_pretrained(folder)
    return folder


def _comparison(folder: Path, backbone: Path, methods: dict[str, Any], **compare: Any) -> Path:
    path = folder / "compare.yaml"
    values = {
        "version": 1,
        "model": {"name_or_path": str(backbone)},
        "adapter": {"method": "lora", "rank": 24, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
        "data": {"train": [{"path": "quickstart", "format": "multiple_choice"}]},
        "compare": {"methods": methods, **compare},
        "output_dir": str(folder / "out"),
    }
    path.write_text(yaml.safe_dump(values))
    return path


def _sized(folder: Path, backbone: Path, methods: dict[str, Any], **compare: Any) -> list[Sized]:
    return match_sizes(read_comparison(_comparison(folder, backbone, methods, **compare)))


@pytest.mark.parametrize("method", available_methods())
def test_every_method_gets_the_baselines_size_and_the_adapter_has_it(shapes: Path, tmp_path: Path, method: str) -> None:
    entry = {"method": method, **SETTINGS[method]}
    if method == "smore":
        entry["vary"] = ["rank", "key_dim"]
    elif method != "trex":
        entry["vary"] = ["rank", *(["num_experts"] if "num_experts" in entry else [])]
    baseline, sized = _sized(tmp_path, shapes, {"one": entry}, tolerance=0.03)
    assert abs(sized.trainable / baseline.trainable - 1) <= 0.03
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(shapes))
    attach(model, sized.adapter)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sized.trainable


def test_another_rank_keeps_the_scale(shapes: Path, tmp_path: Path) -> None:
    methods = {"mola": {"method": "mola", "num_experts": 2, "rank": 4, "alpha": 8.0}}
    _, sized = _sized(tmp_path, shapes, methods, tolerance=0.1)
    rank = sized.changed["rank"]
    assert rank > 4 and sized.changed["alpha"] == 2.0 * rank == sized.adapter.model_dump()["alpha"]


def test_active_parameters_can_be_matched_instead(shapes: Path, tmp_path: Path) -> None:
    methods = {"mola": {"method": "mola", "num_experts": 8, "rank": 4}}
    baseline, sized = _sized(tmp_path, shapes, methods, match="active", tolerance=0.1)
    assert abs(sized.active / baseline.active - 1) <= 0.1 and sized.trainable > 2 * baseline.trainable
    *_, given = _sized(tmp_path, shapes, methods, match="none")
    assert given.changed == {} and given.adapter.rank == 4  # type: ignore[attr-defined]


def test_a_size_that_cannot_be_met_is_refused_with_what_comes_nearest(shapes: Path, tmp_path: Path) -> None:
    methods = {"mola": {"method": "mola", "num_experts": 8, "rank": 4}}
    with pytest.raises(
        UsageError, match=r"compare\.methods\.mola: no rank gives .* within 0\.01 %; nearest: "
    ) as caught:
        _sized(tmp_path, shapes, methods, tolerance=1e-4)
    assert "vary" in caught.value.hint


def test_every_mistake_is_found_at_once_and_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "version: 1\n"
        "model: {name_or_path: smollm2-135m}\n"
        "adapter: {method: lora, rank: 0}\n"
        "data: {train: [{path: quickstart, format: multiple_choice}]}\n"
        "compare:\n"
        "  seed: 3\n"
        "  methods:\n"
        "    a: {method: mola, num_expert: 8}\n"
        "    b: {method: nola}\n"
        "    c: {method: smore, rank: [2], num_experts: [2], fanout: [2], vary: [gate]}\n"
        "    d: {method: lora, train: {learning_rate: -1}}\n"
        "    a/b: {method: lora}\n"
        "output_dir: x\n"
    )
    with pytest.raises(RecipeError) as caught:
        read_comparison(path)
    places = [problem.split(": ")[0].removeprefix(f"{path}:") for problem in caught.value.problems]
    assert places == ["3:31", "6:3", "8:23", "9:17", "10:72", "11:46", "12:10"]


def test_methods_may_be_named_beside_a_plain_recipe(shapes: Path, tmp_path: Path) -> None:
    path = _comparison(tmp_path, shapes, {})
    values = yaml.safe_load(path.read_text())
    del values["compare"]
    path.write_text(yaml.safe_dump(values))
    comparison = read_comparison(path, ["compare.seeds=2", "compare.tolerance=0.1"], ["mola", "mixlora", "trex"])
    baseline, *others = match_sizes(comparison)
    assert [other.contender.label for other in others] == ["mola", "mixlora", "trex"] and comparison.config.seeds == 2
    assert all(abs(other.trainable / baseline.trainable - 1) <= 0.1 for other in others)
    assert others[0].adapter.target_modules == baseline.adapter.target_modules
    with pytest.raises(UsageError, match="no ready recipe"):
        read_comparison(path, (), ["methodless"])
    with pytest.raises(UsageError, match="names its methods itself"):
        read_comparison(_comparison(tmp_path, shapes, {"mola": {"method": "mola", "num_experts": 2}}), (), ["mola"])


def test_a_file_without_the_section_says_so(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("version: 1\nmodel: {name_or_path: x}\nadapter: {method: lora}\noutput_dir: x\n")
    with pytest.raises(RecipeError, match="missing key 'compare'"):
        read_comparison(path)
