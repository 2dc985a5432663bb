"""`smore plan`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from smore_cli.planning.planner import RunPlan

__all__ = ["plan_command"]


def plan_command(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value of the recipe; repeatable.")
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option("--device", help="Plan for this device; default: this machine's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes.")] = False,
) -> None:
    """Show what a run will need: parameters, memory by component, steps, tokens, disk. No weight is loaded."""
    from smore_cli.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from smore_cli.planning.planner import Planner

    found = Planner.load(loaded, device, say=lambda line: print(line, file=sys.stderr)).plan()
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
        return
    from smore_cli.cli.console import out

    for note in found.notes:
        out.print(f"note      {note}", markup=False, highlight=False, soft_wrap=True)
    for table in (_parameters(found), _memory(found), _run(found, "packs" if loaded.data.packing else "rows")):
        out.print(table)
        out.print()


def _parameters(plan: RunPlan) -> Table:
    counts = plan.parameters
    table = _table("parameters", "", "share")
    table.add_row("backbone, frozen", f"{plan.backbone:,}", "")
    share = 100 * counts.trainable / (plan.backbone + counts.trainable)
    table.add_row(f"trainable, on {counts.sites} modules", f"{counts.trainable:,}", f"{share:.2f} %")
    for part, number in counts.parts.items():
        table.add_row(f"  {part}", f"{number:,}", f"{100 * number / counts.trainable:.0f} % of these")
    table.add_row(
        "active for a token, at most", f"{counts.active:,}", f"{100 * counts.active / counts.trainable:.0f} %"
    )
    return table


def _memory(plan: RunPlan) -> Table:
    memory = plan.memory
    highest = max(memory.phases, key=lambda name: memory.phases[name])
    where = {"cpu": "CPU", "cuda": "GPU"}[memory.device]
    table = _table(f"{where} memory, highest in: {highest}", "", "share")
    for part, size in memory.components.items():
        table.add_row(part, show(size), f"{100 * size / memory.peak:.0f} %")
    table.add_row("[bold]peak[/bold]", f"[bold]{show(memory.peak)}[/bold]", "")
    for phase, size in memory.phases.items():
        if phase != highest:
            table.add_row(f"  peak in: {phase}", show(size), "")
    with_it, without = plan.with_checkpointing["true"], plan.with_checkpointing["false"]
    table.add_row("  peak with gradient_checkpointing", show(with_it), "")
    table.add_row("  peak without it", show(without), "")
    table.add_row(f"  one tensor of logits, {plan.heaviest.supervised:,} tokens", show(memory.logits), "")
    return table


def _run(plan: RunPlan, lines: str) -> Table:
    table = _table("run", "", "")
    shape = plan.heaviest
    step = "" if shape.step is None else f", in step {shape.step + 1}"
    table.add_row("heaviest pass", f"{shape.lines} x {shape.width}", f"{lines} x tokens{step}")
    if plan.rows:
        held_out = f"{plan.rows['held_out']:,} held out"
        table.add_row("rows", f"{plan.rows['train']:,}", f"{plan.rows['tokens']:,} tokens; {held_out}")
    if "steps" in plan.steps:
        epochs = f", {plan.steps['epochs']:.2f} epochs" if "epochs" in plan.steps else ""
        table.add_row("steps", f"{plan.steps['steps']:,.0f}", f"of {plan.steps['rows_a_step']:,.0f} {lines}{epochs}")
    if plan.tokens:
        padding = f"and {100 * plan.tokens['padding']:.0f} % of all places are padding"
        table.add_row("tokens", f"{plan.tokens['tokens']:,.0f}", padding)
    kept = plan.disk["checkpoints_kept"]
    checkpoints = f"{kept} checkpoint{'' if kept == 1 else 's'} of {show(plan.disk['checkpoint'])} at once"
    table.add_row("disk", show(plan.disk["in_all"]), checkpoints)
    table.add_row("  of it the final adapter", show(plan.disk["adapter"]), "")
    return table


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number == 1 else "left", min_width=38 if number == 0 else None)
    return table


def show(size: int) -> str:
    """Returns a size in a unit that people read."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
