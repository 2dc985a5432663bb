"""An adapter on disk: adapter_config.json and adapter_model.safetensors.

    method: lora   PEFT's own format and names, base_model.model.<path>.lora_A.weight; PEFT loads it and we load PEFT's
    routed         {"method": ..., its fields ..., "base_model_name_or_path", "revision", "smore_version",
                   "peft_type": by which PEFT finds them},
                   tensors named <path>.<parameter>, and prior.centroids where sequences have a prior
    both           what `modules_to_save` names, whole, under the tensors' own names in the backbone

Keys are sorted and nothing depends on time or machine, so equal adapters are equal files.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from smore_cli import __version__
from smore_cli.atomic import write_bytes, write_text
from smore_cli.errors import AdapterError
from smore_cli.methods import MethodConfig, config_from_dict
from smore_cli.methods.lora import LoRAConfig
from smore_cli.models.peft_format import OUR_PEFT_TYPE, from_peft, is_peft, peft_name, peft_saved_name, to_peft
from smore_cli.models.source import one_line
from smore_cli.nn import adapted_modules, attach, detach
from smore_cli.nn.attach import find_targets, sites_of
from smore_cli.nn.full_copy import FullCopy
from smore_cli.nn.naming import routed_tensors
from smore_cli.nn.prior_hooks import priors_of
from smore_cli.recipe.schema import ModelConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "AdapterFolder", "load_adapter", "load_adapter_state", "save_adapter"]

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_BELIEVED = 100_000_000  # numbers that may be allocated before their file is compared
_OURS = ("base_model_name_or_path", "peft_type", "revision", "smore_version")


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter folder whose config has been read; its tensors have not.

    Attributes:
        folder: where it is.
        values: adapter_config.json.
    """

    folder: Path
    values: dict[str, Any]

    @staticmethod
    def open(folder: str | Path) -> AdapterFolder:
        """Reads the config.

        Raises:
            AdapterError: this is no adapter folder, or its config is damaged.
        """
        folder = Path(folder)
        path = folder / CONFIG_FILE
        if not path.is_file():
            what = f"has no {CONFIG_FILE}" if folder.is_dir() else "does not exist"
            raise AdapterError(f"adapter folder {folder} {what}", "give the folder of a finished run or of an adapter")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"{path} is not JSON: {one_line(error)}") from error
        if not isinstance(values, dict) or not (is_peft(values) or "method" in values):
            raise AdapterError(f"{path} names neither a method nor a peft_type", "is it an adapter's config?")
        return AdapterFolder(folder, values)

    @property
    def base(self) -> ModelConfig:
        """The backbone that the adapter names.

        Raises:
            AdapterError: it names none.
        """
        name = self.values.get("base_model_name_or_path")
        if not name:
            raise AdapterError(f"adapter {self.folder} does not say which backbone it belongs to")
        revision = self.values.get("revision")
        return ModelConfig(name_or_path=str(name), revision=None if revision is None else str(revision))

    @property
    def method(self) -> str:
        """The name of the adapter's method."""
        return "lora" if is_peft(self.values) else str(self.values["method"])

    def config(self, model: nn.Module) -> MethodConfig:
        """Returns the adapter's settings; those of PEFT's need the model to name their targets.

        Raises:
            AdapterError: the settings are not ones this version can use.
        """
        if is_peft(self.values):
            paths = [path for path, _ in model.named_modules()]
            return from_peft(self.values, self._shapes(), paths, str(self.folder))
        try:
            return config_from_dict({key: value for key, value in self.values.items() if key not in _OURS})
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "settings"
            by = self.values.get("smore_version", "an unknown version")
            problem = f"{self.folder / CONFIG_FILE}: {field}: {first['msg']}"
            raise AdapterError(problem, f"it was written by smore {by}; this is {__version__}") from error

    def require_size(self, model: nn.Module, config: MethodConfig) -> None:
        """Refuses settings that ask for more numbers than the file holds, before any of them takes memory.

        Raises:
            AdapterError: with both counts.
        """
        sites = sites_of(model, find_targets(model, config.target_modules, config.sites))
        asked = sum(config.num_parameters(site) for site in sites.values())
        held = sum(math.prod(shape) for shape in self._shapes().values())
        if asked > max(held, _BELIEVED):  # smaller mistakes are told tensor by tensor
            problem = f"adapter {self.folder}: its config asks for {asked:,} numbers, its file holds {held:,}"
            raise AdapterError(problem, f"it is damaged, or not for this backbone but {self.base.name_or_path}")

    def read_into(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Fills the parameters, each by its name in the file; nothing is changed unless everything fits.

        Raises:
            AdapterError: tensors are missing, left over, or of another shape.
        """
        self._require_fit(parameters)
        with self._open_weights() as file, torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(name))

    def _require_fit(self, parameters: Mapping[str, torch.Tensor]) -> None:
        found = self._shapes()
        missing = [f"{name} is missing" for name in parameters if name not in found]
        left_over = [f"{name} is not part of it" for name in found if name not in parameters]
        other = [
            f"{name} is {found[name]} in the file, {tuple(parameter.shape)} in the model"
            for name, parameter in parameters.items()
            if name in found and found[name] != tuple(parameter.shape)
        ]
        problems = [*other, *missing, *left_over]
        if not problems:
            return
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        base = self.values.get("base_model_name_or_path")
        if other:
            what = "was trained on a backbone of other sizes"
            hint = f"its backbone is {base}" if base else "use the backbone it was trained on"
        else:
            what, hint = "does not hold the tensors its config asks for", "the file is damaged or from another adapter"
        raise AdapterError(f"adapter {self.folder} {what}: {'; '.join(problems[:5])}{more}", hint)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        with self._open_weights() as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def _open_weights(self) -> Any:
        path = self.folder / WEIGHTS_FILE
        if not path.is_file():
            pickled = (self.folder / "adapter_model.bin").is_file()
            hint = f"convert its adapter_model.bin once with smore import {self.folder} OUT" if pickled else ""
            raise AdapterError(f"adapter folder {self.folder} has no {WEIGHTS_FILE}", hint)
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{path} is damaged: {one_line(error)}") from error


def save_adapter(
    model: nn.Module, config: MethodConfig, folder: str | Path, *, base: ModelConfig, name: str = "default"
) -> None:
    """Writes the adapter `name` of a model; the folder may hold other files already.

    Each file is replaced atomically, the weights first: a folder with a config is a folder with its weights.
    """
    folder = Path(folder)
    parameters = _parameters(model, config, name)
    # A copy, because tensors that share memory (a parameter used at two sites) are refused by safetensors.
    tensors = {key: parameter.detach().cpu().contiguous().clone() for key, parameter in sorted(parameters.items())}
    write_bytes(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    values = _config_values(model, config, base, name)
    write_text(folder / CONFIG_FILE, json.dumps(values, indent=2, sort_keys=True) + "\n")


def load_adapter(model: nn.Module, folder: str | Path, *, name: str = "default") -> MethodConfig:
    """Attaches the adapter in `folder` to a model, makes it the active one and returns its settings.

    Raises:
        AdapterError: it is no adapter, or does not fit this model; the model is then as it was.
    """
    adapter = AdapterFolder.open(folder)
    config = adapter.config(model)
    adapter.require_size(model, config)
    attach(model, config, name=name)
    try:
        _make_room_for_prior(model, adapter, name)
        adapter.read_into(_parameters(model, config, name))
    except AdapterError:
        detach(model, name)
        raise
    return config


def load_adapter_state(model: nn.Module, folder: str | Path, *, name: str = "default") -> None:
    """Fills an adapter that is attached already, as when a run resumes.

    Raises:
        AdapterError: it is no adapter, or not the one that is attached; nothing was changed.
    """
    adapter = AdapterFolder.open(folder)
    _make_room_for_prior(model, adapter, name)
    adapter.read_into(_parameters(model, adapter.config(model), name))


def _make_room_for_prior(model: nn.Module, adapter: AdapterFolder, name: str) -> None:
    """Gives a prior that has no centroids yet the shape of those in the folder: their width is the embedder's."""
    prior = priors_of(model).get(name)
    if prior is not None and not prior.fitted:
        prior.make_room(adapter._shapes().get("prior.centroids", ()))


def _parameters(model: nn.Module, config: MethodConfig, name: str) -> dict[str, torch.Tensor]:
    """Returns an adapter's parameters, and what its prior holds, by their names in the file."""
    if not isinstance(config, LoRAConfig):
        return routed_tensors(model, name)
    parameters: dict[str, torch.Tensor] = {}
    for path, module in adapted_modules(model).items():
        if name not in module.adapters:
            continue
        adapter = module.adapter(name)
        if isinstance(adapter, FullCopy):
            parameters |= {peft_saved_name(path, key): tensor for key, tensor in adapter.saved_state().items()}
        else:
            parameters |= {peft_name(path, key): tensor for key, tensor in module.adapter_state(name).items()}
    return parameters


def _config_values(model: nn.Module, config: MethodConfig, base: ModelConfig, name: str) -> dict[str, Any]:
    if isinstance(config, LoRAConfig):
        adapted = {
            path: module
            for path, module in adapted_modules(model).items()
            if name in module.adapters and not isinstance(module.adapter(name), FullCopy)
        }
        transposed = any(type(module.base).__name__ == "Conv1D" for module in adapted.values())
        paths = [path for path, _ in model.named_modules()]
        return to_peft(config, base, adapted, paths, transposed=transposed)
    ours = {
        "base_model_name_or_path": base.name_or_path,
        "peft_type": OUR_PEFT_TYPE,
        "revision": base.revision,
        "smore_version": __version__,
    }
    return config.model_dump(mode="json") | ours
