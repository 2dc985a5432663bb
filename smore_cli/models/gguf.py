"""Backbones in one GGUF file: read once through transformers, and kept in the cache as an ordinary Hugging Face folder.

Quantised blocks are dequantised: the weights are those of the file, in a type that can be trained on. The folder loads
in seconds, and everything else here (quantisation, merging, resuming) takes it for any other model.
"""

from __future__ import annotations

import hashlib
import io
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smore_cli.errors import ModelError
from smore_cli.models.cache import built_once, cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["convert_gguf", "gguf_folder"]

_LAYOUT = 1  # raise it when the conversion writes anything else, so that old caches are not taken for new ones
_HEAD = 1 << 20
_MAGIC = b"GGUF"


def gguf_folder(path: Path, dtype: torch.dtype) -> Path:
    """Returns the Hugging Face folder of a GGUF file, converting it first if need be.

    Args:
        path: the file; its header names the architecture and holds the tokenizer.
        dtype: type of the weights in the folder, the compute type.

    Raises:
        ModelError: it is no GGUF file, or one that transformers cannot read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head.startswith(_MAGIC):
        raise ModelError(f"model {path} is no GGUF file: it does not begin with the letters GGUF", "get the file again")
    # Hashing gigabytes at every start would take longer than loading; a file that is written again has another time.
    stat = path.stat()
    identity = hashlib.sha256(head + f"{stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    kind = str(dtype).removeprefix("torch.")
    folder = cache_folder() / "models" / f"gguf-{path.stem}-{identity}-{kind}-v{_LAYOUT}"

    def build(target: Path) -> None:
        try:
            convert_gguf(path, target, what=path.name, dtype=dtype)
        except Exception as error:  # a damaged file fails wherever its reader happens to be
            from smore_cli.models.source import one_line

            problem = f"model {path} cannot be read: {type(error).__name__}: {one_line(error)}"
            raise ModelError(problem, "use the model's Hugging Face folder or hub name") from error

    return built_once(folder, build)


def convert_gguf(
    gguf: Path, folder: Path, *, what: str, dtype: torch.dtype = torch.float32, config: PreTrainedConfig | None = None
) -> None:
    """Writes the model of a GGUF file and its tokenizer into a folder as an ordinary Hugging Face folder.

    Args:
        gguf: the file.
        folder: is there, and empty.
        what: the model's name, for the line that says what takes so long.
        dtype: type of the weights.
        config: what the file's header says, where that is known; reading it takes seconds.
    """
    from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast

    from smore_cli.models.quiet import quiet
    from smore_cli.models.tokenizer_files import save_tokenizer

    print(f"smore: converting {what} once ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    known = {} if config is None else {"config": config}
    # The progress bar of the GGUF reader listens to no setting; failures are exceptions, not lines on stderr.
    with quiet(progress=False), redirect_stderr(io.StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
            local_files_only=True,
            **known,
        )
        # transformers 5 refuses to save what it read from GGUF as long as the quantiser hangs on the model.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config._name_or_path = ""
        model.save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
        tokenizer.model_max_length = model.config.max_position_embeddings  # the file does not say: 1e30
        save_tokenizer(tokenizer, folder)
    seconds = time.perf_counter() - start
    print(f"smore: converted in {seconds:.0f} s, kept in {cache_folder()}", file=sys.stderr, flush=True)
