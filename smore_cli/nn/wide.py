"""The two wide ends of an adapter over a frozen linear map, for all adapters in one place.

    y = W x + b,  latent = V x + v        one node: it keeps x (and the parameters), and gives one dL/dx for both
    y += scale * (B mixed + u)            in place on y, which nobody else has seen; dL/dy passes through uncopied

    dx = W^T dy, then += V^T dlatent in place     dV = dlatent x^T     dmixed = scale B^T dy     dB = scale dy mixed^T

Plain autograd computes the same with passes over tokens x width that these functions save: the update and its sum
with y on the way up, a second dx and its sum on the way down; where several maps read the same x (`siblings.py`), one
dx of each. W is frozen: there is no gradient for it. Rows of V that are `exact` (a router's) see x without dropout, and
are multiplied in float32 where x has fewer bits; the latent is float32 (or float64) everywhere.

Gradients are of first order only.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from smore_cli.nn.adapted import dense_weight

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Down", "Reader", "add_up", "down", "drop", "plain_down", "supports", "without_autocast"]


class Down(NamedTuple):
    """What an adapter applies to x, stacked row by row: first `rows`, then `exact`.

    Attributes:
        rows: (R_i, d_in) each; applied to x (with dropout, while training) in its dtype.
        exact: (R_j, d_in) each; applied to x as it is, in float32 or wider.
        bias: (R_i,) one for each of `rows`; empty: none has one.
        dropout: probability of dropping an element of x before `rows`; 0 outside training.
    """

    rows: tuple[Tensor, ...]
    exact: tuple[Tensor, ...] = ()
    bias: tuple[Tensor, ...] = ()
    dropout: float = 0.0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that may have a gradient."""
        return self.rows + self.exact + self.bias

    @property
    def low(self) -> int:
        """How many rows of V are not exact."""
        return sum(map(len, self.rows))

    @property
    def height(self) -> int:
        """R, rows of V."""
        return self.low + sum(map(len, self.exact))


class Reader(NamedTuple):
    """A frozen linear map and what an adapter beside it reads from the same x."""

    base: nn.Module
    down: Down


