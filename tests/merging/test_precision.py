"""A run of a quantised backbone on full-precision weights: the change is measured and said, in eval and in merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from typer.testing import CliRunner

from smore_cli.cli import app
from smore_cli.errors import UsageError
from smore_cli.merging.merge import merge
from smore_cli.merging.precision import precision_gap
from smore_cli.models.runs import open_run
from smore_cli.recipe.schema import QuantizationConfig
from tests.merging.test_merge import _run

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")


@pytest.mark.parametrize(("bits", "said"), [(4, "4-bit (nf4)"), (8, "8-bit")])
def test_merging_into_full_precision_says_what_that_changed(
    bits: Any, said: str, tiny_llama: Path, tmp_path: Path
) -> None:
    run = _run(tmp_path / "run", tiny_llama, quantization=QuantizationConfig(bits=bits))
    merged = merge(run, tmp_path / "out", base_weights="original", device=CPU)
    assert merged.precision is not None and merged.precision.difference.mean_kl > 1e-4
    assert 0.2 < merged.difference.mean_kl / merged.precision.difference.mean_kl < 5  # that is all that it changed
    assert merged.weights == f"original weights, though trained on {said}"
    assert f"trained on a {said} backbone, used with full-precision weights: mean KL" in merged.precision.line()
    assert merged.document()["precision"]["trained_on"] == said


def test_a_run_of_a_full_precision_backbone_has_no_other_weights(tiny_llama: Path, tmp_path: Path) -> None:
    run = open_run(_run(tmp_path / "run", tiny_llama))
    with pytest.raises(UsageError, match="--full-precision changes nothing"):
        precision_gap(run, CPU)


def test_an_evaluation_on_full_precision_weights_says_so_and_is_not_kept_as_the_runs_own(
    tiny_llama: Path, tmp_path: Path
) -> None:
    run = _run(tmp_path / "run", tiny_llama, quantization=QuantizationConfig())
    words = ["eval", str(run), "--benchmark", "quickstart", "--limit", "2", "--full-precision"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "trained on a 4-bit (nf4) backbone, used with full-precision weights" in result.output
    assert not (run / "eval").exists()
