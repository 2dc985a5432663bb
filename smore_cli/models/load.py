"""Loading a frozen backbone and its tokenizer, every failure as one line."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smore_cli.errors import ModelError
from smore_cli.kernels import use as use_kernels
from smore_cli.models.device import default_device, resolve_dtype
from smore_cli.models.placement import device_map_of, require_no_offload
from smore_cli.models.quantised import bitsandbytes_config, make_trainable
from smore_cli.models.quiet import quiet
from smore_cli.models.source import ModelSource, find_source, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from smore_cli.recipe.schema import ModelConfig, QuantizationConfig

__all__ = [
    "Backbone",
    "default_device",
    "load_backbone",
    "load_skeleton",
    "load_tokenizer",
    "require_usable",
    "resolve_dtype",
]

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "tekken.json")


@dataclass(frozen=True)
class Backbone:
    """A frozen causal language model, ready for adapters.

    Attributes:
        model: in evaluation mode, no parameter requires a gradient.
        tokenizer: with a pad token.
        source: the folder or hub name it came from.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str


def load_backbone(
    config: ModelConfig, quantization: QuantizationConfig | None = None, device: torch.device | None = None
) -> Backbone:
    """Loads a backbone, in 4 or 8 bits if asked, and over several GPUs if asked.

    Args:
        config: which model, and its compute type.
        quantization: None: the weights are in the compute type. Otherwise linear maps are quantised, and embeddings,
            norms and the output head stay in the compute type: the same in training, evaluation and after a reload.
        device: default: the first CUDA device, else the CPU.

    Raises:
        ModelError: no such model, not a causal language model, damaged or incomplete weights, no attention kernel, or
            it does not fit on the GPUs.
    """
    from transformers import AutoModelForCausalLM

    use_kernels()
    device = device or default_device()
    dtype = resolve_dtype(config, device)
    _check_attention(config, device)
    device_map = device_map_of(config, device)
    source = find_source(config)
    settings = _read_config(source)
    tokenizer = _read_tokenizer(source, settings)  # before the weights: what fails should fail in the first second
    with quiet(), _one_line(source):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.name,
            config=settings,
            revision=source.revision,
            local_files_only=source.local,
            trust_remote_code=False,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            quantization_config=bitsandbytes_config(quantization, dtype),
            device_map=device_map,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model, info = loaded
    _require_all_weights(source, info)
    require_no_offload(source.name, getattr(model, "hf_device_map", None))
    make_trainable(model)
    model.requires_grad_(False)
    model.eval()
    return Backbone(model, tokenizer, source.name)


def require_usable(config: ModelConfig, device: torch.device) -> None:
    """Refuses what the machine cannot do, before anything is read.

    Raises:
        ModelError: no such attention kernel here, or not the devices to spread a model over.
    """
    _check_attention(config, device)
    device_map_of(config, device)


def load_skeleton(config: ModelConfig) -> PreTrainedModel:
    """Returns a backbone without its weights, made from config.json alone: modules and shapes, on the meta device.

    Raises:
        ModelError: no such model, or not a causal language model.
    """
    from transformers import AutoModelForCausalLM

    source = find_source(config)
    settings = _read_config(source)
    with quiet(), _one_line(source), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(settings)
    return model


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Loads only the tokenizer, with a pad token.

    Raises:
        ModelError: no such model, or it has no tokenizer.
    """
    source = find_source(config)
    return _read_tokenizer(source, _read_config(source))


def _read_config(source: ModelSource) -> PreTrainedConfig:
    """Reads config.json and refuses what is no causal language model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    with quiet(), _one_line(source):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source.name, revision=source.revision, local_files_only=source.local, trust_remote_code=False
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = config.model_type or type(config).__name__
        raise ModelError(f"model {source.name} is of type '{kind}', which is not a causal language model")
    return config


def _read_tokenizer(source: ModelSource, settings: PreTrainedConfig) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    folder = Path(source.name)
    if source.local and folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelError(f"model folder {source.name} has no tokenizer", "put its tokenizer files there")
    with quiet(), _one_line(source, what="tokenizer of model"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.name, revision=source.revision, local_files_only=source.local, trust_remote_code=False
        )
    _define_padding(tokenizer, settings.get_text_config().vocab_size, source)
    return tokenizer


def _define_padding(tokenizer: PreTrainedTokenizerBase, num_embeddings: int, source: ModelSource) -> None:
    """Uses the tokenizer's own pad token, or else EOS: padding is masked everywhere, so its id only has to exist."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id < num_embeddings:
        return
    if tokenizer.eos_token is None:
        raise ModelError(f"tokenizer of model {source.name} has neither a pad nor an EOS token", "set one of them")
    tokenizer.pad_token = tokenizer.eos_token


def _require_all_weights(source: ModelSource, info: dict[str, Any]) -> None:
    """Refuses what transformers only warns about: tensors that would be left at random numbers."""
    hint = "config.json and the weights do not belong together, or some files are missing"
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"model {source.name}: the files lack {len(missing)} tensors, as {missing[0]}", hint)
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        sizes = f"{name} is {tuple(found)} in the files, {tuple(wanted)} by config.json"
        raise ModelError(f"model {source.name}: {len(mismatched)} tensors have another size, as {sizes}", hint)


def _check_attention(config: ModelConfig, device: torch.device) -> None:
    if config.attn_implementation == "flex_attention" and device.type == "cpu":
        problem = "model.attn_implementation: flex_attention has no backward pass on a CPU"
        raise ModelError(problem, "use sdpa")
    if config.attn_implementation != "flash_attention_2":
        return
    from transformers.utils.import_utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        problem = "model.attn_implementation: flash_attention_2 needs the package flash-attn and a CUDA device"
        raise ModelError(problem, "use sdpa, which needs neither")


@contextmanager
def _one_line(source: ModelSource, what: str = "model") -> Iterator[None]:
    """Turns what transformers raises for unusable files into one line; the whole story stays as its cause."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        problem = f"{what} {source.name}: damaged weights ({one_line(error)})"
        raise ModelError(problem, "get the files again") from error
    except (OSError, ValueError, ImportError, RuntimeError, StrictDataclassError) as error:
        raise ModelError(f"{what} {source.name}: {one_line(error)}", _hint(error)) from error


def _hint(error: Exception) -> str:
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "use a smaller model, bfloat16, or `quantization:`"
    if "trust_remote_code" in text:
        return "models that bring their own code are not supported"
    return ""
