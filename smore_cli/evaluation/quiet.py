"""lm-eval without its log lines and progress bars, and without what it does to the process's random state."""

from __future__ import annotations

import logging
import random
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["quiet_lm_eval"]


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Inside: lm-eval says nothing; afterwards the process is as it was."""
    from lm_eval.api import task as lm_eval_task

    logger, bar = logging.getLogger("lm_eval"), lm_eval_task.tqdm
    level, state = logger.level, random.getstate()  # lm-eval draws a name for every task, even one that has its own
    logger.setLevel(logging.ERROR)
    lm_eval_task.tqdm = partial(bar, disable=True)  # lm-eval has no switch for the bar over building prompts
    try:
        yield
    finally:
        logger.setLevel(level)
        random.setstate(state)
        lm_eval_task.tqdm = bar
