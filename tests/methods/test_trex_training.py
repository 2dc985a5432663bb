"""T-REX through the trainer, the evaluation and the inspection: one prompt has one prior wherever it is read."""

from __future__ import annotations

import json
import logging
import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from safetensors.torch import load_file

from smore_cli.data.batch import Row, collate, prompt_of
from smore_cli.errors import DataError
from smore_cli.evaluation.scoring import PrefixSharingLM
from smore_cli.models.runs import open_run
from smore_cli.nn import adapted_modules, current_context
from smore_cli.nn.prior_hooks import active_prior
from smore_cli.recipe import load_recipe
from smore_cli.routing import collect_routing
from smore_cli.training.dry_run import dry_run
from smore_cli.training.loop import train
from smore_cli.training.setup import prepare
from smore_cli.training.step import accumulate_gradients

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from smore_cli.recipe.schema import Recipe
    from smore_cli.training.setup import Setup

TREX: dict[str, Any] = {"method": "trex", "num_down": 2, "num_up": 3, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    monkeypatch.setenv("SMORE_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.ERROR, logger="lm_eval")
    return tmp_path / "cache"


def write_recipe(folder: Path, model: Path, *, questions: int = 40, name: str = "run", **train: Any) -> Path:
    data, dice = folder / "sums.jsonl", random.Random(1)
    rows = []
    for number in range(questions):
        a, b = dice.randrange(1, 60), dice.randrange(1, 60)
        story = "Anna has" if number % 3 else "There are, after a long and rainy day in the village,"
        choices = [f"{a + b} apples", f"{a + b + 1} apples", f"{abs(a - b)}"]
        rows.append({"question": f"{story} {a} and {b}. How many?", "choices": choices, "label": 0})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"learning_rate": 1e-2, "max_steps": 4, "per_device_batch_size": 4, "logging_steps": 1, "save_steps": 2}
    values = {
        "version": 1,
        "model": {"name_or_path": str(model)},
        "adapter": TREX,
        "data": {
            "train": [{"path": str(data), "format": "multiple_choice"}],
            "max_length": 128,
            "objective": "choice_ranking",
            "eval_fraction": 0.1,
        },
        "train": settings | train,
        "output_dir": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def read(path: Path) -> Recipe:
    return load_recipe(path)


def priors_seen(model: nn.Module) -> list[Tensor]:
    """Collects the prior that the first adapted module meets in every pass."""
    seen: list[Tensor] = []

    def look(module: nn.Module, _: object) -> None:
        if module.active is None:  # the bare backbone, which is asked what it does to its logits
            return
        context = current_context()
        assert context is not None and context.prior is not None
        seen.append(context.prior.clone())

    next(iter(adapted_modules(model).values())).register_forward_pre_hook(look)
    return seen


def step(setup: Setup, rows: list[Row]) -> None:
    batch = collate(rows, pad_token_id=int(setup.tokenizer.pad_token_id))
    accumulate_gradients(setup.model, [batch], setup.objective, device=setup.device, backward=torch.Tensor.backward)


def test_the_prior_is_fitted_before_the_first_step(tiny_llama: Path, tmp_path: Path) -> None:
    said: list[str] = []
    setup = prepare(read(write_recipe(tmp_path, tiny_llama)), said.append)
    prior = active_prior(setup.model)
    assert prior is not None and prior.centroids.shape == (6, 32)
    assert "embedding 36 prompts for the prior, a forward pass each" in said
    vectors = prior.embedder(setup.model, [prompt_of(row) for row in setup.train_rows])
    nearest = torch.cdist(vectors, prior.centroids).argmin(1)
    means = torch.stack([vectors[nearest == k].mean(0) for k in range(6)])
    torch.testing.assert_close(prior.centroids, means, rtol=1e-4, atol=1e-5)
    assert setup.parameter_counts()["trainable"] == sum(p.numel() for p in setup.model.parameters() if p.requires_grad)
    assert setup.model.training and all(p.requires_grad for n, p in setup.model.named_parameters() if ".adapters." in n)


def test_training_evaluation_and_inspection_give_a_prompt_the_same_prior(tiny_llama: Path, tmp_path: Path) -> None:
    setup = prepare(read(write_recipe(tmp_path, tiny_llama)), lambda _: None)
    rows, model, seen = setup.train_rows[:3], setup.model, priors_seen(setup.model)
    assert len({row.length for row in rows}) > 1 and all(len(row.branches) == 3 for row in rows)
    step(setup, rows)
    (training,) = seen
    prior = active_prior(model)
    assert prior is not None
    torch.testing.assert_close(training, prior.scores(model, [row.prompt for row in rows]))
    model.eval()
    seen.clear()
    collect_routing(model, rows, pad_token_id=2, batch_size=3, on_progress=lambda *_: None)
    order = sorted(range(3), key=lambda i: rows[i].length, reverse=True)
    torch.testing.assert_close(seen[0], training[order])
    text = [setup.tokenizer.decode(row.prompt) for row in rows]
    asked = [
        Instance("loglikelihood", {}, (prompt, setup.tokenizer.decode(branch)), i)
        for prompt, row in zip(text, rows, strict=True)
        for i, branch in enumerate(row.branches)
    ]
    scores = []
    for longest in (512, 0):  # sharing a row, and each choice in a row of its own
        seen.clear()
        lm = PrefixSharingLM(model, setup.tokenizer, batch_size=16)  # type: ignore[arg-type]
        lm._longest = longest
        scores.append(lm.loglikelihood(asked))
        assert len(seen) == 1 and len(seen[0]) == (3 if longest else 9)
        gap = torch.cdist(seen[0].double(), training.double())
        assert gap.amin(1).max() < 1e-6 and gap.amin(0).max() < 1e-6
    assert [value for value, _ in scores[0]] == pytest.approx([value for value, _ in scores[1]], abs=1e-4)


def test_a_row_without_a_prompt_has_what_comes_before_its_first_learned_token() -> None:
    chat = Row([], [[5, 6, 7, 8, 9]], [[False, False, True, False, True]])
    text = Row([], [[5, 6, 7]], [[True, False, True]])
    nothing = Row([], [[5, 6]], [[False, False]])
    answers = Row([3, 4], [[5], [6, 7]], [[True], [True, True]])
    assert [prompt_of(row) for row in (chat, text, nothing, answers)] == [[5, 6], [5, 6, 7], [5, 6], [3, 4]]
    batch = collate([chat, text, answers], pad_token_id=0)
    assert batch.prompt_mask is not None
    for row, ids, mask in zip((chat, text, answers), batch.input_ids, batch.prompt_mask, strict=True):
        assert ids[mask].tolist() == prompt_of(row)


def test_the_rows_a_run_sees_are_known_before_it_starts(tiny_llama: Path, tmp_path: Path) -> None:
    for steps, all_rows in ((2, False), (30, True)):
        setup = prepare(read(write_recipe(tmp_path, tiny_llama, max_steps=steps)), lambda _: None)
        packs = [pack for number in range(steps) for packs in setup.plan.passes(number) for pack in packs]
        seen = {row for pack in packs for row in pack}
        assert setup.plan.rows_used() == sorted(seen)
        assert (len(seen) == len(setup.train_rows)) is all_rows


def outcome(run: Path) -> tuple[bytes, list[dict[str, Any]]]:
    times = ("seconds", "tokens_per_second")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key not in times} for line in lines]
    return (run / "adapter_model.safetensors").read_bytes(), metrics


