"""What a merge has to say for itself: printed, and kept as merge.json."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smore_cli import __version__

if TYPE_CHECKING:
    from smore_cli.merging.precision import PrecisionGap
    from smore_cli.merging.verdict import Verdict
    from smore_cli.merging.verify import Difference

__all__ = ["MERGE_FILE", "Merged", "peak_memory"]

MERGE_FILE = "merge.json"


@dataclass(frozen=True)
class Merged:
    """What was written.

    Attributes:
        out: the folder.
        run: where the adapter came from.
        adapter: the adapter's method.
        backbone: its name.
        method: how it was merged.
        linears: how many linear maps were changed.
        dtype: type of the weights.
        quantised: whether training had the backbone in 4 or 8 bits.
        weights: which weights it was merged into.
        verdict: the folder, reopened, beside backbone and adapter.
        calibration: what it was fitted to and how; None: nothing was fitted.
        benchmarks: accuracy of backbone, adapter and merge, task by task.
        precision: what the full-precision weights changed, where training had quantised ones.
        peak_memory_bytes: of the process.
        rank: of a PEFT adapter; None: a whole model was written.
    """

    out: Path
    run: Path
    adapter: str
    backbone: str
    method: str
    linears: int
    dtype: str
    quantised: bool
    weights: str
    verdict: Verdict
    calibration: dict[str, Any] | None
    benchmarks: list[dict[str, Any]]
    precision: PrecisionGap | None
    peak_memory_bytes: int
    rank: int | None = None

    @property
    def difference(self) -> Difference:
        """The written model against the adapter, over all sources."""
        return self.verdict.difference

    @property
    def how(self) -> str:
        """The method in words."""
        rank = "" if self.rank is None else f" of rank {self.rank}"
        if self.calibration is None:
            return f"{self.method}{rank}"
        steps = self.calibration["distill"]
        distilled = f" and {steps} steps of distillation" if steps else ""
        return (
            f"{self.method}{rank}{distilled} on {self.calibration['tokens']:,} tokens of {self.calibration['source']}"
        )

    def document(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return {
            "out": str(self.out),
            "run": str(self.run),
            "adapter": self.adapter,
            "backbone": self.backbone,
            "method": self.method,
            "rank": self.rank,
            "linears": self.linears,
            "dtype": self.dtype,
            "weights": self.weights,
            "difference": asdict(self.difference),
            "verdict": self.verdict.document(),
            "calibration": self.calibration,
            "benchmarks": self.benchmarks,
            "precision": None if self.precision is None else asdict(self.precision),
            "peak_memory_bytes": self.peak_memory_bytes,
            "smore_version": __version__,
        }

    def lines(self) -> list[str]:
        """Returns what is printed."""
        size = sum(file.stat().st_size for file in self.out.iterdir()) / 1e6
        what = "into" if self.rank is None else "beside"
        apart = self.difference
        lines = [
            f"merged      {self.run} {what} {self.linears} linear maps of its backbone",
            f"method      {self.how}",
            f"weights     {self.dtype}, {self.weights}",
            f"written     {self.out} ({size:,.0f} MB), reopened",
            f"difference  largest logit {apart.max_abs_logit:.1e}, mean KL {apart.mean_kl:.1e} nats, "
            f"same first choice {100 * apart.top1_agreement:.2f} % (on {apart.tokens:,} tokens)",
            *self.verdict.lines(),
        ]
        for b in self.benchmarks:
            lines.append(
                f"{b['task']} ({b['n']} questions): backbone {b['base']:.3f}, routed {b['routed']:.3f}, "
                f"merged {b['merged']:.3f}"
            )
        return lines if self.precision is None else [*lines, self.precision.line()]


def peak_memory() -> int:
    """Returns the largest size the process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
