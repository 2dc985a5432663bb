"""Reading an adapter's weights from anyone: safetensors, or a pickled file in which nothing is allowed to run."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smore_cli.errors import AdapterError
from smore_cli.models.adapter_files import WEIGHTS_FILE
from smore_cli.models.source import one_line

__all__ = ["read_tensors"]

BIN_FILE = "adapter_model.bin"


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Reads the weights of an adapter folder.

    Raises:
        AdapterError: there are none, the file is damaged, or it holds more than tensors.
    """
    path = next((folder / name for name in (WEIGHTS_FILE, BIN_FILE) if (folder / name).is_file()), None)
    if path is None:
        raise AdapterError(f"adapter folder {folder} has neither {WEIGHTS_FILE} nor {BIN_FILE}")
    found = _load(path)
    if not isinstance(found, dict) or not found:
        raise AdapterError(f"{path} holds no tensors by name")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise AdapterError(f"{path}: '{name}' is not a tensor of floating-point numbers")
        if not tensor.isfinite().all():
            raise AdapterError(f"{path}: some numbers of {name} are not finite")
    return {name: tensor.detach() for name, tensor in found.items()}


def _load(path: Path) -> Any:
    try:
        if path.name == WEIGHTS_FILE:
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: what cannot be read raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not re.search("Unsupported (global|class)|instantiate class", str(error)):
            raise AdapterError(f"{path} is damaged: it is no file of tensors") from error
        hint = "nothing of it was run; get the adapter as safetensors from someone you trust"
        raise AdapterError(f"{path} holds more than tensors: reading it would run code of its own", hint) from error
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, LookupError) as error:
        raise AdapterError(f"{path} is damaged: {one_line(error)}") from error
