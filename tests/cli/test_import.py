from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smore_cli.cli import main
from tests.models.original_adapters import moe_peft_values, plugin_tensors, trex_tensors, trex_values, write


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMORE_DEBUG", "0")
    monkeypatch.setenv("NO_COLOR", "1")


def _run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["import", *map(str, args)])
    shown = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, shown.out, shown.err


def _mola(folder: Path, base: Path) -> Path:
    return write(folder, moe_peft_values(base, "MOLA", ("v_proj",)), plugin_tensors("mola", ("v_proj",)))


def test_import_prints_what_it_found_and_what_it_assumed(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path
) -> None:
    adapter, out = _mola(tmp_path / "theirs", tiny_llama), tmp_path / "ours"
    code, shown, error = _run(capsys, adapter, out)
    assert (code, error) == (0, "")
    shown = " ".join(shown.split())  # a long line is wrapped
    for part in (
        f"imported {adapter} as mola",
        f"backbone {tiny_llama}",
        "modules 2 (v_proj)",
        "tensors 18, 1,408 numbers",
        "settings num_experts 4, top_k 2, rank 3, alpha 6.0, dropout 0.05",
        "assumed aux_loss_coefficient 0.001: the original does not say",
        f"written {out}",
    ):
        assert part in shown


def test_what_was_imported_can_be_merged_or_is_refused_as_any_other(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path
) -> None:
    code, _, _ = _run(capsys, _mola(tmp_path / "theirs", tiny_llama), tmp_path / "ours")
    assert code == 0
    with pytest.raises(SystemExit) as caught:
        main(["merge", str(tmp_path / "ours"), str(tmp_path / "exact"), "--method", "exact"])
    assert caught.value.code == 2
    assert "depends on the token" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit) as caught:
        main(["merge", str(tmp_path / "ours"), str(tmp_path / "merged"), "--calibration-tokens", "64"])
    assert caught.value.code == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file() and not (tmp_path / "exact").exists()


def test_centroids_and_their_embedder_are_given_beside_a_trex_adapter(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path
) -> None:
    adapter = write(tmp_path / "theirs", trex_values(tiny_llama), trex_tensors())
    torch.save(torch.randn(6, 4), tmp_path / "c.pt")
    options = ("--centroids", tmp_path / "c.pt", "--embedder", "some/encoder")
    code, shown, _ = _run(capsys, adapter, tmp_path / "ours", *options)
    assert code == 0
    assert "embedder some/encoder" in " ".join(shown.split())


def test_bad_input_is_one_line_with_exit_code_two_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path
) -> None:
    adapter = _mola(tmp_path / "theirs", tiny_llama)
    whole = (adapter / "adapter_model.bin").read_bytes()
    (adapter / "adapter_model.bin").write_bytes(whole[:-100])
    code, shown, error = _run(capsys, adapter, tmp_path / "ours")
    assert (code, shown) == (2, "")
    assert error.startswith(f"error: {adapter / 'adapter_model.bin'} is damaged")
    assert len(error.splitlines()) == 1
    code, _, error = _run(capsys, tmp_path / "nowhere", tmp_path / "ours")
    assert code == 2
    assert "does not exist" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]
