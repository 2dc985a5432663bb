"""What travels beside the hidden states: the token mask going in, routing records coming out.

One explicit object, made current around the model call:

    with AdapterContext.of(batch) as context:
        loss = ...model(...)
    loss = loss + context.aux_loss()

A balance loss is a function of *sums over tokens*, so the records keep the sums, not the losses. That is what lets a
step be split at will: with S the sums over a whole step and S_i those of one forward pass, `aux_loss(S)` evaluates the
loss at S while its gradient flows through S_i alone; over all passes that adds up to the gradient of the loss of the
whole step.

A sequence is a row of the batch, or, where several documents share a row (`smore_cli.data.packing`), a document. What
is known of each sequence (its group, its prior) then has D entries, one a document, in the order of `places`.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from torch import Tensor, nn

    from smore_cli.data.batch import Batch
    from smore_cli.nn.gate_edit import GateEdit

__all__ = [
    "AdapterContext",
    "AuxLoss",
    "ExpertLoad",
    "RoutingRecord",
    "RoutingTrace",
    "checkpoint_contexts",
    "current_context",
    "heard",
]


class AuxLoss(Protocol):
    """A loss on sums over tokens; equal losses compare and hash equal, so that they are evaluated together."""

    def __call__(self, sums: Tensor) -> Tensor:
        """Maps the sums (R, k, s) of all R routers that have this loss to their losses, (R,) or one number."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class RoutingRecord:
    """What one auxiliary loss needs to know of one router (one level of it) in one forward pass.

    Attributes:
        owner: the adapter the router belongs to.
        level: tree level, 0 = leaves.
        sums: (k, s) sums over real tokens, differentiable, at least float32.
        loss: the auxiliary loss of these sums.
    """

    owner: nn.Module
    level: int
    sums: Tensor
    loss: AuxLoss


@dataclass(frozen=True)
class ExpertLoad:
    """How busy one router (one level of it) kept its experts in one forward pass.

    Attributes:
        owner: the adapter the router belongs to.
        level: tree level, 0 = leaves.
        load: (s,) how often each expert was picked, or for a dense router the gate mass it got; real tokens, detached.
            (G, s) where the adapter has G groups of experts, each with a distribution of its own.
        decisions: scalar, how many decisions that was for each group: one a token, in a tree one for every parent.
        dense: whether `load` is gate mass.
    """

    owner: nn.Module
    level: int
    load: Tensor
    decisions: Tensor
    dense: bool


@dataclass(frozen=True)
class RoutingTrace:
    """The routing of every token by one router (one level of it), for inspection.

    Attributes:
        owner: the adapter the router belongs to.
        level: tree level, 0 = leaves.
        probabilities: (N, F, s) the router's distribution over all experts, for each of the F parent nodes.
        gates: (N, F, s) the weights applied, 0 where an expert was not picked.
        chosen: (N, F, f) int64 in a tree, which expert each child is; in this order they are the parents of the level
            below. None: there is no tree.
    """

    owner: nn.Module
    level: int
    probabilities: Tensor
    gates: Tensor
    chosen: Tensor | None = None


