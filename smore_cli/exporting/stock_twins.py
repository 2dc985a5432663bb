"""Stock mixture-of-experts architectures that compute a MixLoRA model exactly, and for which backbones.

    backbone         twin         router of the twin                        what else it needs
    llama, mistral   mixtral      softmax, top k, weights sum to 1          no biases
    qwen2            qwen2_moe    the same with norm_topk_prob              a shared expert, which is one unit of zeros
    qwen3            qwen3_moe    the same with norm_topk_prob              no attention bias

Each layer but the feed-forward network is the same code in both, read from the same settings. What is set and the twin
does not know is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smore_cli.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Twin", "twin_config", "twin_of"]


@dataclass(frozen=True)
class Twin:
    """A stock mixture and the names of its tensors.

    Attributes:
        model_type: transformers' name of it.
        width: the setting that holds the width of an expert.
        moe: path of a layer's mixture, `{}` the layer's number.
        maps: names of an expert's gate, up and down maps.
        shared: whether it has a shared expert beside them.
        biases: settings that must be off, since the twin's linear maps have no such bias.
    """

    model_type: str
    width: str
    moe: str
    maps: tuple[str, str, str]
    shared: bool = False
    biases: tuple[str, ...] = ()

    def expert(self, layer: int, number: int) -> list[str]:
        """Returns the names of an expert's gate, up and down weights."""
        return [f"{self.moe.format(layer)}.experts.{number}.{map}.weight" for map in self.maps]


_QWEN_MAPS = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = Twin(
    "mixtral",
    "intermediate_size",
    "model.layers.{}.block_sparse_moe",
    ("w1", "w3", "w2"),
    biases=("attention_bias", "mlp_bias"),
)
_TWINS = {
    "llama": _MIXTRAL,
    "mistral": _MIXTRAL,
    "qwen2": Twin("qwen2_moe", "moe_intermediate_size", "model.layers.{}.mlp", _QWEN_MAPS, shared=True),
    "qwen3": Twin("qwen3_moe", "moe_intermediate_size", "model.layers.{}.mlp", _QWEN_MAPS),
}

_SAME = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "attention_dropout",
    "attention_bias",
    "rope_parameters",
    "sliding_window",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "dtype",
]


def twin_of(config: PreTrainedConfig) -> Twin:
    """Returns the stock mixture for a backbone.

    Raises:
        UsageError: there is none that computes the same.
    """
    kind = config.model_type
    if (twin := _TWINS.get(kind)) is None:
        problem = f"no stock mixture-of-experts architecture has the attention and norms of '{kind}'"
        raise UsageError(problem, f"there is one for: {', '.join(_TWINS)}; --to hf-code keeps any model as it is")
    wrong = [name for name in twin.biases if getattr(config, name, False)]
    if twin.model_type != "mixtral" and "sliding_attention" in (getattr(config, "layer_types", None) or []):
        wrong.append("use_sliding_window")
    if wrong:
        problem = f"{twin.model_type} has no {', '.join(wrong)}, which this backbone sets"
        raise UsageError(problem, "--to hf-code keeps any model as it is")
    return twin


def twin_config(twin: Twin, config: PreTrainedConfig, num_experts: int, top_k: int) -> PreTrainedConfig:
    """Returns the settings of the mixture.

    Args:
        twin: for the backbone.
        config: the backbone's.
        num_experts: of every layer.
        top_k: experts a token goes to.
    """
    from transformers import AutoConfig

    values: dict[str, Any] = {name: getattr(config, name) for name in _SAME if hasattr(config, name)}
    values |= {"num_experts_per_tok": top_k, twin.width: config.intermediate_size}
    if twin.model_type == "mixtral":
        values |= {"num_local_experts": num_experts}
        for name in twin.biases:
            values.pop(name, None)
    else:
        values |= {"num_experts": num_experts, "norm_topk_prob": True, "use_sliding_window": False}
    if twin.shared:
        values |= {"shared_expert_intermediate_size": 1, "qkv_bias": True}
    made: PreTrainedConfig = AutoConfig.for_model(twin.model_type, **values)
    made.architectures = [_CLASSES[twin.model_type]]
    return made


_CLASSES = {
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
