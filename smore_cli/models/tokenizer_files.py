"""Writing a tokenizer so that other readers than transformers 5 know it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from smore_cli.atomic import atomic_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["save_tokenizer"]

# Traces of how and where the tokenizer was read, which transformers writes along.
_TRACES = ("backend", "is_local", "local_files_only", "name_or_path")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the tokenizer's files, chat template included, all of them or none.

    Transformers 5 names its generic class `TokenizersBackend`, which version 4, vLLM and others cannot find; the same
    tokenizer is a `PreTrainedTokenizerFast` to all of them.
    """
    with atomic_files(folder) as made:
        tokenizer.save_pretrained(made)
        path = made / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings = {key: value for key, value in settings.items() if key not in _TRACES}
        path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
