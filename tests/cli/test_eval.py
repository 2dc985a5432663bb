from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from smore_cli.cli import main
from smore_cli.evaluation import evaluate
from smore_cli.methods.lora import LoRAConfig
from smore_cli.models.adapter_files import save_adapter
from smore_cli.nn import attach
from smore_cli.recipe.schema import ModelConfig

QUESTIONS = [
    {
        "id": f"q{i}",
        "question": f"Which number comes after {i}?",
        "choices": ["ice", f"{i + 1}", "fire"],
        "label": i % 3,
    }
    for i in range(12)
]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMORE_DEBUG", "0")  # main() writes it: set here, it is put back after the test
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "arc_easy_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return folder


@pytest.fixture
def run_folder(tmp_path: Path, tiny_llama: Path) -> Path:
    """A run as training leaves it: an adapter, with a strong effect, and the recipe."""
    folder = tmp_path / "runs" / "strong"
    config = LoRAConfig(rank=4, target_modules="all-linear")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    attach(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    save_adapter(model, config, folder, base=ModelConfig(name_or_path=str(tiny_llama)))
    recipe = {
        "version": 1,
        "model": {"name_or_path": str(tiny_llama)},
        "adapter": {"method": "lora", "rank": 4},
        "data": {"train": [{"path": "quickstart", "format": "multiple_choice"}]},
        "output_dir": str(folder),
    }
    (folder / "resolved.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "run.json").write_text("{}")
    return folder


def run(*args: object) -> int:
    """Runs `smore eval` in this process and returns its exit code."""
    with pytest.raises(SystemExit) as caught:
        main(["eval", *(str(argument) for argument in args)])
    code = caught.value.code
    assert isinstance(code, int)
    return code


def test_a_run_is_measured_beside_its_backbone(
    run_folder: Path, data: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(run_folder, "--benchmark", "arc_easy", "--data-dir", data, "--base", "--json")
    shown = capsys.readouterr()
    assert code == 0, shown.err
    found = json.loads(shown.out)
    (task,) = found["tasks"]
    (bare,) = evaluate(
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        AutoTokenizer.from_pretrained(tiny_llama),
        ["arc_easy"],
        data_dir=data,
    )
    assert task["n"] == 12
    assert task["base"]["acc"] == bare.acc
    assert task["base"]["acc_stderr"] == bare.acc_stderr
    assert task["difference"]["acc"] == pytest.approx(task["acc"] - bare.acc)
    assert found["method"] == "lora"
    assert set(found["seconds"]) == {"load", "run", "backbone"}

    kept = json.loads((run_folder / "eval" / "arc_easy.json").read_text())
    samples, theirs = kept["tasks"][0].pop("samples"), kept["tasks"][0]["base"].pop("samples")
    found.pop("seconds")  # how long it took is printed, and not kept
    assert kept == found
    assert [sample["loglikelihoods"] for sample in theirs] == [
        pytest.approx(sample.loglikelihoods, abs=1e-4) for sample in bare.samples
    ]
    differences = [abs(a["loglikelihoods"][0] - b["loglikelihoods"][0]) for a, b in zip(samples, theirs, strict=True)]
    assert min(differences) > 1e-3
    assert [sample["id"] for sample in samples] == [row["id"] for row in QUESTIONS]


def test_the_table_goes_to_stdout_and_everything_else_to_stderr(
    run_folder: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(run_folder, "--benchmark", "arc_easy", "--data-dir", data, "--limit", 5) == 0
    shown = capfd.readouterr()
    assert [line.split()[:2] for line in shown.out.splitlines() if "±" in line][:2] == [
        ["arc_easy", "5"],
        ["acc_norm", "5"],
    ]
    assert "time: " in shown.out
    assert "\r" not in shown.out + shown.err  # no progress bar without a terminal
    assert shown.err.splitlines() == ["scoring the run ...", f"written to {run_folder / 'eval' / 'arc_easy.json'}"]


def test_the_newest_run_is_taken_where_none_is_named(
    run_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run_folder.parent.parent)
    assert run("--benchmark", "arc_easy", "--data-dir", data, "--limit", 2, "--json") == 0
    assert json.loads(capsys.readouterr().out)["run"] == str(Path("runs", run_folder.name))


def test_a_backbone_alone_needs_no_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = run(
        "--model", tiny_llama, "--base", "--benchmark", "quickstart", "--limit", 30, "--json", "--out", "x/y.json"
    )
    assert code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"] is None
    (task,) = found["tasks"]
    assert "difference" not in task
    assert sum(family["n"] for family in task["families"]) == task["n"] == 30
    assert len(json.loads((tmp_path / "x" / "y.json").read_text())["tasks"][0]["samples"]) == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--benchmark", "arc_esay"], "unknown benchmark 'arc_esay'"),
        (["--benchmark", "arc_easy", "--data-dir", "nowhere"], "there is no folder nowhere"),
        (["--benchmark", "arc_easy"], "allenai/ai2_arc"),
        (["norun", "--benchmark", "quickstart"], "norun"),
        (["--benchmark", "quickstart"], "there is no finished run"),
        (["norun", "--model", "m", "--benchmark", "quickstart"], "both a run and --model"),
        (["--model", "no/such-model", "--benchmark", "quickstart"], "no/such-model"),
        (["--model", "m", "--benchmark", "quickstart", "--out", "."], "is a folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*args) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (error,) = [line for line in shown.err.splitlines() if line.startswith("error:")]
    assert message in error
    assert len(shown.err.splitlines()) <= 2  # the error and its hint
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_cannot_be_written_is_printed_and_fails(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "result.json"
    assert run("--model", tiny_llama, "--benchmark", "quickstart", "--limit", 2, "--json", "--out", out) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["tasks"][0]["n"] == 2
    assert f"cannot write {out}" in shown.err
