from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from smore_cli.cli import main
from smore_cli.methods import MethodConfig
from smore_cli.methods.lora import LoRAConfig
from smore_cli.methods.smore import SMoREConfig
from smore_cli.models.adapter_files import save_adapter
from smore_cli.nn import attach
from smore_cli.recipe.schema import ModelConfig


def _run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["merge", *map(str, args)])
    shown = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, shown.out, shown.err


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMORE_DEBUG", "0")
    monkeypatch.setenv("NO_COLOR", "1")


def _adapter(folder: Path, base: Path, config: MethodConfig) -> Path:
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    attach(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    save_adapter(model, config, folder, base=ModelConfig(name_or_path=str(base)))
    return folder


def test_merge_prints_what_was_measured_and_on_what(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path
) -> None:
    adapter = _adapter(tmp_path / "adapter", tiny_llama, LoRAConfig(rank=2, target_modules=["up_proj"]))
    capsys.readouterr()
    code, shown, _ = _run(capsys, adapter, tmp_path / "out")
    assert code == 0
    assert f"{adapter} into 2 linear maps" in shown
    assert f"written     {tmp_path / 'out'}" in shown
    assert "same first choice 100.00 %" in shown
    assert "loss on bundled questions" in shown and "quickstart (test)" in shown


def test_json_is_what_merge_json_holds(capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "adapter", tiny_llama, LoRAConfig(rank=2, target_modules=["up_proj"]))
    capsys.readouterr()
    code, shown, _ = _run(capsys, adapter, tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(shown) == json.loads((tmp_path / "out" / "merge.json").read_text())
    assert json.loads(shown)["difference"]["mean_kl"] < 1e-9


def test_a_tolerance_that_is_not_met_is_exit_code_three_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path
) -> None:
    adapter = _adapter(tmp_path / "adapter", tiny_llama, LoRAConfig(rank=2))
    code, shown, error = _run(capsys, adapter, tmp_path / "out", "--tolerance", "0")
    assert code == 3
    assert shown == ""
    assert "differs from the adapter" in error
    assert not (tmp_path / "out").exists()


def test_a_routed_adapter_is_refused_with_exit_code_two(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path
) -> None:
    config = SMoREConfig(rank=[2], num_experts=[3], fanout=[2], target_modules=["up_proj"])
    adapter = _adapter(tmp_path / "adapter", tiny_llama, config)
    capsys.readouterr()
    code, shown, error = _run(capsys, adapter, tmp_path / "out", "--method", "exact")
    assert (code, shown) == (2, "")
    assert error.splitlines()[-2:] == [
        f"error: {adapter}: a smore adapter has no exact merge: its update depends on the token, "
        "so no single matrix equals it",
        "hint: --method least-squares finds the nearest one and measures what it loses",
    ]


def test_every_option_of_a_routed_merge_is_read(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path
) -> None:
    config = SMoREConfig(rank=[2], num_experts=[3], fanout=[2], target_modules=["up_proj"])
    adapter = _adapter(tmp_path / "adapter", tiny_llama, config)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"water {i} boils and ice melts"}) + "\n" for i in range(60)))
    words: list[str | Path] = ["--calibration", text, "--format", "text", "--calibration-tokens", "500"]
    words += ["--ridge", "0.01", "--prior", "mean", "--dtype", "bfloat16", "--shard-size", "50KB"]
    words += ["--benchmark", "quickstart", "--limit", "2", "--tolerance", "9", "--json"]
    capsys.readouterr()
    code, shown, error = _run(capsys, adapter, tmp_path / "out", *words)
    assert code == 0
    found = json.loads(shown)
    assert found["calibration"]["ridge"] == 0.01 and found["calibration"]["prior"] == "mean"
    assert found["calibration"]["source"].startswith(str(text)) and 500 <= found["calibration"]["tokens"] < 540
    assert found["dtype"] == "bfloat16"
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert {"task", "n", "base", "routed", "merged"} <= found["benchmarks"][0].keys()
    assert "layer 2 of 2" in error
    for wrong in (["--format", "text"], ["--limit", "3"], ["--benchmark", "nonsense"]):
        code, _, error = _run(capsys, adapter, tmp_path / "other", *wrong)
        assert code == 2 and error.startswith("error: ")


def test_a_folder_that_is_no_run_is_exit_code_two(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, error = _run(capsys, tmp_path / "nowhere", tmp_path / "out")
    assert code == 2
    assert "does not exist" in error
