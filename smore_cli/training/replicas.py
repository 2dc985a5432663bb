"""What all processes of a run must agree on before the first step: the batch they share, the data, the adapter."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch

from smore_cli.errors import RecipeError, UsageError
from smore_cli.nn import adapted_modules
from smore_cli.nn.prior_hooks import active_prior

if TYPE_CHECKING:
    from torch import Tensor, nn

    from smore_cli.recipe.schema import Recipe
    from smore_cli.training.parallel import Processes

__all__ = ["make_equal", "share_out"]


def share_out(recipe: Recipe, processes: Processes) -> Recipe:
    """Returns the recipe with the global batch written out, where several processes share it.

    Raises:
        RecipeError: it cannot be dealt out evenly.
    """
    if processes.count == 1:
        return recipe
    each = recipe.train.per_device_batch_size
    total = recipe.train.global_batch_size or each * processes.count
    if total % (each * processes.count):
        raise RecipeError(
            [
                f"train.global_batch_size {total} is not a multiple of per_device_batch_size {each} x "
                f"{processes.count} processes"
            ],
            f"--set train.global_batch_size={-(-total // (each * processes.count)) * each * processes.count}, "
            "or another per_device_batch_size",
        )
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"global_batch_size": total})})


def make_equal(model: nn.Module, recipe: Recipe, data_hash: str, processes: Processes) -> None:
    """Gives every process the main one's adapter, and checks that they train the same thing on the same rows.

    The seed makes the adapters equal by itself, but for what is computed from the backbone (singular vectors, a
    prior's centroids), where another machine may give other signs or last bits.

    Raises:
        UsageError: recipe, rows or backbone differ.
    """
    if processes.count == 1:
        return
    tensors = _adapter_tensors(model)
    processes.copy_from_main(tensors)
    facts = {
        "recipe": _hash(json.dumps(recipe.model_dump(mode="json"), sort_keys=True).encode()),
        "training rows": data_hash,
        "backbone": _hash(repr([_sample(parameter) for parameter in model.parameters()]).encode()),
        "adapter": _hash(b"".join(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                                  for tensor in tensors)),
    }  # fmt: skip
    found = processes.gather_objects(facts)
    for rank, other in enumerate(found):
        if different := [name for name, value in facts.items() if found[0][name] != other[name]]:
            raise UsageError(
                f"process {rank} does not have the {different[0]} of the main process",
                "give every machine the same recipe, data, model files and library versions",
            )


def _adapter_tensors(model: nn.Module) -> list[Tensor]:
    """Returns everything an adapter and its prior hold, in an order that all processes share."""
    found: list[Tensor] = []
    for module in adapted_modules(model).values():
        found += [*module.adapters.parameters(), *module.adapters.buffers()]
    if (prior := active_prior(model)) is not None:
        found.append(prior.centroids)
    return found


def _sample(parameter: Tensor) -> tuple[tuple[int, ...], list[float]]:
    """Returns the shape of a tensor and a few of its numbers: a whole backbone takes too long to read."""
    flat = parameter.detach().reshape(-1)
    places = torch.tensor([i * (len(flat) - 1) // 7 for i in range(8)] if len(flat) else [], dtype=torch.long)
    return tuple(parameter.shape), flat[places.to(flat.device)].float().tolist()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
