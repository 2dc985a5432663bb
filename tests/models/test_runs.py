"""Opening runs, checkpoints and bare adapters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from smore_cli.errors import AdapterError
from smore_cli.methods.lora import LoRAConfig
from smore_cli.models.adapter_files import save_adapter
from smore_cli.models.runs import open_run
from smore_cli.nn import attach
from smore_cli.recipe import Recipe, dump_recipe
from smore_cli.recipe.schema import DataConfig, ModelConfig, QuantizationConfig, Source

LORA = LoRAConfig(rank=2, target_modules=["up_proj"])
IDS = torch.arange(3, 23)[None]


def _recipe(model: Path, **sections: Any) -> Recipe:
    data = DataConfig(train=[Source(path="quickstart", format="multiple_choice")])
    return Recipe(
        version=1, model=ModelConfig(name_or_path=str(model)), adapter=LORA, data=data, output_dir="x", **sections
    )


def _write_run(folder: Path, model: Path, seed: int = 0, **sections: Any) -> None:
    """Writes what `smore train` writes, with a random adapter."""
    recipe = _recipe(model, **sections)
    folder.mkdir(parents=True)
    (folder / "resolved.yaml").write_text(dump_recipe(recipe))
    (folder / "run.json").write_text('{"finished": true}')
    save_adapter(_adapted(model, seed), LORA, folder, base=recipe.model)


def _adapted(folder: Path, seed: int) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    attach(model, LORA, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def test_a_run_loads_with_its_adapter_active(tiny_llama: Path, tmp_path: Path) -> None:
    _write_run(tmp_path / "run", tiny_llama)
    run = open_run(tmp_path / "run")
    assert run.recipe == _recipe(tiny_llama)
    assert run.adapter.method == "lora"
    model, tokenizer = run.load(torch.device("cpu"))
    assert not model.training
    assert torch.equal(_logits(model), _logits(_adapted(tiny_llama, 0)))
    assert tokenizer.pad_token == "<|pad|>"


def test_a_quantised_run_loads_its_backbone_quantised(tiny_llama: Path, tmp_path: Path) -> None:
    _write_run(tmp_path / "run", tiny_llama, quantization=QuantizationConfig())
    model, _ = open_run(tmp_path / "run").load(torch.device("cpu"))
    assert type(model.get_submodule("model.layers.0.mlp.down_proj")).__name__ == "Linear4bit"


def test_a_checkpoint_opens_with_the_recipe_of_its_run(tiny_llama: Path, tmp_path: Path) -> None:
    _write_run(tmp_path / "run", tiny_llama)
    checkpoint = tmp_path / "run" / "checkpoint-5"
    save_adapter(_adapted(tiny_llama, 5), LORA, checkpoint, base=ModelConfig(name_or_path=str(tiny_llama)))
    run = open_run(checkpoint)
    assert run.recipe == _recipe(tiny_llama)
    assert torch.equal(_logits(run.load()[0]), _logits(_adapted(tiny_llama, 5)))


def test_a_bare_adapter_knows_its_backbone(tiny_llama: Path, tmp_path: Path) -> None:
    save_adapter(_adapted(tiny_llama, 1), LORA, tmp_path, base=ModelConfig(name_or_path=str(tiny_llama)))
    run = open_run(tmp_path)
    assert run.recipe is None
    assert run.quantization is None
    assert run.model == ModelConfig(name_or_path=str(tiny_llama))
    assert torch.equal(_logits(run.load()[0]), _logits(_adapted(tiny_llama, 1)))


def test_the_newest_finished_run_is_the_default(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("newest", "middle", "oldest")):
        _write_run(Path("runs", name), tiny_llama)
        os.utime(Path("runs", name, "run.json"), (2e9 - age, 2e9 - age))
    stopped = Path("runs", "stopped")
    stopped.mkdir()
    (stopped / "run.json").write_text("{}")
    assert open_run().folder == Path("runs/newest")


def test_no_runs_at_all_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match="no finished run under runs/, which does not exist here"):
        open_run()


def test_only_stopped_runs_say_how_to_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/run.json").write_text("{}")
    with pytest.raises(AdapterError, match=r"no finished run under runs/$") as caught:
        open_run()
    assert "--resume" in caught.value.hint


def test_a_stopped_run_names_its_newest_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    model = _adapted(tiny_llama, 0)
    for age, step in enumerate((20, 10)):
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        save_adapter(model, LORA, checkpoint, base=ModelConfig(name_or_path=str(tiny_llama)))
        os.utime(checkpoint, (2e9 - age, 2e9 - age))
    with pytest.raises(AdapterError, match="stopped before its end") as caught:
        open_run(tmp_path / "run")
    assert str(tmp_path / "run" / "checkpoint-20") in caught.value.hint


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere", "does not exist"), ("empty", "is neither a run nor an adapter folder")]
)
def test_what_is_no_run_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match=message):
        open_run(tmp_path / name)
