"""Adapters of other programs that cannot be converted: refused in one line, by name, with nothing written."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from smore_cli.errors import AdapterError, ModelError, UsageError
from smore_cli.models.originals import import_adapter
from smore_cli.models.runs import open_run
from tests.models.original_adapters import (
    FFN,
    mixlora_tensors,
    moe_peft_values,
    plugin_tensors,
    smore_tensors,
    smore_values,
    trex_tensors,
    trex_values,
    write,
)

if TYPE_CHECKING:
    from torch import Tensor


@pytest.fixture
def mola(tiny_llama: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return moe_peft_values(tiny_llama, "MOLA", ("v_proj",)), plugin_tensors("mola", ("v_proj",))


GATE = "mola.layers.0.self_attn.v_proj.moe_gate.weight"
EXPERT = "mola.layers.1.self_attn.v_proj.experts.2.lora_B.weight"


def assert_refused(folder: Path, out: Path, *parts: str, **options: Any) -> None:
    """The reason has all the parts, is one line, and nothing was written."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(UsageError) as caught:
        import_adapter(folder, out, **options)
    assert "\n" not in caught.value.message
    for part in (str(folder), *parts):
        assert part in caught.value.message
    assert sorted(folder.parent.iterdir()) == before


def test_an_unknown_tensor_is_refused_by_name(mola: Any, tmp_path: Path) -> None:
    values, tensors = mola
    folder = write(tmp_path / "theirs", values, tensors | {"classifier": torch.zeros(2, 32)})
    assert_refused(folder, tmp_path / "ours", "'classifier' is not a tensor")


def test_a_missing_expert_or_gate_is_refused_by_name(mola: Any, tmp_path: Path) -> None:
    values, tensors = mola
    without = {name: tensor for name, tensor in tensors.items() if name != EXPERT}
    folder = write(tmp_path / "theirs", values, without)
    assert_refused(folder, tmp_path / "ours", "model.layers.1.self_attn.v_proj", "lora_B of expert 2 is missing")
    without = {name: tensor for name, tensor in tensors.items() if name != GATE}
    folder = write(tmp_path / "gateless", values, without)
    assert_refused(folder, tmp_path / "ours", "model.layers.0.self_attn.v_proj.router.weight is missing")


def test_settings_that_contradict_the_tensors_are_refused(mola: Any, tmp_path: Path) -> None:
    values, tensors = mola
    folder = write(tmp_path / "theirs", values | {"num_experts": 5}, tensors)
    assert_refused(folder, tmp_path / "ours", "do not fit", "v_proj.A is (12, 32)", "make it (15, 32)")


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"use_dora": True}, ["use_dora"]),
        ({"bias": "all"}, ["adapter_config.json sets bias"]),
        ({"a_router_of_next_year": 1}, ["adapter_config.json sets a_router_of_next_year"]),
        ({"top_k": 9}, ["top_k: 9 experts cannot be picked from 4"]),
        ({"r": "three"}, ["rank: "]),
        ({"lora_alpha": None}, ["a setting is of the wrong kind"]),
        ({"peft_type": "LOHA"}, ["LOHA"]),
        ({"peft_type": "MIXLORA", "routing_strategy": "mixlora"}, ["not a tensor of the released MixLoRA layouts"]),
    ],
)
def test_settings_that_are_not_known_are_refused_by_name(
    mola: Any, tmp_path: Path, more: dict[str, Any], parts: list[str]
) -> None:
    values, tensors = mola
    assert_refused(write(tmp_path / "theirs", values | more, tensors), tmp_path / "ours", *parts)


def test_a_missing_setting_is_refused_by_name(mola: Any, tmp_path: Path) -> None:
    values, tensors = mola
    values.pop("lora_alpha")
    assert_refused(write(tmp_path / "theirs", values, tensors), tmp_path / "ours", "lacks 'lora_alpha'")


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"routing_strategy": "mixlora-dynamic", "top_p": 0.8}, "'mixlora-dynamic' is not read: it multiplies"),
        ({"routing_strategy": "mixlora-switch"}, "'mixlora-switch' is not read"),
        ({"act_fn": "gelu_new"}, "its experts use 'gelu_new', the backbone uses 'silu'"),
        ({"expert_lora": {"r": 2}}, "expert_lora: experts of another rank"),
    ],
)
def test_a_mixlora_that_computes_something_else_is_refused(
    tiny_llama: Path, tmp_path: Path, more: dict[str, Any], part: str
) -> None:
    values = moe_peft_values(tiny_llama, "MIXLORA", (*FFN, "q_proj"), **{"routing_strategy": "mixlora", **more})
    assert_refused(write(tmp_path / "theirs", values, mixlora_tensors()), tmp_path / "ours", part)


def test_experts_may_have_settings_of_their_own_where_there_is_no_other_lora(tiny_llama: Path, tmp_path: Path) -> None:
    values = moe_peft_values(tiny_llama, "MIXLORA", FFN, routing_strategy="mixlora", r=7, expert_lora={"r": 3})
    tensors = {name: tensor for name, tensor in mixlora_tensors().items() if "self_attn" not in name}
    settings: Any = import_adapter(write(tmp_path / "theirs", values, tensors), tmp_path / "ours").config
    assert (settings.rank, settings.alpha, settings.target_modules) == (3, 6.0, ["mlp"])


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"gate_arch": "linear"}, "gate_arch: 'linear' is not read"),
        ({"gate_dims": [5, 6]}, "gate_dims: [5, 6] differ"),
        ({"gate_type": "soft"}, "gate: "),
        ({"num_active": [9, 2]}, "fanout: 9 children cannot be picked"),
    ],
)
def test_a_smore_variant_that_is_not_known_is_refused(
    tiny_llama: Path, tmp_path: Path, more: dict[str, Any], part: str
) -> None:
    tensors = smore_tensors(smore_values(tiny_llama))
    folder = write(tmp_path / "theirs", smore_values(tiny_llama, **more), tensors, pickled=False)
    assert_refused(folder, tmp_path / "ours", part)


