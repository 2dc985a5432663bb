"""DeepSpeed's ZeRO: optimiser state (1), gradients of the step (2) and the model (3) shared out over processes.

    accelerate launch --use_deepspeed --zero_stage 3 ...

    gradient of a process  = W x the sum over its passes                          whole, where the parameter is
    gradient of a step     = 1/W sum over processes                               DeepSpeed's average, scattered, once

Stages 1 and 2 get the trained parameters alone, so that the backbone may be of any kind; stage 3 gets the model, and
gathers it a decoder layer at a time. DeepSpeed reduces a gradient as soon as it is there, and so needs the same ones in
the same order in every process; a routed adapter has none for an expert without tokens. Here all are reduced after the
last pass of a step, and one that is missing is zero. What is written is whole, as without ZeRO.
"""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from smore_cli.errors import UsageError
from smore_cli.training.shard import layer_classes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.optim import Optimizer

__all__ = ["Zero", "gathered_parameters", "require_valid"]

MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero:
    """An optimiser whose work is shared out by DeepSpeed, and which saves and loads a state that is whole.

    Args:
        model: the backbone with its adapter, equal in every process; with stage 3 it becomes this process's part.
        optimizer: torch's AdamW over the parameters that train, without state.
        settings: DeepSpeed's configuration.
        device: of this process.

    Attributes:
        stage: of ZeRO.
    """

    def __init__(self, model: Any, optimizer: Optimizer, settings: dict[str, Any], device: torch.device) -> None:
        deepspeed = _library()
        self.stage: int = settings["zero_optimization"]["stage"]
        self._count = torch.distributed.get_world_size()
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self._parameters: list[nn.Parameter] = [parameter for group in self._groups for parameter in group]
        self._optimizer = optimizer
        self._loaded: dict[str, Any] | None = None
        self._whole: dict[str, Any] = {}
        managed = model if self.stage == 3 else nn.ParameterList(self._parameters)
        if self.stage == 3:
            _share_out(model, settings, device)
        self._engine = deepspeed.initialize(model=managed, optimizer=optimizer, config=settings)[0]
        # Fill in gradients and reduce them in the middle of the backward pass; `step` does both when all are there.
        for hook in getattr(self._engine.optimizer, "_leaf_module_hooks", []):
            hook.remove()
        self._keep_gradients()

    def _keep_gradients(self) -> None:
        """Lets gradients lie where they are, as inside `coalesce_grad_reduction`.

        That is a generator which reduces whenever it is left: also by an error in one process, for which the others
        would wait. So it is entered when all is there, and what it does on entry is done here.
        """
        self._engine.optimizer._coalesce_grad_reduction = True

    def backward(self, loss: Tensor) -> None:
        """Runs the backward pass of a scalar; gradients add up in this process."""
        (loss * self._count).backward()
        if self.stage == 3:
            self._engine.optimizer.backward_epilogue()  # frees what the first layer has gathered

    def step(self) -> Tensor:
        """Takes the optimiser's step, clipped as the recipe says, on the gradients of all processes.

        Returns:
            Their norm before clipping, a scalar; infinite where it is not finite, and then no step was taken.
        """
        for parameter in self._parameters:
            if parameter.grad is None:
                _set_zero_gradient(parameter)
        with self._engine.coalesce_grad_reduction():
            pass
        self._engine.step()
        self._keep_gradients()
        norm = self._engine.get_global_grad_norm() if self._engine.was_step_applied() else torch.inf
        return torch.as_tensor(norm)

    def gathered(self) -> Zero:
        """Makes the state whole, for `state_dict`; all processes call it together, after a step."""
        from deepspeed.utils import safe_get_full_optimizer_state

        done = max(float(state["step"]) for state in self._optimizer.state.values())
        state = {}
        for number, parameter in enumerate(self._parameters):
            moments = {name: safe_get_full_optimizer_state(parameter, name).cpu() for name in MOMENTS}
            state[number] = {"step": torch.tensor(done), **moments}
        groups, first = [], 0
        for group, parameters in zip(self._optimizer.param_groups, self._groups, strict=True):
            groups.append(group | {"params": list(range(first, first + len(parameters)))})
            first += len(parameters)
        self._whole = {"state": state, "param_groups": groups}
        return self

    def state_dict(self) -> dict[str, Any]:
        """Returns what was gathered, as the optimiser alone would."""
        return self._whole

    def load_state_dict(self, found: dict[str, Any]) -> None:
        """Takes a whole state, for `restore` to deal out."""
        self._loaded = found

    def restore(self) -> None:
        """Goes on from the state and the adapter that were loaded; all processes call it together."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        loaded = cast("dict[str, Any]", self._loaded)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
        self._engine.optimizer.refresh_fp32_params()  # its own copy of the weights
        self.step()  # on no gradient at no learning rate, which changes nothing: now there is a state to fill
        for number, parameter in enumerate(self._parameters):
            for name in MOMENTS:
                held = loaded["state"].get(number, {}).get(name)  # none where no gradient ever came
                whole = torch.zeros(_shape(parameter)) if held is None else held
                whole = whole.to(parameter.device)
                if self.stage == 3:
                    safe_set_local_optimizer_state(parameter, self._piece(whole, parameter), name)
                else:
                    safe_set_full_optimizer_state(parameter, whole, name)
        done = max((float(state["step"]) for state in loaded["state"].values()), default=0.0)
        for state in self._optimizer.state.values():
            state["step"].fill_(done)
        for group, held in zip(self._optimizer.param_groups, loaded["param_groups"], strict=True):
            group.update({name: value for name, value in held.items() if name != "params"})

    def _piece(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        """Returns this process's part of a whole tensor, zeros behind its end."""
        size, rank = cast("Any", parameter).ds_tensor.numel(), torch.distributed.get_rank()
        padded = whole.new_zeros(size * self._count)
        padded[: whole.numel()] = whole.flatten()
        return padded[rank * size : (rank + 1) * size]


