"""Two processes train what one trains: same losses, same balance losses, same adapter, and nobody waits for the dead.

One pair of processes does most of it (`two_processes.py`), because each takes seconds to import its libraries. Sums are
added up in another order by two processes: numbers agree to `TOLERANCE`, and runs of the same number bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from smore_cli.recipe import load_recipe
from smore_cli.training.loop import train
from tests.training.conftest import SMORE

TOLERANCE = 1e-5
"""Of losses after six steps in float32; measured: 1e-6."""
WEIGHTS = 2e-5
"""Of weights; measured: 1.1e-5 in one of tiny gradients, by whose size AdamW divides, 1.3e-6 in the others."""
TIMES = ("seconds", "tokens_per_second")
ADAPTER = "adapter_model.safetensors"


def write_recipes(folder: Path, model: Path) -> None:
    dice = random.Random(3)
    lines = []
    for number in range(21):
        a, b = dice.randrange(1, 60), dice.randrange(1, 60)
        story = "Anna has" if number % 3 else "There are, after a long and rainy day in the village,"
        row = {"question": f"{story} {a} and {b}. How many?", "choices": [f"{a + b} apples", f"{a}"], "label": 0}
        lines.append(json.dumps(row) + "\n")
    (folder / "sums.jsonl").write_text("".join(lines))
    plain: dict[str, Any] = {
        "version": 1,
        "model": {"name_or_path": str(model)},
        "adapter": {**SMORE, "gate": "switch"},
        # 17 rows for training: steps of 8, 8 and 1, so that the second process has nothing to do in every third.
        "data": {
            "train": [{"path": str(folder / "sums.jsonl"), "format": "multiple_choice"}],
            "max_length": 96,
            "eval_fraction": 0.2,
        },
        "train": {
            "learning_rate": 1e-2, "max_steps": 6, "logging_steps": 1, "save_steps": 2,
            "per_device_batch_size": 2, "global_batch_size": 8,
        },
        "eval": {"batch_size": 3, "steps": 3},
        "output_dir": str(folder / "nowhere"),
    }  # fmt: skip
    noisy = {**plain, "adapter": {**SMORE, "gate": "noisy_topk"}, "eval": {}}
    train = plain["train"]
    recipes = {
        "plain": plain,
        "noisy": noisy,
        "uneven": {**plain, "train": {**train, "global_batch_size": 6}},
        "default": {**plain, "train": {**train, "global_batch_size": None, "max_steps": 1}, "eval": {}},
        "quantised": {**plain, "quantization": {}},
        "streamed": {
            **plain,
            "adapter": {"method": "lora", "rank": 2, "dropout": 0.0},
            "data": {"train": plain["data"]["train"], "max_length": 96, "streaming": True, "shuffle_buffer": 8},
            "eval": {},
        },
    }
    for name, values in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))


def environment(rank: int, port: int) -> dict[str, str]:
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return os.environ | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in values.items()}


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The folder in which two processes have run, and what each found."""
    folder = tmp_path_factory.mktemp("pair")
    write_recipes(folder, tiny_llama)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "tests.training.two_processes", str(folder)]
    processes = [
        subprocess.Popen(command, env=environment(rank, port), stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    said = [process.communicate(timeout=400)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    assert said[1] == "", "the second process has something to say"
    return folder, [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def flat(values: Any) -> list[Any]:
    if isinstance(values, dict):
        return [item for key in sorted(values) for item in (key, *flat(values[key]))]
    return [item for value in values for item in flat(value)] if isinstance(values, list) else [values]


def assert_same_training(one: Path, two: Path) -> None:
    a, b = load_file(one / ADAPTER), load_file(two / ADAPTER)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=WEIGHTS, atol=WEIGHTS, msg=lambda m, n=name: f"{n}: {m}")
    lines = list(zip(metrics(one), metrics(two), strict=True))
    assert lines
    for alone, together in lines:
        for x, y in zip(flat(alone), flat(together), strict=True):
            assert x == (pytest.approx(y, rel=TOLERANCE, abs=TOLERANCE) if isinstance(x, float) else y), (
                alone,
                together,
            )


@pytest.fixture(scope="session")
def alone(pair: tuple[Path, list[dict[str, Any]]]) -> Path:
    """The folder of the same recipe, run by this one process."""
    folder, _ = pair
    path = folder / "plain.yaml"
    train(load_recipe(path, [f"output_dir={folder / 'plain-1'}"]), path.read_text())
    return folder / "plain-1"


@pytest.mark.slow
class TestTwoProcesses:
    """One pair of processes, which takes about half a minute."""

    def test_they_train_what_one_trains_with_a_balance_loss_and_a_short_last_step(self, pair: Any, alone: Path) -> None:
        folder, found = pair
        assert [each["plain"] for each in found] == [None, None]
        assert_same_training(alone, folder / "plain-2")
        assert metrics(alone)[0]["aux_loss"] > 0
        assert any("eval_loss" in line for line in metrics(alone))

    def test_sharded_by_fsdp2_they_train_what_one_trains(self, pair: Any, alone: Path) -> None:
        folder, found = pair
        assert found[0]["sharded"] is None
        assert_same_training(alone, folder / "sharded-2")
        assert json.loads((folder / "sharded-2/run.json").read_text())["processes"] == {"count": 2, "sharded": True}

    def test_of_a_stream_each_row_is_trained_on_by_one_of_them(self, pair: Any) -> None:
        folder, found = pair
        assert found[0]["streamed"] is None
        path = folder / "streamed.yaml"
        train(load_recipe(path, [f"output_dir={folder / 'streamed-1'}"]), path.read_text())
        assert_same_training(folder / "streamed-1", folder / "streamed-2")

    def test_they_resume_bit_for_bit_where_one_of_them_got_a_signal(self, pair: Any) -> None:
        folder, found = pair
        for whole, stopped in (("noisy-2", "noisy-stopped-2"), ("sharded-2", "sharded-stopped-2")):
            assert (folder / whole / ADAPTER).read_bytes() == (folder / stopped / ADAPTER).read_bytes()
            assert metrics(folder / whole) == metrics(folder / stopped)
        for key in ("stopped", "sharded_stopped"):
            assert found[0][key] == found[1][key]  # after the same step, and with the same checkpoint
            assert found[0][key].startswith("Interrupted: stopped by SIGTERM after step")

    def test_a_checkpoint_of_two_is_resumed_by_one_with_a_warning_in_run_json(self, pair: Any, alone: Path) -> None:
        folder, _ = pair
        run = folder / "plain-2-by-one"
        shutil.copytree(folder / "plain-2", run)
        shutil.rmtree(run / "checkpoint-6", ignore_errors=True)
        values = json.loads((run / "run.json").read_text()) | {"finished": False}
        (run / "run.json").write_text(json.dumps(values))
        path = folder / "plain.yaml"
        checkpoint = run / "checkpoint-4"
        assert {file.name for file in checkpoint.glob("rng_state*")} == {"rng_state.pth", "rng_state_1.pth"}
        result = train(load_recipe(path, [f"output_dir={run}"]), path.read_text(), checkpoint=checkpoint)
        assert "written by 2 processes and is resumed by 1" in result["resumed_inexactly"]
        assert_same_training(alone, run)  # nothing random is drawn in this one

    def test_what_cannot_be_done_is_refused_in_one_line(self, pair: Any) -> None:
        _, found = pair
        assert found[0]["uneven"] == (
            "RecipeError: train.global_batch_size 6 is not a multiple of per_device_batch_size 2 x 2 processes"
        )
        assert found[1]["uneven"] == found[0]["uneven"]
        assert "does not shard a quantised backbone" in found[0]["sharded_4bit"]

    def test_the_default_global_batch_is_one_pass_in_each_process(self, pair: Any) -> None:
        folder, found = pair
        assert found[0]["default_batch"] is None
        assert load_recipe(folder / "default-2/resolved.yaml").train.global_batch_size == 4

    def test_replicas_stay_equal_draw_noise_of_their_own_and_share_no_row(self, pair: Any) -> None:
        replicas = pair[1][0]["replicas"]
        assert replicas["same_adapter"]
        assert not replicas["same_noise"]
        (first, third), (second, nothing) = replicas["seen"]
        assert nothing == []
        assert len(third) == 1
        assert not {json.dumps(each) for each in first} & {json.dumps(each) for each in second}

    def test_sums_counts_and_errors_reach_every_process(self, pair: Any) -> None:
        for found in pair[1]:
            exchanges = found["exchanges"]
            assert exchanges["weight"] == [3.0] * 6
            assert exchanges["bias"] == [1.0, 1.0]  # one process had none
            assert exchanges["untouched"]  # none had any
            assert exchanges["sums"] == [1, 2**41 + 1]
            assert exchanges["most"] == 1
            assert exchanges["from_main"] == {"rank": 0}
            assert exchanges["caught"] == ["Interrupted", "stopped", "go on"]
        assert [found["exchanges"]["first"] for found in pair[1]] == [0, 1]


def start(folder: Path, *options: str, module: str = "smore_cli") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", module, "train", str(folder / "plain.yaml"), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_with_a_message(tmp_path: Path, tiny_llama: Path) -> None:
    write_recipes(tmp_path, tiny_llama)
    run = tmp_path / "run"
    process = start(tmp_path, "--num-processes", "2", "--output-dir", str(run), "--set", "train.max_steps=1000")
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    killed = time.monotonic()
    printed, _ = process.communicate(timeout=60)
    assert time.monotonic() - killed < 40
    assert process.returncode == 1, printed
    assert "process 1 of 2 was killed by SIGKILL; the run has ended" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_what_both_processes_find_is_told_once_and_keeps_its_exit_code(tmp_path: Path, tiny_llama: Path) -> None:
    write_recipes(tmp_path, tiny_llama)
    (tmp_path / "sums.jsonl").write_text('{"question": "no choices"}\n')
    process = start(tmp_path, "--num-processes", "2", "--output-dir", str(tmp_path / "run"))
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 2, printed
    assert printed.count("error:") == 1, printed
    assert not (tmp_path / "run").exists()


def test_num_processes_inside_a_launcher_are_refused(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from smore_cli.cli import app
    from smore_cli.errors import UsageError

    write_recipes(tmp_path, tiny_llama)
    monkeypatch.setenv("WORLD_SIZE", "1")
    result = CliRunner().invoke(app, ["train", str(tmp_path / "plain.yaml"), "--num-processes", "2"])
    assert isinstance(result.exception, UsageError)
    assert "a launcher has started the processes already" in result.exception.message
