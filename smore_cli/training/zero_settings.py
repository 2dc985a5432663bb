"""What accelerate's DeepSpeed configuration asks for, held against the recipe.

    accelerate launch --use_deepspeed --zero_stage 2 ...                 or with --deepspeed_config_file FILE

Where both name a thing, the recipe says what it is: a setting that says something else is refused, never followed in
silence. What DeepSpeed alone decides, `zero_optimization`, goes to it as it is.
"""

from __future__ import annotations

import os
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from smore_cli.errors import UsageError
from smore_cli.models.load import resolve_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator

    from smore_cli.recipe.schema import Recipe
    from smore_cli.training.parallel import Processes

__all__ = ["plain_accelerate", "require_zero", "zero_settings", "zero_wanted"]

WISH = "ACCELERATE_USE_DEEPSPEED"
BUCKET_NUMBERS = 2**23
"""Numbers reduced at a time: DeepSpeed's 5e8 would take 2 GB of each GPU, which no adapter needs."""
CHOSEN_HERE = ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print")
PLAIN = "start it with --num-processes, torchrun, or accelerate launch without --use_deepspeed"


def zero_wanted() -> bool:
    """Whether accelerate's configuration asks for DeepSpeed."""
    return os.environ.get(WISH, "false").lower() == "true"


@contextmanager
def plain_accelerate() -> Iterator[None]:
    """Keeps the wish from accelerate itself, which would wrap model and optimiser and divide the loss."""
    before = os.environ.pop(WISH, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[WISH] = before


def require_zero(recipe: Recipe, processes: Processes) -> None:
    """Refuses what cannot work, before anything is loaded.

    Raises:
        UsageError: DeepSpeed is not there, there is one process, or the optimiser does not work on flat pieces.
    """
    if find_spec("deepspeed") is None:
        raise UsageError(
            "DeepSpeed is asked for and is not installed", "pip install deepspeed (0.19.8 or newer), or use FSDP2"
        )
    if processes.count == 1:
        raise UsageError("ZeRO has nothing to share out among: there is one process", "use --num_processes 2 or more")
    if recipe.train.optim != "adamw_torch_fused":
        raise UsageError(f"train.optim {recipe.train.optim} does not work on ZeRO's pieces", "use adamw_torch_fused")


def zero_settings(recipe: Recipe, processes: Processes, device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """Reads accelerate's configuration as accelerate does.

    Args:
        recipe: with its global batch written out.
        processes: those that train together.
        device: of this process.

    Returns:
        DeepSpeed's configuration, and the settings of the file that have no effect.

    Raises:
        UsageError: it cannot be read, contradicts the recipe, or asks for what is not driven here.
    """
    from accelerate.utils import DeepSpeedPlugin

    try:
        with warnings.catch_warnings():  # of flags that accelerate sets by itself and that have no effect
            warnings.simplefilter("ignore")
            found: dict[str, Any] = DeepSpeedPlugin().deepspeed_config
    except (ValueError, OSError, AttributeError) as error:  # the last of what should be a mapping and is none
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"DeepSpeed's configuration cannot be read: {reason}", "see docs/scale.md") from error
    zero = _given(found["zero_optimization"])
    _require_supported(zero, recipe)
    idle = _require_agreement(found, recipe, processes, device)
    train = recipe.train
    return {
        "train_micro_batch_size_per_gpu": train.per_device_batch_size,
        "gradient_accumulation_steps": 1,  # passes are counted by the step, which sums their gradients itself
        "gradient_clipping": train.max_grad_norm or 0.0,
        "zero_optimization": {"reduce_bucket_size": BUCKET_NUMBERS} | zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }, idle


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what is not set: `auto`, and offloading to nowhere."""
    return {
        key: _given(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value not in (None, "auto") and not (isinstance(value, dict) and value.get("device") in (None, "none"))
    }


def _require_supported(zero: dict[str, Any], recipe: Recipe) -> None:
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        raise UsageError(f"ZeRO stage {stage} shares out nothing", PLAIN)
    for part in ("offload_optimizer", "offload_param"):
        if zero.get(part, {}).get("device") == "nvme":
            raise UsageError(f"zero_optimization.{part}: nvme is not supported", "offload to cpu")
    if stage != 3 and "offload_param" in zero:
        raise UsageError(
            f"ZeRO {stage} leaves parameters where they are", "remove offload_param, or use --zero_stage 3"
        )
    if stage == 3 and recipe.quantization is not None:
        raise UsageError("ZeRO 3 does not shard a quantised backbone, whose weights are packed", "use --zero_stage 2")
    if stage == 3 and recipe.adapter.method == "trex":
        raise UsageError(
            "ZeRO 3 does not shard method trex, whose prior calls parts of the backbone", "use --zero_stage 2"
        )


def _require_agreement(found: dict[str, Any], recipe: Recipe, processes: Processes, device: torch.device) -> list[str]:
    """Refuses settings that say something else than the recipe, and returns those that have no effect."""
    train, dtype = recipe.train, resolve_dtype(recipe.model, device)
    each, batch = train.per_device_batch_size, train.global_batch_size or 0
    same: dict[str, tuple[set[Any], str]] = {
        "train_micro_batch_size_per_gpu": ({each}, "train.per_device_batch_size"),
        "train_batch_size": ({batch}, "train.global_batch_size"),
        # 1 is what accelerate fills in where nobody has said anything.
        "gradient_accumulation_steps": ({1, batch // (each * processes.count)}, "train.global_batch_size"),
        "gradient_clipping": ({train.max_grad_norm or 0.0}, "train.max_grad_norm"),
        "bf16": ({False, dtype == torch.bfloat16}, "model.dtype"),
        "fp16": ({False}, "model.dtype"),
    }
    idle = []
    for key, value in found.items():
        value = value.get("enabled", False) if key in ("bf16", "fp16") and isinstance(value, dict) else value
        if key in ("optimizer", "scheduler"):
            setting = "train.optim" if key == "optimizer" else "train.lr_scheduler"
            raise UsageError(f"DeepSpeed's configuration has a section {key}; the recipe names it in {setting}",
                             f"remove {key} from it")  # fmt: skip
        if key not in same:
            idle += [key] if key not in ("zero_optimization", *CHOSEN_HERE) else []
        elif value not in (None, "auto") and value not in same[key][0]:
            raise UsageError(
                f"DeepSpeed's {key} is {value}, which is not what {same[key][1]} of the recipe gives",
                f"set it to auto, or change {same[key][1]}",
            )
    return idle
