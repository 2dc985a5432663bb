"""The steps of `tree_triton.py`, which has the equations: what one program does with one block of tokens.

`flat` is the row of all parameters, `own` the program's row of their gradients; where a step adds to it, `again` says
whether there is something to add to. `at` is where the scores of each row begin, `gap` how far one expert's or child's
lie from the next's, `here` which rows there are.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "add_matrix",
    "add_row",
    "dot",
    "first",
    "first_back",
    "gather",
    "leaves",
    "leaves_back",
    "load",
    "nodes",
    "nodes_back",
    "one_hot",
    "own_columns",
    "rank_experts",
    "recall",
    "route_back",
    "score",
    "spread",
    "store_picks",
    "table",
    "tokens",
    "weigh",
]

# ------------------------------------------------------------------------------------------------ matrices, activations


@triton.jit
def _matrix(at, rows, cols, stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Addresses (ROWS, COLS) of a matrix, and which of them it has."""
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None]
    return at + i * stride + j, (i < rows) & (j < cols)


@triton.jit
def load(at, rows, cols, stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A matrix, (ROWS, COLS)."""
    where, inside = _matrix(at, rows, cols, stride, ROWS, COLS)
    return tl.load(where, mask=inside, other=0.0)


@triton.jit
def _stacked(at, level: tl.constexpr, SR: tl.constexpr):
    """Addresses (SR, D) of [B_1 .. B_s]^T, and which of them it has."""
    i, j = tl.arange(0, SR)[:, None], tl.arange(0, level.D)[None]
    return at + i // level.r * (level.d * level.r) + j * level.r + i % level.r, (i < level.s * level.r) & (j < level.d)


@triton.jit
def _add(where, inside, value, again):
    """Adds to what is there, or where it is not `again`, puts it there."""
    tl.store(where, value + tl.where(again, tl.load(where, mask=inside, other=0.0), 0.0), mask=inside)


@triton.jit
def add_matrix(at, value, rows, cols, stride, again):
    """Adds a matrix, without what only fills it up."""
    where, inside = _matrix(at, rows, cols, stride, value.shape[0], value.shape[1])
    _add(where, inside, value, again)


@triton.jit
def add_row(at, value, n, again):
    """Adds a row of n."""
    add_matrix(at, value[None], 1, n, 0, again)


@triton.jit
def dot(a, b, q: tl.constexpr):
    """The product a b."""
    return tl.dot(a, b, input_precision=q.precision)


@triton.jit
def _act(a, act: tl.constexpr):
    if act == "tanh":  # a polynomial near 0, where the other form loses all digits
        size, square = tl.abs(a), a * a
        p = -5.70498872745e-3 * square + 2.06390887954e-2
        p = p * square - 5.37397155531e-2
        p = p * square + 1.33314422036e-1
        p = p * square - 3.33332819422e-1
        far = tl.exp(-2.0 * size)
        high = (1.0 - far) / (1.0 + far)
        a = tl.where(size < 0.625, p * square * a + a, tl.where(a < 0, -high, high))
    if act == "relu":
        a = tl.where(a < 0, 0.0, a)
    return a


@triton.jit
def _slope(grad, out, act: tl.constexpr):
    if act == "tanh":
        grad = grad * (1.0 - out * out)
    if act == "relu":
        grad = tl.where(out <= 0, 0.0, grad)
    return grad


@triton.jit
def spread(a, F: tl.constexpr):
    """(T, D) for every child of the root, (F T, D)."""
    return tl.reshape(tl.broadcast_to(a[None], (F, a.shape[0], a.shape[1])), (F * a.shape[0], a.shape[1]))


@triton.jit
def gather(a, F: tl.constexpr):
    """(F T, D) summed over the children of the root, (T, D)."""
    return tl.sum(tl.reshape(a, (F, a.shape[0] // F, a.shape[1])), 0)


# -------------------------------------------------------------------------------------------------------------- routing


@triton.jit
def first(x, flat, level: tl.constexpr, q: tl.constexpr):
    """The token's part of W1 u + b1, (T, M)."""
    W1 = load(flat + level.W1, level.m, q.width, level.columns, level.M, q.X)
    return dot(x, tl.trans(W1), q) + load(flat + level.b1, 1, level.m, 0, 1, level.M)


@triton.jit
def table(flat, q: tl.constexpr):
    """What each child of the root adds to that of the leaves, (S, M)."""
    keys = load(flat + q.root.keys, q.root.s, q.root.m, q.root.m, q.root.S, q.root.M)
    W1 = load(flat + q.leaf.W1 + q.width, q.leaf.m, q.root.m, q.leaf.columns, q.leaf.M, q.root.M)
    return dot(keys, tl.trans(W1), q)


@triton.jit
def score(pre, flat, level: tl.constexpr, q: tl.constexpr):
    """The hidden layer (rows, M), the logits (rows, S) and their softmax."""
    keys = load(flat + level.keys, level.s, level.m, level.m, level.S, level.M)
    W2 = load(flat + level.W2, level.m, level.m, level.m, level.M, level.M)
    bias = tl.sum(keys * load(flat + level.b2, 1, level.m, 0, 1, level.M), 1)
    hidden = _act(pre, q.router_act)
    z = dot(hidden, tl.trans(dot(keys, W2, q)), q) + bias[None]
    z = tl.where(tl.arange(0, level.S)[None] < level.s, z, float("-inf"))
    p = tl.exp(z - tl.max(z, 1)[:, None])
    return hidden, z, p / tl.sum(p, 1)[:, None]


@triton.jit
def rank_experts(z, level: tl.constexpr, DENSE: tl.constexpr):
    """How many experts go before each: larger ones, of equal ones the first; as in PyTorch NaN is the largest."""
    e = tl.arange(0, level.S)[None]
    rank = tl.zeros((z.shape[0], level.S), tl.int32)
    if DENSE:
        rank += e
    else:
        z = tl.where(z == z, z, float("inf"))
        for o in range(level.s):
            other = tl.sum(tl.where(e == o, z, 0.0), 1)[:, None]
            rank += ((other > z) | ((other == z) & (o < e))).to(tl.int32)
    return rank


@triton.jit
def recall(chosen, at, gap, here, level: tl.constexpr):
    """The ranks of those that were picked; of all others s."""
    e = tl.arange(0, level.S)[None]
    rank = tl.full((at.shape[0], level.S), level.S, tl.int32)
    for c in range(level.f):
        expert = tl.load(chosen + at + c * gap, mask=here, other=c)[:, None]
        rank = tl.where(e == expert, c, rank)
    return rank


@triton.jit
def weigh(p, rank, level: tl.constexpr):
    """The weight of each expert, (rows, S): its share of the pool or of the picked."""
    g = tl.where(rank < level.f, p, 0.0)
    if not level.by_pool:
        g = g / tl.sum(g, 1)[:, None]
    return g


@triton.jit
def store_picks(z, p, g, rank, chosen, alpha, logits, probabilities, at, gap, here, level: tl.constexpr):
    """Stores who was picked and all scores, as `Picks` has them."""
    e = tl.arange(0, level.S)[None]
    expert, child = at[:, None] + e * gap, at[:, None] + rank * gap
    there, picked = here[:, None] & (e < level.s), here[:, None] & (rank < level.f)
    tl.store(logits + expert, z, mask=there)
    tl.store(probabilities + expert, p, mask=there)
    tl.store(chosen + child, tl.broadcast_to(e.to(tl.int64), rank.shape), mask=picked)
    tl.store(alpha + child, g, mask=picked)


@triton.jit
def route_back(
    hidden, p, g, rank, d_g, d_alpha, d_logits, d_probabilities, at, gap, here, flat, own, again,
    level: tl.constexpr, q: tl.constexpr,
):  # fmt: skip
    """From the gradients of a level's weights to those of its first products, (rows, M), and of its keys, (S, M)."""
    e = tl.arange(0, level.S)[None]
    expert, child = at[:, None] + e * gap, at[:, None] + rank * gap
    there, picked = here[:, None] & (e < level.s), here[:, None] & (rank < level.f)
    if d_alpha is not None:
        d_g += tl.load(d_alpha + child, mask=picked, other=0.0)
    d_g = tl.where(picked, d_g, 0.0)
    d_p = tl.zeros_like(p)
    if d_probabilities is not None:
        d_p += tl.load(d_probabilities + expert, mask=there, other=0.0)
    if level.by_pool:
        d_p += d_g
    dz = p * (d_p - tl.sum(p * d_p, 1)[:, None])
    if not level.by_pool:
        dz += g * (d_g - tl.sum(g * d_g, 1)[:, None])
    if d_logits is not None:
        dz += tl.load(d_logits + expert, mask=there, other=0.0)
    keys = load(flat + level.keys, level.s, level.m, level.m, level.S, level.M)
    W2 = load(flat + level.W2, level.m, level.m, level.m, level.M, level.M)
    d_product, d_bias = dot(tl.trans(dz), hidden, q), tl.sum(dz, 0)[:, None]  # (S, M), (S, 1): of keys W2, keys b2
    add_matrix(own + level.W2, dot(tl.trans(keys), d_product, q), level.m, level.m, level.m, again)
    add_row(own + level.b2, tl.sum(keys * d_bias, 0), level.m, again)
    d_keys = dot(d_product, tl.trans(W2), q) + d_bias * load(flat + level.b2, 1, level.m, 0, 1, level.M)
    return _slope(dot(dz, dot(keys, W2, q), q), hidden, q.router_act), d_keys


@triton.jit
def first_back(d_pre, x, flat, own, again, level: tl.constexpr, q: tl.constexpr):
    """From the gradient of a level's first products, (T, M), to that of x, (T, X)."""
    W1 = load(flat + level.W1, level.m, q.width, level.columns, level.M, q.X)
    add_matrix(own + level.W1, dot(tl.trans(d_pre), x, q), level.m, q.width, level.columns, again)
    add_row(own + level.b1, tl.sum(d_pre, 0), level.m, again)
    return dot(d_pre, W1, q)


# --------------------------------------------------------------------------------------------------------------- states


@triton.jit
def tokens(latent, stride, t, n, width, WIDTH: tl.constexpr):
    """Columns of the latents of tokens t, (.., WIDTH)."""
    j = tl.arange(0, WIDTH)[None]
    return tl.load(latent + t[:, None] * stride + j, mask=(t[:, None] < n) & (j < width), other=0.0)


@triton.jit
def _leaf(h, B, b, level: tl.constexpr, q: tl.constexpr):
    """act(scale (B h + b)), (T, D)."""
    return _act(level.scale * (dot(h, tl.trans(B), q) + b), q.act)


@triton.jit
def leaves(latent, stride, t, n, g, flat, level: tl.constexpr, q: tl.constexpr):
    """x_1, (F T, D)."""
    x = tl.zeros((q.F * q.T, level.D), tl.float32)
    for k in range(level.s):
        h = tokens(latent + level.at + k * level.r, stride, t, n, level.r, level.R)
        B = load(flat + level.B + k * level.d * level.r, level.d, level.r, level.r, level.D, level.R)
        b = load(flat + level.b + k * level.d, 1, level.d, 0, 1, level.D)
        weight = tl.sum(tl.where(tl.arange(0, level.S)[None] == k, g, 0.0), 1)
        x += weight[:, None] * spread(_leaf(h, B, b, level, q), q.F)
    return x


@triton.jit
def one_hot(rank, q: tl.constexpr):
    """One-hot rows of the root's children, (F T, S)."""
    c = tl.arange(0, q.F)[:, None, None]
    return tl.reshape((rank[None] == c).to(tl.float32), (q.F * q.T, q.root.S))


@triton.jit
def own_columns(place, q: tl.constexpr):
    """Which columns of the latents are a child's own, (F T, SR)."""
    expert = tl.sum(place * tl.arange(0, q.root.S)[None], 1)
    return (expert[:, None] == tl.arange(0, q.SR)[None] // q.root.r).to(tl.float32)


@triton.jit
def nodes(rows, place, x, flat, q: tl.constexpr):
    """act( scale (B_c h_c + b_c) + W x_1[c] + w ), (F T, D)."""
    level: tl.constexpr = q.root
    where, inside = _stacked(flat + level.B, level, q.SR)
    W = load(flat + q.W, level.d, q.leaf.d, q.leaf.d, level.D, q.leaf.D)
    e = dot(rows, tl.load(where, mask=inside, other=0.0), q)
    e += dot(place, load(flat + level.b, level.s, level.d, level.d, level.S, level.D), q)
    e = level.scale * e + load(flat + q.w, 1, level.d, 0, 1, level.D)
    return _act(e + dot(x, tl.trans(W), q), q.act)


@triton.jit
def leaves_back(d_x, g, latent, d_latent, stride, t, n, flat, own, again, level: tl.constexpr, q: tl.constexpr):
    """From the gradient of x_1 to that of the weights, (F T, S); those of B, b and h are written."""
    e, j = tl.arange(0, level.S)[None], tl.arange(0, level.R)[None]
    d_g = tl.zeros((q.F * q.T, level.S), tl.float32)
    for k in range(level.s):
        h = tokens(latent + level.at + k * level.r, stride, t, n, level.r, level.R)
        B = load(flat + level.B + k * level.d * level.r, level.d, level.r, level.r, level.D, level.R)
        b = load(flat + level.b + k * level.d, 1, level.d, 0, 1, level.D)
        out = _leaf(h, B, b, level, q)
        weight = tl.sum(tl.where(e == k, g, 0.0), 1)[:, None]
        d_g += tl.where(e == k, tl.sum(d_x * spread(out, q.F), 1)[:, None], 0.0)
        de = level.scale * _slope(gather(weight * d_x, q.F), out, q.act)
        add_matrix(own + level.B + k * level.d * level.r, dot(tl.trans(de), h, q), level.d, level.r, level.r, again)
        add_row(own + level.b + k * level.d, tl.sum(de, 0), level.d, again)
        where = d_latent + t[:, None] * q.latent + level.at + k * level.r + j
        _add(where, (t[:, None] < n) & (j < level.r), dot(de, B, q), q.shared)
    return d_g


@triton.jit
def nodes_back(d_state, alpha, out, rows, owned, place, x, d_latent, t, n, flat, own, again, q: tl.constexpr):
    """From the gradient of x_2, (F T, D), to that of x_1; those of W, w, B, b and h are written."""
    level: tl.constexpr = q.root
    dz = _slope(alpha[:, None] * d_state, out, q.act)
    W = load(flat + q.W, level.d, q.leaf.d, q.leaf.d, level.D, q.leaf.D)
    add_matrix(own + q.W, dot(tl.trans(dz), x, q), level.d, q.leaf.d, q.leaf.d, again)
    add_row(own + q.w, tl.sum(dz, 0), level.d, again)
    de = level.scale * dz
    where, inside = _stacked(own + level.B, level, q.SR)
    _add(where, inside, dot(tl.trans(rows), de, q), again)
    add_matrix(own + level.b, dot(tl.trans(place), de, q), level.s, level.d, level.d, again)
    where, inside = _stacked(flat + level.B, level, q.SR)
    dh = gather(owned * dot(de, tl.trans(tl.load(where, mask=inside, other=0.0)), q), q.F)
    j = tl.arange(0, q.SR)[None]
    where = d_latent + t[:, None] * q.latent + level.at + j
    tl.store(where, dh, mask=(t[:, None] < n) & (j < level.s * level.r))
    return dot(dz, W, q)
