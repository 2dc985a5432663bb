"""`smore compare` from its file to its page, killed in between and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from smore_cli.comparing.summary import Summary

if TYPE_CHECKING:
    from pathlib import Path

SMORE = [sys.executable, "-m", "smore_cli"]


@pytest.fixture
def spec(tmp_path: Path, tiny_llama: Path) -> Path:
    (tmp_path / "piqa_dev.jsonl").write_text(
        "".join(
            json.dumps({"id": str(i), "question": f"After {i}?", "choices": ["ice", str(i + 1)], "label": i % 2}) + "\n"
            for i in range(6)
        )
    )
    (tmp_path / "general.jsonl").write_text(json.dumps({"text": "Metals conduct electricity and heat. " * 9}) + "\n")
    values: dict[str, Any] = {
        "version": 1,
        "model": {"name_or_path": str(tiny_llama)},
        "adapter": {"method": "lora", "rank": 12, "target_modules": ["gate_proj", "up_proj"]},
        "data": {
            "train": [{"path": "quickstart", "format": "multiple_choice"}],
            "eval": [{"path": "quickstart", "split": "test[:8]", "format": "multiple_choice"}],
            "max_length": 256,
        },
        "train": {"max_steps": 4, "per_device_batch_size": 2, "logging_steps": 1, "gradient_census": False},
        "eval": {"steps": 2},
        "compare": {
            "methods": {"mola": {"method": "mola", "num_experts": 2, "rank": 4}},
            "tolerance": 0.1,
            "seeds": 2,
            "benchmarks": ["piqa"],
            "data_dir": ".",
            "general_text": {"path": "general.jsonl", "format": "text"},
            "dividend_tokens": 400,
        },
        "output_dir": "compare",
    }
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def _run(spec: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SMORE, "compare", spec.name, *arguments], cwd=spec.parent, capture_output=True, text=True, check=False
    )


def test_the_plan_is_shown_and_nothing_is_written(spec: Path) -> None:
    done = _run(spec, "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].split()[:2] == ["lora", "4,608"] and lines[2].split()[0] == "mola"
    assert "5 runs: 2 methods, 2 seeds, completion; the backbone" in done.stdout
    assert not (spec.parent / "compare").exists()


def test_a_killed_comparison_goes_on_and_comes_to_the_numbers_of_its_runs(spec: Path) -> None:
    out = spec.parent / "compare"
    process = subprocess.Popen(
        [*SMORE, "compare", spec.name, "--jobs", "2"], cwd=spec.parent, start_new_session=True, stderr=subprocess.PIPE
    )
    while process.poll() is None and not list(out.glob("found/lora-*.json")):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("found/*.json")}
    assert "lora-completion-seed0.json" in kept
    done = _run(spec, "--json")
    assert done.returncode == 0, done.stderr
    assert all((out / "found" / name).stat().st_mtime_ns == before for name, before in kept.items())
    summary = json.loads(done.stdout)
    lora, mola = summary["rows"]["completion"]
    runs = {seed: json.loads((out / f"found/mola-completion-seed{seed}.json").read_text()) for seed in (0, 1)}
    right = [runs[seed]["tasks"]["piqa"]["acc"] for seed in (0, 1)]
    assert mola["scores"]["piqa"]["seeds"] == [sum(values) / 6 for values in right]
    assert lora["scores"]["piqa"]["above"] is None and mola["scores"]["piqa"]["above"]["low"] <= 0
    assert lora["step_ratio"] == lora["memory_ratio"] == 1 and lora["dividend"]["dividend"] == 0
    assert mola["dividend"]["fitted_tokens"] >= 400 and mola["perplexity"] > 1
    assert [tokens for tokens, _ in mola["curve"]] == [tokens for tokens, _ in lora["curve"]]  # the same rows
    assert set(summary) == set(Summary.__dataclass_fields__)
    written = {path.name for path in out.iterdir()}
    assert {"results.json", "results.md", "results.html", "runs", "found", "logs"} <= written
    assert json.loads((out / "results.json").read_text()) == summary
    page = (out / "results.html").read_text()
    assert "http" not in page and page.count("<svg") == 2
    again = _run(spec)
    assert "5 of 5 runs are done already" in again.stderr and "mola" in again.stdout
    other = _run(spec, "--set", "train.learning_rate=0.1")
    assert other.returncode == 2 and "was measured with other settings" in other.stderr


def test_what_fails_in_a_run_is_said_with_its_name(spec: Path) -> None:
    groups = "compare.methods.mola={method: loramoe, num_experts: 2, rank: 4, num_groups: 2}"
    done = _run(spec, "--set", groups, "--set", "compare.seeds=1", "--set", "compare.match=none")
    assert done.returncode == 1
    assert "mola-completion-seed0: " in done.stderr and "logs/mola-completion-seed0.log" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dividend_without_held_out_rows_is_refused_before_anything_runs(spec: Path) -> None:
    done = _run(spec, "--set", "data.eval=null", "--set", "eval.steps=null")
    assert done.returncode == 2 and "held-out rows, of which there are none" in done.stderr
    assert not (spec.parent / "compare").exists()


def test_every_method_goes_on_with_the_learning_rate_that_did_best(spec: Path) -> None:
    out = spec.parent / "compare"
    grid = ["--set", "compare.learning_rate_factors=[0.001, 30, 1e30]", "--set", "compare.benchmarks=[]"]
    plan = _run(spec, *grid, "--dry-run")
    assert "before them 6 trials of learning rates" in plan.stdout
    done = _run(spec, *grid, "--json", "--set", "compare.dividend_tokens=0")
    assert done.returncode == 0, done.stderr
    for row in json.loads(done.stdout)["rows"]["completion"]:
        (low, slow), (high, fast), (_, diverged) = row["tried"]
        assert low == pytest.approx(2e-7) and high == pytest.approx(6e-3) and diverged is None
        assert fast < slow and row["learning_rate"] == high
        trial = json.loads((out / f"found/{row['label']}-completion-seed0-lr30.json").read_text())
        first = json.loads((out / f"found/{row['label']}-completion-seed0.json").read_text())
        assert trial["curve"][-1][1] == fast and trial["curve"] == first["curve"]
        assert trial["step_seconds"] == first["step_seconds"]  # the trial itself, not trained again
        assert not (out / f"runs/{row['label']}-completion-seed0").exists()
        recipe = yaml.safe_load((out / f"runs/{row['label']}-completion-seed1/resolved.yaml").read_text())
        assert recipe["train"]["learning_rate"] == high


def test_learning_rates_without_held_out_rows_are_refused(spec: Path) -> None:
    values = ["compare.learning_rate_factors=[1, 3]", "data.eval=null", "eval.steps=null", "compare.dividend_tokens=0"]
    done = _run(spec, *(part for value in values for part in ("--set", value)))
    assert done.returncode == 2 and "chosen by the loss on held-out rows, of which there are none" in done.stderr


def test_a_learning_rate_is_tried_once(spec: Path) -> None:
    done = _run(spec, "--set", "compare.learning_rate_factors=[1, 3, 1.0]", "--dry-run")
    assert done.returncode == 2 and "two are the same" in done.stderr and "learning_rate_factors" in done.stderr
