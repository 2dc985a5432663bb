"""Large backbones by their hub names, on the meta device: shapes without weights, for counting parameters."""

from __future__ import annotations

from functools import cache

import torch
from transformers import LlamaConfig, LlamaForCausalLM

LLAMA_2_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32,
}  # fmt: skip
LLAMA_3_8B = LLAMA_2_7B | {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}
SHAPES = {
    "meta-llama/Llama-2-7b-hf": LLAMA_2_7B,
    "meta-llama/Meta-Llama-3-8B": LLAMA_3_8B,
    "meta-llama/Llama-3.1-8B": LLAMA_3_8B,
}


@cache
def meta_model(name: str) -> LlamaForCausalLM:
    """The backbone called `name`, without memory for its weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SHAPES[name], tie_word_embeddings=False))