def supports(base: nn.Module) -> bool:
    """Whether `down` knows how a frozen module maps x: a linear map by itself, a 4-bit one, GPT-2's `Conv1D`.

    Anything else (8 bits, a subclass, hooks such as accelerate's, a weight that trains or is sharded) is called as it
    is, with plain autograd beside it: the same numbers, only slower.
    """
    if type(base) is not nn.Linear and type(base).__name__ not in ("Conv1D", "Linear4bit"):
        return False
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return False
    if "forward" in base.__dict__ or any(each is not None and each.requires_grad for each in base._parameters.values()):
        return False
    return type(base.weight).__name__ != "DTensor"


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, every operation has the dtype of its operands."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def drop(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    """Returns x (N, d) with elements dropped and the others scaled by 1 / (1 - p), and what was kept, (N, d) bool."""
    return torch.native_dropout(x, p, True) if p > 0 else (x, None)


def plain_down(x: Tensor, down: Down) -> Tensor:
    """Returns the latent (N, R), float32 or wider, of x (N, d_in) by plain autograd."""
    dtype = _compute_dtype(x)
    wide = torch.promote_types(dtype, torch.float32)
    with without_autocast(x.device):
        dropped = drop(x, down.dropout)[0].to(dtype)
        found = []
        if down.rows:
            bias = torch.cat(down.bias).to(dtype) if down.bias else None
            found.append(F.linear(dropped, torch.cat(down.rows).to(dtype), bias).to(wide))
        if down.exact:
            found.append(F.linear(x.to(wide), torch.cat(down.exact).to(wide)))
        return _cat(found, 1)


def down(x: Tensor, readers: Sequence[Reader]) -> list[tuple[Tensor, Tensor]]:
    """Returns y (N, d_out) and the latent (N, R) of each reader, all of the same x (..., d_in).

    Args:
        x: N rows.
        readers: their bases are all supported; with dropout there is one reader.
    """
    if not torch.is_grad_enabled():
        return [_frugal(x, reader) for reader in readers]
    tensors = [tensor for reader in readers for tensor in reader.down.tensors]
    weights = [cast("Tensor", reader.base.weight) for reader in readers]
    out = _Down.apply(readers, x, *weights, *tensors)
    return list(zip(out[: len(readers)], out[len(readers) :], strict=True))


def add_up(y: Tensor, mixed: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Returns y + scale (mixed weight^T + bias), computed in place of y, which must have come from `down`; no autocast.

    Args:
        y: (N, d_out).
        mixed: (N, R).
        weight: (d_out, R).
        bias: (d_out,).
        scale: on what is added.
    """
    if torch.is_grad_enabled():
        return cast("Tensor", _Up.apply(y, mixed, weight, bias, scale))
    return _added(y, _cast(mixed, y.dtype), weight, bias, scale)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a linear map computes in for an input x: autocast spares float64 alone."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _frugal(x: Tensor, reader: Reader) -> tuple[Tensor, Tensor]:
    """As `down`, without gradients: a product for every part of V, so that decoding stacks no weights."""
    base, parts = reader
    dtype = _compute_dtype(x)
    wide = torch.promote_types(dtype, torch.float32)
    x = x.reshape(-1, x.shape[-1])
    y = _cast(base(x), dtype)
    with without_autocast(x.device):
        low = _cast(drop(x, parts.dropout)[0], dtype)
        biases: list[Tensor | None] = [_cast(bias, dtype) for bias in parts.bias]
        biases = biases or [None] * len(parts.rows)
        found = [
            _cast(F.linear(low, _cast(rows, dtype), bias), wide) for rows, bias in zip(parts.rows, biases, strict=True)
        ]
        if parts.exact:
            high = _cast(x, wide)
            found += [F.linear(high, _cast(rows, wide)) for rows in parts.exact]
        return y, found[0] if len(found) == 1 else torch.cat(found, 1)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `tensor.to(dtype)`, which takes longer to find out that it has nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _added(y: Tensor, low: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    y.addmm_(low, _cast(weight, y.dtype).t(), alpha=scale)
    if bias is not None:
        y.add_(_cast(bias, y.dtype), alpha=scale)
    return y


class _Down(torch.autograd.Function):
    """See the module's equations. Inputs: the readers, x, the weights of their bases, the tensors of each `Down`."""

    @staticmethod
    def forward(ctx: Any, readers: Sequence[Reader], x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        dtype, flat = _compute_dtype(x), x.reshape(-1, x.shape[-1])
        downs, p = [reader.down for reader in readers], readers[0].down.dropout
        outputs = [_product(reader.base, flat).to(dtype) for reader in readers]
        with without_autocast(x.device):
            dropped, kept = drop(flat, p)
            ctx.one = p == 0 and x.dtype == dtype and dtype in (torch.float32, torch.float64)
            latents = _latents(flat, downs) if ctx.one else _latents_apart(flat, dropped.to(dtype), downs)
        ctx.save_for_backward(x, kept, *tensors)
        ctx.set_materialize_grads(False)
        ctx.bases = [reader.base for reader in readers]
        ctx.counts = [(len(down.rows), len(down.exact), len(down.bias)) for down in downs]
        ctx.dtype, ctx.p = dtype, p
        return (*outputs, *latents)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, kept, *tensors = ctx.saved_tensors
        n, dtype = len(ctx.bases), ctx.dtype
        needs_x, needs_parts = ctx.needs_input_grad[1], any(ctx.needs_input_grad[2 + n :])
        dx: Tensor | None = None
        found: Sequence[Tensor | None] = [None] * (len(tensors) - n)
        with without_autocast(x.device):
            flat = x.reshape(-1, x.shape[-1])
            if needs_x:
                for base, weight, dy in zip(ctx.bases, tensors[:n], gradients[:n], strict=True):
                    dx = dx if dy is None else _input_gradient(dx, dy, base, weight, dtype)
            if any(dlatent is not None for dlatent in gradients[n:]):
                downs = _taken(ctx.counts, tensors[n:], ctx.p)
                wide = torch.promote_types(dtype, torch.float32)
                slopes = [
                    flat.new_zeros(len(flat), down.height, dtype=wide) if dlatent is None else dlatent
                    for down, dlatent in zip(downs, gradients[n:], strict=True)
                ]
                if needs_x:
                    dx = flat.new_zeros(flat.shape, dtype=dtype) if dx is None else dx
                    _add_slopes(dx, slopes, downs, ctx.one, kept)
                if needs_parts:
                    found = _part_gradients(flat, slopes, downs, dtype, ctx.one, kept)
        return (None, None if dx is None else dx.to(x.dtype).view(x.shape), *(None for _ in range(n)), *found)


class _Up(torch.autograd.Function):
    """y += scale mixed B^T + b, in place."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, mixed: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        low = mixed.to(y.dtype)
        _added(y, low, weight, bias, scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(low, weight)
        ctx.scale, ctx.dtype = scale, mixed.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        low, weight = ctx.saved_tensors
        _, needs_mixed, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dmixed = dweight = dbias = None
        with without_autocast(dy.device):
            if needs_mixed:
                dmixed = torch.mm(dy, weight.to(dy.dtype)).to(ctx.dtype)
                dmixed = dmixed if ctx.scale == 1 else dmixed.mul_(ctx.scale)
            if needs_weight:
                dweight = torch.mm(dy.t(), low).to(weight.dtype)
                dweight = dweight if ctx.scale == 1 else dweight.mul_(ctx.scale)
            if needs_bias:
                dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
        return dy, dmixed, dweight, dbias, None


def _product(base: nn.Module, flat: Tensor) -> Tensor:
    """Returns what the base gives for (N, d_in), in memory of its own."""
    if type(base).__name__ == "Conv1D":  # its own forward returns a view, which could not be added to in place
        return torch.addmm(cast("Tensor", base.bias), flat, cast("Tensor", base.weight))
    return cast("Tensor", base(flat))


def _input_gradient(dx: Tensor | None, dy: Tensor, base: nn.Module, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns dx + dy W, computed in place of dx; of a 4-bit map exactly what its own autograd gives."""
    if getattr(weight, "quant_state", None) is not None:
        own = getattr(base, "compute_dtype", None) or dtype
        found = torch.mm(dy.to(own), dense_weight(base).to(own)).to(dtype)
        return found if dx is None else dx.add_(found)
    dense = (weight.t() if type(base).__name__ == "Conv1D" else weight).to(dtype)
    return torch.mm(dy, dense) if dx is None else dx.addmm_(dy, dense)


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _latents(flat: Tensor, downs: Sequence[Down]) -> Sequence[Tensor]:
    """All of V in one product."""
    weight = _cat([part for down in downs for part in down.rows + down.exact]).t()
    if any(down.bias for down in downs):
        zeros = [flat.new_zeros(down.height - sum(map(len, down.bias))) for down in downs]
        bias = torch.cat([part for down, rest in zip(downs, zeros, strict=True) for part in (*down.bias, rest)])
        out = torch.addmm(bias, flat, weight)
    else:
        out = torch.mm(flat, weight)
    return [out] if len(downs) == 1 else out.split([down.height for down in downs], 1)


def _latents_apart(flat: Tensor, low: Tensor, downs: Sequence[Down]) -> list[Tensor]:
    """One product for the rows that see `low`, x with dropout or in half precision, and one for the exact ones."""
    wide = torch.promote_types(low.dtype, torch.float32)
    rows = [part for down in downs for part in down.rows]
    h = torch.mm(low, _cat(rows).to(low.dtype).t()).to(wide) if rows else low.new_empty(len(low), 0, dtype=wide)
    each = list(h.split([down.low for down in downs], 1))
    for own, down in zip(each, downs, strict=True):
        if down.bias:
            own += _cat(down.bias).to(wide)
    exact = [part for down in downs for part in down.exact]
    if not exact:
        return each
    z = torch.mm(flat.to(wide), _cat(exact).to(wide).t()).split([down.height - down.low for down in downs], 1)
    return [torch.cat(pair, 1) for pair in zip(each, z, strict=True)]


def _taken(counts: Sequence[tuple[int, int, int]], tensors: Sequence[Tensor], p: float) -> list[Down]:
    """Returns the `Down` of each reader from the tensors of all."""
    found, rest = [], iter(tensors)
    for count in counts:
        rows, exact, bias = (tuple(next(rest) for _ in range(each)) for each in count)
        found.append(Down(rows, exact, bias, p))
    return found


def _add_slopes(dx: Tensor, slopes: Sequence[Tensor], downs: Sequence[Down], one: bool, kept: Tensor | None) -> None:
    """Adds dlatent V to dx (N, d_in)."""
    if one or kept is None:
        weight = _cat([part for down in downs for part in down.rows + down.exact])
        dx.addmm_(_cat(slopes, 1).to(dx.dtype), weight.to(dx.dtype))
        return
    (slope,), (down,) = slopes, downs
    low, high = slope.to(dx.dtype).split([down.low, down.height - down.low], 1)
    through = torch.mm(low, _cat(down.rows).to(dx.dtype)).mul_(kept)
    dx.add_(through, alpha=1 / (1 - down.dropout))
    if down.exact:
        dx.addmm_(high, _cat(down.exact).to(dx.dtype))


def _part_gradients(
    flat: Tensor, slopes: Sequence[Tensor], downs: Sequence[Down], dtype: torch.dtype, one: bool, kept: Tensor | None
) -> list[Tensor | None]:
    """Returns the gradients of every reader's rows, exact rows and biases."""
    if one:
        whole = torch.mm(_cat(slopes, 1).t(), flat).split([len(p) for d in downs for p in d.rows + d.exact])
        products = iter(whole)
        return [
            gradient
            for down, slope in zip(downs, slopes, strict=True)
            for gradient in (*(next(products) for _ in down.rows + down.exact), *_bias_gradients(slope, down))
        ]
    low = flat.to(dtype) if kept is None else flat.to(dtype) * kept
    dh = _cat([slope[:, : down.low] for slope, down in zip(slopes, downs, strict=True)], 1)
    of_rows = torch.mm(dh.to(dtype).t(), low)
    if kept is not None:
        of_rows.mul_(1 / (1 - downs[0].dropout))
    rows = iter(of_rows.split([len(part) for down in downs for part in down.rows]))
    dz = _cat([slope[:, down.low :] for slope, down in zip(slopes, downs, strict=True)], 1)
    of_exact = torch.mm(dz.t(), flat.to(dz.dtype)) if dz.shape[1] else dz.new_zeros(0, flat.shape[1])
    exact = iter(of_exact.split([len(part) for down in downs for part in down.exact]))
    found: list[Tensor | None] = []
    for down, slope in zip(downs, slopes, strict=True):
        found += [next(rows).to(part.dtype) for part in down.rows]
        found += [next(exact).to(part.dtype) for part in down.exact]
        found += _bias_gradients(slope, down)
    return found


def _bias_gradients(slope: Tensor, down: Down) -> list[Tensor]:
    if not down.bias:
        return []
    return list(slope[:, : down.low].sum(0).split([len(part) for part in down.bias]))
