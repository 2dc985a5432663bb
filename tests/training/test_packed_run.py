"""A run whose sources are mixed by weight and whose rows are packed: said beforehand, kept in run.json, resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smore_cli.errors import RecipeError
from smore_cli.recipe import load_recipe
from smore_cli.recipe.schema import Recipe
from smore_cli.training.loop import train
from smore_cli.training.setup import prepare

MakeRecipe = Callable[..., Path]
LORA = {"method": "lora", "rank": 2, "dropout": 0.1}
STEPS = {"per_device_batch_size": 1, "global_batch_size": 2, "save_steps": 3, "gradient_census": False}


def sources(path: Path, *weights: float | None) -> list[dict[str, Any]]:
    return [
        {"path": str(path), "format": "multiple_choice"} | ({} if weight is None else {"weight": weight})
        for weight in weights
    ]


def unfinished_copy(run: Path, copy: Path) -> None:
    """The run as it was when it had written its first checkpoint and was killed after that."""
    shutil.copytree(run, copy)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (copy / name).unlink(missing_ok=True)
    values = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(values | {"finished": False}))


def test_it_resumes_within_an_epoch_bit_for_bit(make_recipe: MakeRecipe, questions: Path, tmp_path: Path) -> None:
    data = {"train": sources(questions, 3.0, 1.0), "packing": True, "eval_fraction": 0.1}
    path = make_recipe(adapter=LORA, data=data, train=STEPS)
    values = train(load_recipe(path), path.read_text())
    assert values["data"]["layout"] == "packs"
    assert [source["draws_per_epoch"] for source in values["data"]["mixture"]] == [324, 108]
    assert values["data"]["padding"]["packs"]["share"] < values["data"]["padding"]["groups"]["share"] + 0.05
    copy = tmp_path / "copy"
    unfinished_copy(tmp_path / "run", copy)
    again = path.with_name("again.yaml")
    again.write_text(path.read_text().replace(str(tmp_path / "run"), str(copy)))
    resumed = train(load_recipe(again), again.read_text(), checkpoint=copy / "checkpoint-3")
    assert resumed["resumed_from"] == 3
    names = ("adapter_model.safetensors",)
    assert [(copy / name).read_bytes() for name in names] == [(tmp_path / "run" / name).read_bytes() for name in names]
    assert resumed["result"]["eval_loss"] == values["result"]["eval_loss"]


def test_several_processes_deal_out_the_passes_of_one(recipe: Callable[..., Recipe], questions: Path) -> None:
    for train_values, data in (({}, {"packing": True}), ({"group_by_length": True}, {})):
        steps = {"per_device_batch_size": 2, "global_batch_size": 8, "max_steps": 2} | train_values
        found = recipe(adapter=LORA, data={"train": sources(questions, None), **data}, train=steps)
        setup = prepare(found, lambda _: None)
        whole = [batch.input_ids.tolist() for batch in setup.batches.step(1)]
        ranks = [type(setup.batches)(**vars(setup.batches) | {"process": rank, "processes": 2}) for rank in range(2)]
        dealt = [[batch.input_ids.tolist() for batch in rank.step(1)] for rank in ranks]
        assert len(whole) == 4 and [dealt[i % 2][i // 2] for i in range(4)] == whole
        assert any(line.startswith("padding") for line in setup.describe())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"packing": True}, "train": {"group_by_length": True}}, "both save padding: keep one"),
        ({"data": {"train": [1.0, None]}}, "'data.train.0' has a weight and 'data.train.1' has none"),
        ({"data": {"train": [None], "eval": [2.0]}}, "'data.eval.0.weight' is set, but every held-out row counts once"),
        ({"data": {"train": [0.0]}}, "must be greater than 0"),
    ],
)
def test_settings_that_cannot_work_are_one_line(
    make_recipe: MakeRecipe, questions: Path, sections: dict[str, Any], message: str
) -> None:
    data = {
        key: sources(questions, *value) if isinstance(value, list) else value for key, value in sections["data"].items()
    }
    with pytest.raises(RecipeError) as raised:
        load_recipe(make_recipe(**sections | {"data": data}))
    assert message in str(raised.value)
