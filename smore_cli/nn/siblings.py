"""Linear maps that read the same x do together what is the same for all of them.

    latents = [V_q; V_k; V_v] x            dx = sum_i W_i^T dy_i + [dlatent_q | dlatent_k | dlatent_v] [V_q; V_k; V_v]

No model is patched for it. The first map that is called with an x has the wide products done for all; what belongs to
the others waits until they are called with the very same tensor. One that comes with another tensor, or finds nothing,
goes by itself: the same numbers to rounding, only slower.

Without gradients every map goes by itself: there is no dx to share, and V would be stacked for every decoded token.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from smore_cli.nn.factored import Factored
from smore_cli.nn.wide import Reader, down, supports

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from smore_cli.nn.adapted import AdaptedModule

__all__ = ["Siblings", "group_siblings"]

NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Maps of one parent that every family calls with the same input."""


class Siblings:
    """Adapted maps of one parent.

    Attributes:
        members: in the order of `NAMES`.
    """

    def __init__(self, members: Iterable[AdaptedModule]) -> None:
        self.members = list(members)
        self._waiting: dict[int, tuple[Tensor, Tensor]] = {}
        self._x: weakref.ref[Tensor] | None = None
        self._version = 0

    def __getstate__(self) -> dict[str, object]:
        """Leaves out what waits: a copy of the model starts with nothing."""
        return {"members": self.members, "_waiting": {}, "_x": None, "_version": 0}

    def products(self, member: AdaptedModule, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns what `wide.down` gives for a member, or None where it goes by itself.

        Args:
            member: one of them, with an active adapter.
            x: (..., d_in) its input.
        """
        if not torch.is_grad_enabled():
            return None
        known = self._x is not None and self._x() is x and self._version == x._version
        if known and id(member) in self._waiting:
            return self._waiting.pop(id(member))
        readers = {id(each): reader for each in self.members if (reader := _reader(each)) is not None}
        if len(readers) < 2 or id(member) not in readers:
            return None
        self._waiting = dict(zip(readers, down(x, list(readers.values())), strict=True))
        self._x, self._version = weakref.ref(x), x._version
        return self._waiting.pop(id(member))


def group_siblings(model: nn.Module) -> None:
    """Makes groups of the adapted maps that read the same input; what was grouped before is grouped anew."""
    from smore_cli.nn.adapted import AdaptedModule

    for parent in model.modules():
        for names in NAMES:
            children = [getattr(parent, name, None) for name in names]
            members = [child for child in children if isinstance(child, AdaptedModule)]
            together = Siblings(members) if len(members) > 1 else None
            for member in members:
                member.siblings = together


def _reader(member: AdaptedModule) -> Reader | None:
    """Returns what a map reads from x; None: it cannot be done for it, or dropout gives each map an x of its own."""
    adapter = None if member.active is None else member.adapter(member.active)
    # One that overrides `adapted`, as DoRA does, makes something else of what its map gives.
    if not isinstance(adapter, Factored) or type(adapter).adapted is not Factored.adapted or not supports(member.base):
        return None
    reads = adapter.down()
    return Reader(member.base, reads) if reads.dropout == 0 else None
