"""Training from a stream: the same run wherever it is cut, however many workers and processes share it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smore_cli.data.stream import StreamRows
from smore_cli.errors import CheckpointError, SmoreError, UsageError
from smore_cli.recipe import load_recipe
from smore_cli.recipe.schema import Recipe
from smore_cli.training.batches import Batches
from smore_cli.training.loop import train
from smore_cli.training.setup import prepare

MakeRecipe = Callable[..., Path]
LORA = {"method": "lora", "target_modules": ["q_proj"], "rank": 2, "dropout": 0.1}
STREAM = {"streaming": True, "shuffle_buffer": 30}
TRAIN = {"max_steps": 8, "save_steps": 4, "per_device_batch_size": 2, "global_batch_size": 4, "logging_steps": 1}


def run(path: Path, **options: Any) -> dict[str, Any]:
    return train(load_recipe(path), path.read_text(), **options)


def adapter(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def numbers(folder: Path) -> list[dict[str, Any]]:
    times = ("seconds", "tokens_per_second")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


@pytest.mark.parametrize("packing", [False, True])
def test_half_a_run_and_its_resumption_with_workers_are_the_whole_run_bit_for_bit(
    make_recipe: MakeRecipe, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    monkeypatch.setattr("smore_cli.training.stream_plan.WINDOW", 50)
    sources = [
        {"path": str(questions), "format": "multiple_choice", "weight": 3},
        {"path": "quickstart", "format": "multiple_choice", "weight": 1},
    ]
    data = {**STREAM, "train": sources, "packing": packing}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    path = make_recipe(adapter=LORA, data=data, train=TRAIN, output_dir=str(whole))
    run(path)
    path = make_recipe(adapter=LORA, data=data, train={**TRAIN, "dataloader_num_workers": 2}, output_dir=str(parts))
    run(path)
    assert adapter(parts) == adapter(whole) and numbers(parts) == numbers(whole)
    unfinished = json.loads((parts / "run.json").read_text()) | {"finished": False}
    (parts / "run.json").write_text(json.dumps(unfinished))
    (parts / "adapter_model.safetensors").unlink()
    run(path, checkpoint=parts / "checkpoint-4")
    assert adapter(parts) == adapter(whole) and numbers(parts) == numbers(whole)
    assert json.loads((parts / "run.json").read_text())["data"]["train_rows"] is None
    assert "training rows from a stream" in (parts / "README.md").read_text()


def test_processes_share_a_stream_without_overlap_and_tokenise_their_own_rows_only(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(make_recipe(adapter=LORA, data=STREAM, train={**TRAIN, "global_batch_size": 8}))
    setup = prepare(recipe, lambda _: None)
    stream, plan = setup.batches.rows, setup.plan
    tokenised: list[int] = []
    inner = StreamRows._tokenise_together

    def counted(self: StreamRows, place: int, entries: dict[int, Any]) -> None:
        tokenised.extend(entries)
        inner(self, place, entries)

    monkeypatch.setattr(StreamRows, "_tokenise_together", counted)
    together = [batch.input_ids.tolist() for step in range(3) for batch in setup.batches.step(step)]
    shares = []
    for rank in range(2):
        mine = Batches(stream, plan, setup.batches.pad_token_id, setup.batches.mask_dtype, rank, 2)
        mine.restart()
        tokenised.clear()
        shares.append([[batch.input_ids.tolist() for batch in mine.step(step)] for step in range(3)])
        assert [number // 2 % 2 for number in tokenised] == [rank] * 12  # passes of two rows are dealt out in turn
    assert [
        batch for steps in zip(*shares, strict=True) for pair in zip(*steps, strict=True) for batch in pair
    ] == together


def test_a_bad_row_met_in_training_is_named_after_a_checkpoint_from_which_the_run_goes_on(
    make_recipe: MakeRecipe, questions: Path, tmp_path: Path
) -> None:
    lines = questions.read_text().splitlines()
    path, good = tmp_path / "rows.jsonl", lines[70]
    lines[70] = '{"question": "Which'
    path.write_text("\n".join(lines) + "\n")
    source = {"path": str(path), "format": "multiple_choice"}
    data = {**STREAM, "shuffle_buffer": 1, "train": [source]}
    recipe = make_recipe(adapter=LORA, data=data, train={**TRAIN, "max_steps": 19, "dataloader_num_workers": 1})
    with pytest.raises(
        SmoreError, match=r"rows.jsonl:71:\d+: not valid JSON.*saved .*checkpoint-17 after step 17"
    ) as caught:
        run(recipe)
    assert "--resume" in caught.value.hint and caught.value.exit_code == 1
    lines[70] = good
    path.write_text("\n".join(lines) + "\n")
    resumed = run(recipe, resume=True)
    assert (resumed["resumed_from"], resumed["result"]["steps"]) == (17, 19)
    undisturbed = make_recipe(adapter=LORA, data=data, train={**TRAIN, "max_steps": 19}, output_dir=str(tmp_path / "b"))
    run(undisturbed)
    assert adapter(tmp_path / "run") == adapter(tmp_path / "b")


def test_a_stream_whose_rows_are_not_those_it_gave_is_not_resumed(
    make_recipe: MakeRecipe, questions: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(questions.read_text())
    source = {"path": str(path), "format": "multiple_choice"}
    data = {**STREAM, "shuffle_buffer": 1, "train": [source]}
    recipe = make_recipe(adapter=LORA, data=data, train={**TRAIN, "max_steps": 20, "save_steps": 18})
    run(recipe)
    (tmp_path / "run" / "run.json").write_text(
        json.dumps(json.loads((tmp_path / "run" / "run.json").read_text()) | {"finished": False})
    )
    path.write_text("".join(sorted(questions.read_text().splitlines(keepends=True)[:100], reverse=True)))
    with pytest.raises(UsageError, match="the training rows are not those"):
        run(recipe, resume=True)
    # The rows that are looked at when it starts are the same here; one that was drawn later is not.
    lines = questions.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:70], lines[0], *lines[71:]]))
    with pytest.raises((CheckpointError, UsageError), match="the training rows are not those"):
        run(recipe, checkpoint=tmp_path / "run" / "checkpoint-18")


def test_loramoe_trains_from_streams_with_declared_groups(
    make_recipe: MakeRecipe, questions: Path, recipe: Callable[..., Recipe]
) -> None:
    adapter_config = {"method": "loramoe", "target_modules": ["up_proj"], "rank": 2, "num_experts": 2, "num_groups": 2}
    sources = [
        {"path": str(questions), "format": "multiple_choice", "weight": 1, "group": "sums"},
        {"path": "quickstart", "format": "multiple_choice", "weight": 1, "group": "other"},
    ]
    loaded = recipe(adapter=adapter_config, data={**STREAM, "train": sources}, train={**TRAIN, "max_steps": 2})
    setup = prepare(loaded, lambda _: None)
    groups = [batch.groups for step in range(2) for batch in setup.batches.step(step)]
    assert {int(group) for batch in groups if batch is not None for group in batch} == {0, 1}


def test_trex_fits_its_prior_to_the_first_rows_of_a_stream(make_recipe: MakeRecipe) -> None:
    trex = {"method": "trex", "target_modules": ["q_proj"], "num_down": 2, "num_up": 2, "kmeans_max_prompts": 80}
    lines: list[str] = []
    path = make_recipe(adapter=trex, data=STREAM, train={**TRAIN, "max_steps": 2})
    setup = prepare(load_recipe(path), lines.append)
    assert len(setup.train_rows) == 80 and "80 rows looked at" in lines[0]
