"""The data set that ships with the package: `quickstart`, four families of short instructions with known answers."""

from __future__ import annotations

from pathlib import Path

__all__ = ["QUICKSTART", "quickstart_files"]

QUICKSTART = "quickstart"
"""The name by which a recipe asks for the bundled set."""


def quickstart_files() -> dict[str, Path]:
    """Returns the file of each split of the bundled set; rows are `{id, family, question, choices, label}`."""
    folder = Path(__file__).parent / "quickstart"
    return {split: folder / f"{split}.jsonl" for split in ("train", "test")}
