"""What an export's format gives to the rest: files in a folder, and the two that are asked the same prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch

    from smore_cli.exporting.compare import Writer
    from smore_cli.merging.calibration import Calibration

__all__ = ["OPEN_MODEL", "Options", "Written"]

OPEN_MODEL = (
    'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")'
)


@dataclass(frozen=True)
class Options:
    """What was asked for beside the format.

    Attributes:
        rank: of a PEFT LoRA.
        type: of the numbers in a GGUF file.
        verify: whether the files will be opened by the program they are for.
        calibration: what a routed adapter is fitted to where it is merged; None: the default.
        say: takes lines of progress.
        device: where models are loaded.
    """

    rank: int | None = None
    type: str | None = None
    verify: bool = False
    calibration: Calibration | None = None
    say: Callable[[str], None] = lambda line: None
    device: torch.device | None = None


@dataclass(frozen=True)
class Written:
    """What a format wrote.

    Attributes:
        what: in a line.
        use: how it is opened, in Python or as a command.
        consumer: the program that `theirs` asks.
        ours: loads the reference; called for --verify alone, and gone before `theirs` is called.
        theirs: opens the written folder with the program it is for; told the prompts it will be asked.
        tolerance: mean difference of log-probabilities, in nats, that the format's rounding explains; None: the
            format approximates, and no bound is known.
        facts: what else export.json should hold.
        scratch: a folder that only the check needs, removed after it.
    """

    what: str
    use: str
    consumer: str
    ours: Callable[[], Writer]
    theirs: Callable[[Sequence[list[int]]], Writer]
    tolerance: float | None
    facts: dict[str, Any] = field(default_factory=dict)
    scratch: Path | None = None
