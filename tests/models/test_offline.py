"""Nothing here asks the hub: not loading, not training, not saving, not merging, wherever the model is from."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from transformers import AutoModelForCausalLM

from smore_cli.merging.merge import merge
from smore_cli.methods import MethodConfig
from smore_cli.methods.lora import LoRAConfig
from smore_cli.methods.smore import SMoREConfig
from smore_cli.models.adapter_files import AdapterFolder, save_adapter
from smore_cli.models.runs import open_run
from smore_cli.models.source import find_source
from smore_cli.nn import attach
from smore_cli.recipe import Recipe, dump_recipe
from smore_cli.recipe.schema import DataConfig, ModelConfig, Source, TrainConfig
from smore_cli.training.loop import train

CPU = torch.device("cpu")
HUB_NAME = "some-org/tiny-llama"
LORA = LoRAConfig(rank=2, modules_to_save=["embed_tokens", "model.norm"])


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No host's address is known, no connection leaves; the hub's own offline switch is off, so it could try.

    Returns what was asked for, to which the tests' calls are added.
    """
    asked: list[str] = []

    def refuse(*arguments: object, **__: object) -> NoReturn:
        asked.append(str(arguments))
        raise OSError("the network was asked")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


def recipe(model: str, folder: Path, adapter: MethodConfig) -> Recipe:
    return Recipe(
        version=1,
        model=ModelConfig(name_or_path=model),
        adapter=adapter,
        data=DataConfig(train=[Source(path="quickstart", format="multiple_choice")], max_length=256, template="plain"),
        train=TrainConfig(max_steps=2, per_device_batch_size=2, save_steps=1),
        output_dir=str(folder),
    )


@pytest.mark.parametrize("adapter", [LORA, SMoREConfig(rank=[2], num_experts=[3], fanout=[2])], ids=["lora", "smore"])
def test_a_local_model_is_trained_saved_loaded_and_merged_without_asking_the_network(
    adapter: MethodConfig, tiny_llama: Path, tmp_path: Path, no_network: list[str]
) -> None:
    settings = recipe(str(tiny_llama), tmp_path / "run", adapter)
    train(settings, dump_recipe(settings))
    model, _ = open_run(tmp_path / "run").load(CPU)
    open_run(tmp_path / "run" / "checkpoint-1").load(CPU)
    if not adapter.routed:
        merged = merge(tmp_path / "run", tmp_path / "merged", device=CPU)
        assert merged.difference.mean_kl < 1e-6
    assert model.device == CPU
    assert no_network == []


def test_the_adapter_of_a_hub_model_is_saved_loaded_and_merged_from_the_cache_alone(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[str]
) -> None:
    commit = "0" * 40
    cached = tmp_path / "hub" / f"models--{HUB_NAME.replace('/', '--')}"
    shutil.copytree(tiny_llama, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    settings, adapter = recipe(HUB_NAME, tmp_path / "run", LoRAConfig(rank=2)), LoRAConfig(rank=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "resolved.yaml").write_text(dump_recipe(settings))
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
    attach(model, adapter)
    model.config._name_or_path = HUB_NAME  # what PEFT would look up on the hub to see whether the vocabulary has grown
    save_adapter(model, adapter, tmp_path / "run", base=settings.model)
    assert no_network == []
    assert AdapterFolder.open(tmp_path / "run").base.name_or_path == HUB_NAME
    find_source(settings.model)  # asks once whether the hub is there
    alone = len(no_network)
    open_run(tmp_path / "run").load(CPU)
    assert 0 < len(no_network) - alone <= alone  # so once more; transformers would go on with 23 seconds of retries
    assert merge(tmp_path / "run", tmp_path / "merged", device=CPU).linears == 14
