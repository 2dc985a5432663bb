"""`smore eval` of several runs on one backbone, and of one that was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from smore_cli.cli import main
from smore_cli.evaluation import subjects
from smore_cli.methods import MethodConfig
from smore_cli.methods.lora import LoRAConfig
from smore_cli.methods.smore import SMoREConfig
from smore_cli.models.adapter_files import save_adapter
from smore_cli.nn import attach
from smore_cli.recipe.schema import ModelConfig

TREE = SMoREConfig(rank=[2, 2], num_experts=[3, 3], router_dim=4, key_dim=4, target_modules="all-linear")
ROWS = [
    {
        "id": f"q{i}",
        "question": f"Which number comes after {i}?",
        "choices": ["ice", f"{i + 1}", "fire"],
        "label": i % 3,
    }
    for i in range(9)
]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMORE_DEBUG", "0")  # main() writes it: set here, it is put back after the test
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "piqa_dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def make_run(folder: Path, backbone: Path, config: MethodConfig, seed: int) -> Path:
    """A run as training leaves it: an adapter with a strong effect, and the recipe."""
    model: Any = AutoModelForCausalLM.from_pretrained(backbone)
    attach(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    save_adapter(model, config, folder, base=ModelConfig(name_or_path=str(backbone)))
    recipe = {
        "version": 1,
        "model": {"name_or_path": str(backbone)},
        "adapter": {"method": config.method},
        "data": {"train": [{"path": "quickstart", "format": "multiple_choice"}]},
        "output_dir": str(folder),
    }
    (folder / "resolved.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "run.json").write_text("{}")
    return folder


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["eval", *(str(argument) for argument in args)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_runs_on_one_backbone_share_it_and_score_as_they_do_alone(
    tmp_path: Path, data: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = make_run(tmp_path / "runs" / "lora", tiny_llama, LoRAConfig(rank=4, target_modules="all-linear"), 0)
    tree = make_run(tmp_path / "runs" / "tree", tiny_llama, TREE, 1)
    options = "--benchmark", "piqa", "--data-dir", data, "--base", "--batch-size", 4
    alone = []
    for folder in (lora, tree):
        assert run(folder, *options) == 0
        alone.append((folder / "eval" / "piqa.json").read_bytes())
        (folder / "eval" / "piqa.json").unlink()
    capsys.readouterr()
    opened = []
    original = subjects.Run.load
    monkeypatch.setattr(subjects.Run, "load", lambda self, *a, **k: opened.append(self) or original(self, *a, **k))
    assert run(lora, tree, *options, "--out", tmp_path / "both.json") == 0
    assert len(opened) == 1  # the backbone was loaded once
    assert [(folder / "eval" / "piqa.json").read_bytes() for folder in (lora, tree)] == alone
    assert alone[0] != alone[1]
    assert json.loads((tmp_path / "both.json").read_text()) == {"evaluations": [json.loads(each) for each in alone]}
    header, *rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert header == ["task", "n", "backbone", "lora", "tree"]
    first = json.loads(alone[0])["tasks"][0]
    (line,) = [row for row in rows if row[0] == "piqa"]
    assert line[1:3] == ["9", f"{first['base']['acc']:.3f}"]


def test_runs_on_other_backbones_are_refused_in_one_line(
    tmp_path: Path, data: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = LoRAConfig(rank=4, target_modules="all-linear")
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(other)
    folders = [make_run(tmp_path / name, place, lora, 0) for name, place in (("a", tiny_llama), ("b", other))]
    assert run(*folders, "--benchmark", "piqa", "--data-dir", data) == 2
    (error, hint) = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith("error: one table has one backbone: ")
    assert f"b is on {other}" in error
    assert hint == "hint: evaluate them one by one"


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_gives_the_same_bytes(tmp_path: Path, tiny_llama: Path) -> None:
    options = ["--model", str(tiny_llama), "--benchmark", "quickstart", "--batch-size", "1", "--json"]
    command = [sys.executable, "-m", "smore_cli", "eval", *options, "--out", str(tmp_path / "x.json")]
    partial = tmp_path / "x.json.partial"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and (not partial.exists() or partial.stat().st_size < 4000):
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "x.json").exists()
    known = len(partial.read_text().splitlines())
    assert 10 < known < 380
    assert run(*options, "--out", tmp_path / "x.json") == 0
    assert not partial.exists()
    assert run(*options, "--out", tmp_path / "undisturbed.json") == 0
    assert (tmp_path / "x.json").read_bytes() == (tmp_path / "undisturbed.json").read_bytes()


@pytest.mark.parametrize("size", ["0", "many", "-1"])
def test_a_batch_size_is_a_number_or_auto(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", "m", "--benchmark", "quickstart", f"--batch-size={size}") == 2
    assert "neither auto nor a number" in capsys.readouterr().err
