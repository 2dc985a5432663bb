"""Opening what a run left behind: a run folder, one of its checkpoints, or an adapter folder from anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smore_cli.errors import AdapterError
from smore_cli.models.adapter_files import CONFIG_FILE, AdapterFolder, load_adapter
from smore_cli.models.embedders import use_tokenizer
from smore_cli.models.load import load_backbone
from smore_cli.recipe import load_recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from smore_cli.recipe.schema import ModelConfig, QuantizationConfig, Recipe

__all__ = ["RUNS", "Run", "open_run"]

RUNS = Path("runs")
"""Where runs are looked for when none is named."""


@dataclass(frozen=True)
class Run:
    """An adapter that can be used.

    Attributes:
        folder: as it was named, or as it was found.
        adapter: its files.
        recipe: what it was trained by; None for an adapter without its run.
    """

    folder: Path
    adapter: AdapterFolder
    recipe: Recipe | None

    @property
    def model(self) -> ModelConfig:
        """The backbone."""
        return self.adapter.base if self.recipe is None else self.recipe.model

    @property
    def quantization(self) -> QuantizationConfig | None:
        """How the backbone was quantised."""
        return None if self.recipe is None else self.recipe.quantization

    def load(
        self, device: torch.device | None = None, *, full_precision: bool = False
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Loads the backbone as it was in training, with the adapter attached and active, in evaluation mode.

        Args:
            device: default: the first CUDA device, else the CPU.
            full_precision: load the weights as they are in the model's files, though training had them quantised;
                `smore_cli.merging.precision` measures what that changes.

        Raises:
            ModelError: the backbone cannot be loaded.
            AdapterError: the adapter does not fit it.
        """
        backbone = load_backbone(self.model, None if full_precision else self.quantization, device)
        load_adapter(backbone.model, self.adapter.folder)
        use_tokenizer(backbone.model, backbone.tokenizer)
        return backbone.model, backbone.tokenizer


def open_run(path: str | Path | None = None) -> Run:
    """Opens a run folder, a checkpoint in it (`runs/NAME/checkpoint-N`), or an adapter folder (ours, or PEFT's LoRA).

    Args:
        path: default: the newest run under `runs/` that has an adapter.

    Raises:
        AdapterError: it is none of these, or there is no run.
        RecipeError: the run's `resolved.yaml` is not a recipe of this version.
    """
    folder = _newest() if path is None else Path(path).expanduser()
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterError(*_why_not(folder))
    recipes = [folder / "resolved.yaml"]
    if folder.name.startswith("checkpoint-"):
        recipes.append(folder.resolve().parent / "resolved.yaml")
    recipe = next((load_recipe(file) for file in recipes if file.is_file()), None)
    return Run(folder, AdapterFolder.open(folder), recipe)


def _newest() -> Path:
    """Returns the run whose run.json was written last."""
    runs = [file.parent for file in RUNS.glob("*/run.json")]
    finished = [run for run in runs if (run / CONFIG_FILE).is_file()]
    if not finished:
        problem = f"there is no finished run under {RUNS}{'/' if RUNS.is_dir() else '/, which does not exist here'}"
        stopped = f"{len(runs)} stopped before the end; continue with smore train RECIPE --resume"
        raise AdapterError(problem, stopped if runs else "train one with smore train RECIPE, or name a run's folder")
    return max(finished, key=lambda run: (run / "run.json").stat().st_mtime_ns)


def _why_not(folder: Path) -> tuple[str, str]:
    """Returns the message and the hint for a folder without an adapter."""
    if not folder.is_dir():
        others = ", ".join(sorted(file.parent.name for file in RUNS.glob("*/run.json"))[:5])
        return f"run folder {folder} does not exist", f"under {RUNS}/ there are: {others}" if others else ""
    checkpoints = [child for child in folder.glob("checkpoint-*") if (child / CONFIG_FILE).is_file()]
    if checkpoints:
        newest = max(checkpoints, key=lambda child: child.stat().st_mtime_ns)
        return f"run {folder} stopped before its end", f"continue it with --resume, or name a checkpoint: {newest}"
    if (folder / "run.json").is_file():
        return f"run {folder} stopped before its first checkpoint", "start it again with smore train RECIPE --resume"
    return f"{folder} is neither a run nor an adapter folder", f"a run folder holds run.json and {CONFIG_FILE}"
