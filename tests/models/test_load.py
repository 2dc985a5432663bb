"""Loading backbones: what comes out, and one clear line for everything that cannot be loaded."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from smore_cli.errors import ModelError
from smore_cli.models.load import load_backbone, load_tokenizer, resolve_dtype
from smore_cli.recipe.schema import ModelConfig, QuantizationConfig

CPU = torch.device("cpu")
IDS = torch.arange(3, 43).view(2, 20)


def _config(folder: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(name_or_path=str(folder), **settings)


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def _set(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_backbone_is_frozen_in_evaluation_mode_and_computes_what_transformers_computes(tiny_llama: Path) -> None:
    backbone = load_backbone(_config(tiny_llama), device=CPU)
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not backbone.model.training
    assert backbone.source == str(tiny_llama)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    with torch.no_grad():
        assert torch.equal(backbone.model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_loading_a_local_folder_opens_no_connection(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_backbone(_config(tiny_llama), device=CPU)


def test_loading_is_silent(tiny_llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_backbone(_config(tiny_llama), QuantizationConfig(), CPU)
    assert capfd.readouterr() == ("", "")


def test_auto_dtype_is_float32_on_a_cpu_and_a_named_one_is_taken(tiny_llama: Path) -> None:
    assert load_backbone(_config(tiny_llama), device=CPU).model.dtype == torch.float32
    assert load_backbone(_config(tiny_llama, dtype="bfloat16"), device=CPU).model.dtype == torch.bfloat16
    assert resolve_dtype(ModelConfig(name_or_path="x"), CPU) == torch.float32


def test_attention_implementation_is_taken(tiny_llama: Path) -> None:
    backbone = load_backbone(_config(tiny_llama, attn_implementation="eager"), device=CPU)
    assert backbone.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_bit_backbone_passes_gradients_and_keeps_the_rest_in_the_compute_type(
    tiny_llama: Path, dtype: Any
) -> None:
    model = load_backbone(_config(tiny_llama, dtype=dtype), QuantizationConfig(), CPU).model
    kind = getattr(torch, dtype)
    linear = model.get_submodule("model.layers.0.mlp.up_proj")
    assert type(linear).__name__ == "Linear4bit"
    assert linear.weight.dtype == torch.uint8
    assert linear.weight.quant_type == "nf4"
    assert linear.compute_dtype == kind
    assert model.get_output_embeddings().weight.dtype == model.model.norm.weight.dtype == kind
    assert not any(parameter.requires_grad for parameter in model.parameters())
    hidden = model.get_input_embeddings()(IDS).requires_grad_()
    model(inputs_embeds=hidden).logits.float().square().sum().backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()
    assert hidden.grad.abs().max() > 0


def test_four_bit_layer_equals_its_dequantised_weight(tiny_llama: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    model = load_backbone(_config(tiny_llama), QuantizationConfig(type="fp4", double_quant=False), CPU).model
    linear = model.get_submodule("model.layers.1.mlp.down_proj")
    weight = dequantize_4bit(linear.weight, linear.weight.quant_state)
    x = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(linear(x), x @ weight.t(), rtol=1e-5, atol=1e-5)


def test_evaluating_a_four_bit_backbone_changes_neither_its_numbers_nor_its_gradients(tiny_llama: Path) -> None:
    model = load_backbone(_config(tiny_llama), QuantizationConfig(), CPU).model

    def in_training() -> tuple[torch.Tensor, torch.Tensor]:
        hidden = model.get_input_embeddings()(IDS).requires_grad_()
        logits = model.train()(inputs_embeds=hidden).logits
        logits.square().sum().backward()
        assert hidden.grad is not None
        return logits.detach(), hidden.grad

    logits, gradient = in_training()
    with torch.inference_mode():
        evaluated = model.eval()(input_ids=IDS).logits
    torch.testing.assert_close(evaluated, logits, rtol=1e-5, atol=1e-5)
    again, gradient_again = in_training()
    assert torch.equal(again, logits)
    assert torch.equal(gradient_again, gradient)


def test_tokenizer_alone_is_the_backbones_tokenizer(tiny_llama: Path) -> None:
    text = "Question: what?\nAnswer: é 你"
    plain = AutoTokenizer.from_pretrained(tiny_llama)
    assert load_tokenizer(_config(tiny_llama))(text).input_ids == plain(text).input_ids
    assert load_tokenizer(_config(tiny_llama)).pad_token == "<|pad|>"


def test_a_tokenizer_without_pad_token_pads_with_eos_and_no_embedding_is_added(copy: Path) -> None:
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    backbone = load_backbone(_config(copy), device=CPU)
    assert backbone.tokenizer.pad_token_id == backbone.tokenizer.eos_token_id
    assert backbone.model.get_input_embeddings().weight.shape[0] == 512


def test_a_pad_token_beyond_the_embedding_is_replaced_by_eos(copy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_special_tokens({"pad_token": "<|new_pad|>"})
    assert tokenizer.pad_token_id == 512
    tokenizer.save_pretrained(copy)
    assert load_tokenizer(_config(copy)).pad_token == "<|im_end|>"


def _cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


BROKEN = {
    "cut weights": (_cut, "damaged weights"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "cut config": (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
    "unknown type": (lambda folder: _set(folder, "config.json", model_type="of_the_future"), "of_the_future"),
    "wrong value": (
        lambda folder: _set(folder, "config.json", hidden_size="wide"),
        "hidden_size.*expected int, got str",
    ),
    "no language model": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'),
        "type 'vit', which is not a causal language model",
    ),
    "encoder-decoder": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'),
        "type 't5', which is not a causal language model",
    ),
    "other sizes": (
        lambda folder: _set(folder, "config.json", hidden_size=64),
        r"tensors have another size, as .* \(512, 32\) in the files, \(512, 64\) by config.json",
    ),
    "lacks a layer": (
        lambda folder: _set(folder, "config.json", num_hidden_layers=3),
        r"lack 9 tensors, as model\.layers\.2\.",
    ),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        "has no tokenizer",
    ),
    "cut tokenizer": (lambda folder: (folder / "tokenizer.json").write_text('{"a":'), "tokenizer of model"),
    "own code": (
        lambda folder: _set(folder, "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"}),
        "custom code",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_folder_that_cannot_be_loaded_is_one_clear_line(copy: Path, how: str) -> None:
    change, message = BROKEN[how]
    change(copy)
    with pytest.raises(ModelError, match=message) as caught:
        load_backbone(_config(copy), device=CPU)
    assert str(copy) in caught.value.message
    assert "\n" not in caught.value.message + caught.value.hint
    assert caught.value.exit_code == 2


def test_flash_attention_without_its_package_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="needs the package flash-attn"):
        load_backbone(_config(tiny_llama, attn_implementation="flash_attention_2"), device=CPU)


def test_flex_attention_is_refused_on_a_cpu_which_has_no_backward_pass_for_it(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="flex_attention has no backward pass on a CPU"):
        load_backbone(_config(tiny_llama, attn_implementation="flex_attention"), device=CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eight_bit_backbone_trains_alike_before_and_after_an_evaluation_and_says_nothing(
    tiny_llama: Path, dtype: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    model = load_backbone(_config(tiny_llama, dtype=dtype), QuantizationConfig(bits=8), CPU).model
    linear = model.get_submodule("model.layers.0.mlp.up_proj")
    assert type(linear).__name__ == "Linear8bitLt" and linear.weight.dtype == torch.int8
    assert model.get_output_embeddings().weight.dtype == getattr(torch, dtype)
    results = []
    for _ in range(2):
        hidden = model.get_input_embeddings()(IDS).requires_grad_()
        logits = model.train()(inputs_embeds=hidden).logits
        logits.float().square().sum().backward()
        assert hidden.grad is not None and hidden.grad.isfinite().all() and hidden.grad.any()
        results.append((logits.detach(), hidden.grad))
        with torch.inference_mode():
            error = model.eval()(input_ids=IDS).logits - logits  # other kernels: a last bit moves x by a whole step
        assert error.norm() < 0.05 * logits.norm()
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert capfd.readouterr() == ("", "")


_MEASURE = """
import re, sys, torch
from pathlib import Path
from smore_cli.models.load import load_backbone
from smore_cli.recipe.schema import ModelConfig
# Not getrusage, whose peak a process inherits from the one that started it.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
load_backbone(ModelConfig(name_or_path=sys.argv[1], dtype="bfloat16"), device=torch.device("cpu"))
before = peak()
model = load_backbone(ModelConfig(name_or_path=sys.argv[2], dtype="bfloat16"), device=torch.device("cpu")).model
touched = sum(float(p.flatten()[::512].sum()) for p in model.parameters())  # what is mapped from the file is then there
print((peak() - before) * 1024)
"""


@pytest.mark.slow  # a process of its own, whose peak memory nothing else has raised
def test_a_bfloat16_checkpoint_is_loaded_without_a_float32_copy(tiny_llama: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 4096}
    config = LlamaConfig(**sizes, num_hidden_layers=4, num_attention_heads=8, tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu").save_pretrained(tmp_path)
    for path in tiny_llama.glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    weights = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert weights > 250e6
    printed = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tiny_llama), str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert weights * 0.3 < int(printed.stdout) < weights * 1.5  # through float32 it would be twice the file at least
