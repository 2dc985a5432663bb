"""A GGUF file as a backbone: the weights of the file, its tokenizer, converted once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from smore_cli.errors import ModelError
from smore_cli.models.load import load_backbone
from smore_cli.models.source import find_source
from smore_cli.recipe.schema import ModelConfig, QuantizationConfig
from tests.models.gguf_files import write_gguf

CPU = torch.device("cpu")


def test_a_gguf_file_is_dequantised_once_and_then_a_backbone_like_any_other(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMORE_CACHE", str(tmp_path / "cache"))
    written = write_gguf(tiny_llama, tmp_path / "tiny.gguf")
    config = ModelConfig(name_or_path=str(tmp_path / "tiny.gguf"))
    backbone = load_backbone(config, device=CPU)
    assert "converting tiny.gguf once" in capsys.readouterr().err
    state = backbone.model.state_dict()
    assert backbone.model.dtype == torch.float32
    compared = [name for name in written if "q_proj" not in name and "k_proj" not in name]
    assert len(compared) == 12
    for name in compared:
        np.testing.assert_array_equal(state[name].numpy(), written[name])
    plain = load_backbone(ModelConfig(name_or_path=str(tiny_llama)), device=CPU)
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():  # q and k are in their order again, or the two would say quite different things
        mine, theirs = (each.model(input_ids=ids).logits.log_softmax(-1) for each in (backbone, plain))
    assert (theirs.exp() * (theirs - mine)).sum(-1).mean() < 1e-3
    text = "Question: what? <|im_end|>"
    assert backbone.tokenizer(text).input_ids == AutoTokenizer.from_pretrained(tiny_llama)(text).input_ids
    assert backbone.tokenizer.chat_template and backbone.tokenizer.pad_token == "<|pad|>"

    folder = find_source(config).name
    assert capsys.readouterr().err == ""  # from the cache
    half = find_source(ModelConfig(name_or_path=config.name_or_path, dtype="bfloat16")).name
    assert (
        half != folder
        and Path(half, "model.safetensors").stat().st_size < Path(folder, "model.safetensors").stat().st_size
    )
    four_bit = load_backbone(config, QuantizationConfig(), CPU).model
    assert type(four_bit.get_submodule("model.layers.0.mlp.up_proj")).__name__ == "Linear4bit"


def test_a_gguf_file_that_cannot_be_read_is_one_line_and_leaves_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMORE_CACHE", str(tmp_path / "cache"))
    write_gguf(tiny_llama, tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 4])
    (tmp_path / "other.gguf").write_bytes(b"PK" + whole)
    expected = {"cut": "cannot be read", "other": "is no GGUF file", "tinny": "does not exist"}
    for name, message in expected.items():
        with pytest.raises(ModelError, match=message) as caught:
            find_source(ModelConfig(name_or_path=str(tmp_path / f"{name}.gguf")))
        assert "\n" not in caught.value.message and caught.value.hint
    assert list((tmp_path / "cache" / "models").glob("[!.]*")) == []
