"""A model class of transformers that puts its adapter on itself when it is loaded; travels with what it is about.

The folder holds the backbone under its own names, and the adapter's settings and tensors in two files of their own.
Copied into an export together with the modules it needs (`sources`), so it imports nothing that is not copied.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open

from smore_cli.errors import AdapterError
from smore_cli.methods import MethodConfig  # at run time: transformers evaluates the annotations of model classes
from smore_cli.nn.attach import attach
from smore_cli.nn.naming import routed_tensors
from smore_cli.nn.prior_hooks import priors_of

__all__ = ["ADAPTER_SETTINGS", "ADAPTER_WEIGHTS", "SelfContained", "adapt"]

# Not the names that transformers takes for an adapter of PEFT and would load by itself.
ADAPTER_SETTINGS, ADAPTER_WEIGHTS = "smore_adapter.json", "smore_adapter.safetensors"
_WHERE = ("revision", "token", "cache_dir", "local_files_only", "subfolder")


class SelfContained:
    """Mixed in before a causal language model; `settings_class` is the method's."""

    settings_class: ClassVar[type[MethodConfig]]

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads the backbone as any other, then the adapter; arguments as in `PreTrainedModel.from_pretrained`."""
        from transformers.utils.hub import cached_file

        where = {key: kwargs[key] for key in _WHERE if kwargs.get(key)}
        settings, weights = (cached_file(str(name), file, **where) for file in (ADAPTER_SETTINGS, ADAPTER_WEIGHTS))
        loaded: Any = super().from_pretrained(name, *args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        values = json.loads(Path(str(settings)).read_text(encoding="utf-8"))
        adapt(model, cls.settings_class.model_validate(values), str(weights))
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuses: the folder it came from is what can be copied.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("copy the folder: the adapter is not part of the backbone's own files")


def adapt(model: Any, settings: MethodConfig, weights: str) -> None:
    """Attaches an adapter and fills it from a safetensors file.

    Raises:
        AdapterError: the file does not hold the tensors that the settings ask for.
    """
    attach(model, settings)
    with safe_open(weights, framework="pt") as file, torch.no_grad():
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if (prior := priors_of(model).get("default")) is not None:
            prior.make_room(shapes.get("prior.centroids", ()))
        tensors = routed_tensors(model)
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
            raise AdapterError(f"{weights} does not hold the tensors its settings ask for")
        for name, tensor in tensors.items():
            tensor.copy_(file.get_tensor(name))
    model.eval()
