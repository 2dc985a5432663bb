"""Which rows a run was started with, kept so that a changed data file can be named when the run is resumed.

    data_sources.json   [{source, files, sha256, lines}, ...]   one entry a source of data.train

What decides is the hash of the tokenised rows in run.json: a file that was moved, or whose layout changed and nothing
else, is the same data. Where the rows are others, this says in which source and, for .jsonl, from which row on.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smore_cli.atomic import write_text
from smore_cli.data.bundled import QUICKSTART, quickstart_files
from smore_cli.data.folders import is_pattern, split_files
from smore_cli.data.sources import describe_source
from smore_cli.errors import UsageError
from smore_cli.training.differences import place_of
from smore_cli.training.run_folder import read_run_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from smore_cli.recipe.document import Document
    from smore_cli.recipe.schema import Recipe, Source

__all__ = ["fingerprint", "keep_fingerprints", "require_same_data"]

FILE = "data_sources.json"
MAX_LINES = 100_000
"""Lines whose checksums are kept: 4 bytes each. Of a longer file the first so many; a later change names no row."""
MAX_BYTES = 4 << 30
"""A source larger than this is known by its size alone: reading it all would take longer than it is worth."""


def keep_fingerprints(run_dir: Path, recipe: Recipe) -> None:
    """Writes what is needed to name a source that changed."""
    found = [fingerprint(source) for source in recipe.data.train]
    write_text(run_dir / FILE, json.dumps(found) + "\n")


def require_same_data(run_dir: Path, recipe: Recipe, data_hash: str, document: Document | None = None) -> None:
    """Refuses to resume a run on other training rows.

    Args:
        run_dir: the run.
        recipe: what it goes on with.
        data_hash: of the rows as they are now.
        document: knows where the recipe names a source.

    Raises:
        UsageError: with the sources that changed and the first row, where that is known.
    """
    if read_run_json(run_dir)["data"]["hash"] == data_hash:
        return
    lines = [f"the training rows are not those that the run in {run_dir} was started with:"]
    lines += [f"  {place_of(document, ('data', 'train', i))}{change}" for i, change in _changes(run_dir, recipe)]
    raise UsageError("\n".join(lines), "restore the data, or start a new run with --output-dir")


def fingerprint(source: Source) -> dict[str, Any]:
    """Returns what tells a source from another with other content; of a hub dataset that is its name alone."""
    files = list(_files(source))
    size = sum(file.stat().st_size for file in files)
    found: dict[str, Any] = {"source": describe_source(source), "bytes": size, "sha256": None, "lines": None}
    if not files or size > MAX_BYTES:
        return found
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    lines = _line_checksums(files[0]) if len(files) == 1 and files[0].suffix == ".jsonl" else None
    return found | {"sha256": digest.hexdigest(), "lines": lines}


def _files(source: Source) -> Iterator[Path]:
    path = Path(source.path).expanduser()
    if source.path == QUICKSTART:
        split = source.split.partition("[")[0]
        yield from (file for name, file in quickstart_files().items() if name == split)
    elif path.is_file():
        yield path
    elif path.is_dir():
        yield from sorted(file for file in path.rglob("*") if file.is_file())
    elif is_pattern(source.path):
        yield from split_files(source.path)["train"]


def _line_checksums(path: Path) -> str:
    """CRC-32 of each line that holds a row, up to `MAX_LINES`, as base64."""
    found = array("I")
    with path.open("rb") as file:
        for line in file:
            if len(found) == MAX_LINES:
                break
            if line.strip():
                found.append(zlib.crc32(line.strip()))
    return base64.b64encode(found.tobytes()).decode()


def _changes(run_dir: Path, recipe: Recipe) -> list[tuple[int, str]]:
    try:
        before = json.loads((run_dir / FILE).read_text())
    except (OSError, ValueError):
        return [(0, f"which of the sources changed is not known: {FILE} is missing")]
    found = []
    for index, (old, source) in enumerate(zip(before, recipe.data.train, strict=False)):
        new = fingerprint(source)
        if old["sha256"] is None or new["sha256"] is None:
            if old["bytes"] != new["bytes"]:
                found.append((index, f"{new['source']} has another size"))
        elif old["sha256"] != new["sha256"]:
            found.append((index, f"{new['source']} has another content{_first_row(old, new)}"))
    same = "the files are as they were: the tokenizer, its chat template, a hub dataset or a library changed"
    return found or [(0, same)]


def _first_row(old: dict[str, Any], new: dict[str, Any]) -> str:
    if not old["lines"] or not new["lines"]:
        return ""
    rows = [_numbers(old["lines"]), _numbers(new["lines"])]
    shared = min(map(len, rows))
    first = next((i for i in range(shared) if rows[0][i] != rows[1][i]), shared)
    if first < shared:
        return f": row {first + 1} is the first that differs"
    return f": {len(rows[1]):,} rows instead of {len(rows[0]):,}" if len(rows[0]) != len(rows[1]) else ""


def _numbers(text: str) -> Sequence[int]:
    return array("I", base64.b64decode(text))
