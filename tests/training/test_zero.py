"""Two processes under DeepSpeed's ZeRO train what one process trains, and leave the same files.

One pair of processes does most of it (`zero_processes.py`). The switch gate leaves experts without tokens, which then
have a gradient in one process and none in the other.
"""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from smore_cli.errors import UsageError
from smore_cli.recipe import load_recipe
from smore_cli.recipe.schema import Recipe
from smore_cli.training.loop import train
from smore_cli.training.parallel import ALONE, Processes
from smore_cli.training.replicas import share_out
from smore_cli.training.zero_settings import require_zero, zero_settings
from tests.training.test_parallel import ADAPTER, assert_same_training, environment, metrics, write_recipes

STAGES = (1, 2, 3)
TWO = Processes(0, 2)
Found = tuple[Path, list[dict[str, Any]]]
Settings = Callable[..., tuple[dict[str, Any], list[str]]]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs the package deepspeed"
)


def write_more_recipes(folder: Path) -> None:
    """Two more: one with a backbone in half precision that is recomputed, and one that diverges."""
    plain = yaml.safe_load((folder / "plain.yaml").read_text())
    half = {**plain, "model": {**plain["model"], "dtype": "bfloat16"}, "eval": {}}
    half["train"] = {**plain["train"], "gradient_checkpointing": True, "max_steps": 2}
    wild = {**plain, "train": {**plain["train"], "learning_rate": 1e30}, "eval": {}}
    (folder / "half.yaml").write_text(yaml.safe_dump(half))
    (folder / "wild.yaml").write_text(yaml.safe_dump(wild))


