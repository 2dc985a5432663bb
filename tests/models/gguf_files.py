"""Writing a tiny Llama as a GGUF file, as llama.cpp's own converter lays it out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType, GGUFWriter, quants
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from torch import Tensor

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


def write_gguf(model_folder: Path, path: Path) -> dict[str, np.ndarray]:
    """Writes a Llama folder with a byte-level BPE as GGUF, its matrices in Q8_0.

    Returns:
        The matrices as they are in the file, dequantised, by their names in the model (q and k still permuted).
    """
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    config = model.config
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, model_folder)
    written: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        short = name
        for ours, theirs in _NAMES.items():
            short = short.replace(ours, theirs)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        kind = name.split(".")[-2]
        array = (_permuted(tensor, heads[kind]) if kind in heads else tensor).numpy()
        if array.ndim == 1:
            writer.add_tensor(short, array)
            continue
        packed = quants.quantize(array, GGMLQuantizationType.Q8_0)
        written[name] = quants.dequantize(packed, GGMLQuantizationType.Q8_0)
        writer.add_tensor(short, packed, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _add_tokenizer(writer: GGUFWriter, folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    ids = tokenizer["model"]["vocab"] | {each["content"]: each["id"] for each in tokenizer["added_tokens"]}
    special = {each["id"] for each in tokenizer["added_tokens"]}
    tokens = sorted(ids, key=lambda token: int(ids[token]))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if ids[token] in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    for role, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        add(ids[settings[f"{role}_token"]])
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())


def _permuted(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp interleaves the two halves of a head's rotary dimensions."""
    d_out, d_in = weight.shape
    return weight.reshape(heads, 2, d_out // heads // 2, d_in).swapaxes(1, 2).reshape(d_out, d_in).contiguous()
