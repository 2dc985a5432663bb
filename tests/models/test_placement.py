"""A model over several devices: as far as a machine without several GPUs can tell, and what is refused there."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate import dispatch_model

from smore_cli.errors import ModelError
from smore_cli.methods.mixlora import MixLoRAConfig
from smore_cli.methods.smore import SMoREConfig
from smore_cli.models.load import load_backbone
from smore_cli.models.placement import device_map_of, gpus_of, require_no_offload
from smore_cli.nn import adapted_modules, attach, detach, factored, siblings
from smore_cli.recipe.schema import ModelConfig
from tests.contract.models import assert_same, backbone, logits, randomised, rows, token_ids
from tests.contract.test_gradients import step

if TYPE_CHECKING:
    from pathlib import Path

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
AUTO = ModelConfig(name_or_path="x", device_map="auto")


@pytest.mark.parametrize(
    "config",
    [
        SMoREConfig(rank=[2, 2], router_dim=4, key_dim=4, modules_to_save=["embed_tokens", "lm_head"]),
        MixLoRAConfig(rank=2, modules_to_save=["model.norm"]),
    ],
    ids=["smore", "mixlora"],
)
def test_a_dispatched_model_is_adapted_and_trained_as_one_that_is_not(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (factored, siblings):  # maps that accelerate has hooked are not fused, and here the others neither
        monkeypatch.setattr(module, "supports", lambda base: False)
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    plain, spread = copy.deepcopy(backbone("llama")), copy.deepcopy(backbone("llama"))
    spread = dispatch_model(spread, dict.fromkeys(parts, "cpu"), force_hooks=True)
    ids, results = token_ids(2, 7), []
    for model in (plain, spread):
        attach(model, config)
        randomised(model)
        results.append((step(model.train(), [rows(4)]), logits(model.eval(), ids)))
    (first, found), after = results[0]
    (second, again), after_again = results[1]
    assert torch.equal(first.loss, second.loss) and torch.equal(after, after_again)
    assert_same(found, again)
    moved = [path for path, module in adapted_modules(spread).items() if module._forward_pre_hooks]
    assert set(moved) == adapted_modules(spread).keys()  # each brings its input to its adapters
    detach(spread)
    assert torch.equal(logits(spread, ids), logits(backbone("llama"), ids))


def test_a_map_is_refused_where_it_cannot_help(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="over several GPUs, and this machine has none") as caught:
        load_backbone(ModelConfig(name_or_path=str(tiny_llama), device_map="auto"), device=CPU)
    assert caught.value.hint == "remove model.device_map"
    assert device_map_of(ModelConfig(name_or_path="x"), CPU) == {"": CPU}
    assert device_map_of(AUTO, GPU) == "auto"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ModelError, match="gives all GPUs to one process, and there are 2"):
        device_map_of(AUTO, GPU)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_parts_that_do_not_fit_on_the_gpus_are_refused(place: str) -> None:
    require_no_offload("m", {"model": 0, "lm_head": 1})
    require_no_offload("m", {"": CPU})
    require_no_offload("m", None)
    with pytest.raises(ModelError, match=r"does not fit on the GPUs: 1 of its parts, as model\.layers\.1, would stay"):
        require_no_offload("m", {"model.layers.0": 0, "model.layers.1": place})


def test_the_random_state_of_every_gpu_that_a_model_lies_on_is_kept() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = torch.nn.Linear(2, 2)
    assert gpus_of(model, CPU) == []
    with FakeTensorMode(allow_non_fake_inputs=True):  # tensors of GPUs that need not be there
        model.weight = torch.nn.Parameter(torch.empty(2, 2, device="cuda:2"))
        model.bias = torch.nn.Parameter(torch.empty(2, device="cuda:1"))
    assert gpus_of(model, GPU) == [0, 1, 2]
