"""`modules_to_save` on disk: as PEFT writes and reads it, merged, and beside a quantised backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from smore_cli.errors import AdapterError
from smore_cli.merging.dense import fold
from smore_cli.methods.lora import LoRAConfig
from smore_cli.methods.smore import SMoREConfig
from smore_cli.models.adapter_files import CONFIG_FILE, WEIGHTS_FILE, load_adapter, save_adapter
from smore_cli.models.load import load_backbone
from smore_cli.nn import adapted_modules, attach
from smore_cli.nn.full_copy import FullCopy
from smore_cli.recipe.schema import ModelConfig, QuantizationConfig

IDS = torch.arange(3, 43).view(2, 20)
# PEFT warns that tied modules are trained apart, which is what is meant here and there.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # read by PEFT
]
SAVED = ["embed_tokens", "lm_head", "model.norm"]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    sizes: dict[str, Any] = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True, initializer_range=0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def randomised(model: Any, config: Any, seed: int = 1) -> Any:
    """Attaches an adapter and moves everything that trains a little."""
    attach(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("base", ["tiny_llama", "tied"])
@pytest.mark.parametrize("saved", [SAVED, ["embed_tokens"], ["lm_head"]], ids=["all", "embed", "head"])
def test_peft_loads_what_we_save_and_a_merged_model_is_the_same(
    base: str, saved: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(base)
    config = LoRAConfig(rank=2, target_modules=["q_proj", "down_proj"], modules_to_save=saved)
    model = randomised(loaded(folder), config)
    expected = logits(model)
    save_adapter(model, config, tmp_path / "a", base=ModelConfig(name_or_path=str(folder)))
    theirs = PeftModel.from_pretrained(loaded(folder), tmp_path / "a")
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
    ours = loaded(folder)
    assert load_adapter(ours, tmp_path / "a").modules_to_save == saved
    assert torch.equal(logits(ours), expected)
    assert fold(model) == 4
    model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["tiny_llama", "tied"])
def test_we_load_what_peft_saves(base: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(base)
    settings = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    theirs = get_peft_model(loaded(folder), settings)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    expected = logits(theirs.eval())
    theirs.save_pretrained(tmp_path)
    ours = loaded(folder)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)


def test_a_merged_adapter_of_a_tied_output_head_leaves_the_embedding_alone(tied: Path, tmp_path: Path) -> None:
    model = randomised(loaded(tied), LoRAConfig(rank=2, target_modules=["lm_head"]))
    expected, embedding = logits(model), model.get_input_embeddings().weight.clone()
    fold(model)
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(again.get_input_embeddings().weight, embedding)
    assert again.config.tie_word_embeddings is False


def test_a_routed_adapter_keeps_the_tensors_under_their_own_names(tiny_llama: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = {"rank": [2, 2], "router_dim": 4, "key_dim": 4, "target_modules": ["up_proj"]}
    config = SMoREConfig(**small, modules_to_save=SAVED)
    model = randomised(loaded(tiny_llama), config)
    save_adapter(model, config, tmp_path, base=ModelConfig(name_or_path=str(tiny_llama)))
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} < tensors.keys()
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["modules_to_save"] == SAVED
    again = loaded(tiny_llama)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("bits", [4, 8])
def test_beside_quantised_maps_what_is_not_quantised_trains_and_what_is_does_not(tiny_llama: Path, bits: Any) -> None:
    config, settings = ModelConfig(name_or_path=str(tiny_llama)), QuantizationConfig(bits=bits)
    model = load_backbone(config, settings, torch.device("cpu")).model
    with pytest.raises(AdapterError, match="up_proj is quantised, and whole numbers cannot be trained"):
        attach(model, LoRAConfig(rank=2, target_modules=["q_proj"], modules_to_save=["up_proj"]))
    attach(model, LoRAConfig(rank=2, modules_to_save=SAVED))
    copies = [
        m.adapter("default") for m in adapted_modules(model).values() if isinstance(m.adapter("default"), FullCopy)
    ]
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert len(copies) == 3
    assert all(p.grad is not None and p.grad.any() for each in copies for p in each.parameters())
