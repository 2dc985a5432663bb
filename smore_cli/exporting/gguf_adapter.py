"""A LoRA as a GGUF adapter, which llama.cpp adds to the model of its backbone when it starts (`--lora`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from smore_cli.exporting.gguf_model import LlamaNames, write_tensors
from smore_cli.nn import adapted_modules
from smore_cli.nn.low_rank import LowRank

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

__all__ = ["is_plain_lora", "write_adapter"]


def is_plain_lora(model: nn.Module) -> bool:
    """Whether all that was trained is B A beside linear maps: no DoRA, no whole module, no router."""
    adapters = [module.adapters["default"] for module in adapted_modules(model).values()]
    return all(type(adapter) is LowRank for adapter in adapters)


def write_adapter(model: nn.Module, out: Path, kind: str, names: LlamaNames, name: str) -> None:
    """Writes the adapter of a model.

    llama.cpp adds alpha / r B A, r the rows of A.

    Args:
        model: with a plain LoRA attached.
        out: the file.
        kind: type of the matrices.
        names: of the model's tensors.
        name: what the file says it is.
    """
    import gguf

    adapters = {path: cast("LowRank", module.adapters["default"]) for path, module in adapted_modules(model).items()}
    first = next(iter(adapters.values()))
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, first.scale * len(first.lora_A))
    made: list[tuple[str, Callable[[], Tensor]]] = []
    for path, adapter in adapters.items():
        weight = f"{path}.weight"
        halves: dict[str, Tensor] = {"a": adapter.lora_A, "b": names.laid_out(weight, adapter.lora_B)}
        made += [(f"{names.name(weight)}.lora_{half}", tensor.detach) for half, tensor in halves.items()]
    write_tensors(writer, made, kind)
