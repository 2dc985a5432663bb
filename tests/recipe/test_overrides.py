from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from smore_cli.errors import RecipeError
from smore_cli.recipe import load_recipe

Write = Callable[[str], Path]
Problems = Callable[..., list[str]]


def test_an_override_is_read_by_the_rules_of_recipes(write: Write, good: str) -> None:
    recipe = load_recipe(
        write(good),
        [
            "train.learning_rate=2e-4",
            "train.gradient_checkpointing=true",
            "adapter.target_modules=[q_proj, v_proj]",
            "model.revision='1.10'",
            "data.train.0.path=other=file.jsonl",
            "quantization={type: fp4}",
        ],
    )
    assert recipe.train.learning_rate == 2e-4
    assert recipe.train.gradient_checkpointing is True
    assert recipe.adapter.target_modules == ["q_proj", "v_proj"]
    assert recipe.model.revision == "1.10"
    assert recipe.data.train[0].path == "other=file.jsonl"
    assert recipe.quantization is not None
    assert recipe.quantization.type == "fp4"


def test_the_last_of_two_overrides_counts(write: Write, good: str) -> None:
    assert load_recipe(write(good), ["seed=1", "seed=2"]).seed == 2


def test_a_mistake_that_is_overridden_is_no_mistake(problems: Problems, good: str) -> None:
    text = good + "train: {learning_rate: fast, epochs: 1, max_steps: 2}\nseed: x\n"
    assert problems(text, ["train.learning_rate=1e-4", "train.epochs=null", "seed=3"]) == []
    assert problems(text, ["train={}", "seed=3"]) == []


def test_null_removes_a_key_and_its_default_returns(write: Write, good: str) -> None:
    text = good + "seed: 5\nquantization: {bits: 4}\n"
    recipe = load_recipe(write(text), ["seed=null", "quantization=null"])
    assert recipe.seed == 0
    assert recipe.quantization is None


def test_removing_what_is_not_there_changes_nothing(write: Write, good: str) -> None:
    recipe = load_recipe(write(good), ["quantization.bits=null", "train.epochs=null"])
    assert recipe == load_recipe(write(good))
    assert recipe.quantization is None


def test_an_unknown_key_can_be_removed(problems: Problems, good: str) -> None:
    assert problems(good + "base_model: x\n", ["base_model=null"]) == []


def test_after_an_entry_is_removed_the_others_keep_their_places(problems: Problems, good: str) -> None:
    sources = (
        "data:\n  train:\n  - {path: a, format: chat}\n  - {path: b, format: chatt}\n  - {path: 3, format: chat}\n"
    )
    text = good.replace("data: {train: [{path: rows.jsonl, format: chat}]}\n", sources)
    assert [line.split(":")[0] for line in problems(text, ["data.train.0=null"])] == ["7", "8"]
    assert [line.split(":")[0] for line in problems(text, ["data.train.1=null"])] == ["8"]
    assert problems(text, ["data.train.1=null", "data.train.1.path=c"]) == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rat=1", "unknown key 'learning_rat' in train: did you mean 'learning_rate'?"),
        ("trian.epochs=1", "unknown key 'trian' at the top level: did you mean 'train'?"),
        ("lora_r=8", "unknown key 'lora_r' at the top level: that is axolotl's name, here it is 'adapter.rank'"),
        ("train.learning_rate=fast", "'train.learning_rate' must be a number, got the string 'fast'"),
        ("data.train.0.format=shargpt", None),
        ("data.train.1.format=chat", "'data.train' is a list with the indices 0 to 0, not '1'"),
        ("data.train.first.format=chat", "'data.train' is a list with the indices 0 to 0, not 'first'"),
        ("version.x=1", "'version' is a value, not a section, so 'x' cannot be set in it"),
        ("train.epochs", "an override is written path=value, as in train.learning_rate=2e-4"),
        ("=1", "an override is written path=value, as in train.learning_rate=2e-4"),
        ("train..epochs=1", "an override is written path=value, as in train.learning_rate=2e-4"),
        ("train.epochs=", "there is no value (null removes the key)"),
        ("train={epochs: 1, epochs: 2}", "duplicate key 'epochs', first set on line 1"),
        ("model.name_or_path=null", "missing key 'name_or_path' in model"),
        ("model=null", "missing key 'model' at the top level"),
        ("model={}", "missing key 'name_or_path' in model"),
        ("train.epoks=null", "unknown key 'epoks' in train: did you mean 'epochs'?"),
        (
            "eval.x.y=null",
            "unknown key 'x' in eval: there are steps, batch_size, metric_for_best_model, greater_is_better, "
            "early_stopping_patience, early_stopping_threshold, benchmarks, benchmark_data_dir, benchmark_limit, "
            "load_best_model_at_end",
        ),
        ("adapter.method=smoore", "unknown method 'smoore': did you mean 'smore'?"),
        ("output_dir=*x", "*x refers to an anchor &x that is not defined above it"),
    ],
)
def test_a_mistake_in_an_override_points_at_the_flag(
    problems: Problems, good: str, override: str, expected: str | None
) -> None:
    found = problems(good, [override])
    if expected is None:
        assert len(found) == 1
        assert found[0].startswith(f"--set {override}: 'data.train.0.format' must be one of ")
    else:
        assert found == [f"--set {override}: {expected}"]


def test_a_contradiction_points_at_the_override_that_makes_it(problems: Problems, good: str) -> None:
    assert problems(good + "train: {max_steps: 5}\n", ["train.epochs=1"]) == [
        "--set train.epochs=1: 'train.epochs' and 'train.max_steps' are both set: keep one"
    ]


def test_problems_of_overrides_come_after_those_of_the_file(write: Write, good: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(good + "sed: 1\n"), ["train.epochs=x", "foo"])
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "recipe.yaml",
        "--set foo",
        "--set train.epochs=x",
    ]
