from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import smore_cli
from smore_cli.cli import main
from smore_cli.kernels.compiled import library
from smore_cli.models.probes import run_probes


def _run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", *args])
    shown = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, shown.out, shown.err


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SMORE_DEBUG", "0")
    monkeypatch.setenv("SMORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_json_tells_versions_devices_and_what_works(capsys: pytest.CaptureFixture[str], own_cache: Path) -> None:
    code, shown, _ = _run(capsys, "--json")
    assert code == 0
    report = json.loads(shown)
    assert report["ok"] is True
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["smore-cli"] == smore_cli.__version__
    assert report["devices"]["cpu"]["cores"] == len(os.sched_getaffinity(0))
    assert report["devices"]["cpu"]["memory"] > 2**28
    assert len(report["devices"]["cuda"]) == torch.cuda.device_count()
    assert report["cache"] == {
        "folder": str(own_cache),
        "models": {"smollm2-135m": None},
        "packages": report["cache"]["packages"],
    }
    *basic, kernels = [probe["works"] for probe in report["probes"]]
    assert basic == [True] * 4
    assert kernels == (library("tree") is not None)  # a machine without a C compiler is in order


def test_tables_show_the_same(capsys: pytest.CaptureFixture[str], own_cache: Path) -> None:
    code, shown, _ = _run(capsys)
    assert code == 0
    assert torch.__version__ in shown
    assert str(own_cache) in shown.replace("\n", "")
    assert "4-bit (nf4) forward and backward on" in shown


def test_doctor_leaves_nothing_in_the_cache_but_kernels(capsys: pytest.CaptureFixture[str], own_cache: Path) -> None:
    _run(capsys, "--json")
    assert {path.name for path in own_cache.iterdir()} <= {"kernels"}


def test_kernels_that_are_switched_off_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMORE_KERNELS", "0")
    probe = run_probes(torch.device("cpu"))[-1]
    assert not probe.works
    assert not probe.required
    assert "SMORE_KERNELS=0" in probe.detail


def test_a_required_probe_that_fails_is_exit_code_three(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SMORE_CACHE", str(tmp_path / "file" / "cache"))  # cannot be made: its parent is a file
    code, shown, error = _run(capsys)
    assert code == 3
    assert "NO" in shown
    assert "does not work here: writing into the cache folder" in error


def test_a_wrong_device_is_a_result_not_a_crash() -> None:
    probes = run_probes(torch.device("meta"))  # computes shapes only, so every number is missing
    assert [probe.works for probe in probes[:4]] == [False, False, False, True]
    assert all("\n" not in probe.detail for probe in probes)


def test_importing_the_command_loads_no_torch() -> None:
    code = "import sys, smore_cli.cli.doctor, smore_cli.cli.merge; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
