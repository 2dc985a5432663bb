"""Names of an adapter's tensors in a file: `<path in the bare backbone>.<parameter>`, and `prior.<buffer>`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smore_cli.nn.attach import adapted_modules
from smore_cli.nn.full_copy import FullCopy
from smore_cli.nn.prior_hooks import priors_of

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["prior_tensors", "routed_tensors"]


def routed_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Returns the tensors of a routed adapter, what is trained whole and its prior included.

    Args:
        model: with the adapter attached.
        name: the adapter's name.
    """
    found: dict[str, Tensor] = {}
    for path, module in adapted_modules(model).items():
        if name in module.adapters:
            adapter = module.adapter(name)
            state = adapter.saved_state() if isinstance(adapter, FullCopy) else module.adapter_state(name)
            found |= {f"{path}.{key}": tensor for key, tensor in state.items()}
    return found | prior_tensors(model, name)


def prior_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Returns what an adapter's prior holds; empty where it has none."""
    prior = priors_of(model).get(name)
    return {} if prior is None else {f"prior.{key}": each for key, each in prior.state_dict(keep_vars=True).items()}
