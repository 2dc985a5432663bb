"""An adapter folder from a stranger: nothing in it is run, no path in it is followed, no size in it is believed."""

from __future__ import annotations

import json
import os
import pickle
import resource
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from smore_cli.errors import AdapterError
from smore_cli.methods.lora import LoRAConfig
from smore_cli.methods.smore import SMoREConfig
from smore_cli.models.adapter_files import AdapterFolder, load_adapter, save_adapter
from smore_cli.nn import adapted_modules, attach
from smore_cli.recipe.schema import ModelConfig

if TYPE_CHECKING:
    from pathlib import Path

    from smore_cli.methods import MethodConfig

ROUTED = SMoREConfig(rank=[2], num_experts=[3], fanout=[2])
PLAIN = LoRAConfig(rank=2)


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


def _folder(folder: Path, base: Path, config: MethodConfig, **changed: Any) -> Path:
    """Writes an adapter, with some of its settings changed afterwards."""
    adapted = AutoModelForCausalLM.from_pretrained(base)
    attach(adapted, config)
    save_adapter(adapted, config, folder, base=ModelConfig(name_or_path=str(base)))
    values = json.loads((folder / "adapter_config.json").read_text()) | changed
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def _refused(model: Any, folder: Path, named: str) -> None:
    with pytest.raises(AdapterError, match=named) as caught:
        load_adapter(model, folder)
    assert "\n" not in caught.value.message
    assert adapted_modules(model) == {}  # the model is as it was


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_pickle_in_place_of_the_weights_is_not_run(model: Any, tiny_llama: Path, tmp_path: Path, name: str) -> None:
    folder = _folder(tmp_path / "adapter", tiny_llama, ROUTED)
    (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(_Bomb(tmp_path / "mark")))
    _refused(model, folder, "is damaged|has no adapter_model.safetensors")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("config", [ROUTED, PLAIN], ids=["routed", "peft"])
def test_names_that_climb_out_of_the_folder_are_only_names(
    model: Any, tiny_llama: Path, tmp_path: Path, config: MethodConfig
) -> None:
    folder = _folder(tmp_path / "in/adapter", tiny_llama, config)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in ("../../escaped.lora_A.weight", "/etc/escaped", "base_model.model.../../escaped.lora_A.weight"):
        tensors[name] = torch.zeros(2, 2)
    save_file(tensors, file)
    before = sorted(tmp_path.rglob("*"))
    _refused(model, folder, "escaped")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        (ROUTED, {"rank": [10**9]}),
        (ROUTED, {"num_experts": [10**10]}),
        (PLAIN, {"r": 10**12}),
    ],
    ids=["rank", "experts", "peft rank"],
)
def test_an_absurd_size_takes_no_memory(
    model: Any, tiny_llama: Path, tmp_path: Path, config: MethodConfig, changed: dict[str, Any]
) -> None:
    folder = _folder(tmp_path / "adapter", tiny_llama, config, **changed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _refused(model, folder, r"asks for [\d,]{9,} numbers, its file holds")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_shapes_that_do_not_fit_change_nothing(model: Any, tiny_llama: Path, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "adapter", tiny_llama, ROUTED)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    save_file(tensors | {first: torch.zeros(100, 100)}, file)
    _refused(model, folder, "backbone of other sizes")


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"method": "../../../evil"}', '{"method": ["smore"]}', '{"peft_type": ["LORA"], "r": 1}', "[]"],
    ids=["deep", "path", "list", "peft list", "no table"],
)
def test_a_config_of_any_kind_is_one_line(model: Any, tiny_llama: Path, tmp_path: Path, text: str) -> None:
    from smore_cli.errors import UsageError

    folder = _folder(tmp_path / "adapter", tiny_llama, ROUTED)
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(UsageError) as caught:
        load_adapter(model, folder)
    assert "\n" not in caught.value.message
    assert adapted_modules(model) == {}


def test_a_backbones_name_of_another_type_is_read_as_text(tiny_llama: Path, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "adapter", tiny_llama, ROUTED, revision=["x"], base_model_name_or_path={"a": 1})
    assert AdapterFolder.open(folder).base.revision == "['x']"
