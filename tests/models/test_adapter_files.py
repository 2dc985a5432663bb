"""Saving and loading adapters of every kind; what does not fit is refused before anything changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from smore_cli.errors import AdapterError
from smore_cli.methods import MethodConfig
from smore_cli.methods.lora import LoRAConfig
from smore_cli.methods.smore import SMoREConfig
from smore_cli.models.adapter_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFolder,
    load_adapter,
    load_adapter_state,
    save_adapter,
)
from smore_cli.nn import adapted_modules, attach
from smore_cli.recipe.schema import ModelConfig

BASE = ModelConfig(name_or_path="org/base", revision="v1")
LORA = LoRAConfig(rank=2, target_modules=["q_proj", "up_proj"])
TREE = SMoREConfig(rank=[2, 3], num_experts=[3, 4], gate="noisy_topk", router_dim=4, key_dim=4, activation="prelu")
BOTH = pytest.mark.parametrize("config", [LORA, TREE], ids=["lora", "smore"])


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def _trained(model: Any, config: MethodConfig) -> dict[str, torch.Tensor]:
    """Attaches an adapter with random parameters and returns them."""
    attach(model, config, seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return _state(model)


def _state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_parameters() if ".adapters." in name}


@BOTH
def test_reloading_gives_every_parameter_bit_for_bit(
    model: Any, tiny_llama: Path, tmp_path: Path, config: MethodConfig
) -> None:
    before = _trained(model, config)
    save_adapter(model, config, tmp_path, base=BASE)
    fresh = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    loaded = load_adapter(fresh, tmp_path)
    after = _state(fresh)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=ids).logits, model(input_ids=ids).logits)
    assert loaded.method == config.method
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_routed_settings_come_back_equal(model: Any, tiny_llama: Path, tmp_path: Path) -> None:
    attach(model, TREE)
    save_adapter(model, TREE, tmp_path, base=BASE)
    assert load_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path) == TREE


@BOTH
def test_equal_adapters_are_equal_files(model: Any, tmp_path: Path, config: MethodConfig) -> None:
    _trained(model, config)
    for name in ("a", "b"):
        save_adapter(model, config, tmp_path / name, base=BASE)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    values = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    assert list(values) == sorted(values)


@BOTH
def test_the_folder_knows_its_backbone_and_method(model: Any, tmp_path: Path, config: MethodConfig) -> None:
    attach(model, config)
    save_adapter(model, config, tmp_path, base=BASE)
    adapter = AdapterFolder.open(tmp_path)
    assert adapter.base == BASE
    assert adapter.method == config.method


def test_tensor_names_are_paths_and_parameters(model: Any, tmp_path: Path) -> None:
    attach(model, TREE)
    save_adapter(model, TREE, tmp_path / "tree", base=BASE)
    names = load_file(tmp_path / "tree" / WEIGHTS_FILE).keys()
    path = "model.layers.0.self_attn.q_proj"
    expected = {f"{path}.{name}" for name in adapted_modules(model)[path].adapter_state("default")}
    assert expected <= names
    assert len(names) == len(adapted_modules(model)) * len(expected)


def test_a_second_adapter_is_saved_and_loaded_under_its_own_name(model: Any, tiny_llama: Path, tmp_path: Path) -> None:
    attach(model, TREE, name="tree")
    before = _trained(model, LORA)
    save_adapter(model, LORA, tmp_path, base=BASE)
    fresh = AutoModelForCausalLM.from_pretrained(tiny_llama)
    load_adapter(fresh, tmp_path, name="other")
    for name, value in _state(fresh).items():
        assert torch.equal(value, before[name.replace(".adapters.other.", ".adapters.default.")])


def test_state_of_an_attached_adapter_is_replaced(model: Any, tiny_llama: Path, tmp_path: Path) -> None:
    before = _trained(model, LORA)
    save_adapter(model, LORA, tmp_path, base=BASE)
    fresh = AutoModelForCausalLM.from_pretrained(tiny_llama)
    attach(fresh, LORA, seed=5)
    load_adapter_state(fresh, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in _state(fresh).items())


def _wider_model() -> Any:
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


@BOTH
def test_another_backbone_is_named_as_the_reason_and_stays_untouched(
    model: Any, tmp_path: Path, config: MethodConfig
) -> None:
    _trained(model, config)
    save_adapter(model, config, tmp_path, base=BASE)
    other = _wider_model()
    with pytest.raises(AdapterError, match=r"backbone of other sizes.*in the file.*in the model.* more$") as caught:
        load_adapter(other, tmp_path)
    assert caught.value.hint == "its backbone is org/base"
    assert adapted_modules(other) == {}


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_missing_and_left_over_tensors_are_listed_and_nothing_is_assigned(
    model: Any, tmp_path: Path, change: str
) -> None:
    _trained(model, TREE)
    save_adapter(model, TREE, tmp_path, base=BASE)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    if change == "missing":
        name = sorted(tensors)[0]
        del tensors[name]
    else:
        name = "model.layers.9.mlp.up_proj.A.0"
        tensors[name] = torch.zeros(1)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with torch.no_grad():
        for parameter in adapted_modules(model)["model.layers.1.mlp.up_proj"].adapters.parameters():
            parameter.zero_()
    before = _state(model)
    with pytest.raises(AdapterError, match=name):
        load_adapter_state(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in _state(model).items())


def _break(folder: Path, how: str) -> None:
    config = folder / CONFIG_FILE
    if how == "no config":
        config.unlink()
    elif how == "no weights":
        (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    elif how == "cut weights":
        (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:100])
    elif how == "cut config":
        config.write_text(config.read_text()[:20])
    elif how == "foreign config":
        config.write_text("{}")
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"of_the_future": 1}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "has no adapter_config.json"),
        ("no weights", "has no adapter_model.safetensors"),
        ("cut weights", "is damaged"),
        ("cut config", "is not JSON"),
        ("foreign config", "names neither a method nor a peft_type"),
        ("future config", "of_the_future: Extra inputs are not permitted"),
    ],
)
def test_damaged_folders_are_one_clear_line(
    model: Any, tiny_llama: Path, tmp_path: Path, how: str, message: str
) -> None:
    attach(model, TREE)
    save_adapter(model, TREE, tmp_path, base=BASE)
    _break(tmp_path, how)
    fresh = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(fresh, tmp_path)
    assert "\n" not in caught.value.message
    assert adapted_modules(fresh) == {}


def test_a_missing_folder_is_one_clear_line(model: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="nowhere does not exist"):
        load_adapter(model, tmp_path / "nowhere")
