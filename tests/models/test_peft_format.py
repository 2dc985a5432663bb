"""LoRA, rsLoRA and DoRA against the installed PEFT: ours load there and theirs load here, with the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from smore_cli.errors import AdapterError
from smore_cli.methods.lora import LoRAConfig
from smore_cli.models.adapter_files import load_adapter, save_adapter
from smore_cli.models.peft_format import from_peft, to_peft
from smore_cli.nn import adapted_modules, attach
from smore_cli.recipe.schema import ModelConfig

# PEFT 0.21 still asks transformers for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.arange(3, 43).view(2, 20)
NAMES = ["base_model.model.a.q.lora_A.weight", "base_model.model.a.q.lora_B.weight"]
BASE = ModelConfig(name_or_path="base")


def _model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _randomise(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=4),
        LoRAConfig(rank=3, alpha=5.0, target_modules=["q_proj", "v_proj"], dropout=0.1),
        LoRAConfig(rank=2, alpha=0.5, target_modules=["model.layers.1.mlp.up_proj"]),
        LoRAConfig(rank=4, alpha=6.0, use_rslora=True),
        LoRAConfig(rank=3, use_dora=True),
        LoRAConfig(rank=4, alpha=2.0, use_rslora=True, use_dora=True, target_modules=["down_proj"]),
    ],
    ids=["all-linear", "two-targets", "one-path", "rslora", "dora", "rslora-and-dora"],
)
def test_our_folder_loads_in_peft_with_the_same_logits(tiny_llama: Path, tmp_path: Path, config: LoRAConfig) -> None:
    ours = _model(tiny_llama)
    attach(ours, config)
    _randomise(parameter for parameter in ours.parameters() if parameter.requires_grad)
    save_adapter(ours, config, tmp_path, base=ModelConfig(name_or_path=str(tiny_llama)))
    theirs = peft.PeftModel.from_pretrained(_model(tiny_llama), tmp_path).eval()
    assert (_logits(ours) - _logits(_model(tiny_llama))).abs().max() > 0.01
    read = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (read["use_rslora"], read["use_dora"]) == (config.use_rslora, config.use_dora)
    torch.testing.assert_close(_logits(theirs), _logits(ours), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "use_rslora": True},
        {"r": 2, "lora_alpha": 2, "target_modules": r".*layers\.1\..*(gate|up)_proj"},
        {"r": 2, "lora_alpha": 2, "target_modules": ["down_proj"], "layers_to_transform": [0]},
        {"r": 3, "lora_alpha": 2, "target_modules": "all-linear", "use_dora": True},
        {"r": 4, "lora_alpha": 3, "target_modules": ["v_proj"], "use_dora": True, "use_rslora": True},
    ],
    ids=["all-linear", "rslora", "regular-expression", "some-layers", "dora", "rslora-and-dora"],
)
def test_pefts_folder_loads_here_with_the_same_logits(
    tiny_llama: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    theirs = peft.get_peft_model(_model(tiny_llama), peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    _randomise(parameter for name, parameter in theirs.named_parameters() if "lora_" in name)
    theirs.save_pretrained(tmp_path)
    ours = _model(tiny_llama)
    config = load_adapter(ours, tmp_path)
    assert isinstance(config, LoRAConfig)
    assert config.use_rslora is settings.get("use_rslora", False)
    assert config.use_dora is settings.get("use_dora", False)
    assert len(adapted_modules(ours)) == sum("lora_A.default.weight" in name for name, _ in theirs.named_parameters())
    torch.testing.assert_close(_logits(ours), _logits(theirs), rtol=0, atol=2e-5)


def test_a_dora_adapter_without_its_magnitudes_is_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    ours = _model(tiny_llama)
    attach(ours, LoRAConfig(rank=2, target_modules=["q_proj"]))
    save_adapter(ours, LoRAConfig(rank=2, target_modules=["q_proj"]), tmp_path, base=BASE)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    model = _model(tiny_llama)
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj\.lora_magnitude_vector is missing"):
        load_adapter(model, tmp_path)
    assert adapted_modules(model) == {}


def test_only_keys_of_the_installed_peft_are_written() -> None:
    values = to_peft(LoRAConfig(), BASE, ["a.q"], ["a", "a.q"], transposed=False)
    assert values.keys() <= peft.LoraConfig().to_dict().keys()
    assert (values["r"], values["lora_alpha"], values["target_modules"]) == (16, 32, ["q"])


def test_full_paths_are_written_where_short_names_would_match_more() -> None:
    values = to_peft(LoRAConfig(), BASE, ["a.q"], ["a", "a.q", "b", "b.q"], transposed=False)
    assert values["target_modules"] == ["a.q"]


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"use_qalora": True}, "use_qalora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q": 2}}, "rank_pattern"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"a_feature_of_next_year": 1}, "a_feature_of_next_year"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(extra: dict[str, Any], named: str) -> None:
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | extra
    with pytest.raises(AdapterError, match=named) as caught:
        from_peft(values, NAMES, ["a.q"], "x")
    assert "\n" not in caught.value.message


def test_the_defaults_of_the_installed_peft_are_plain_lora() -> None:
    values = json.loads(json.dumps(peft.LoraConfig(r=8, lora_alpha=4).to_dict(), default=list))
    config = from_peft(values | {"peft_type": "LORA"}, NAMES, ["a", "a.q"], "x")
    assert (config.rank, config.scale, config.target_modules) == (8, 0.5, ["q"])
