"""A whole run in one process: what it writes, what it refuses, what it ignores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smore_cli.errors import CheckpointError, SmoreError, UsageError
from smore_cli.recipe import load_recipe
from smore_cli.training.checkpoint import checkpoints, newest_complete
from smore_cli.training.dry_run import dry_run
from smore_cli.training.loop import train

MakeRecipe = Callable[..., Path]


def run(path: Path, **options: Any) -> dict[str, Any]:
    return train(load_recipe(path), path.read_text(), **options)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_the_design_names(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = make_recipe(train={"save_steps": 2, "save_total_limit": 1}, data={"eval_fraction": 0.1}, eval={"steps": 3})
    values = run(path)
    folder = tmp_path / "run"
    written = {entry.name for entry in folder.iterdir()}
    assert written >= {
        "recipe.yaml", "resolved.yaml", "run.json", "metrics.jsonl", "README.md", "adapter_config.json",
        "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "checkpoint-6",
        "best", "latest",
    }  # fmt: skip
    assert [entry.name for entry in checkpoints(folder)] == ["checkpoint-6"]  # the best so far, and the newest
    assert {entry.name for entry in (folder / "checkpoint-6").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
        "trainer_state.json", "data_state.json", "complete.json",
    }  # fmt: skip
    assert json.loads((folder / "run.json").read_text()) == values
    assert values["finished"]
    lines = metrics(folder)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
    assert load_recipe(folder / "resolved.yaml") == load_recipe(path)
    assert f"{values['result']['eval_loss']:.4f}" in (folder / "README.md").read_text()


def test_it_learns(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run(make_recipe(train={"max_steps": 40, "warmup_ratio": 0.1}))
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < 0.6 * losses[0]


def test_choice_ranking_reports_held_out_accuracy(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    values = run(make_recipe(data={"objective": "choice_ranking", "eval_fraction": 0.1}, train={"max_steps": 3}))
    assert 0 <= values["result"]["eval_accuracy"] <= 1


def test_a_dry_run_writes_nothing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    lines = dry_run(load_recipe(make_recipe(train={"global_batch_size": 8})))
    assert any("first step: loss" in line for line in lines)
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_never_overwritten(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = make_recipe(train={"max_steps": 1})
    run(path)
    before = (tmp_path / "run" / "adapter_model.safetensors").stat().st_mtime_ns
    with pytest.raises(UsageError, match="already holds a run"):
        run(path)
    with pytest.raises(UsageError, match="is finished"):
        run(path, resume=True)
    assert (tmp_path / "run" / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_a_folder_with_other_files_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="is not empty"):
        run(make_recipe())
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_resuming_needs_a_run_and_the_same_recipe(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run to resume"):
        run(make_recipe(), resume=True)
    unfinished(make_recipe, tmp_path)
    with pytest.raises(UsageError, match=r"train.learning_rate: 0.01 -> 0.02 \(changes every step\)"):
        run(make_recipe(train={"save_steps": 2, "learning_rate": 0.02}), resume=True)
    run(make_recipe(train={"save_steps": 3, "logging_steps": 2}), resume=True)  # changes nothing that matters


def test_resuming_on_changed_data_is_refused(make_recipe: MakeRecipe, tmp_path: Path, questions: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_text(questions.read_text())
    data = {"train": [{"path": str(copy), "format": "multiple_choice"}]}
    unfinished(make_recipe, tmp_path, data=data)
    copy.write_text(questions.read_text().replace("apples", "pears"))
    with pytest.raises(UsageError, match="training rows are not those"):
        run(make_recipe(train={"save_steps": 2}, data=data), resume=True)


@pytest.mark.parametrize("damage", ["cut", "marker", "missing"])
def test_a_damaged_checkpoint_is_passed_over(make_recipe: MakeRecipe, tmp_path: Path, damage: str) -> None:
    folder = unfinished(make_recipe, tmp_path)
    newest = checkpoints(folder)[0]
    if damage == "cut":
        data = (newest / "optimizer.pt").read_bytes()
        (newest / "optimizer.pt").write_bytes(data[:-10])
    else:
        (newest / ("complete.json" if damage == "marker" else "scheduler.pt")).unlink()
    said: list[str] = []
    assert newest_complete(folder, said.append) == checkpoints(folder)[1]
    assert len(said) == 1
    assert newest.name in said[0]
    with pytest.raises(CheckpointError, match=newest.name):
        run(make_recipe(train={"save_steps": 2}), checkpoint=newest)
    run(make_recipe(train={"save_steps": 2}), resume=True)


def test_numbers_that_are_not_finite_push_out_no_checkpoint(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    settings = {"learning_rate": 1e30, "save_steps": 1, "logging_steps": 6, "save_total_limit": 1}
    with pytest.raises(SmoreError, match=r"^the (loss|norm of the gradient) is (nan|inf) at step [2-5]$"):
        run(make_recipe(train=settings | {"gradient_census": False}))
    (left,) = checkpoints(tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in load_file(left / "adapter_model.safetensors").values())


def test_accumulation_gives_the_adapter_of_one_pass(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = []
    for name, per_device in (("a", 8), ("b", 2)):
        train_section = {"max_steps": 3, "per_device_batch_size": per_device, "global_batch_size": 8}
        run(make_recipe(train=train_section, output_dir=str(tmp_path / name)))
        tensors.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    for name, tensor in tensors[0].items():
        # Adam divides by the gradient's size, so a rounding error can flip the sign of a step of size lr
        close = (tensor - tensors[1][name]).abs() < 1e-4
        assert close.float().mean() > 0.99, name


def unfinished(make_recipe: MakeRecipe, tmp_path: Path, **sections: Any) -> Path:
    """A run of 6 steps, as a kill after its last checkpoints would have left it."""
    run(make_recipe(train={"save_steps": 2}, **sections))
    folder = tmp_path / "run"
    values = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**values, "finished": False}))
    return folder


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"dtype": "bfloat16"}},
        {"quantization": {"bits": 4, "type": "nf4"}},
        {"quantization": {"bits": 4, "type": "fp4", "double_quant": False}},
        {"train": {"gradient_checkpointing": True, "global_batch_size": 8}},
        {"adapter": {"method": "lora", "rank": 4, "dropout": 0.1}},
        {"train": {"lr_scheduler": "constant", "weight_decay": 0.1, "max_grad_norm": 0.0}},
    ],
    ids=["bf16", "nf4", "fp4", "checkpointing", "dropout", "no-clipping"],
)
def test_every_setting_trains_and_loads_again(make_recipe: MakeRecipe, tmp_path: Path, sections: dict) -> None:
    """The saved run, opened anew, has the held-out loss that the training measured at its end."""
    import torch

    from smore_cli.data.batch import collate
    from smore_cli.data.build import build_rows, split_eval
    from smore_cli.models.forward import target_logprobs
    from smore_cli.models.runs import open_run

    path = make_recipe(data={"eval_fraction": 0.1}, **sections)
    result = run(path)["result"]
    model, tokenizer = open_run(tmp_path / "run").load()
    recipe = load_recipe(path)
    _, rows = split_eval(build_rows(recipe.data, tokenizer, recipe.data.train).rows, 0.1, recipe.seed)
    batch = collate(rows, pad_token_id=tokenizer.pad_token_id)
    with torch.inference_mode():
        loss = -float(target_logprobs(model.eval(), batch).mean())
    tolerance = 2e-2 if "model" in sections else 1e-4  # bfloat16 sums differ between batches
    assert loss == pytest.approx(result["eval_loss"], rel=tolerance)