def test_copies_of_a_shared_pool_that_differ_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    values = smore_values(tiny_llama, is_shared_expert_pool=True, num_experts=[3, 3], expert_dims=[2, 2])
    tensors = smore_tensors(values)
    tensors["base_model.model.model.layers.1.mlp.up_proj.moe_B.1"] += 1
    folder = write(tmp_path / "theirs", values, tensors, pickled=False)
    assert_refused(
        folder, tmp_path / "ours", "model.layers.1.mlp.up_proj.B.1 differs from model.layers.1.mlp.up_proj.B.0"
    )


def test_a_trex_adapter_needs_its_centroids_one_for_each_pair(tiny_llama: Path, tmp_path: Path) -> None:
    folder, out = write(tmp_path / "theirs", trex_values(tiny_llama), trex_tensors()), tmp_path / "ours"
    assert_refused(folder, out, "is nothing without its centroids")
    torch.save(torch.randn(5, 7), tmp_path / "five.pt")
    assert_refused(folder, out, "prior.centroids is (5, 7)", centroids=tmp_path / "five.pt")
    other = write(tmp_path / "r32", trex_values(tiny_llama, r=32), trex_tensors())
    assert_refused(other, out, "r is 32, and lora_A and lora_B make 2 x 3 pairs", centroids=tmp_path / "five.pt")


def test_centroids_for_another_method_are_refused(mola: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", *mola)
    assert_refused(folder, tmp_path / "ours", "only a T-REX adapter has centroids", centroids=tmp_path / "c.pt")


class Attack:
    """Touches a file when it is unpickled by a loader that allows that."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def _pickle(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize(("save", "part"), [(torch.save, "holds more than tensors"), (_pickle, "is damaged")])
def test_a_file_that_would_run_code_is_refused_and_does_not_run_it(
    mola: Any, tmp_path: Path, save: Any, part: str
) -> None:
    folder = write(tmp_path / "theirs", *mola)
    save({"x": Attack(tmp_path / "touched")}, folder / "adapter_model.bin")
    assert_refused(folder, tmp_path / "ours", part)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("pickled", [True, False])
def test_a_truncated_file_is_refused_in_one_line_wherever_it_ends(mola: Any, tmp_path: Path, pickled: bool) -> None:
    folder = write(tmp_path / "theirs", *mola, pickled=pickled)
    path = folder / ("adapter_model.bin" if pickled else "adapter_model.safetensors")
    whole = path.read_bytes()
    for end in [0, 1, 3, 4, 9, 100, *range(500, len(whole), len(whole) // 12), len(whole) - 1]:
        path.write_bytes(whole[:end])
        assert_refused(folder, tmp_path / "ours", "is damaged")
    path.write_bytes(whole)
    import_adapter(folder, tmp_path / "ours")


def test_what_is_not_a_table_of_finite_tensors_is_refused(mola: Any, tmp_path: Path) -> None:
    values, tensors = mola
    folder = write(tmp_path / "theirs", values, tensors)
    for content, part in [
        ([1, 2], "holds no tensors by name"),
        ({"x": "text"}, "'x' is not a tensor"),
        ({"x": torch.ones(2, dtype=torch.int64)}, "'x' is not a tensor of floating-point numbers"),
        (tensors | {GATE: tensors[GATE] * math.nan}, f"some numbers of {GATE} are not finite"),
    ]:
        torch.save(content, folder / "adapter_model.bin")
        assert_refused(folder, tmp_path / "ours", part)
    (folder / "adapter_model.bin").unlink()
    assert_refused(folder, tmp_path / "ours", "has neither adapter_model.safetensors nor adapter_model.bin")


def test_an_existing_output_or_an_adapter_of_our_own_is_refused(mola: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", *mola)
    import_adapter(folder, tmp_path / "ours")
    with pytest.raises(UsageError, match="already exists"):
        import_adapter(folder, tmp_path / "ours")
    with pytest.raises(AdapterError, match="one of smore's own"):
        import_adapter(tmp_path / "ours", tmp_path / "again")


def test_a_backbone_that_is_not_there_or_does_not_fit_is_named(mola: Any, tiny_llama: Path, tmp_path: Path) -> None:
    values, tensors = mola
    folder = write(tmp_path / "theirs", values | {"base_model_name_or_path": "/nowhere/llama"}, tensors)
    with pytest.raises(ModelError, match="/nowhere/llama") as caught:
        import_adapter(folder, tmp_path / "ours")
    assert "--base" in caught.value.hint
    import_adapter(folder, tmp_path / "ours", base=str(tiny_llama))
    elsewhere = {name.replace("layers.1", "layers.5"): tensor for name, tensor in tensors.items()}
    folder = write(tmp_path / "layers", values, elsewhere)
    assert_refused(folder, tmp_path / "x", "no module for model.layers.5.self_attn.v_proj", base=str(tiny_llama))


def test_an_adapter_that_must_be_converted_first_says_so_when_it_is_used(mola: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", *mola, pickled=False)
    with pytest.raises(AdapterError, match="MOLA") as caught:
        open_run(folder).load(torch.device("cpu"))
    assert f"smore import {folder}" in caught.value.hint