@contextmanager
def gathered_parameters(parameters: Sequence[nn.Parameter], *, changes: bool) -> Iterator[None]:
    """Makes parameters of stage 3 whole, to be read, or with `changes` to be filled alike by every process."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if changes else None):
        yield


def require_valid(settings: dict[str, Any]) -> None:
    """Refuses what DeepSpeed would refuse when everything is loaded.

    Raises:
        UsageError: it is too old, or does not know a setting.
    """
    deepspeed = _library()
    if not hasattr(deepspeed.DeepSpeedEngine, "coalesce_grad_reduction"):
        raise UsageError(f"DeepSpeed {deepspeed.__version__} is too old", "pip install -U deepspeed (0.19.8 or newer)")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**settings["zero_optimization"])
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise UsageError(f"DeepSpeed refuses zero_optimization: {found}", "correct its configuration file") from error


def _library() -> Any:
    """Imports DeepSpeed, and keeps to itself what it and torch say of how it is made."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # Otherwise it compiles an exchange through shared memory: minutes, and a lock that stays where one is stopped.
        deepspeed.ops.__compatible_ops__ = {}
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # DeepSpeed uses them
    return deepspeed


def _share_out(model: Any, settings: dict[str, Any], device: torch.device) -> None:
    """Leaves this process its part of every parameter; decoder layers are gathered whole, in the same order by all."""
    import deepspeed

    deepspeed.utils.set_z3_leaf_modules(model, layer_classes(model, None))
    offload = settings["zero_optimization"].get("offload_param", {}).get("device")
    # Before `initialize`, which would move the whole model to the device first.
    deepspeed.zero.Init(module=model, config_dict_or_path=settings, remote_device=offload)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def _shape(parameter: nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _set_zero_gradient(parameter: nn.Parameter) -> None:
    """Sets a gradient of zeros, of the whole parameter's shape, which one of stage 3 does not have in between."""
    piece = parameter.data
    parameter.data = torch.empty(_shape(parameter), dtype=piece.dtype, device=piece.device)
    parameter.grad = torch.zeros_like(parameter.data)
    parameter.data = piece
