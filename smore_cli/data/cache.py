"""Tokenised rows on the disk, under a hash of everything they depend on.

    what is hashed     the sources' settings and bytes (of a hub dataset its fingerprint, which follows from its
                       commit), what `data:` says of template, lengths and loss, the tokenizer with its chat template,
                       the code that reads, renders and tokenises, and the libraries it uses
    what is kept       CACHE/tokens/HASH/{tokens,ends,heads}.npy and report.json

Nothing goes by a file's time or size: files that are copied, restored or written twice in a second lie about both.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smore_cli.atomic import write_text
from smore_cli.data.build import RowSet, build_rows
from smore_cli.data.report import DataReport
from smore_cli.data.rows import FlatRows
from smore_cli.data.sources import source_files
from smore_cli.errors import DataError
from smore_cli.models.cache import built_once, cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

    from smore_cli.recipe.schema import DataConfig, Source

__all__ = ["CacheEntry", "cache_entries", "cached_rows", "clear_cache", "settings_hash", "token_cache"]

FOLDER = "SMORE_TOKEN_CACHE"
"""Environment variable: another folder for tokenised rows; 0: tokenise anew, and keep nothing."""

_LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow")
# What says which rows there are or how they are batched, not what stands in them.
_NOT_OF_THE_DATA = {"train", "eval", "eval_fraction", "packing", "streaming", "shuffle_buffer"}
_NOT_OF_THE_DATA |= {"ranking_completion_weight"}
_NOT_OF_A_SOURCE = {"path", "weight"}


def cached_rows(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, sources: Sequence[Source], say: Callable[[str], None]
) -> RowSet:
    """Returns what `build_rows` does, from the cache where it holds exactly that, and says what became of the data.

    Of several processes that ask, one tokenises and the others wait for it. A cache folder that cannot be used (full,
    read-only) costs the time it would have saved and nothing else.

    Args:
        data: the recipe's data section.
        tokenizer: a fast tokenizer.
        sources: which rows.
        say: takes the lines of the report.

    Raises:
        DataError: as `build_rows` does; or a file was changed while it was read.
        ModelError: as `build_rows` does.
    """
    found, note = _find(data, tokenizer, sources)
    for line in found.report.lines():
        say(line + note)
    return found


def _find(data: DataConfig, tokenizer: PreTrainedTokenizerBase, sources: Sequence[Source]) -> tuple[RowSet, str]:
    """Returns the rows, and what to say of where they are from."""
    if os.environ.get(FOLDER) == "0":
        return build_rows(data, tokenizer, sources), ""
    fresh: RowSet | None = None

    def build(target: Path) -> None:
        nonlocal fresh
        fresh = build_rows(data, tokenizer, sources)
        if _key(data, tokenizer, sources) != key:
            names = ", ".join(source.path for source in sources)
            raise DataError(f"{names}: changed while it was read", "start again once it is written")
        fresh.rows.save(target)
        write_text(target / "report.json", json.dumps({"groups": fresh.groups, "report": fresh.report.as_dict()}))

    try:
        key = _key(data, tokenizer, sources)
        folder = built_once(token_cache() / key, build)
        if fresh is None:
            os.utime(folder)  # when it was last of use
        try:
            return _load(folder), "" if fresh else " (from the cache)"
        except (OSError, ValueError, KeyError, TypeError):  # damaged: done again, once
            shutil.rmtree(folder)
            fresh = None
            return _load(built_once(folder, build)), ""
    except OSError as error:
        # A source that is not there is found here too, and is said properly by build_rows.
        rows = fresh or build_rows(data, tokenizer, sources)
        return rows, f" (not cached: {error.strerror or error})"


def _load(folder: Path) -> RowSet:
    kept = json.loads((folder / "report.json").read_text())
    return RowSet(FlatRows.load(folder), DataReport.from_dict(kept["report"]), tuple(kept["groups"]))


def settings_hash(data: DataConfig, tokenizer: PreTrainedTokenizerBase, sources: Sequence[Source]) -> str:
    """Returns a sha256 over what the recipe and the tokenizer say of how rows are written and tokenised."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()  # both are settings of a call, which differ before the first one and after
    backend.no_truncation()
    settings = {
        "data": data.model_dump(mode="json", exclude=_NOT_OF_THE_DATA),
        "sources": [source.model_dump(mode="json", exclude=_NOT_OF_A_SOURCE) for source in sources],
        "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest(),
        "class": type(tokenizer).__name__,
        "special": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
    }
    return _hash(settings)


def _key(data: DataConfig, tokenizer: PreTrainedTokenizerBase, sources: Sequence[Source]) -> str:
    key = {
        "code": _code(),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "settings": settings_hash(data, tokenizer, sources),
        "names": [source.path for source in sources],  # the report says them
        "contents": [_content(source) for source in sources],
    }
    return _hash(key)


def _content(source: Source) -> str:
    """Returns a hash of what a source holds."""
    files = source_files(source)
    if files is None:
        from smore_cli.data.hub import load_hub_dataset

        return str(load_hub_dataset(source)._fingerprint)  # type: ignore[attr-defined]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
        digest.update(file.name.encode())
    return digest.hexdigest()


def _code() -> str:
    """Returns a hash of the modules beside this one: nobody has to remember to raise a version number."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def token_cache() -> Path:
    """Returns the folder of all entries; it need not exist."""
    own = os.environ.get(FOLDER, "0")
    return cache_folder() / "tokens" if own == "0" else Path(own).expanduser()


@dataclass(frozen=True)
class CacheEntry:
    """Tokenised rows in the cache.

    Attributes:
        folder: where.
        bytes: how much they take.
        used: when they were made or last used, in seconds since 1970.
        report: what they are.
    """

    folder: Path
    bytes: int
    used: float
    report: DataReport


def cache_entries() -> list[CacheEntry]:
    """Returns what is in the cache, the last used first; what cannot be read is left out."""
    entries = []
    for folder in token_cache().glob("[!.]*"):
        try:
            report = DataReport.from_dict(json.loads((folder / "report.json").read_text())["report"])
            size = sum(file.stat().st_size for file in folder.iterdir())
            entries.append(CacheEntry(folder, size, folder.stat().st_mtime, report))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(entries, key=lambda entry: entry.used, reverse=True)


def clear_cache() -> None:
    """Removes all entries; a run that has mapped one keeps reading it."""
    if token_cache().is_dir():
        shutil.rmtree(token_cache())
