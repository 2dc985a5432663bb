"""`smore import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["import_command"]


def import_command(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter folder of the other program.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The adapter folder to write; must not exist.")],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="The backbone; default: the one the adapter names."),
    ] = None,
    centroids: Annotated[
        Path | None,
        typer.Option("--centroids", metavar="FILE", help="T-REX: its centroids (.pt .npy .safetensors)."),
    ] = None,
    embedder: Annotated[
        str | None,
        typer.Option(
            "--embedder",
            metavar="MODEL",
            help="T-REX: what the centroids were made with; default: nomic-embed-text-v1.",
        ),
    ] = None,
) -> None:
    """Convert an adapter of PEFT, S'MoRE's or T-REX's released code, or MoE-PEFT (MixLoRA, MoLA, DynMoLE)."""
    from smore_cli.cli.console import out as console
    from smore_cli.models.originals import import_adapter

    done = import_adapter(adapter, out, base=base, centroids=centroids, embedder=embedder)
    settings = done.config.model_dump(exclude={"method", "target_modules", "modules_to_save"})
    known = {key: value for key, value in settings.items() if key not in done.assumed}
    for line in (
        f"imported    {done.adapter} as {done.config.method}",
        f"backbone    {done.base.name_or_path}",
        f"modules     {done.modules} ({_shown(done.config.target_modules)})",
        f"tensors     {done.tensors}, {done.parameters:,} numbers",
        f"settings    {_listed(known)}",
        *([f"assumed     {_listed(done.assumed)}: the original does not say"] if done.assumed else []),
        f"written     {out}",
    ):
        console.print(line, markup=False, highlight=False)


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_shown(value)}" for key, value in settings.items())


def _shown(value: Any) -> str:
    return (
        ", ".join(map(str, value)) if isinstance(value, list) and all(isinstance(v, str) for v in value) else str(value)
    )
