"""Routed adapters for PEFT: importing this module makes them one of the kinds that PEFT loads.

    import smore_cli.peft
    model = PeftModel.from_pretrained(backbone, "runs/quickstart")

lm-eval, TRL and scripts that know PEFT then use them as they are: forward, generate, `disable_adapter`, `set_adapter`,
saving. Settings, names and files are this package's own; PEFT's tuner only passes on. Auxiliary losses need this
package's training loop: a model that PEFT trains has none.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import fields, make_dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner

from smore_cli import __version__
from smore_cli.errors import AdapterError, UsageError
from smore_cli.kernels import use as use_kernels
from smore_cli.methods import MethodConfig, available_methods, config_from_dict, load_method
from smore_cli.models.peft_format import OUR_PEFT_TYPE
from smore_cli.nn import AdaptedModule, adapted_modules, attach, detach, set_active
from smore_cli.nn.naming import routed_tensors
from smore_cli.nn.prior_hooks import priors_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

__all__ = ["SmorePeftConfig", "SmorePeftModel"]

_ROUTED = [cls for cls in map(load_method, available_methods()) if cls.routed]
_SETTINGS = sorted({name for cls in _ROUTED for name in cls.model_fields})
_BESIDE = ("base_model_name_or_path", "revision", "smore_version")
# PEFT makes the config from all keys of adapter_config.json, so it must have a field for each setting of each method:
# `...` where the file does not name it.
_Fields: Any = make_dataclass(
    "_Fields",
    [(name, Any, ...) for name in (*_SETTINGS, *_BESIDE) if name not in {field.name for field in fields(PeftConfig)}],
    bases=(PeftConfig,),
)


class SmorePeftConfig(_Fields):  # type: ignore[misc]
    """adapter_config.json of a routed adapter, as PEFT passes it around."""

    def __post_init__(self) -> None:
        self.peft_type = OUR_PEFT_TYPE
        self.task_type = "CAUSAL_LM"
        super().__post_init__()

    @property
    def is_adaption_prompt(self) -> bool:
        """PEFT's word for adapters that are switched as a whole: no tuner layers whose status it could ask."""
        return True

    @property
    def method_config(self) -> MethodConfig:
        """The method's own settings."""
        known = load_method(str(self.method)).model_fields
        return config_from_dict({name: getattr(self, name) for name in known if getattr(self, name) is not ...})

    def to_dict(self) -> dict[str, Any]:
        """Returns what adapter_config.json holds: the same as when smore writes it."""
        return self.method_config.model_dump(mode="json") | {
            "base_model_name_or_path": self.base_model_name_or_path,
            "peft_type": OUR_PEFT_TYPE,
            "revision": self.revision,
            "smore_version": __version__ if self.smore_version is ... else self.smore_version,
        }


class SmorePeftModel(BaseTuner):
    """PEFT's view of a model with routed adapters."""

    prefix = "smore_"
    tuner_layer_cls = AdaptedModule  # type: ignore[assignment]
    peft_config: dict[str, Any]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *_: Any, **__: Any) -> None:
        """Attaches a fresh adapter."""
        use_kernels()
        attach(model, self.peft_config[adapter_name].method_config, name=adapter_name)
        self.set_adapter(self.active_adapters)  # which `attach` changed to the newest

    def add_adapter(self, adapter_name: str, config: SmorePeftConfig) -> None:
        """Attaches a further one, which does not act yet.

        Raises:
            AdapterError: it holds modules trained whole, which PEFT would wrap a second time.
        """
        if config.modules_to_save:
            raise AdapterError(f"adapter {adapter_name} has modules_to_save, so it must be the first", "load it first")
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)

    def _create_and_replace(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError("adapters are attached as a whole")

    def _cast_adapter_dtype(self, *_: Any, **__: Any) -> None:
        """Nothing: parameters are float32 and are cast down where they are used."""

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Lets adapters train, or not."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for module in adapted_modules(self.model).values():
            for name in set(names) & set(module.adapters):
                module.adapters[name].requires_grad_(requires_grad)

    @contextmanager
    def _temporarily_active(self, adapter_name: str) -> Iterator[None]:
        """Nothing: an adapter is filled where it is, active or not."""
        yield

    def disable_adapter_layers(self) -> None:
        """The model is the bare backbone."""
        set_active(self.model, None)

    def enable_adapter_layers(self) -> None:
        """The adapter acts again."""
        self.set_adapter(self.active_adapters)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Uses one adapter.

        Raises:
            AdapterError: several are named, or it is not there.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) != 1:
            raise AdapterError(f"{len(names)} adapters cannot act at once, one can", "name one")
        set_active(self.model, names[0])
        if inference_mode or self.peft_config[names[0]].inference_mode:
            self.set_requires_grad(names[0], False)
        self.active_adapter = names[0]

    def delete_adapter(self, adapter_name: str) -> None:
        """Takes an adapter off."""
        detach(self.model, adapter_name)
        del self.peft_config[adapter_name]
        if self.active_adapter == adapter_name and self.peft_config:
            self.set_adapter(next(iter(self.peft_config)))

    def unload(self) -> nn.Module:
        """Takes all adapters off and returns the bare backbone."""
        for name in list(self.peft_config):
            detach(self.model, name)
        bare: nn.Module = self.model
        return bare

    def merge_and_unload(self, *_: Any, **__: Any) -> NoReturn:
        """Refuses.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "a routed adapter's update depends on the token, so no single matrix equals it",
            "smore merge finds the nearest one and measures what it loses",
        )

    def merge_adapter(self, *_: Any, **__: Any) -> NoReturn:
        """Refuses, as `merge_and_unload` does."""
        self.merge_and_unload()

    @classmethod
    def _get_adapter_state_dict(cls, model: Any, config: Any, adapter_name: str, *_: Any, **__: Any) -> dict[str, Any]:
        return {name: tensor.detach() for name, tensor in routed_tensors(_bare(model), adapter_name).items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key  # names in the file hold no adapter's name

    @classmethod
    @torch.no_grad()
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Fills the adapter here, all of it or nothing, and leaves PEFT nothing to load.

        A prior is no part of the model, so PEFT could not fill it.

        Raises:
            AdapterError: tensors are missing, left over or of another shape.
        """
        bare = _bare(model)
        if (prior := priors_of(bare).get(adapter_name)) is not None and "prior.centroids" in state_dict:
            prior.make_room(state_dict["prior.centroids"].shape)
        own = routed_tensors(bare, adapter_name)
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        found = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        if wrong := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
            raise AdapterError(f"the adapter does not fit this model: {wrong[0]} and {len(wrong) - 1} more tensors")
        for name, tensor in own.items():
            tensor.copy_(state_dict[name])
        return {}


def _bare(model: Any) -> nn.Module:
    """Returns the model inside PEFT's wrappers."""
    inside: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inside


_KEY: Any = OUR_PEFT_TYPE  # PEFT's own keys are members of a closed enumeration of strings
PEFT_TYPE_TO_CONFIG_MAPPING[_KEY] = SmorePeftConfig
PEFT_TYPE_TO_TUNER_MAPPING[_KEY] = SmorePeftModel
PEFT_TYPE_TO_PREFIX_MAPPING[_KEY] = SmorePeftModel.prefix
