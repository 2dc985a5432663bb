"""An adapter that was trained on a quantised backbone, used with the full-precision weights: how much that changes.

The adapter learned on rounded weights. On the weights that were not rounded it fits, and the model says something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from smore_cli.errors import UsageError
from smore_cli.merging.text import comparison_text
from smore_cli.merging.verify import Difference, difference, logits_of
from smore_cli.models.quantised import describe_quantization

if TYPE_CHECKING:
    import torch

    from smore_cli.models.runs import Run

__all__ = ["PrecisionGap", "precision_gap", "require_quantised"]

TOKENS = 512


@dataclass(frozen=True)
class PrecisionGap:
    """What the full-precision weights change.

    Attributes:
        trained_on: how the weights were kept in training, as in '4-bit (nf4)'.
        difference: the run on full-precision weights, against the run as it was trained.
        text: what they were compared on.
    """

    trained_on: str
    difference: Difference
    text: str

    def line(self) -> str:
        """Returns the change in one line."""
        apart = self.difference
        return (
            f"trained on a {self.trained_on} backbone, used with full-precision weights: mean KL {apart.mean_kl:.1e} "
            f"nats, same first choice {100 * apart.top1_agreement:.1f} % (on {apart.tokens:,} tokens of {self.text})"
        )


def precision_gap(run: Run, device: torch.device | None = None) -> PrecisionGap:
    """Loads a run both ways, one after the other, and measures how far apart they are.

    Args:
        run: of a quantised backbone.
        device: default: the first CUDA device, else the CPU.

    Raises:
        UsageError: its backbone was not quantised.
    """
    require_quantised(run)
    found = []
    for full_precision in (False, True):
        model, tokenizer = run.load(device, full_precision=full_precision)
        text = comparison_text(run.recipe, tokenizer, TOKENS)
        found.append(logits_of(model, text.texts))
        del model  # before the other is loaded
    return PrecisionGap(describe_quantization(run.quantization), difference(*found), text.origin)


def require_quantised(run: Run, option: str = "--full-precision") -> None:
    """Refuses a run that has full-precision weights anyway.

    Args:
        run: the run.
        option: what asked for them.

    Raises:
        UsageError: its backbone was not quantised.
    """
    if run.quantization is None:
        problem = f"{run.folder} was trained on a full-precision backbone, so {option} changes nothing"
        raise UsageError(problem, "leave it out")