@dataclass
class AdapterContext(AbstractContextManager["AdapterContext"]):
    """Makes itself current for the model calls inside its `with` block.

    Attributes:
        token_mask: (B, S), true or non-zero on real tokens; None: every token is real.
        aux: whether routers add to `records` (training) or not (evaluation).
        observe: called with the `RoutingTrace` of every router, for inspection.
        edit: changes the gates of some routers after they have decided, to see what their experts are worth.
        records: what the auxiliary losses need, in the order of the forward pass.
        loads: how busy the experts were, in the same order; filled where `aux` is on.
        groups: (B,) the group each sequence belongs to, for losses that know of groups (LoRAMoE).
        prior: (B, K) what is known of each sequence before its tokens are routed (T-REX).
        prompt_mask: (B, S), true on the tokens a sequence's prior is computed from; None: all real tokens.
        documents: (B, S) int64, the number of each token's document, -1 on padding; None: a row is one document.
        places: (D, L) int64, where in B*S the tokens of each document are, -1 beyond its end; given with `documents`.
        entered_by: what made it current, where that was no `with` block but a hook (`prior_hooks`).
        recomputing: it stands in for the context of a pass whose activations are computed once more: whatever no
            gradient flows through has been recorded by then, and is not worked out again.
    """

    token_mask: Tensor | None = None
    aux: bool = True
    observe: Callable[[RoutingTrace], None] | None = None
    edit: GateEdit | None = None
    records: list[RoutingRecord] = field(default_factory=list)
    loads: list[ExpertLoad] = field(default_factory=list)
    groups: Tensor | None = None
    prior: Tensor | None = None
    prompt_mask: Tensor | None = None
    documents: Tensor | None = None
    places: Tensor | None = None
    entered_by: object = field(default=None, repr=False)
    recomputing: bool = False
    _tokens: list[Token[AdapterContext | None]] = field(default_factory=list, init=False, repr=False)
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)  # of the mask, once for all layers

    @classmethod
    def of(cls, batch: Batch, **fields: Any) -> AdapterContext:
        """Returns the context of a batch; `fields` are the attributes that no batch knows of."""
        return cls(
            token_mask=batch.token_mask,
            groups=batch.groups,
            prompt_mask=batch.prompt_mask,
            documents=batch.documents,
            places=batch.places,
            **fields,
        )

    def __enter__(self) -> AdapterContext:
        """Makes this context current."""
        self._tokens.append(_CURRENT.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        """Makes the context current that was so before."""
        _CURRENT.reset(self._tokens.pop())

    def flat_mask(self, num_tokens: int, device: torch.device) -> Tensor | None:
        """Returns the token mask as (N,) bool, or None where every token is real.

        Raises:
            ValueError: the mask is for another number of tokens than the hidden states hold.
        """
        if self.token_mask is None:
            return None
        if self.token_mask.numel() != num_tokens:
            raise ValueError(f"token_mask has {self.token_mask.numel()} tokens, the hidden states have {num_tokens}")
        mask = self.token_mask
        return cast("Tensor", self._once(("mask", device), lambda: mask.reshape(-1).to(device) != 0))

    def weights(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns 1 for every real token and 0 for padding, (N,), and how many are real, a scalar.

        Args:
            like: (N, ...) one entry a token, of whose dtype and device they are.
        """
        n, device, dtype = len(like), like.device, like.dtype
        mask = self.flat_mask(n, device)

        def make() -> tuple[Tensor, Tensor]:
            found = like.new_ones(n) if mask is None else mask.to(dtype)
            return found, found.sum()

        return cast("tuple[Tensor, Tensor]", self._once(("weights", n, device, dtype), make))

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Returns what `make` gave for a key at first."""
        if key not in self._made:
            with torch.no_grad():
                self._made[key] = make()
        return self._made[key]

    def by_sequence(self, values: Tensor) -> Tensor:
        """Returns one value a token, (N, ...), sequence by sequence: (D, L, ...), 0 (false) beyond a sequence's end."""
        if self.places is None:
            return values.view(self._num_rows(), -1, *values.shape[1:])
        places = self.places.to(values.device)  # (D, L)
        beyond = (places < 0).view(*places.shape, *(1 for _ in values.shape[1:]))
        return values[places.clamp_min(0)].masked_fill(beyond, 0)

    def _num_rows(self) -> int:
        """Returns the rows of the batch: of what is known of it; 1 where nothing tells where a sequence ends."""
        if self.groups is not None:
            return len(self.groups)
        return len(self.token_mask) if self.token_mask is not None and self.token_mask.dim() > 1 else 1

    def statistics(self) -> list[Tensor]:
        """Returns the detached sums of every record, in order; they add up over forward passes and processes."""
        return [record.sums.detach() for record in self.records]

    def aux_loss(self, totals: list[Tensor] | None = None) -> Tensor:
        """Returns the sum of all auxiliary losses, a scalar (0 where there are none).

        Args:
            totals: `statistics()` summed over all forward passes of the step. The value is then the loss of the whole
                step, and the gradient is the share of it that belongs to this pass. None: this pass is the step.
        """
        groups: dict[tuple[Hashable, torch.Size], list[int]] = defaultdict(list)
        for i, record in enumerate(self.records):
            groups[record.loss, record.sums.shape].append(i)
        device = self.records[0].sums.device if self.records else None  # layers may be on several GPUs
        losses = []
        for (loss, _), members in groups.items():
            sums = torch.stack([self.records[i].sums.to(device) for i in members])  # (R, k, s)
            if totals is not None:
                sums = torch.stack([totals[i].to(device) for i in members]) + (sums - sums.detach())
            losses.append(loss(sums).sum())  # type: ignore[operator]
        return torch.stack(losses).sum() if losses else torch.zeros(())


_CURRENT: ContextVar[AdapterContext | None] = ContextVar("smore_adapter_context", default=None)


def current_context() -> AdapterContext | None:
    """Returns the context of the model call that is running, if it has one."""
    return _CURRENT.get()


def heard() -> bool:
    """Whether anybody wants to know what is routed."""
    context = _CURRENT.get()
    return context is not None and (context.aux or context.observe is not None)


def checkpoint_contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """The `context_fn` of `torch.utils.checkpoint`: contexts for the forward pass and for its recomputation.

    The recomputation runs when the `with` block has long ended, maybe in another thread, and must not record twice: it
    gets the same inputs and record lists of its own that are thrown away.
    """
    context = current_context() or AdapterContext(aux=False)  # a backward pass may run inside another pass's context
    again = replace(context, observe=None, records=[], loads=[], recomputing=True)
    return nullcontext(), again
