"""Every error a user can cause or meet, as one small tree.

    SmoreError                       exit 1   something failed while running
    +-- UsageError                   exit 2   nothing was run, nothing was written
    |   +-- RecipeError                       a recipe that does not say something sound
    |   +-- DataError                         data that is missing, empty or of the wrong form
    |   +-- ModelError                        a backbone or tokenizer that cannot be used
    |   +-- AdapterError                      an adapter or run folder that cannot be used
    +-- CheckpointError              exit 1   a checkpoint that is damaged or does not fit
    +-- Diverged                     exit 1   training came to numbers that are not finite
    +-- CheckFailed                  exit 3   a check ran and said no
    +-- Interrupted                  exit 130 stopped by a signal after the state was saved

An error is one line that says what and where; its `hint` says what to do.
"""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "CheckFailed",
    "CheckpointError",
    "DataError",
    "Diverged",
    "Interrupted",
    "ModelError",
    "RecipeError",
    "SmoreError",
    "UsageError",
]


class SmoreError(Exception):
    """Base of the tree.

    Args:
        message: one line, what went wrong and where.
        hint: one line, what to do about it; empty where there is nothing to add.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(SmoreError):
    """The request cannot be carried out as given; nothing was run."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe has one or more problems; `problems` holds every one, already formatted, one a line."""

    def __init__(self, problems: list[str], hint: str = "") -> None:
        super().__init__("\n".join(problems), hint)
        self.problems = problems


class DataError(UsageError):
    """A data source is missing, empty, or not of the form its recipe names."""


class ModelError(UsageError):
    """A backbone or its tokenizer cannot be loaded or cannot do what is asked."""


class AdapterError(UsageError):
    """An adapter does not fit its backbone, or a run folder is not one."""


class CheckpointError(SmoreError):
    """A checkpoint is damaged, or belongs to another run."""


class Diverged(SmoreError):
    """A loss or a gradient is not finite."""


class CheckFailed(SmoreError):
    """A check that the user asked for ran and said no."""

    exit_code = 3


class Interrupted(SmoreError):
    """The run was stopped by a signal; its state was saved first."""

    exit_code = 130