def test_a_resumed_run_ends_bit_for_bit_where_a_whole_one_does(tiny_llama: Path, tmp_path: Path, cache: Path) -> None:
    path = write_recipe(tmp_path, tiny_llama, global_batch_size=8, gradient_checkpointing=True)
    train(read(path), path.read_text())
    whole = tmp_path / "whole"
    (tmp_path / "run").rename(whole)
    shutil.copytree(whole, tmp_path / "run")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "run" / name).unlink()
    values = json.loads((whole / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(values | {"finished": False}))
    shutil.rmtree(cache)  # found again, from the same prompts
    train(read(path), path.read_text(), resume=True)
    assert outcome(tmp_path / "run") == outcome(whole)
    losses = [line["loss"] for line in outcome(whole)[1] if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]
    tensors = load_file(whole / "adapter_model.safetensors")
    assert tensors["prior.centroids"].shape == (6, 32)
    assert tensors["model.layers.0.mlp.down_proj.router.omega"].shape == (1,)


def test_a_trained_run_generates_by_itself(tiny_llama: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, tiny_llama, max_steps=2)
    train(read(path), path.read_text())
    model, tokenizer = open_run(tmp_path / "run").load(torch.device("cpu"))
    tokenizer.padding_side = "left"
    inputs = tokenizer(["Question: Anna has 3 and 4. How many?\nAnswer:", "Question: What?\nAnswer:"],
                       padding=True, return_tensors="pt")  # fmt: skip
    asked: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 2}
    together = model.generate(**inputs, **asked)  # type: ignore[operator]
    for row, ids, mask in zip(together, inputs["input_ids"], inputs["attention_mask"], strict=True):
        alone = model.generate(ids[mask == 1][None], **asked)[0]  # type: ignore[operator]
        width = len(alone) - int(mask.sum())
        assert row[len(ids) : len(ids) + width].tolist() == alone[int(mask.sum()) :].tolist()


def test_a_dry_run_fits_the_prior_too(tiny_llama: Path, tmp_path: Path) -> None:
    assert any("first step: loss" in line for line in dry_run(read(write_recipe(tmp_path, tiny_llama))))
    assert not (tmp_path / "run").exists()


def test_too_little_data_for_the_clusters_is_said_before_anything_is_written(tiny_llama: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, tiny_llama, questions=5)
    with pytest.raises(DataError, match="6 clusters need as many different prompts"):
        train(read(path), path.read_text())
    assert not (tmp_path / "run").exists()
