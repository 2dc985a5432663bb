"""LoRA, rsLoRA and DoRA in PEFT's own format: config, tensor names, and which PEFT features cannot be read.

PEFT's many kinds of LoRA share one config class whose defaults mean "not used". What is not known here and is set is
refused by name: an adapter must never load as something it is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from smore_cli.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from smore_cli.methods.lora import LoRAConfig
    from smore_cli.recipe.schema import ModelConfig

__all__ = [
    "CONVERTED",
    "OUR_PEFT_TYPE",
    "from_peft",
    "is_peft",
    "peft_name",
    "peft_saved_name",
    "short_names",
    "to_peft",
]

CONVERTED = {"HIER_MOE": "smore", "MIXLORA": "mixlora", "MOLA": "mola", "DYNMOLE": "dynmole"}
"""`peft_type` of other programs' adapters that `smore import` converts, and the method each becomes."""

OUR_PEFT_TYPE = "SMORE_CLI"
"""`peft_type` of this package's routed adapters, by which PEFT finds `smore_cli.peft`; nothing here reads it."""

_PREFIX = "base_model.model."
_PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")

# Read below, or without influence on what a trained adapter computes.
_UNDERSTOOD = frozenset(
    """auto_mapping base_model_name_or_path bias corda_config eva_config exclude_modules fan_in_fan_out inference_mode
    init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config
    megatron_config megatron_core modules_to_save peft_type peft_version qalora_group_size r revision runtime_config
    target_modules task_type use_dora use_rslora""".split()  # noqa: SIM905 (as a list it would be one name a line)
)
_CHANGES_THE_BACKBONE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def is_peft(values: dict[str, Any]) -> bool:
    """Whether an adapter_config.json is PEFT's own, or another program's with a `peft_type`."""
    return bool(values.get("peft_type", OUR_PEFT_TYPE) != OUR_PEFT_TYPE)


def peft_name(path: str, parameter: str) -> str:
    """Returns PEFT's name of a parameter: `lora_A` of `model.layers.0.mlp.up_proj`."""
    name = f"{_PREFIX}{path}.{parameter}"
    return name if parameter == "lora_magnitude_vector" else f"{name}.weight"  # PEFT wrote it so before it was a module


def peft_saved_name(path: str, parameter: str) -> str:
    """Returns PEFT's name of a tensor of a module that is saved whole."""
    return f"{_PREFIX}{path}.{parameter}"


def to_peft(
    config: LoRAConfig, base: ModelConfig, paths: Collection[str], modules: Iterable[str], *, transposed: bool
) -> dict[str, Any]:
    """Returns the PEFT config of a LoRA adapter.

    Args:
        config: the adapter's.
        base: the backbone it was trained on.
        paths: the adapted modules.
        modules: paths of all modules of the backbone; short target names must not match more than `paths`.
        transposed: whether the linear maps store their weight transposed (GPT-2's `Conv1D`).
    """
    alpha = 2.0 * config.rank if config.alpha is None else config.alpha
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base.name_or_path,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": config.modules_to_save or None,
        "peft_type": "LORA",
        "r": config.rank,
        "rank_pattern": {},
        "revision": base.revision,
        "target_modules": short_names(paths, modules),
        "task_type": "CAUSAL_LM",
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }


def from_peft(values: dict[str, Any], tensor_names: Iterable[str], modules: Iterable[str], where: str) -> LoRAConfig:
    """Returns the config of a PEFT LoRA adapter.

    The targets come from the tensors that are there: PEFT's `target_modules` may be a regular expression, and may be
    narrowed by layer numbers.

    Args:
        values: PEFT's adapter_config.json.
        tensor_names: names in adapter_model.safetensors.
        modules: paths of all modules of the backbone.
        where: the adapter, for messages.

    Raises:
        AdapterError: it is no LoRA that is known here.
    """
    from smore_cli.methods.lora import LoRAConfig

    _require_plain_lora(values, where)
    paths = {
        name.removeprefix(_PREFIX).removesuffix(part) for name in tensor_names for part in _PARTS if name.endswith(part)
    }
    if not paths:
        raise AdapterError(
            f"adapter {where} holds no LoRA tensors", f"expected names such as {peft_name('...', 'lora_A')}"
        )
    try:
        return LoRAConfig(
            target_modules=short_names(paths, modules),
            rank=int(values["r"]),
            alpha=float(values["lora_alpha"]),
            modules_to_save=list(values.get("modules_to_save") or []),
            dropout=float(values.get("lora_dropout", 0.0)),
            use_rslora=bool(values.get("use_rslora")),
            use_dora=bool(values.get("use_dora")),
        )
    except (TypeError, ValueError) as error:
        problem = "r, lora_alpha or lora_dropout is no number that LoRA can have"
        raise AdapterError(f"adapter {where}: adapter_config.json: {problem}") from error


def _require_plain_lora(values: dict[str, Any], where: str) -> None:
    kind = str(values["peft_type"])
    if kind != "LORA":
        hint = (
            f"convert it once with smore import {where} OUT" if kind in CONVERTED else "it reads LoRA, rsLoRA and DoRA"
        )
        raise AdapterError(f"adapter {where} is a {kind} of another program, which smore does not read as it is", hint)
    used = sorted(key for key, value in values.items() if value and key not in _UNDERSTOOD)
    if values.get("bias", "none") != "none":
        used.append("bias")
    if str(values.get("init_lora_weights", "")).lower().startswith(_CHANGES_THE_BACKBONE):
        used.append(f"init_lora_weights: {values['init_lora_weights']}")
    if used:
        hint = "convert it to plain LoRA with PEFT first, or merge it there"
        raise AdapterError(f"adapter {where} uses {', '.join(used)} of PEFT, which smore does not read", hint)
    if missing := [key for key in ("r", "lora_alpha") if key not in values]:
        raise AdapterError(f"adapter {where}: adapter_config.json lacks {', '.join(missing)}")


def short_names(paths: Collection[str], modules: Iterable[str]) -> list[str]:
    """Returns the last parts of the paths where these name exactly the same modules, else the full paths."""
    short = {path.rsplit(".", 1)[-1] for path in paths}
    matched = {module for module in modules if module.rsplit(".", 1)[-1] in short}
    return sorted(short if matched == set(paths) else paths)
