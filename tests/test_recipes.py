"""Every ready recipe runs: two short steps on the real model, on its own data (ARC from the shared folder).

Those of backbones that are not here are checked, and the parameter count each names is compared with the shapes of
its backbone.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from smore_cli.comparing.sizes import match_sizes
from smore_cli.comparing.spec import read_comparison
from smore_cli.methods import available_methods
from smore_cli.nn.attach import find_targets, sites_of
from smore_cli.recipe import load_recipe
from smore_cli.training.loop import train
from tests.backbones import SHAPES, meta_model

ROOT = Path(__file__).parents[1] / "recipes"
RECIPES = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in sorted(ROOT.rglob("*.yaml"))}
COMPARISONS = {name: RECIPES.pop(name) for name in list(RECIPES) if name.startswith("compare/")}
BUNDLED = [name for name, path in RECIPES.items() if "name_or_path: smollm2-135m" in path.read_text()]
LARGE = [name for name in RECIPES if name not in BUNDLED]
SHORT = ["train.max_steps=2", "train.per_device_batch_size=2", "data.max_length=96", "eval.batch_size=8"]


@pytest.mark.usefixtures("smollm2")
@pytest.mark.parametrize("name", BUNDLED)
def test_a_ready_recipe_trains(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = RECIPES[name]
    overrides = [*SHORT, f"output_dir={tmp_path / 'run'}"]
    if path.stem.startswith("arc-easy"):
        rows = request.getfixturevalue("shared_data") / "arc_easy_train.jsonl"
        overrides.append(f"data.train=[{{path: {rows}, format: multiple_choice, split: 'train[:16]'}}]")
    if path.stem == "mixture":
        overrides += mixture_of_local_files(request.getfixturevalue("shared_data"))
    values = train(load_recipe(path, overrides), path.read_text())
    assert values["finished"]
    assert values["result"]["steps"] == 2


def mixture_of_local_files(folder: Path) -> list[str]:
    choices, few = "format: multiple_choice", "split: 'train[:16]'"
    answers = "format: prompt_completion, columns: {prompt: question, completion: answer}"
    train = (
        f"{{path: {folder / 'arc_easy_train.jsonl'}, {choices}, {few}, weight: 0.4}}",
        f"{{path: {folder / 'csqa_train.jsonl'}, {choices}, {few}, weight: 0.3}}",
        f"{{path: {folder / 'gsm8k_train.jsonl'}, {answers}, {few}, weight: 0.3}}",
    )
    held_out = f"{{path: {folder / 'arc_easy_test.jsonl'}, {choices}, {few}}}"
    return [f"data.train=[{', '.join(train)}]", f"data.eval=[{held_out}]", "data.max_length=256"]


@pytest.mark.usefixtures("smollm2")
@pytest.mark.parametrize("name", COMPARISONS)
def test_a_ready_comparison_has_methods_of_equal_size(name: str) -> None:
    baseline, *others = match_sizes(read_comparison(COMPARISONS[name]))
    assert others and all(abs(other.trainable / baseline.trainable - 1) <= 0.02 for other in others)


def test_every_method_has_a_recipe_of_its_own() -> None:
    methods = {name: load_recipe(path).adapter.method for name, path in RECIPES.items() if name.startswith("methods/")}
    assert {name.removeprefix("methods/") for name in methods} >= set(available_methods())
    assert all(name.removeprefix("methods/").startswith(method) for name, method in methods.items())


@pytest.mark.parametrize("name", LARGE)
def test_a_large_recipe_names_its_true_number_of_trainable_parameters(name: str) -> None:
    said = re.search(r"^# Trainable parameters: ([\d,]+)", RECIPES[name].read_text(), re.MULTILINE)
    assert said is not None
    recipe = load_recipe(RECIPES[name])
    model, adapter = meta_model(recipe.model.name_or_path), recipe.adapter
    sites = sites_of(model, find_targets(model, adapter.target_modules, adapter.sites))
    assert sum(adapter.num_parameters(site) for site in sites.values()) == int(said[1].replace(",", ""))


def test_the_papers_counts_are_among_them() -> None:
    """S'MoRE's, MoLA's and CoMoL's tables; counted in the released code: DynMoLE, MixLoRA, LoRA, DoRA, T-REX."""
    said = {name: int(re.findall(r"^# Trainable parameters: ([\d,]+)", path.read_text(), re.M)[0].replace(",", ""))
            for name, path in RECIPES.items() if name in LARGE}  # fmt: skip
    assert round(said["llama8b-tree"] / 1e9, 3) == round(said["llama8b-tree-qlora"] / 1e9, 3) == 0.957
    assert round(said["paper/smore-22-llama3-8b"] / 1e9, 3) == 0.480
    assert said["paper/mola-5555-llama2-7b"] == said["paper/mola-2468-llama2-7b"] == 105_635_840
    assert said["paper/mola-8888-llama2-7b"] == 169_017_344
    assert said["paper/mixlora-llama2-7b"] == 203_423_744
    assert said["paper/dynmole-llama2-7b"] == 212_484_096
    assert said["paper/lora-llama2-7b"] == 199_884_800
    assert said["paper/dora-llama2-7b"] == 201_244_672
    assert round(said["paper/trex-llama2-7b"] / 1e6, 2) == 51.87
    assert round(said["paper/comol-qwen3-8b"] / 1e6, 2) == 25.16


def test_the_shapes_of_the_large_backbones_are_theirs() -> None:
    """Llama-2-7B has 6,738,415,616 parameters, Llama-3-8B 8,030,261,248, Qwen3-8B 8,190,735,360."""
    totals = {name: sum(p.numel() for p in meta_model(name).parameters()) for name in SHAPES}
    assert totals["meta-llama/Llama-2-7b-hf"] == 6_738_415_616
    assert totals["Qwen/Qwen3-8B"] == 8_190_735_360
    assert totals["meta-llama/Meta-Llama-3-8B"] == totals["meta-llama/Llama-3.1-8B"] == 8_030_261_248


@pytest.mark.parametrize("suffix", ["", "-ranking"])
def test_compared_recipes_have_equal_trainable_parameters(suffix: str) -> None:
    """Within 1 %, over the linear maps of a SmolLM2-135M layer."""
    from smore_cli.methods import Site

    wide, narrow, hidden = 1536, 192, 576
    shapes = [(hidden, hidden)] * 2 + [(hidden, narrow)] * 2 + [(hidden, wide)] * 2 + [(wide, hidden)]
    sizes = []
    for method in ("lora", "smore"):
        adapter = load_recipe(RECIPES[f"arc-easy-{method}{suffix}"]).adapter
        sizes.append(sum(adapter.num_parameters(Site("x", d_in, d_out)) for d_in, d_out in shapes))
    assert abs(sizes[1] / sizes[0] - 1) < 0.01
