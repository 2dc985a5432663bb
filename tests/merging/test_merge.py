"""A whole merge: the folder that comes out, and what is refused with nothing written."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smore_cli.errors import CheckFailed, UsageError
from smore_cli.merging.merge import merge
from smore_cli.methods import MethodConfig
from smore_cli.methods.lora import LoRAConfig
from smore_cli.methods.smore import SMoREConfig
from smore_cli.models.adapter_files import save_adapter
from smore_cli.models.runs import open_run
from smore_cli.nn import attach
from smore_cli.recipe import Recipe, dump_recipe
from smore_cli.recipe.schema import DataConfig, ModelConfig, QuantizationConfig, Source

CPU = torch.device("cpu")
LORA = LoRAConfig(rank=2)


def _run(
    folder: Path, model: Path, adapter: MethodConfig = LORA, size: float = 0.1, dtype: Any = "auto", **sections: Any
) -> Path:
    """Writes a run with a random adapter."""
    recipe = Recipe(
        version=1,
        model=ModelConfig(name_or_path=str(model), dtype=dtype),
        adapter=adapter,
        data=DataConfig(train=[Source(path="quickstart", format="multiple_choice")]),
        output_dir=str(folder),
        **sections,
    )
    adapted = AutoModelForCausalLM.from_pretrained(model)
    attach(adapted, adapter)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    folder.mkdir(parents=True)
    (folder / "resolved.yaml").write_text(dump_recipe(recipe))
    (folder / "run.json").write_text("{}")
    save_adapter(adapted, adapter, folder, base=recipe.model)
    return folder


def _assert_same_logits(out: Path, run: Path, atol: float) -> None:
    adapted, tokenizer = open_run(run).load(CPU)
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(out)("Question: what is ice?\nAnswer: water").input_ids])
    assert ids.tolist() == [tokenizer("Question: what is ice?\nAnswer: water").input_ids]
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=0, atol=atol)


def test_the_folder_is_an_ordinary_model_with_the_adapters_logits(tiny_llama: Path, tmp_path: Path) -> None:
    run, out = _run(tmp_path / "run", tiny_llama), tmp_path / "merged"
    merged = merge(run, out, device=CPU)
    assert {path.name for path in out.iterdir()} == {path.name for path in tiny_llama.iterdir()} | {"merge.json"}
    _assert_same_logits(out, run, atol=2e-5)
    assert merged.linears == 14
    assert merged.difference.tokens == 1024
    assert merged.difference.mean_kl < 1e-9
    assert merged.difference.max_abs_logit < 1e-4
    assert merged.difference.top1_agreement == 1
    assert json.loads((out / "merge.json").read_text()) == merged.document()
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 1
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {stat.S_IMODE(out.stat().st_mode) & 0o666}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "run"]


def test_a_bfloat16_merge_measures_its_rounding(tiny_llama: Path, tmp_path: Path) -> None:
    run = _run(tmp_path / "run", tiny_llama, dtype="bfloat16")
    merged = merge(run, tmp_path / "out", tolerance=1.0, device=CPU)
    assert merged.dtype == "bfloat16"
    assert 1e-9 < merged.difference.mean_kl < 1e-2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_a_merge_beyond_the_tolerance_is_not_kept(tiny_llama: Path, tmp_path: Path) -> None:
    run = _run(tmp_path / "run", tiny_llama, dtype="bfloat16")
    with pytest.raises(CheckFailed, match=r"mean KL .* 1e-12 allowed") as caught:
        merge(run, tmp_path / "out", tolerance=1e-12, device=CPU)
    assert caught.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_adapter_that_gives_no_numbers_fails_the_check(tiny_llama: Path, tmp_path: Path) -> None:
    run = _run(tmp_path / "run", tiny_llama, size=float("nan"))
    with pytest.raises(CheckFailed, match="mean KL nan"):
        merge(run, tmp_path / "out", device=CPU)
    assert not (tmp_path / "out").exists()


def _refused(run: Path, out: Path, message: str) -> UsageError:
    with pytest.raises(UsageError, match=message) as caught:
        merge(run, out, device=CPU)
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message
    return caught.value


def test_a_routed_adapter_is_refused_with_the_reason(tiny_llama: Path, tmp_path: Path) -> None:
    run = _run(tmp_path / "run", tiny_llama, SMoREConfig(rank=[2], num_experts=[3], fanout=[2]))
    error = _refused(run, tmp_path / "out", "its update depends on the token, so no single matrix equals it")
    assert f"smore eval {run}" in error.hint
    assert not (tmp_path / "out").exists()


def test_a_quantised_backbone_is_refused_with_the_reason(tiny_llama: Path, tmp_path: Path) -> None:
    run = _run(tmp_path / "run", tiny_llama, quantization=QuantizationConfig())
    _refused(run, tmp_path / "out", "trained on a 4-bit backbone")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_refused_and_untouched(tiny_llama: Path, tmp_path: Path) -> None:
    run, out = _run(tmp_path / "run", tiny_llama), tmp_path / "out"
    out.mkdir()
    _refused(run, out, "already exists")
    assert list(out.iterdir()) == []


@pytest.mark.slow
def test_the_real_model_merges_and_reopens(smollm2: Path, tmp_path: Path) -> None:
    run = _run(tmp_path / "run", smollm2, LoRAConfig(rank=8, target_modules=["q_proj", "down_proj"]), size=0.02)
    merged = merge(run, tmp_path / "out", device=CPU)
    assert merged.linears == 60
    assert merged.difference.mean_kl < 1e-7
    assert merged.difference.max_abs_logit < 1e-2
    assert merged.difference.top1_agreement > 0.999
    _assert_same_logits(tmp_path / "out", run, atol=1e-2)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 540e6  # the tied head is stored once
