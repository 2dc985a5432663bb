"""Where a backbone comes from: a bundled model, a folder, a GGUF file, or the hub, found out before it is loaded.

A local folder never causes a network call. The hub gets one short question first: transformers by itself retries an
unreachable hub for 23 seconds, and says the same to a mistyped name as to a missing connection.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smore_cli.errors import ModelError
from smore_cli.models.bundled import BUNDLED, bundled_folder

if TYPE_CHECKING:
    from smore_cli.recipe.schema import ModelConfig

__all__ = ["ModelSource", "find_source", "one_line"]

PATIENCE = 10.0
"""Seconds to wait for the hub's first answer."""

_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class ModelSource:
    """What transformers' `from_pretrained` is given.

    Attributes:
        name: a folder (maybe in the hub's cache, when the hub is out of reach), or a hub name.
        revision: of a hub model.
        local: whether it is a folder, so that only local files are used.
    """

    name: str
    revision: str | None
    local: bool


def find_source(config: ModelConfig) -> ModelSource:
    """Returns where the model is, without loading it.

    Raises:
        ModelError: it is nowhere, or cannot be a model.
    """
    name = config.name_or_path
    if name in BUNDLED:
        _refuse_revision(config)
        return ModelSource(str(bundled_folder(name)), None, local=True)
    path = Path(name).expanduser()
    if path.is_dir():
        _refuse_revision(config)
        if not (path / "config.json").is_file():
            raise ModelError(f"model folder {path} has no config.json", _hint_for_folder(path))
        return ModelSource(str(path), None, local=True)
    if path.suffix.lower() == ".gguf":
        return _converted(path, config)
    if path.is_file():
        raise ModelError(f"model {path} is a file", "name the folder that holds config.json and the weights")
    if not _HUB_NAME.fullmatch(name):
        raise ModelError(f"model folder {path} does not exist", _suggestion(path))
    if (cached := _only_cached(config)) is not None:
        # Given the name, transformers would go on asking the hub for files the cache lacks, with 23 seconds of retries.
        return ModelSource(str(cached), None, local=True)
    return ModelSource(name, config.revision, local=False)


def one_line(error: BaseException) -> str:
    """Returns the first line of an exception's message (and the next after a colon), or its kind where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _converted(gguf: Path, config: ModelConfig) -> ModelSource:
    """Returns the folder that a GGUF file was converted to, now or earlier."""
    from smore_cli.models.device import default_device, resolve_dtype
    from smore_cli.models.gguf import gguf_folder

    if not gguf.is_file():
        near = difflib.get_close_matches(gguf.name, [file.name for file in gguf.parent.glob("*.gguf")], n=1)
        hint = f"did you mean {gguf.with_name(near[0])}?" if near else "give the path of the file"
        raise ModelError(f"model file {gguf} does not exist", hint)
    _refuse_revision(config)
    return ModelSource(str(gguf_folder(gguf, resolve_dtype(config, default_device()))), None, local=True)


def _refuse_revision(config: ModelConfig) -> None:
    if config.revision is not None:
        raise ModelError(f"model '{config.name_or_path}' is local and has no revisions", "remove model.revision")


def _hint_for_folder(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return "it is an adapter: name its backbone here, and give the adapter to the command"
    if files := sorted(path.glob("*.gguf")):
        return f"to use a GGUF file, name it: {files[0]}"
    inner = sorted(child.name for child in path.iterdir() if (child / "config.json").is_file())
    return f"did you mean {path / inner[0]}?" if inner else "it must hold config.json, the weights and the tokenizer"


def _suggestion(path: Path) -> str:
    """Names what comes nearest: a sibling folder, or a bundled model."""
    siblings = {str(child): child.name for child in _folders(path.parent)}
    near = difflib.get_close_matches(path.name, [*siblings.values(), *BUNDLED], n=1)
    if not near:
        return f"give a folder, a hub name, or a bundled model: {', '.join(BUNDLED)}"
    return f"did you mean {next((full for full, name in siblings.items() if name == near[0]), near[0])}?"


def _folders(path: Path) -> list[Path]:
    return [child for child in path.iterdir() if child.is_dir()] if path.is_dir() and os.access(path, os.R_OK) else []


def _only_cached(config: ModelConfig) -> Path | None:
    """Returns the model's folder in the hub's cache where the hub is out of reach; None: the hub has it.

    Raises:
        ModelError: there is no such model or revision, access to it is missing, or it can be had nowhere.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    from smore_cli.models.quiet import quiet

    name = config.name_or_path
    try:
        with quiet():
            HfApi().model_info(name, revision=config.revision, timeout=PATIENCE)
    except GatedRepoError as error:
        hint = "ask for access on its page, then log in with `hf auth login`"
        raise ModelError(f"hub model '{name}' is gated and this login may not read it", hint) from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"there is no folder and no hub model '{name}'", _suggestion(Path(name))) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"hub model '{name}' has no revision '{config.revision}'") from error
    except HfHubHTTPError as error:
        raise ModelError(f"hub model '{name}': {one_line(error)}", "try again later") from error
    except Exception as error:
        if not _is_connection_failure(error):
            raise
        if (folder := _cached_folder(config)) is not None:
            return folder
        offline = type(error).__name__ == "OfflineModeIsEnabled"
        why = "offline mode is on" if offline else "the hub cannot be reached"
        problem = f"there is no folder '{name}', no hub model of that name in the cache, and {why}"
        raise ModelError(problem, _suggestion(Path(name))) from error
    return None


def _is_connection_failure(error: Exception) -> bool:
    """Whether the network failed: an error of the OS, or of the hub's HTTP client (its package's name varies)."""
    return isinstance(error, OSError) or any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _cached_folder(config: ModelConfig) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(config.name_or_path, "config.json", revision=config.revision)
    return Path(found).parent if isinstance(found, str) else None
