"""The README.md of an export: where it came from, what it is, how it is opened, what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from smore_cli.exporting.formats import Written
    from smore_cli.models.runs import Run

__all__ = ["export_card"]


def export_card(folder: Path, run: Run, to: str, written: Written, measured: list[str]) -> None:
    """Writes the card, or adds to the one that is there (a merge writes its own, with its loss).

    Args:
        folder: the export.
        run: where it came from.
        to: the format.
        written: what there is.
        measured: lines of the verdict; empty: nothing was compared.
    """
    card = folder / "README.md"
    before = card.read_text(encoding="utf-8").rstrip() if card.is_file() else _head(run)
    check = measured or ["not compared with the adapter on any prompt (`--verify` does it)"]
    lines = [
        before,
        "",
        f"## Export: {to}",
        "",
        f"- {written.what}",
        *(f"- {line}" for line in check),
        "",
        "```python" if written.use.startswith("from ") else "```console",
        written.use,
        "```",
        "",
    ]
    card.write_text("\n".join(lines), encoding="utf-8")


def _head(run: Run) -> str:
    base = run.model.name_or_path
    lines = ["---", f"base_model: {base}", f"tags: [{run.adapter.method}]", "---", "", f"# {base} with an adapter"]
    return "\n".join([*lines, "", f"- adapter: {run.adapter.method}, trained with smore"])
