"""Answers kept as they come, so that an evaluation that was killed goes on where it was.

One JSON line a forward pass, `{"key": ..., "answers": ...}`. The key is a hash of what answered and of everything it
was asked in that pass, so an answer is only ever taken for the same question to the same model in the same batch: the
numbers are those that an undisturbed run has, to the last bit. A line that was cut off is passed over.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["NO_JOURNAL", "Journal"]


class Journal:
    """The answers of one evaluation, in a file.

    Args:
        path: the file, which need not exist; None: nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, Any] = {}
        self._subject = ""
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                entry = _read(line)
                if entry is not None:
                    self._known[entry["key"]] = entry["answers"]

    def __len__(self) -> int:
        """Returns how many passes' answers are known."""
        return len(self._known)

    def answers_of(self, subject: str) -> Journal:
        """Returns this journal, for the answers of `subject` from now on: a text that tells models apart."""
        self._subject = subject
        return self

    def key(self, asked: Any) -> str:
        """Returns the key of what is asked in a forward pass, as JSON values."""
        return hashlib.sha256(json.dumps([self._subject, asked]).encode()).hexdigest()[:32]

    def recall(self, key: str) -> Any | None:
        """Returns the answers kept under a key; None: there are none."""
        return self._known.get(key)

    def keep(self, key: str, answers: Any) -> None:
        """Adds answers, as JSON values."""
        if self.path is None:
            return
        entry = json.dumps({"key": key, "answers": answers})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A line begins anew after one that was cut off.
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"\n{entry}")
        except (
            OSError
        ):  # what is not kept can be asked again; that nothing can be written there is said with the result
            self.path = None

    def close(self) -> None:
        """Removes the file: the evaluation is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


NO_JOURNAL = Journal(None)


def _read(line: str) -> dict[str, Any] | None:
    """Returns a line's entry; None: it was cut off."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and {"key", "answers"} <= entry.keys() else None
