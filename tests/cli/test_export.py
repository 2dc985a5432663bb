from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from smore_cli.cli import main
from smore_cli.methods.lora import LoRAConfig
from smore_cli.methods.mixlora import MixLoRAConfig
from tests.exporting.runs import make_run

if TYPE_CHECKING:
    from pathlib import Path


def _run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["export", *map(str, args)])
    shown = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, shown.out, shown.err


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMORE_DEBUG", "0")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture(scope="module")
def mixlora(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("mixlora") / "run", tiny_llama, MixLoRAConfig(num_experts=3, rank=2))


@pytest.fixture(scope="module")
def lora(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("lora") / "run", tiny_llama, LoRAConfig(rank=2), size=0.3)


def test_export_prints_what_was_written_and_what_was_verified(
    capsys: pytest.CaptureFixture[str], mixlora: Path, tmp_path: Path
) -> None:
    code, shown, _ = _run(capsys, mixlora, tmp_path / "out", "--to", "hf-moe", "--verify")
    assert code == 0
    assert f"exported    {mixlora} as mixtral: 3 experts a layer, 2 a token, float32" in shown
    assert "verified    log-probabilities differ by" in shown
    assert "no token differs" in shown
    card = (tmp_path / "out/README.md").read_text()
    assert "log-probabilities differ by" in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())["files"]
    assert manifest.keys() == {path.name for path in (tmp_path / "out").iterdir()} - {"manifest.json"}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # read by PEFT
@pytest.mark.parametrize("to", ["hf", "peft"])
def test_a_lora_is_exact_as_model_and_as_peft(
    capsys: pytest.CaptureFixture[str], lora: Path, tmp_path: Path, to: str
) -> None:
    code, shown, error = _run(capsys, lora, tmp_path / "out", "--to", to, "--verify", "--json")
    assert code == 0, error
    found = json.loads(shown)
    assert found == json.loads((tmp_path / "out/export.json").read_text())
    assert found["verdict"]["passed"]
    assert found["verdict"]["mean"] < 1e-5
    assert found["verdict"]["tokens"] > 50
    merged = json.loads((tmp_path / "out/merge.json").read_text())
    assert merged["method"] == "exact"
    assert ".tmp-" not in str(found) + str(merged)


def test_beyond_the_tolerance_is_exit_code_three_and_nothing_is_left(
    capsys: pytest.CaptureFixture[str], mixlora: Path, tmp_path: Path
) -> None:
    code, shown, error = _run(capsys, mixlora, tmp_path / "out", "--to", "hf-moe", "--verify", "--tolerance", "0")
    assert (code, shown) == (3, "")
    assert "error: transformers answers otherwise: log-probabilities differ by" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--to", "onnx"], "error: --to onnx is no format\nhint: there are: peft, hf, hf-code, hf-moe, gguf"),
        (["--to", "hf", "--rank", "8"], "error: --rank is for --to peft, and this is --to hf"),
        (["--to", "hf-moe", "--type", "f16"], "error: --type is for --to gguf"),
        (["--to", "hf-code", "--calibration-tokens", "9"], "error: --calibration is for --to peft and hf and gguf"),
        (["--to", "hf", "--tolerance", "1"], "error: --tolerance is what --verify allows"),
        (["--to", "gguf", "--type", "q4_k"], "error: --type q4_k is no type of gguf that is written here"),
    ],
)
def test_a_mistaken_request_is_one_line_and_exit_code_two(
    capsys: pytest.CaptureFixture[str], lora: Path, tmp_path: Path, options: list[str], named: str
) -> None:
    code, shown, error = _run(capsys, lora, tmp_path / "out", *options)
    assert (code, shown) == (2, "")
    assert named in error
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_and_a_full_disk_are_refused(
    capsys: pytest.CaptureFixture[str], mixlora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    code, _, error = _run(capsys, mixlora, tmp_path / "out", "--to", "hf-moe")
    assert code == 2
    assert "already exists" in error
    assert list((tmp_path / "out").iterdir()) == []
    import shutil

    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    code, _, error = _run(capsys, mixlora, tmp_path / "other", "--to", "hf-moe")
    assert code == 2
    assert "would not fit on the disk of" in error
    assert not (tmp_path / "other").exists()
