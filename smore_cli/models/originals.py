"""Adapters that other programs trained, converted into adapters of this package.

    S'MoRE     peft_type HIER_MOE, the released code's fork of PEFT
    MixLoRA    MIXLORA, of MoE-PEFT or the `mixlora` package        MoLA, DynMoLE    MOLA, DYNMOLE, of MoE-PEFT
    T-REX      LORA with tensors router, omg and binary_main_gate_weight; centroids in a file of their own
    LoRA       LORA (rsLoRA and DoRA too), of PEFT or MoE-PEFT

What a method's settings and tensors are called there stands in the method's file (`settings_from_original`,
`from_original`). A setting that nothing reads, or a tensor that has no place, is refused by name: an adapter must never
load as something it is not.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from smore_cli.atomic import atomic_folder
from smore_cli.errors import AdapterError, ModelError, UsageError
from smore_cli.methods import MethodConfig, config_from_dict
from smore_cli.methods.lora import LoRAConfig
from smore_cli.methods.smore import without_shared_copies
from smore_cli.models.adapter_files import CONFIG_FILE, AdapterFolder, save_adapter
from smore_cli.models.load import load_skeleton
from smore_cli.models.peft_format import CONVERTED, from_peft, is_peft, peft_name, short_names
from smore_cli.models.prior import read_centroids
from smore_cli.models.source import one_line
from smore_cli.models.weight_files import read_tensors
from smore_cli.nn import adapted_modules, attach
from smore_cli.nn.attach import is_gated_mlp, is_linear
from smore_cli.nn.prior_hooks import priors_of
from smore_cli.recipe.schema import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Imported", "import_adapter"]

_TREX_MARKS = (".omg.weight", ".binary_main_gate_weight.weight")

# Without influence on what a trained adapter computes, or said by its tensors.
_SAID_ELSEWHERE = frozenset(
    """auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out inference_mode init_lora_weights
    init_moe_weights layer_forward_mode layers_to_transform lora_init lora_scaling moe_dropout name peft_type revision
    router_init_range routing_strategy target_modules task_name task_type""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Imported:
    """What was converted.

    Attributes:
        adapter: the folder it came from.
        out: the folder that was written.
        config: its method and settings.
        base: its backbone.
        modules: how many modules are adapted.
        tensors: how many tensors the file held.
        parameters: how many numbers.
        assumed: settings that the original does not name, with the values they have now.
    """

    adapter: Path
    out: Path
    config: MethodConfig
    base: ModelConfig
    modules: int
    tensors: int
    parameters: int
    assumed: dict[str, Any]


