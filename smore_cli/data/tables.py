"""Parquet and Arrow through `datasets`: single files, and the folders that `save_to_disk` writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from smore_cli.data.quiet import first_line, quiet_datasets
from smore_cli.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["is_saved_dataset", "read_arrow", "read_parquet", "read_saved_dataset"]

RawRow = dict[str, Any]

FILE_FORMAT = b"ARROW1"
"""How a file in Arrow's file format begins; one in its stream format does not."""


def read_parquet(path: Path, origin: str) -> Sequence[RawRow]:
    """Returns the rows of a parquet file, which stay on disk.

    Raises:
        DataError: it is not a parquet file.
    """
    if path.stat().st_size == 0:
        return []
    import datasets

    try:
        with quiet_datasets():
            rows: Sequence[RawRow] = datasets.load_dataset("parquet", data_files=_literal(path), split="train")
    except (ValueError, datasets.exceptions.DatasetsError) as error:  # Arrow's own errors are ValueErrors
        problem = f"{origin}: not a parquet file: {first_line(error.__cause__ or error)}"
        raise DataError(problem, "download or write it again") from error
    return rows


def read_arrow(path: Path, origin: str) -> Sequence[RawRow]:
    """Returns the rows of an Arrow file, mapped into memory: a stream, as `datasets` writes, or Arrow's file format.

    Raises:
        DataError: it is neither.
    """
    if path.stat().st_size == 0:
        return []
    import datasets
    import pyarrow

    try:
        with path.open("rb") as file:
            file_format = file.read(len(FILE_FORMAT)) == FILE_FORMAT
        if file_format:
            with pyarrow.memory_map(str(path)) as mapped:
                table = datasets.table.InMemoryTable(pyarrow.ipc.open_file(mapped).read_all())
            rows: Sequence[RawRow] = datasets.Dataset(table)
        else:
            rows = datasets.Dataset.from_file(str(path))
    except (ValueError, OSError, pyarrow.ArrowException) as error:
        problem = f"{origin}: not an Arrow file: {first_line(error)}"
        raise DataError(problem, "copy or write it again") from error
    return rows


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote a folder: one data set, or several splits."""
    return (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists()


def read_saved_dataset(folder: Path, origin: str) -> dict[str, Sequence[RawRow]]:
    """Returns the rows of a saved folder by split; one that has no splits is `train`.

    Raises:
        DataError: the folder is damaged or incomplete.
    """
    import datasets
    import pyarrow

    try:
        with quiet_datasets():
            saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        problem = f"{origin}: not a whole data set folder: {first_line(error)}"
        raise DataError(problem, "copy it again, or save it again with save_to_disk") from error
    return dict(saved.items()) if isinstance(saved, datasets.DatasetDict) else {"train": saved}


def _literal(path: Path) -> str:
    """Returns a path for `datasets`, which reads brackets and stars in it as a pattern."""
    return "".join(f"[{letter}]" if letter in "[*?" else letter for letter in str(path))
