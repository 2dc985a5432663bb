"""What a run needs at its peak, by component, for one process.

    always      Python and libraries (on a CPU) + backbone + adapter
    loading     + the files that the backbone is converted from   on a CPU, where they are mapped
    census      + a copy of the adapter + a pass                  before the first step, no optimiser state yet
    training    + optimiser state + a pass with its gradients     the pass that costs most
    step        + optimiser state + all gradients
    evaluation  + optimiser state + a pass without gradients

The peak is the highest of these. On a CPU the model's Python objects and the code they need add to it (`OBJECTS`), and
the allocator: glibc gives the top of its heap back only when it is larger than `KEPT`, and nothing of what is freed
between blocks in use (`HOLES`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smore_cli.planning.parameters import adapter_bytes, optimizer_bytes
from smore_cli.training.process_memory import KEPT

if TYPE_CHECKING:
    from smore_cli.planning.passes import PassMemory
    from smore_cli.planning.skeleton import Skeleton
    from smore_cli.recipe.schema import Recipe

__all__ = ["MemoryPlan", "plan_memory"]

OBJECTS = 64 << 20
"""What loading a model and attaching an adapter adds besides tensors, as measured."""
HOLES = 0.05
"""Share of what comes and goes in a pass, as measured (docs/memory.md)."""


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted memory of one process, in bytes.

    Attributes:
        device: `cpu` or `cuda`.
        components: of the highest phase; they add up to `peak`.
        phases: the peak of each phase.
        logits: what head and loss take in the heaviest pass, whether or not that is the peak.
    """

    device: str
    components: dict[str, int]
    phases: dict[str, int]
    logits: int

    @property
    def peak(self) -> int:
        """The highest of all phases."""
        return max(self.phases.values())

    def as_dict(self) -> dict[str, Any]:
        """Returns it as plain values."""
        return {
            "device": self.device,
            "peak": self.peak,
            "components": self.components,
            "phases": self.phases,
            "logits": self.logits,
        }


def plan_memory(
    recipe: Recipe, skeleton: Skeleton, train: PassMemory, held_out: PassMemory | None, *, device: str, baseline: int
) -> MemoryPlan:
    """Adds up the components.

    Args:
        recipe: what is run.
        skeleton: its model.
        train: the heaviest training pass.
        held_out: the heaviest evaluation pass, where there is one.
        device: `cpu` or `cuda`.
        baseline: resident bytes of the process before the model is loaded; 0 for a GPU.
    """
    adapter, optimizer = adapter_bytes(skeleton), optimizer_bytes(skeleton, recipe.train)
    always = {"Python and libraries": baseline + OBJECTS} if device == "cpu" else {}
    always |= {f"backbone: {part}": size for part, size in skeleton.weights.items()}
    always |= {"adapter": adapter["trainable"]}
    if adapter["frozen"]:
        always["adapter: frozen parts"] = adapter["frozen"]
    loading = always | {"backbone: mapped files": skeleton.files["loading"]}
    if device == "cpu":
        always["backbone: mapped files"] = skeleton.files["kept"]
    state = {"optimiser": optimizer}
    phases = {
        "training": always | state | _parts(train),
        "optimiser step": always | state | {"gradients": train.gradients_in_all},
    }
    if device == "cpu" and skeleton.files["loading"]:
        phases["loading"] = loading
    if recipe.train.gradient_census:
        phases["census"] = always | {"copy of the adapter": adapter["trainable"]} | _parts(train)
    if held_out is not None:
        phases["evaluation"] = always | state | _parts(held_out)
    if device == "cpu":
        for parts in phases.values():
            moving = sum(parts.get(name, 0) for name in ("activations", "logits", "gradients", "working buffers"))
            parts["allocator"] = KEPT + int(HOLES * moving)
    totals = {name: sum(parts.values()) for name, parts in phases.items()}
    highest = max(totals, key=lambda name: totals[name])
    components = {name: size for name, size in phases[highest].items() if size}
    return MemoryPlan(device, components, totals, train.logits_alone)


def _parts(memory: PassMemory) -> dict[str, int]:
    return {
        "gradients": memory.gradients,
        "activations": memory.activations,
        "logits": memory.logits,
        "working buffers": memory.working,
    }
