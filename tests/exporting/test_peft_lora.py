"""A PEFT LoRA from any adapter: the very tensors of a LoRA, and for a routed one the nearest of its rank."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from smore_cli.errors import CheckFailed, UsageError
from smore_cli.exporting.peft_lora import export_peft
from smore_cli.merging.calibration import Calibration
from smore_cli.methods.dynmole import DynMoLEConfig
from smore_cli.methods.lora import LoRAConfig
from smore_cli.models.runs import open_run
from smore_cli.recipe.schema import QuantizationConfig
from tests.merging.test_merge import CPU, ROUTED, _run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # read by PEFT

IDS = torch.arange(3, 43).view(2, 20)
FEW = Calibration(tokens=1500)


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(input_ids=IDS).logits
    return logits


def _in_peft(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True, "alpha": 3.0}], ids=["dora", "rslora"])
def test_a_lora_is_exported_as_it_is(tiny_llama: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    run, out = _run(tmp_path / "run", tiny_llama, LoRAConfig(rank=3, **settings)), tmp_path / "out"
    done = export_peft(run, out, device=CPU)
    assert done.method == "exact" and done.rank == 3 and done.difference.mean_kl == 0
    name = "adapter_model.safetensors"
    before, after = load_file(run / name), load_file(out / name)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    ours, _ = open_run(run).load(CPU)
    torch.testing.assert_close(_logits(_in_peft(tiny_llama, out)), _logits(ours), rtol=0, atol=2e-5)
    with pytest.raises(UsageError, match="nothing to calibrate"):
        export_peft(run, tmp_path / "other", options=FEW, device=CPU)


def test_a_routed_adapter_becomes_a_lora_that_peft_opens_and_a_higher_rank_is_nearer(
    tiny_llama: Path, tmp_path: Path
) -> None:
    adapter = DynMoLEConfig(num_experts=3, rank=2, target_modules="all-linear", modules_to_save=["lm_head"])
    run, found = _run(tmp_path / "run", tiny_llama, adapter), {}
    for rank in (1, 12):
        out = tmp_path / f"rank-{rank}"
        done = export_peft(run, out, rank=rank, options=FEW, device=CPU)
        assert done.document() == json.loads((out / "merge.json").read_text())
        opened = _in_peft(tiny_llama, out)
        assert opened.peft_config["default"].r == rank
        ours, _ = open_run(out).load(CPU)
        torch.testing.assert_close(_logits(opened), _logits(ours), rtol=0, atol=2e-5)
        found[rank] = done.difference.mean_kl
    assert found[12] < 0.7 * found[1]


def test_a_lora_stands_beside_the_quantised_weights_that_training_had(tiny_llama: Path, tmp_path: Path) -> None:
    run = _run(tmp_path / "run", tiny_llama, ROUTED, quantization=QuantizationConfig())
    done = export_peft(run, tmp_path / "out", rank=8, options=FEW, device=CPU)
    assert done.weights == "beside the backbone's 4-bit (nf4) weights"
    assert done.difference.mean_kl < 0.3


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    run = _run(tmp_path / "run", tiny_llama, ROUTED)
    with pytest.raises(UsageError, match="no rank 40"):
        export_peft(run, tmp_path / "out", rank=40, options=FEW, device=CPU)
    with pytest.raises(CheckFailed, match="mean KL"):
        export_peft(run, tmp_path / "out", rank=1, options=FEW, tolerance=1e-9, device=CPU)
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="already exists"):
        export_peft(run, tmp_path / "there", device=CPU)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there"]
