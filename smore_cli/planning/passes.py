"""What one forward (and backward) pass needs at its peak, layer by layer.

    forward   embedding | layer 0 | layer 1 | ... | layer L-1 | head and loss
    backward                                        head      | layer L-1 | ... | layer 0 | the rest

A pass of the few layers of a skeleton is tracked with a mark at every boundary. What a stretch leaves alive and how far
it rises above where it began is its own affair, so the peak at full depth is the highest of

    alive before the stretch + its rise            over all stretches of all L layers

where what is alive before it is summed from the layers before it: activations on the way up, gradients on the way down.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smore_cli.models.forward import target_logprobs
from smore_cli.nn import AdapterContext, checkpoint_contexts
from smore_cli.planning.trace import Segment, Tracker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from smore_cli.data.batch import Batch
    from smore_cli.planning.skeleton import Skeleton

__all__ = ["PassMemory", "measure_pass"]


@dataclass(frozen=True)
class PassMemory:
    """The peak of a pass beyond what was there before it, in bytes, and what it is made of.

    Attributes:
        activations: kept for the backward pass (in evaluation: the hidden states), the batch and its masks included.
        logits: of head and loss where they are part of the peak: logits, their float32 copy, their gradient.
        gradients: of adapter parameters, made so far.
        working: what the busiest operations hold besides.
        logits_alone: how far head and loss rise, whether or not the peak lies there.
        gradients_in_all: gradients of all parameters.
    """

    activations: int
    logits: int
    gradients: int
    working: int
    logits_alone: int
    gradients_in_all: int

    @property
    def peak(self) -> int:
        """All that is alive at the peak."""
        return self.activations + self.logits + self.gradients + self.working


def measure_pass(
    skeleton: Skeleton, batch: Batch, *, train: bool = True, checkpointing: bool = False, accumulating: bool = False
) -> PassMemory:
    """Runs a pass on shapes.

    Args:
        skeleton: the model.
        batch: real rows, on the CPU.
        train: forward and backward; false: as in evaluation.
        checkpointing: activations are recomputed in the backward pass.
        accumulating: gradients of an earlier pass of the step are there already.
    """
    tracker = Tracker(skeleton.fake, [*skeleton.model.parameters(), *skeleton.model.buffers()])
    with _mode(skeleton, train=train, checkpointing=checkpointing), skeleton.fake, tracker:
        shapes = _shapes_of(batch, tracker)
        prior = None
        if skeleton.prior_width:
            sequences = len(batch.gold)
            prior = torch.zeros(sequences, skeleton.prior_width)
        with _marks(skeleton, tracker), torch.set_grad_enabled(train):
            with AdapterContext.of(shapes, aux=train, prior=prior) as context:
                loss = -target_logprobs(skeleton.model, shapes).sum()
            if train:
                loss = loss + context.aux_loss().to(loss)
                context.records.clear()
                tracker.mark("head-backward")
                loss.backward()
    tracker.segments[-1].end = tracker.live
    parameters = [p for p in skeleton.model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    return _at_full_depth(tracker.segments, skeleton, train=train, accumulating=accumulating)


def _shapes_of(batch: Batch, tracker: Tracker) -> Batch:
    tensors = {f.name: value for f in fields(batch) if isinstance(value := getattr(batch, f.name), Tensor)}
    return replace(batch, **{name: tracker.know(value) for name, value in tensors.items()})


@contextmanager
def _mode(skeleton: Skeleton, *, train: bool, checkpointing: bool) -> Iterator[None]:
    """Puts the model into the mode of the pass."""
    model: Any = skeleton.model
    model.train(train)
    if train and checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    try:
        yield
    finally:
        if train and checkpointing:
            model.activation_checkpointing_disable()
        model.train()


@contextmanager
def _marks(skeleton: Skeleton, tracker: Tracker) -> Iterator[None]:
    """Marks where each layer begins, forward and backward, and where the last one ends."""
    last = len(skeleton.stack) - 1

    def before(index: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if tracker.segments[-1].label[0] in ("start", "layer"):  # not when recomputed in the backward pass
                tracker.mark("layer", index)

        return hook

    def after(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if tracker.segments[-1].label[0] != "layer":
                return
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: tracker.mark("layer-backward", index))
            if index == last:
                tracker.mark("head")

        return hook

    handles = [layer.register_forward_pre_hook(before(i)) for i, layer in enumerate(skeleton.stack)]
    handles += [layer.register_forward_hook(after(i)) for i, layer in enumerate(skeleton.stack)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _at_full_depth(segments: list[Segment], skeleton: Skeleton, *, train: bool, accumulating: bool) -> PassMemory:
    """Adds the stretches up over all layers of the model."""
    by_label = {segment.label: segment for segment in segments}
    trainable = [
        sum(p.numel() * p.element_size() for p in layer.parameters() if p.requires_grad) for layer in skeleton.stack
    ]
    in_layers = [trainable[i] for i in skeleton.layers]
    elsewhere = sum(p.numel() * p.element_size() for p in skeleton.model.parameters() if p.requires_grad) - sum(
        trainable
    )
    in_all = sum(in_layers) + elsewhere
    grads = in_all if accumulating else 0
    live = by_label["start", 0].change
    found = [PassMemory(0, 0, grads, by_label["start", 0].peak, 0, in_all)]
    for i in skeleton.layers:
        stretch = by_label["layer", i]
        found.append(PassMemory(live, 0, grads, stretch.rise, 0, in_all))
        # Without gradients a layer leaves nothing: at its end its input is alive too, but the next begins without.
        live += stretch.change if train or i == 0 else 0
    head = by_label.get(("head", 0))
    if head is None:  # the layers were not found: the whole pass was one stretch
        return PassMemory(0, 0, grads, max(segment.peak for segment in segments), 0, in_all)
    back = by_label.get(("head-backward", 0))
    rise = max(head.rise, 0 if back is None else head.change + back.rise)
    found.append(PassMemory(live, rise, grads, 0, rise, in_all))
    if back is not None:
        left = head.change + back.change
        for i, own in zip(reversed(skeleton.layers), reversed(in_layers), strict=True):
            stretch = by_label["layer-backward", i]
            made = 0 if accumulating else own
            found.append(PassMemory(live, 0, grads, max(left, 0) + stretch.rise, rise, in_all))
            # What a layer frees of its activations is what it changes beyond the gradients it makes.
            live += stretch.change - own
            grads += made
    highest = max(found, key=lambda memory: memory.peak)
    return replace(highest, logits_alone=rise)
