"""A Llama or Mistral folder as a GGUF file, tensor by tensor.

names       model.layers.0.self_attn.q_proj -> blk.0.attn_q, ...
q and k     rows reordered: llama.cpp rotates neighbouring pairs of a head, transformers its two halves
types       matrices in the type asked for, vectors in float32
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open

from smore_cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter
    from torch import Tensor
    from transformers import PreTrainedConfig

    from smore_cli.exporting.gguf_tokenizer import GgufTokenizer

__all__ = ["NUMBERS", "GgufType", "LlamaNames", "gguf_bytes", "require_llama", "write_model"]

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
NUMBERS: dict[str, float] = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32}
"""Bytes of a number by type."""
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_FAMILIES = ("llama", "mistral")
_RENAMED = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
}


@dataclass(frozen=True)
class LlamaNames:
    """Names and layout of a model's tensors in llama.cpp.

    Attributes:
        heads: number of query heads.
        kv_heads: number of key and value heads.
    """

    heads: int
    kv_heads: int

    def name(self, path: str) -> str:
        """Returns llama.cpp's name of a tensor of transformers."""
        for ours, theirs in _RENAMED.items():
            path = path.replace(ours, theirs)
        return path

    def laid_out(self, path: str, tensor: Tensor) -> Tensor:
        """Returns the tensor with the rows of a q or k projection in llama.cpp's order."""
        heads = self.heads if ".q_proj." in path else self.kv_heads if ".k_proj." in path else None
        if heads is None:
            return tensor
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape).contiguous()


def require_llama(config: PreTrainedConfig) -> LlamaNames:
    """Returns the layout of a model.

    Raises:
        UsageError: it is of another family, or its positions are scaled in a way that is not written here.
    """
    if config.model_type not in _FAMILIES:
        problem = f"a '{config.model_type}' model is not written as gguf"
        raise UsageError(
            problem, f"these are: {', '.join(_FAMILIES)}; llama.cpp's own converter reads what --to hf writes"
        )
    rope = config.rope_parameters["rope_type"]
    if rope not in ("default", "linear", "llama3"):
        raise UsageError(f"positions scaled by '{rope}' are not written as gguf", "default, linear and llama3 are")
    if config.hidden_act != "silu":
        raise UsageError(f"llama.cpp's Llama has the activation silu, this model {config.hidden_act}", "use --to hf")
    return LlamaNames(config.num_attention_heads, config.num_key_value_heads)


def gguf_bytes(numbers: int, kind: str) -> int:
    """Returns about what so many numbers take."""
    return math.ceil(numbers * NUMBERS[kind])


def write_model(folder: Path, out: Path, kind: str, tokenizer: GgufTokenizer, name: str) -> None:
    """Writes a model folder as one GGUF file; one tensor is in memory at a time.

    Args:
        folder: config.json and safetensors of a Llama or Mistral.
        out: the file.
        kind: `NUMBERS` has the types.
        tokenizer: of the model.
        name: what the file says it is.
    """
    import gguf
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    names = require_llama(config)
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_name(name)
    _add_settings(writer, config)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
    tokenizer.write(writer)
    with ExitStack() as files:
        tensors = _Tensors(folder, files)
        made: list[tuple[str, Callable[[], Tensor]]] = [
            (names.name(path), partial(_read, names, tensors, path))
            for path in tensors.names
            if not (path == "lm_head.weight" and config.tie_word_embeddings)
        ]
        if config.rope_parameters["rope_type"] == "llama3":
            made.append(("rope_freqs.weight", lambda: _llama3_factors(config)))
        write_tensors(writer, made, kind)


def write_tensors(writer: GGUFWriter, made: list[tuple[str, Callable[[], Tensor]]], kind: str) -> None:
    """Writes a file whose metadata is complete, and closes it.

    Args:
        writer: of the file.
        made: names, and what makes each tensor: asked for its shape first, and for its numbers when it is written.
        kind: type of the matrices.
    """
    for name, make in made:
        array, stored = _stored(make(), kind)
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, make in made:
        writer.write_tensor_data(_stored(make(), kind)[0])
    writer.close()


def _stored(tensor: Tensor, kind: str) -> tuple[np.ndarray[Any, Any], GGMLQuantizationType]:
    """Returns a tensor's numbers as they are stored, and as what."""
    from gguf import GGMLQuantizationType, quants

    wide = tensor.float().numpy()
    chosen = kind if wide.ndim > 1 else "f32"
    if chosen == "q8_0" and wide.shape[-1] % 32:
        chosen = "f16"  # blocks of 32 do not fit: llama.cpp's converter falls back to the same
    stored = GGMLQuantizationType[chosen.upper()]
    return quants.quantize(wide, stored), stored


def _read(names: LlamaNames, tensors: _Tensors, path: str) -> Tensor:
    return names.laid_out(path, tensors.read(path))


class _Tensors:
    """The tensors of a model folder, read when they are asked for."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        self._of: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = files.enter_context(safe_open(path, framework="pt"))
            self._of |= dict.fromkeys(file.keys(), file)
        self.names = sorted(self._of)

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._of[name].get_tensor(name)
        return tensor


def _add_settings(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    rope = config.rope_parameters
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    # llama.cpp's Llama has no sliding window: up to the window's length there is no difference.
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if rope["rope_type"] == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _llama3_factors(config: PreTrainedConfig) -> Tensor:
    """Returns by what each frequency is divided (Llama 3.1): long waves by the factor, short by 1, smooth between."""
    rope = config.rope_parameters
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wave = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head, 2).double() / head)  # (head / 2,) tokens a turn
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / wave
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return factors.float()
