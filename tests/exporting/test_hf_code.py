"""A routed model in a folder of its own, opened where this package cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from smore_cli.errors import UsageError
from smore_cli.exporting.export import export
from smore_cli.exporting.formats import Options
from smore_cli.exporting.sources import flat_sources
from smore_cli.methods.lora import LoRAConfig
from smore_cli.methods.mixlora import MixLoRAConfig
from smore_cli.methods.smore import SMoREConfig
from smore_cli.methods.trex import TRexConfig
from smore_cli.models.runs import open_run
from tests.exporting.runs import CPU, make_run

if TYPE_CHECKING:
    from pathlib import Path

    from smore_cli.methods import MethodConfig

ON_CPU = Options(device=CPU)
PROMPTS = [[5, 9, 300, 77], list(range(100, 140))]

ALONE = """
import sys
sys.modules["smore_cli"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM
folders, prompts = sys.argv[1:], {prompts}
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            found.append((model(input_ids=ids).logits, model.generate(ids, do_sample=False, max_new_tokens=12)))
    torch.save(found, folder + "/found.pt")
"""

ADAPTERS: dict[str, MethodConfig] = {
    "smore": SMoREConfig(rank=[2, 2], num_experts=[3, 3], fanout=[2, 2], modules_to_save=["lm_head"]),
    "mixlora": MixLoRAConfig(num_experts=3, rank=2),
    "trex": TRexConfig(num_down=2, num_up=2),
}


def _trained_prior(run: Path) -> None:
    """Gives a random adapter centroids, which random parameters do not have."""
    from safetensors.torch import load_file, save_file

    file = run / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["prior.centroids"] = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.slow
def test_the_folder_computes_the_same_bits_where_the_package_is_not_there(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMORE_KERNELS", "0")  # the folder's code is the package's without its compiled kernels
    for name, adapter in ADAPTERS.items():
        run = make_run(tmp_path / name / "run", tiny_llama, adapter, size=0.3)
        if name == "trex":
            _trained_prior(run)
        export(run, tmp_path / name / "out", "hf-code", options=ON_CPU)
    folders = [str(tmp_path / name / "out") for name in ADAPTERS]
    process = subprocess.run(
        [sys.executable, "-c", ALONE.format(prompts=PROMPTS), *folders],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr
    for name in ADAPTERS:
        ours, _ = open_run(tmp_path / name / "run").load(CPU)
        for prompt, (logits, written) in zip(PROMPTS, torch.load(tmp_path / name / "out/found.pt"), strict=True):
            ids: Any = torch.tensor([prompt])
            with torch.no_grad():
                assert torch.equal(logits, ours(input_ids=ids).logits), name
                assert torch.equal(written, ours.generate(ids, do_sample=False, max_new_tokens=12)), name


def test_a_bfloat16_folder_verifies_to_the_bit_and_needs_its_code(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = make_run(tmp_path / "run", tiny_llama, ADAPTERS["smore"], size=0.3, dtype="bfloat16")
    done = export(run, tmp_path / "out", "hf-code", options=Options(device=CPU, verify=True))
    assert done.verdict is not None
    assert (done.verdict.mean, done.verdict.divergence) == (0.0, None)
    assert done.verdict.tokens > 50
    with pytest.raises(ValueError, match="trust_remote_code"):  # never a backbone without its adapter
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert set(json.loads((tmp_path / "out/manifest.json").read_text())["files"]) == names - {"manifest.json"}


def test_what_needs_no_code_or_a_second_model_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    lora = make_run(tmp_path / "lora", tiny_llama, LoRAConfig(rank=2))
    with pytest.raises(UsageError, match="needs no code of its own"):
        export(lora, tmp_path / "out", "hf-code", options=ON_CPU)
    trex = make_run(tmp_path / "trex", tiny_llama, TRexConfig(num_down=2, num_up=2, embedder="some/encoder"))
    with pytest.raises(UsageError, match="a second model that the folder cannot hold"):
        export(trex, tmp_path / "out", "hf-code", options=ON_CPU)
    assert not (tmp_path / "out").exists()


def test_flat_sources_import_nothing_of_the_package() -> None:
    files = flat_sources(["smore_cli.exporting.self_contained", "smore_cli.methods.trex"])
    assert {"smore_nn_attach.py", "smore_nn_prior_hooks.py", "smore_models_embedders.py"} <= files.keys()
    assert not [name for name, text in files.items() if "from smore_cli" in text or "import smore_cli" in text]