def run_alone(folder: Path, recipe: str, name: str) -> Path:
    path = folder / f"{recipe}.yaml"
    train(load_recipe(path, [f"output_dir={folder / name}"]), path.read_text())
    return folder / name


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Found:
    """The folder in which one process and then two have run, and what each of the two found."""
    folder = tmp_path_factory.mktemp("zero")
    write_recipes(folder, tiny_llama)
    write_more_recipes(folder)
    run_alone(folder, "plain", "alone")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "tests.training.zero_processes", str(folder)]
    processes = [
        subprocess.Popen(command, env=environment(rank, port), stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    said = [process.communicate(timeout=400)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    assert said[1] == "", "the second process has something to say"
    return folder, [json.loads((folder / f"zero-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@needs_deepspeed
class TestTwoProcesses:
    """One pair of processes, which takes about half a minute."""

    @pytest.mark.parametrize("name", [*(f"plain-{stage}" for stage in STAGES), "offloaded"])
    def test_they_train_what_one_trains_with_experts_that_only_one_of_them_reaches(
        self, pair: Found, name: str
    ) -> None:
        folder, found = pair
        assert [each[name] for each in found] == [None, None]
        assert_same_training(folder / "alone", folder / name)
        assert metrics(folder / name)[0]["aux_loss"] > 0
        stage = 2 if name == "offloaded" else int(name[-1])
        expected = {"count": 2, "sharded": True, "zero_stage": stage}
        assert json.loads((folder / name / "run.json").read_text())["processes"] == expected

    @pytest.mark.parametrize("stage", STAGES)
    def test_what_they_write_is_what_one_process_writes(self, pair: Found, stage: int) -> None:
        folder, _ = pair
        alone, together = (folder / name / "checkpoint-4" for name in ("alone", f"plain-{stage}"))
        one, two = (torch.load(each / "optimizer.pt", weights_only=True) for each in (alone, together))
        assert one["param_groups"] == two["param_groups"]
        assert one["state"].keys() == two["state"].keys()
        for number, state in one["state"].items():
            for name, value in state.items():
                torch.testing.assert_close(two["state"][number][name], value, rtol=1e-4, atol=1e-7)
        assert {file.name for file in together.iterdir()} - {file.name for file in alone.iterdir()} == {
            "rng_state_1.pth"
        }

    @pytest.mark.parametrize("stage", (2, 3))
    def test_they_resume_bit_for_bit_where_one_of_them_got_a_signal(self, pair: Found, stage: int) -> None:
        folder, found = pair
        whole, stopped = folder / f"noisy-{stage}", folder / f"stopped-{stage}"
        assert (whole / ADAPTER).read_bytes() == (stopped / ADAPTER).read_bytes()
        assert metrics(whole) == metrics(stopped)
        assert found[0][f"stopped-{stage}"] == found[1][f"stopped-{stage}"]
        assert found[0][f"stopped-{stage}"].startswith("Interrupted: stopped by SIGTERM after step")

    @pytest.mark.parametrize("stage", STAGES)
    def test_they_go_on_with_what_one_process_began(self, pair: Found, stage: int) -> None:
        folder, found = pair
        assert found[0][f"continued-{stage}"] is None
        values = json.loads((folder / f"continued-{stage}/run.json").read_text())
        assert "written by 1 processes and is resumed by 2" in values["resumed_inexactly"]
        assert_same_training(folder / "alone", folder / f"continued-{stage}")

    def test_a_quantised_backbone_is_trained_at_stage_2_and_refused_at_stage_3(self, pair: Found) -> None:
        folder, found = pair
        assert "ZeRO 3 does not shard a quantised backbone" in found[0]["quantised-3"]
        assert found[0]["quantised-3"] == found[1]["quantised-3"]
        assert found[0]["quantised-2"] is None
        assert_same_training(run_alone(folder, "quantised", "quantised-1"), folder / "quantised-2")

    def test_a_backbone_in_half_precision_is_recomputed_from_its_parts(self, pair: Found) -> None:
        folder, found = pair
        assert found[0]["half-3"] is None
        one, two = (load_file(each / ADAPTER) for each in (run_alone(folder, "half", "half-1"), folder / "half-3"))
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("stage", (2, 3))
    def test_a_run_that_diverges_is_ended_as_it_is_without_deepspeed(self, pair: Found, stage: int) -> None:
        _, found = pair
        assert "Diverged: the loss is" in found[0][f"wild-{stage}"]
        assert found[0][f"wild-{stage}"] == found[1][f"wild-{stage}"]


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path) -> Recipe:
    write_recipes(tmp_path, tiny_llama)
    return share_out(load_recipe(tmp_path / "plain.yaml"), TWO)


@pytest.fixture
def settings(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Reads a configuration file, given as a mapping or as text, for that recipe with some changes."""

    def read(values: dict[str, Any] | str, **changes: Any) -> tuple[dict[str, Any], list[str]]:
        path = tmp_path / "deepspeed.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
        return zero_settings(recipe.model_copy(update=changes), TWO, torch.device("cpu"))

    return read


def test_a_configuration_that_says_what_the_recipe_says_is_followed(settings: Settings) -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "none"}, "stage3_prefetch_bucket_size": "auto"}
    agreeing = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    found, idle = settings(
        {"zero_optimization": zero, "bf16": {"enabled": False}, "wall_clock_breakdown": True} | agreeing
    )
    assert found["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 2**23}
    assert found["gradient_clipping"] == 1.0
    assert idle == ["wall_clock_breakdown"]
    largest = {"stage": 2, "reduce_bucket_size": 500}
    assert settings({"zero_optimization": largest})[0]["zero_optimization"] == largest


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_batch_size": 16}, "train_batch_size is 16, which is not what train.global_batch_size of the recipe"),
        ({"train_micro_batch_size_per_gpu": 8}, "not what train.per_device_batch_size of the recipe gives"),
        ({"gradient_accumulation_steps": 4}, "not what train.global_batch_size of the recipe gives"),
        ({"gradient_clipping": 5.0}, "not what train.max_grad_norm of the recipe gives"),
        ({"bf16": {"enabled": True}}, "not what model.dtype of the recipe gives"),
        ({"fp16": {"enabled": True}}, "not what model.dtype of the recipe gives"),
        ({"optimizer": {"type": "Adam"}}, "section optimizer; the recipe names it in train.optim"),
        ({"scheduler": {"type": "WarmupLR"}}, "section scheduler; the recipe names it in train.lr_scheduler"),
        ({"zero_optimization": {"stage": 0}}, "stage 0 shares out nothing"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "nvme is not supported"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "leaves parameters where they are"),
        ({"zero_optimization": 3}, "cannot be read"),
        ("[]", "cannot be read"),
        ("{", "cannot be read"),
        ('{"train_batch_size": 8}', "cannot be read"),
    ],
)
def test_a_configuration_that_contradicts_the_recipe_is_refused_in_one_line(
    settings: Settings, values: dict[str, Any] | str, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        settings(values if isinstance(values, str) else {"zero_optimization": {"stage": 2}} | values)
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_stage_3_is_refused_where_a_prior_calls_parts_of_the_backbone(settings: Settings, recipe: Recipe) -> None:
    adapter = recipe.adapter.model_copy(update={"method": "trex"})
    assert settings({"zero_optimization": {"stage": 2}}, adapter=adapter)
    with pytest.raises(UsageError, match="ZeRO 3 does not shard method trex"):
        settings({"zero_optimization": {"stage": 3}}, adapter=adapter)


@needs_deepspeed
def test_a_setting_that_deepspeed_does_not_know_is_refused_before_anything_is_loaded(settings: Settings) -> None:
    from smore_cli.training.zero import require_valid

    found, _ = settings({"zero_optimization": {"stage": 2, "reduce_bucket": 5}})
    with pytest.raises(UsageError, match="DeepSpeed refuses zero_optimization: reduce_bucket: Extra inputs"):
        require_valid(found)


def test_one_process_another_optimiser_and_a_missing_package_are_refused(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smore_cli.training.zero_settings.find_spec", lambda _: object())
    with pytest.raises(UsageError, match="there is one process"):
        require_zero(recipe, ALONE)
    adafactor = recipe.model_copy(update={"train": recipe.train.model_copy(update={"optim": "adafactor"})})
    with pytest.raises(UsageError, match=r"train\.optim adafactor does not work"):
        require_zero(adafactor, TWO)
    monkeypatch.setattr("smore_cli.training.zero_settings.find_spec", lambda _: None)
    with pytest.raises(UsageError, match="DeepSpeed is asked for and is not installed"):
        require_zero(recipe, TWO)
