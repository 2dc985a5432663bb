"""Datasets from the hub: reached within seconds or refused in one line; what is already in the cache works offline.

`datasets` by itself retries an unreachable hub for 23 seconds and logs every attempt, so one short question goes first.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smore_cli.data.quiet import first_line, quiet_datasets
from smore_cli.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from smore_cli.recipe.schema import Source

__all__ = ["load_hub_dataset"]

PATIENCE = 10.0
"""Seconds to wait for the hub's first answer."""


def load_hub_dataset(source: Source, *, streaming: bool = False) -> Sequence[dict[str, Any]]:
    """Returns the split of a hub dataset, from the cache where the hub is not reachable or offline mode is on.

    Args:
        source: its name, configuration, split and revision.
        streaming: download nothing beforehand; what then comes back can only be iterated over, unless it was cached.

    Raises:
        DataError: no such dataset, configuration, split or revision, no access to it, or no way to reach it.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    reachable = not datasets.config.HF_HUB_OFFLINE and _hub_has(source)
    try:
        with quiet_datasets(), nullcontext() if reachable else _offline():
            rows: Sequence[dict[str, Any]] = datasets.load_dataset(
                source.path,
                source.name,
                split=source.split,
                revision=source.revision,
                streaming=streaming and reachable,
            )
    except (ConnectionError, FileNotFoundError, HfHubHTTPError) as error:
        if reachable:
            raise DataError(f"hub dataset '{source.path}': {first_line(error)}") from error
        raise _out_of_reach(source) from error
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        problem = " ".join(str(error.__cause__ or error).split())[:300]
        raise DataError(f"hub dataset '{source.path}': {problem}", "check its name, split and revision") from error
    if not reachable and source.revision is not None:
        _require_revision(rows, source)
    return rows


def _require_revision(rows: Any, source: Source) -> None:
    """Refuses cached rows that may be of another revision: offline, `datasets` takes the newest and says nothing."""
    commits = {Path(file["filename"]).parent.name for file in rows.cache_files}
    if commits != {source.revision}:
        problem = f"hub dataset '{source.path}' is in the cache, but not surely at revision '{source.revision}'"
        raise DataError(problem, "connect, or name the whole commit hash that was downloaded")


def _hub_has(source: Source) -> bool:
    """Whether the hub answers and has the dataset; false if it does not answer.

    Raises:
        DataError: the hub answered that there is no such dataset or revision, or that access is missing.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    name = source.path
    try:
        HfApi().dataset_info(name, revision=source.revision, timeout=PATIENCE)
    except GatedRepoError as error:
        hint = "ask for access on its page, then log in with `hf auth login`"
        raise DataError(f"hub dataset '{name}' is gated and this login may not read it", hint) from error
    except RepositoryNotFoundError as error:
        hint = "check the name; a private dataset needs `hf auth login`"
        raise DataError(f"there is no hub dataset '{name}', and no local file of that name", hint) from error
    except RevisionNotFoundError as error:
        raise DataError(f"hub dataset '{name}' has no revision '{source.revision}'") from error
    except HfHubHTTPError as error:
        raise DataError(f"hub dataset '{name}': {first_line(error)}", "try again later") from error
    except Exception as error:
        if not _is_connection_failure(error):
            raise
        return False
    return True


def _is_connection_failure(error: Exception) -> bool:
    """Whether the network failed: an error of the OS, or of the hub's HTTP client, whose package varies by version."""
    return isinstance(error, OSError) or any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


@contextmanager
def _offline() -> Iterator[None]:
    """Makes `datasets` look only into its cache."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _out_of_reach(source: Source) -> DataError:
    import datasets

    why = "offline mode is on" if datasets.config.HF_HUB_OFFLINE else "the hub cannot be reached"
    problem = f"hub dataset '{source.path}' is not in the cache and {why}"
    if "/" not in source.path or "." in source.path:
        problem += f" (there is no local file '{source.path}' either)"
    return DataError(problem, "connect, or download it elsewhere and name a local .jsonl, .csv or .parquet file")
