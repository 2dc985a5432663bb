"""Distillation: the gradient is that of the mean KL, and what is learned is nearer to the routed model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from smore_cli.data.batch import Row
from smore_cli.exporting.peft_lora import export_peft
from smore_cli.merging.calibration import Calibration
from smore_cli.merging.distillation import _teach, lessons_of
from smore_cli.merging.merge import merge
from smore_cli.methods.lora import LoRAConfig
from smore_cli.methods.mixlora import MixLoRAConfig
from smore_cli.nn import attach, set_active
from tests.merging.test_merge import CPU, _run

if TYPE_CHECKING:
    from pathlib import Path

FEW = Calibration(tokens=1500)
ROWS = [Row([], [list(range(3, 40))], [[True] * 37]), Row([], [list(range(9, 20))], [[True] * 11])]


def _noisy_lora(path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    attach(model, LoRAConfig(rank=2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def test_the_gradient_is_that_of_the_mean_kl_over_real_tokens(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smore_cli.merging.distillation.CHUNK", 5)
    model = _noisy_lora(tiny_llama)
    (lesson,) = lessons_of(model, ROWS, pad_token_id=0)
    theirs = [model(input_ids=torch.tensor([row.branches[0]])).logits[0].detach() for row in ROWS]
    set_active(model, None)
    model.requires_grad_(False)
    weight = model.model.layers[1].self_attn.v_proj.base.weight.requires_grad_()
    found = _teach(model, lesson)
    ours = [model(input_ids=torch.tensor([row.branches[0]])).logits[0] for row in ROWS]
    p, q = (torch.cat(logits).double().log_softmax(-1) for logits in (theirs, ours))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    (expected,) = torch.autograd.grad(kl, weight)
    assert found == pytest.approx(kl.item(), rel=1e-4) and found > 0.01
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected, rtol=1e-3, atol=1e-6)


def test_a_distilled_merge_and_lora_are_nearer_to_the_routed_model(tiny_llama: Path, tmp_path: Path) -> None:
    run = _run(tmp_path / "run", tiny_llama, MixLoRAConfig(rank=2, num_experts=3), size=0.3)
    taught = replace(FEW, distill=16)
    plain = merge(run, tmp_path / "plain", calibration=FEW, device=CPU)
    merged = merge(run, tmp_path / "merged", calibration=taught, device=CPU)
    assert merged.difference.mean_kl < 0.99 * plain.difference.mean_kl
    assert merged.document()["calibration"]["distill"] == 16 and "16 steps of distillation" in merged.how
    assert merged.linears == plain.linears
    plain = export_peft(run, tmp_path / "lora", rank=4, options=FEW, device=CPU)
    lora = export_peft(run, tmp_path / "taught", rank=4, options=taught, device=CPU)
    assert lora.difference.mean_kl < 0.95 * plain.difference.mean_kl