class _Read(Mapping[str, Any]):
    """Settings that remember which of them were asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values_, self.asked = values, set(_SAID_ELSEWHERE)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return self.values_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    @property
    def unread(self) -> list[str]:
        """Settings that are set and were not asked for."""
        plain = {"bias": "none"}
        return sorted(k for k, v in self.values_.items() if v and k not in self.asked and plain.get(k) != v)


@dataclass(frozen=True)
class _Extra:
    """What a T-REX adapter needs that is not in its folder."""

    centroids: Path | None = None
    embedder: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {} if self.embedder is None else {"embedder": self.embedder}

    def read_centroids(self) -> Tensor:
        if self.centroids is None:
            hint = "its code keeps them in a file of their own, task_embs_*.pt: --centroids FILE"
            raise AdapterError("a T-REX adapter is nothing without its centroids", hint)
        return read_centroids(self.centroids)


@dataclass(frozen=True)
class _Converted:
    """Settings, tensors by their names here, and the settings that the original does not name."""

    config: MethodConfig
    tensors: dict[str, Tensor]
    assumed: dict[str, Any]


def import_adapter(
    folder: str | Path,
    out: Path,
    *,
    base: str | None = None,
    centroids: Path | None = None,
    embedder: str | None = None,
) -> Imported:
    """Converts an adapter folder of another program into one of this package.

    Args:
        folder: the original's, with adapter_config.json and adapter_model.safetensors or .bin.
        out: must not exist.
        base: the backbone; default: the one that the adapter names.
        centroids: T-REX's, see `smore_cli.models.prior.read_centroids`.
        embedder: what T-REX's centroids were made with, a folder or hub name; default: the released code's.

    Raises:
        UsageError: it cannot be read, is none of the known kinds, does not fit the backbone, or `out` exists; nothing
            was written.
    """
    if out.exists():
        raise UsageError(f"{out} already exists", "name a new folder; an import replaces nothing")
    adapter = AdapterFolder.open(folder)
    if not is_peft(adapter.values):
        raise AdapterError(f"adapter {folder} is one of smore's own already", f"use it as it is: smore eval {folder}")
    tensors = read_tensors(adapter.folder)
    model_config = adapter.base if base is None else ModelConfig(name_or_path=base)
    model = _skeleton(model_config, named=base is not None)
    try:
        found = _converted(adapter, tensors, model, _Extra(centroids, embedder))
        attach(model, found.config)
        _fill(model, found)
    except AdapterError as error:
        where = "" if str(folder) in error.message else f"adapter {folder}: "
        raise AdapterError(f"{where}{error.message}", error.hint) from error
    with atomic_folder(out) as temporary:
        save_adapter(model, found.config, temporary, base=model_config)
    parameters = sum(tensor.numel() for tensor in found.tensors.values())
    return Imported(
        adapter.folder,
        out,
        found.config,
        model_config,
        modules=len(adapted_modules(model)),
        tensors=len(tensors),
        parameters=parameters,
        assumed=found.assumed,
    )


def _skeleton(config: ModelConfig, *, named: bool) -> nn.Module:
    try:
        return load_skeleton(config)
    except ModelError as error:
        if named:
            raise
        raise ModelError(error.message, "that is the backbone the adapter names; name another with --base") from error


def _converted(adapter: AdapterFolder, tensors: dict[str, Tensor], model: nn.Module, extra: _Extra) -> _Converted:
    kind = str(adapter.values["peft_type"])
    trex = kind == "LORA" and any(name.endswith(_TREX_MARKS) for name in tensors)
    if not trex and extra != _Extra():
        raise AdapterError("only a T-REX adapter has centroids and an embedder", "leave them out")
    if kind == "LORA" and not trex:
        modules = [path for path, _ in model.named_modules()]
        return _Converted(from_peft(adapter.values, tensors, modules, str(adapter.folder)), tensors, {})
    method = "trex" if trex else CONVERTED.get(kind)
    if method is None:
        raise AdapterError(f"adapters of the kind {kind} are not read", f"these are: LORA, {', '.join(CONVERTED)}")
    module = importlib.import_module(f"smore_cli.methods.{method}")
    renamed: dict[str, Tensor] = module.from_original(tensors)
    values = _Read(adapter.values)
    try:
        if trex:
            settings: dict[str, Any] = module.settings_from_original(values, renamed) | extra.settings
            values.asked |= {"lora_alpha", "modules_to_save"}  # the layer does not use alpha; its tensors are all known
        else:
            settings = module.settings_from_original(values)
        if method == "mixlora":
            _require_same_activation(values, model)
        if values.unread:
            raise AdapterError(f"{CONFIG_FILE} sets {', '.join(values.unread)}, which smore does not read")
        settings |= {"method": method, "target_modules": _targets(renamed, model)}
        config = config_from_dict(settings)
    except KeyError as error:
        raise AdapterError(f"{CONFIG_FILE} lacks {error}") from error
    except ValidationError as error:
        raise AdapterError(f"{CONFIG_FILE}: {_first_problem(error)}") from error
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{CONFIG_FILE}: a setting is of the wrong kind: {one_line(error)}") from error
    if trex:
        renamed["prior.centroids"] = extra.read_centroids()
    elif settings.get("shared_pool"):
        renamed = without_shared_copies(renamed)
    own = [key for key in type(config).model_fields if key not in MethodConfig.model_fields]  # not of every method
    assumed = {key: getattr(config, key) for key in own if key not in settings}
    return _Converted(config, renamed, assumed)


def _targets(tensors: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """Returns names for the modules that the tensors `PATH.PARAMETER` belong to.

    Raises:
        AdapterError: the backbone has no such module.
    """
    found = set()
    sites = {path for path, module in model.named_modules() if is_linear(module) or is_gated_mlp(module)}
    for name in tensors:
        parts = name.split(".")
        above = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
        path = next((path for path in above if path in sites), None)
        if path is None:
            raise AdapterError(f"the backbone has no module for {name}", "name the right backbone with --base")
        found.add(path)
    return short_names(found, [path for path, _ in model.named_modules()])


def _require_same_activation(values: Mapping[str, Any], model: nn.Module) -> None:
    theirs, ours = values.get("act_fn"), getattr(model.config, "hidden_act", None)
    if theirs is not None and theirs != ours:
        raise AdapterError(f"act_fn: its experts use '{theirs}', the backbone uses '{ours}'", "only the same is read")


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    field = "".join(f"{part}: " for part in first["loc"] if isinstance(part, str))
    return f"{field}{first['msg'].removeprefix('Value error, ')}"


@torch.no_grad()
def _fill(model: nn.Module, found: _Converted) -> None:
    """Gives an adapter on the meta device its tensors.

    Raises:
        AdapterError: some are missing, left over, or of another shape.
    """
    rename = peft_name if isinstance(found.config, LoRAConfig) else "{}.{}".format
    modules = {
        path: module.adapters["default"].to_empty(device="cpu") for path, module in adapted_modules(model).items()
    }
    places = {rename(path, key): p for path, module in modules.items() for key, p in module.state_dict().items()}
    if (prior := priors_of(model).get("default")) is not None:
        prior.make_room(found.tensors["prior.centroids"].shape)
        places["prior.centroids"] = prior.centroids
    problems = [f"{name} is missing" for name in places if name not in found.tensors]
    problems += [f"{name} has no place" for name in found.tensors if name not in places]
    problems += [
        f"{name} is {tuple(found.tensors[name].shape)}, its settings and the backbone make it {tuple(place.shape)}"
        for name, place in places.items()
        if name in found.tensors and found.tensors[name].shape != place.shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise AdapterError(f"its tensors do not fit: {'; '.join(problems[:3])}{more}", "is --base its backbone?")
    for name, place in places.items():
        place.copy_(found.tensors[name])
