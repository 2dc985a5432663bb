"""`smore train`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smore_cli.errors import UsageError

if TYPE_CHECKING:
    from smore_cli.training.parallel import Processes

__all__ = ["train_command"]


def train_command(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value of the recipe; repeatable.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest complete checkpoint of the run.")
    ] = False,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", metavar="DIR", help="Go on from this checkpoint of the run.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option("--output-dir", metavar="DIR", help="Write the run here.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load everything, run one forward and backward pass, write nothing.")
    ] = False,
    num_processes: Annotated[
        int,
        typer.Option(
            "--num-processes", metavar="N", min=1, help="Train in N processes of this machine, one a GPU or on the CPU."
        ),
    ] = 1,
) -> None:
    """Train an adapter as a recipe says."""
    overrides = [*(overrides or []), *([] if output_dir is None else [f"output_dir={output_dir}"])]
    if "WORLD_SIZE" in os.environ:  # torchrun, accelerate or --num-processes has started this process, and others
        from smore_cli.training.together import one_voice

        with one_voice() as processes:
            if num_processes > 1:
                raise UsageError("a launcher has started the processes already", "drop --num-processes")
            _train(recipe, overrides, resume, checkpoint, dry_run, processes)
    elif num_processes > 1:
        from smore_cli.recipe import read_recipe
        from smore_cli.training.launch import launch

        read_recipe(recipe, overrides)  # its mistakes show before anything is started
        settings = [word for override in overrides for word in ("--set", override)]
        flags = [flag for flag, wanted in (("--resume", resume), ("--dry-run", dry_run)) if wanted]
        flags += ["--checkpoint", str(checkpoint)] if checkpoint else []
        launch(["train", str(recipe), *settings, *flags], num_processes)
    else:
        _train(recipe, overrides, resume, checkpoint, dry_run)


def _train(
    recipe: Path,
    overrides: list[str],
    resume: bool,
    checkpoint: Path | None,
    dry_run: bool,
    processes: Processes | None = None,
) -> None:
    """Trains in this process, which may be one of several."""
    from smore_cli.recipe import read_recipe

    started = time.perf_counter()
    loaded, document = read_recipe(recipe, overrides)
    from smore_cli.cli.console import out
    from smore_cli.training.parallel import ALONE

    processes = processes or ALONE
    if dry_run:
        from smore_cli.training.dry_run import dry_run as check

        for line in check(loaded, processes):
            if processes.main:
                out.print(line, highlight=False, markup=False, soft_wrap=True)
        return
    from smore_cli.training.loop import train

    run = train(
        loaded,
        recipe.read_text(),
        resume=resume,
        checkpoint=checkpoint,
        document=document,
        processes=processes,
        predict_memory=True,
    )
    if not processes.main:
        return
    result = run["result"]
    out.print(f"saved     {loaded.output_dir}", highlight=False, markup=False, soft_wrap=True)
    held_out = f", held-out loss {result['eval_loss']:.4f}" if "eval_loss" in result else ""
    out.print(f"result    training loss {result['loss']:.4f}{held_out}", highlight=False, markup=False, soft_wrap=True)
    time_line = _time_line(run["seconds"], time.perf_counter() - started)
    out.print(f"time      {time_line}", highlight=False, markup=False, soft_wrap=True)
    from smore_cli.planning.compare import comparison_line

    out.print(f"memory    {comparison_line(run['memory'])}", highlight=False, markup=False, soft_wrap=True)


def _time_line(seconds: dict[str, float], in_all: float) -> str:
    """Returns where the time of this command went; what is resumed had its own."""
    named = {"data": "data", "model": "model", "census": "census", "steps": "steps", "prediction": "memory prediction"}
    parts = [f"{name} {seconds[phase]:.1f} s" for phase, name in named.items() if phase in seconds]
    rest = max(in_all - sum(seconds[phase] for phase in named if phase in seconds), 0.0)
    return f"{in_all:.1f} s: {', '.join(parts)}, start-up, evaluation and saving {rest:.1f} s"
