"""Large backbones by their hub names, on the meta device: shapes without weights, for counting parameters."""

from __future__ import annotations

from functools import cache

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

LLAMA_2_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32,
}  # fmt: skip
LLAMA_3_8B = LLAMA_2_7B | {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}
QWEN_3_8B = LLAMA_3_8B | {
    "vocab_size": 151936, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128,
}  # fmt: skip
SHAPES = {
    "Qwen/Qwen3-8B": QWEN_3_8B,
    "meta-llama/Llama-2-7b-hf": LLAMA_2_7B,
    "meta-llama/Meta-Llama-3-8B": LLAMA_3_8B,
    "meta-llama/Llama-3.1-8B": LLAMA_3_8B,
}


@cache
def meta_model(name: str) -> PreTrainedModel:
    """The backbone called `name`, without memory for its weights."""
    with torch.device("meta"):
        if name.startswith("Qwen"):
            return Qwen3ForCausalLM(Qwen3Config(**SHAPES[name], tie_word_embeddings=False))
        return LlamaForCausalLM(LlamaConfig(**SHAPES[name], tie_word_embeddings=False))
