"""All checks, on the tiny Llama and, if asked, on the user's own backbone."""

from __future__ import annotations

from typing import Any

from smore_cli.models.load import default_device, load_backbone
from smore_cli.numerics.checks import CHECKS, Outcome, reference, run_check
from smore_cli.numerics.processes import check_processes
from smore_cli.numerics.subjects import TINY, subjects, tiny_llama
from smore_cli.recipe.schema import ModelConfig

__all__ = ["run_numerics"]


def run_numerics(name_or_path: str | None = None) -> list[Outcome]:
    """Returns what every check found.

    Args:
        name_or_path: of a backbone, loaded in float32, that is checked after the tiny Llama.

    Raises:
        ModelError: the backbone cannot be loaded.
    """
    device = default_device()
    backbones: dict[str, Any] = {TINY: tiny_llama(device)}
    if name_or_path is not None:
        config = ModelConfig(name_or_path=name_or_path, dtype="float32")
        backbones[name_or_path] = load_backbone(config, None, device).model
    outcomes = check_processes()
    for name, model in backbones.items():
        for subject in subjects(model, device, name):
            expected = reference(subject)
            outcomes += [run_check(subject, check, expected) for check in CHECKS]
    return outcomes
