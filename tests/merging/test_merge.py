"""A whole merge: the folder that comes out, and what is refused with nothing written."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smore_cli.errors import CheckFailed, SmoreError, UsageError
from smore_cli.merging.calibration import Calibration
from smore_cli.merging.merge import merge
from smore_cli.methods import MethodConfig
from smore_cli.methods.lora import LoRAConfig
from smore_cli.methods.smore import SMoREConfig
from smore_cli.methods.trex import TRexConfig
from smore_cli.models.adapter_files import save_adapter
from smore_cli.models.runs import open_run
from smore_cli.nn import attach
from smore_cli.recipe import Recipe, dump_recipe
from smore_cli.recipe.schema import DataConfig, ModelConfig, QuantizationConfig, Source

CPU = torch.device("cpu")
LORA = LoRAConfig(rank=2)
ROUTED = SMoREConfig(rank=[2], num_experts=[3], fanout=[2])


def _run(
    folder: Path, model: Path, adapter: MethodConfig = LORA, size: float = 0.1, dtype: Any = "auto", **sections: Any
) -> Path:
    """Writes a run with a random adapter."""
    recipe = Recipe(
        version=1,
        model=ModelConfig(name_or_path=str(model), dtype=dtype),
        adapter=adapter,
        output_dir=str(folder),
        **({"data": DataConfig(train=[Source(path="quickstart", format="multiple_choice")])} | sections),
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
    ours = {"merge.json", "README.md", "manifest.json"}
    assert {path.name for path in out.iterdir()} == {path.name for path in tiny_llama.iterdir()} | ours
    _assert_same_logits(out, run, atol=2e-5)
    assert merged.linears == 14
    assert merged.difference.tokens > 1500
    assert merged.method == "exact" and merged.calibration is None
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


def _refused(run: Path, out: Path, message: str, **options: Any) -> UsageError:
    with pytest.raises(UsageError, match=message) as caught:
        merge(run, out, device=CPU, **options)
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message
    return caught.value


def test_an_exact_merge_of_a_routed_adapter_is_refused_with_the_reason(tiny_llama: Path, tmp_path: Path) -> None:
    run = _run(tmp_path / "run", tiny_llama, ROUTED)
    message = "its update depends on the token, so no single matrix equals it"
    assert "least-squares" in _refused(run, tmp_path / "out", message, method="exact").hint
    trex = _run(tmp_path / "trex", tiny_llama, TRexConfig(target_modules=["up_proj"], num_down=2, num_up=2))
    _refused(trex, tmp_path / "out", "on the token and on its prompt's likeness to the clusters", method="exact")
    assert not (tmp_path / "out").exists()


def test_options_that_would_mean_nothing_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    run = _run(tmp_path / "run", tiny_llama)
    _refused(run, tmp_path / "out", "nothing to fit", method="least-squares")
    _refused(run, tmp_path / "out", "fits nothing", calibration=Calibration(tokens=100))
    _refused(run, tmp_path / "out", "--base-weights original changes nothing", base_weights="original")
    routed = _run(tmp_path / "routed", tiny_llama, ROUTED)
    _refused(routed, tmp_path / "out", "solves nothing", method="mean", calibration=Calibration(prior="mean"))


def test_a_quantised_run_is_merged_into_the_weights_it_was_trained_on(tiny_llama: Path, tmp_path: Path) -> None:
    run = _run(tmp_path / "run", tiny_llama, quantization=QuantizationConfig())
    merged = merge(run, tmp_path / "out", device=CPU)
    assert merged.weights == "dequantised 4-bit (nf4) weights"
    assert merged.difference.mean_kl < 1e-9
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}


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


def test_a_routed_merge_is_judged_source_by_source_and_opens_where_smore_is_not(
    tiny_llama: Path, tmp_path: Path
) -> None:
    held_out = [Source(path="quickstart", split="test[:40]", format="multiple_choice")]
    data = DataConfig(train=[Source(path="quickstart", format="multiple_choice")], eval=held_out)
    run, out, said = _run(tmp_path / "run", tiny_llama, ROUTED, data=data), tmp_path / "out", list[str]()
    merged = merge(run, out, calibration=Calibration(tokens=1500), say=said.append, device=CPU)
    assert merged.method == "least-squares" and merged.linears == 14
    assert "layer 1 of 2" in said[-3] and "layer 2 of 2" in said[-2]
    (source,) = merged.verdict.sources
    assert merged.verdict.role == "evaluation data" and source.supervised > 50
    assert 0 < merged.difference.mean_kl < 0.3  # 1.2 from the backbone
    written = json.loads((out / "merge.json").read_text())
    assert written == merged.document()
    assert written["verdict"]["sources"][0]["loss"].keys() == {"base", "routed", "merged"}
    assert f"{source.merged:.4f}" in (out / "README.md").read_text()
    program = (
        "import sys; sys.modules['smore_cli'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(out)!r})\n"
        f"words = AutoTokenizer.from_pretrained({str(out)!r})('What is ice?', return_tensors='pt')\n"
        "print(model.generate(**words, max_new_tokens=4, do_sample=False).shape[1] - words.input_ids.shape[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "4", done.stderr


def test_the_manifest_holds_the_hash_of_every_file_and_the_name_of_every_tensor(
    tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    merge(_run(tmp_path / "run", tiny_llama), out, shard_size="60KB", device=CPU)
    files = json.loads((out / "manifest.json").read_text())["files"]
    assert files.keys() == {path.name for path in out.iterdir()} - {"manifest.json"}
    for name, entry in files.items():
        assert entry["sha256"] == hashlib.sha256((out / name).read_bytes()).hexdigest()
    shards = [entry["tensors"] for name, entry in files.items() if name.endswith(".safetensors")]
    assert len(shards) > 1
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(name for shard in shards for name in shard) == sorted(index)


def test_a_killed_merge_leaves_no_output_and_goes_on_where_it_was(tiny_llama: Path, tmp_path: Path) -> None:
    run, out = _run(tmp_path / "run", tiny_llama, ROUTED), tmp_path / "out"
    program = (
        "import os, signal, torch\nfrom pathlib import Path\n"
        "from smore_cli.merging.calibration import Calibration\nfrom smore_cli.merging.merge import merge\n"
        "def say(line):\n    if line.startswith('layer 1'): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"merge(Path({str(run)!r}), Path({str(out)!r}), calibration=Calibration(tokens=800), say=say, "
        "device=torch.device('cpu'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    (left,) = [path for path in tmp_path.iterdir() if path.name != "run"]
    assert left.name.startswith(".out.work-") and [file.name for file in left.iterdir()] == ["layer-0.safetensors"]
    said = list[str]()
    merge(run, out, calibration=Calibration(tokens=800), say=said.append, device=CPU)
    assert [line for line in said if "from an earlier attempt" in line] == [line for line in said if "layer 1" in line]
    merge(run, tmp_path / "undisturbed", calibration=Calibration(tokens=800), device=CPU)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run", "undisturbed"]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "undisturbed")]
    assert weights[0] == weights[1]


def test_another_merge_into_the_same_folder_removes_what_was_left(tiny_llama: Path, tmp_path: Path) -> None:
    run, left = _run(tmp_path / "run", tiny_llama), tmp_path / ".out.work-0123"
    left.mkdir()
    merge(run, tmp_path / "out", device=CPU)
    assert not left.exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(tmp_path / "run", tiny_llama, ROUTED)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    _refused(run, tmp_path / "out", "would not fit on the disk")
    monkeypatch.undo()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("smore_cli.merging.merge.write_model", full)
    with pytest.raises(SmoreError, match="could not be written: No space left on device") as caught:
        merge(run, tmp_path / "out", calibration=Calibration(tokens=300), device=CPU)
    assert caught.value.exit_code == 1 and "\n" not in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_missing_backbone_and_one_of_another_size_are_one_line_each(tiny_llama: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    shutil.copytree(tiny_llama, gone)
    run = _run(tmp_path / "run", gone)
    shutil.rmtree(gone)
    _refused(run, tmp_path / "out", "gone")
    config = json.loads((tiny_llama / "config.json").read_text()) | {"hidden_size": 48, "head_dim": 12}
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(gone)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(gone)
    _refused(run, tmp_path / "out", "was trained on a backbone of other sizes")
    assert not (tmp_path / "out").exists()


def test_the_mean_of_routing_loses_more_than_least_squares_does(tiny_llama: Path, tmp_path: Path) -> None:
    run, found = _run(tmp_path / "run", tiny_llama, ROUTED), {}
    for method in ("least-squares", "mean", "uniform"):
        few = Calibration(tokens=1500)
        found[method] = merge(run, tmp_path / method, method=method, calibration=few, device=CPU).difference.mean_kl
    assert found["least-squares"] < 0.8 * min(found["mean"], found["uniform"])
    assert found["mean"] != found["uniform"]


def test_a_routed_run_on_4_bits_is_merged_into_the_weights_it_was_trained_on(tiny_llama: Path, tmp_path: Path) -> None:
    run = _run(tmp_path / "run", tiny_llama, ROUTED, quantization=QuantizationConfig())
    few = Calibration(tokens=1500)
    trained = merge(run, tmp_path / "trained", calibration=few, device=CPU)
    original = merge(run, tmp_path / "original", calibration=few, base_weights="original", device=CPU)
    assert trained.difference.mean_kl < original.difference.mean_kl
    assert original.precision is not None
