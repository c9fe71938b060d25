"""The ball of a p-norm, q = p / (p - 1): the largest magnitude m beside the squared norm (norm_max), then
sq = sum (|g| / m)^q  (norm_p), then  backup = w;  w += s sign(g) (|g| / m)^(q - 1)  (ascend_p) with
s = rho (m / (||g||_q + eps))^(q - 1),  ||g||_q = m sq^(1/q).

Bytes a parameter, fp32: the norms read g 4; ascend_p reads w 4 and g 4, writes w 4 and backup 4; of a half type with
its master it reads that 4 and g 2, and writes w 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import schema
from .adam import divide
from .norm import update_ema
from .reduce import check_partials, check_sums, is_last, leave, total
from .walk import (
    BACKUP,
    BLOCK,
    STEP,
    address,
    bits,
    check,
    check_backup,
    check_counters,
    check_norms,
    check_segments,
    check_values,
    check_vector,
    float64,
    launch,
    load,
    norms,
    share,
    store,
    stretch,
    sum_buffers,
    walk,
    walk_sums,
)


@triton.jit
def largest_of(largest, n_buffers):
    """The largest magnitude of a gradient, from those in its flat buffers."""
    m = tl.full((), 0, tl.float64)
    for i in range(n_buffers):
        m = tl.maximum(m, tl.load(largest + i))
    return m


@triton.jit
def power(g, largest, y, A: tl.constexpr):
    """(|g| / m)^y; 0 for g = 0, whatever y and m, NaN for what is not finite."""
    FAR: tl.constexpr = 100 if tl.float32 == A else 1000
    a = tl.abs(g)
    # What is below m 2^-FAR is divided by m 2^-FAR: its quotient by m may be no normal number.
    is_far = a < (largest * tl.full((), 2.0**-FAR, tl.float64)).to(A)
    ratio = divide(a * tl.where(is_far, tl.full((), 2.0**FAR, A), tl.full((), 1, A)), largest.to(A), A)
    log_ratio = tl.log2(tl.where(a > 0, ratio, 1)) - tl.where(is_far, tl.full((), FAR, A), tl.full((), 0, A))
    return tl.where(a > 0, tl.exp2(y * log_ratio), 0) + (a - a)


@triton.jit
def inverse_of(largest, A: tl.constexpr):
    """(near, 1 / (near m)): near is 1, another power of 2 where 1 / m would be no normal number."""
    FAR: tl.constexpr = 100 if tl.float32 == A else 1000
    much = tl.full((), 2.0**FAR, tl.float64)
    near = tl.where(largest * much < 1, much, tl.where(largest > much, 1.0 / 16, 1.0).to(tl.float64))
    return near.to(A), (1 / (largest * near)).to(A)


@triton.jit
def large_power(g, near, inverse, y, A: tl.constexpr):
    """The same for y >= 1: what is far is below 2^-FAR, and taken for 0 or as much. No division."""
    a = tl.abs(g)
    return tl.where(a > 0, tl.exp2(y * tl.log2(tl.where(a > 0, a * near * inverse, 1))), 0) + (a - a)


@triton.jit
def add_squares_and_max(piece, sums, grad, T: tl.constexpr, A: tl.constexpr):
    squares, most = sums
    g = load(grad, piece, T).to(A)
    return squares + g * g, tl.maximum(most, tl.abs(g))


@triton.jit(do_not_specialize=["stride_column", "n_blocks", "buffer", "decay", "coefficient"])
def norm_max_kernel(
    table, stride_row, stride_column, blocks, n_blocks, sq, largest, n_buffers, buffer, partials, ema,
    decay: tl.int64, coefficient: tl.int64, T: tl.constexpr, A: tl.constexpr, EMA: tl.constexpr,
):  # fmt: skip
    sums = (tl.zeros((BLOCK,), A), tl.zeros((BLOCK,), A))
    rest = (tl.zeros((STEP,), A), tl.zeros((STEP,), A))
    b, end = share(n_blocks)
    while b < end:
        at = stretch(table, stride_row, stride_column, blocks, b, n_blocks)
        if at.grad != 0:
            sums, rest = walk_sums(add_squares_and_max, at.grad, at, sums, rest, (at.grad, T, A))
        b += at.n
    leave(partials, sums[0], rest[0], 0, 2)
    leave(partials, sums[1], rest[1], 1, 2, MAX=True)
    if is_last(partials):
        own = total(partials, 0, 2)
        tl.store(sq + buffer, own)
        tl.store(largest + buffer, total(partials, 1, 2, MAX=True))
        if EMA:
            n = tl.full((), 0, tl.float64)
            for i in range(n_buffers):
                n += tl.where(i == buffer, own, tl.load(sq + i))
            update_ema(ema, n, float64(decay), float64(coefficient))


@triton.jit
def add_powers(piece, sums, grad, near, inverse, y, T: tl.constexpr, A: tl.constexpr):
    # Beyond the end there are zeros, whose power is 0.
    return sums + large_power(load(grad, piece, T).to(A), near, inverse, y, A)


@triton.jit(do_not_specialize=["stride_column", "n_blocks", "q"])
def norm_p_kernel(
    table, stride_row, stride_column, blocks, n_blocks, sq, partials, largest, n_buffers, q: tl.int64,
    T: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    near, inverse = inverse_of(largest_of(largest, n_buffers), A)
    y = float64(q).to(A)
    sums = tl.zeros((BLOCK,), A)
    rest = tl.zeros((STEP,), A)
    b, end = share(n_blocks)
    while b < end:
        at = stretch(table, stride_row, stride_column, blocks, b, n_blocks)
        if at.grad != 0:
            sums, rest = walk_sums(add_powers, at.grad, at, sums, rest, (at.grad, near, inverse, y, T, A))
        b += at.n
    leave(partials, sums, rest, 0, 1)
    if is_last(partials):
        tl.store(sq, total(partials, 0, 1))


@triton.jit
def move(
    piece, param, grad, kept_param, go, s, largest, y, T: tl.constexpr, A: tl.constexpr, SIGN: tl.constexpr,
    MASTER: tl.constexpr,
):  # fmt: skip
    if MASTER:
        old = load(kept_param, piece, A)
    else:
        old = load(param, piece, T)
    g = load(grad, piece, T).to(A)
    d = s + (g - g)
    if not SIGN:
        d = s * power(g, largest, y, A)
    d = tl.where(g < 0, -d, tl.where(g == 0, 0, d))
    if not MASTER:
        store(kept_param, old, piece, T)
    # A skipped perturbation must not show the gradient.
    store(param, tl.where(go, (old.to(A) + d).to(T), old), piece, T)


@triton.jit(do_not_specialize=["stride_column", "n_blocks", "exponent", "eps"])
def ascend_p_kernel(
    table, stride_row, stride_column, blocks, n_blocks, backup, counters, radius, sq, n_buffers, largest, n_largest,
    powers, n_powers, exponent: tl.int64, eps: tl.int64, T: tl.constexpr, A: tl.constexpr, SIGN: tl.constexpr,
    MASTER: tl.constexpr, SKIP: tl.constexpr, COUNT: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = A if MASTER else T
    _, finite = norms(sq, n_buffers, PASSES)
    go = finite | (not SKIP)
    scale = tl.full((), 1, tl.float64)
    m = tl.full((), 0, tl.float64)
    if not SIGN:
        # (m / (||g||_q + eps))^(q - 1), 0 for a gradient of zeros
        y = float64(exponent)
        m = largest_of(largest, n_largest)
        root = tl.exp(tl.log(sum_buffers(powers, n_powers)) / (y + 1))
        scale = tl.exp(-y * tl.log(root + float64(eps) / m))
    b, end = share(n_blocks)
    while b < end:
        at = stretch(table, stride_row, stride_column, blocks, b, n_blocks, BACKWARDS=True)
        param = at.param
        grad = at.grad
        s = (tl.load(radius + 2 * at.group) * scale).to(A)
        kept_param = address(backup, at.slot, W)
        if at.k == 0:
            # For every row, so that no mark of an earlier step is left.
            tl.store(at.cells + BACKUP * at.stride, (grad != 0).to(tl.int64))
        moves = grad != 0
        if MASTER:
            moves = moves & go  # what the parameters are is not read
        if moves:
            walk(move, param | grad | kept_param, at,
                 (param, grad, kept_param, go, s, m, float64(exponent).to(A), T, A, SIGN, MASTER))  # fmt: skip
        b += at.n
    if COUNT:
        if tl.program_id(0) == 0:
            tl.store(counters, tl.load(counters) + 1)
            tl.store(counters + 1, tl.load(counters + 1) + 1)


def norm_max(
    sq: Tensor,
    largest: Tensor,
    partials: Tensor,
    ema: Tensor,
    grads: Sequence[Tensor],
    table: Tensor,
    blocks: Tensor,
    *,
    buffer: int,
    decay: float,
    coefficient: float,
    dtype: torch.dtype,
) -> None:
    check_segments([], grads, table, blocks, dtype)
    check_vector(sq, table, "sq")
    check_vector(largest, table, "largest")
    if not 0 <= buffer < sq.numel():
        raise RuntimeError(f"sharpkern: buffer should be an index of sq, which has {sq.numel()} elements")
    if largest.numel() != sq.numel():
        raise RuntimeError(f"sharpkern: largest should have an element for each of sq, which has {sq.numel()}")
    check_partials(partials, table, blocks, 2)
    check(ema, table, torch.float64, "ema", len(schema.EMA) if ema.numel() else 0)
    launch(
        norm_max_kernel,
        table,
        blocks,
        sq,
        largest,
        sq.numel(),
        buffer,
        partials,
        ema,
        bits(decay),
        bits(coefficient),
        dtype=dtype,
        mixed=True,
        EMA=ema.numel() > 0,
    )


def norm_p(
    sq: Tensor,
    partials: Tensor,
    grads: Sequence[Tensor],
    table: Tensor,
    blocks: Tensor,
    largest: Tensor,
    *,
    q: float,
    dtype: torch.dtype,
) -> None:
    check_segments([], grads, table, blocks, dtype)
    check_sums(sq, partials, table, blocks)
    check_vector(largest, table, "largest")
    launch(norm_p_kernel, table, blocks, sq, partials, largest, largest.numel(), bits(q), dtype=dtype, mixed=True)


def ascend_p(
    params: Sequence[Tensor],
    backup: Tensor,
    counters: Tensor,
    grads: Sequence[Tensor],
    table: Tensor,
    blocks: Tensor,
    radius: Tensor,
    sq: Tensor,
    largest: Tensor,
    powers: Tensor,
    *,
    exponent: float,
    eps: float,
    skip_nonfinite: bool,
    dtype: torch.dtype,
) -> None:
    check_segments(params, grads, table, blocks, dtype)
    check_norms(sq, table)
    check_values(radius, table, 2, "radius")
    check_counters(counters, table)
    master = check_backup(backup, table, dtype, numel=1 if blocks.numel() else 0)
    check_vector(largest, table, "largest")
    check_vector(powers, table, "powers")
    if not exponent >= 0:
        raise RuntimeError(f"sharpkern: exponent should be 0 or more, found {exponent}")
    launch(
        ascend_p_kernel,
        table,
        blocks,
        backup,
        counters,
        radius,
        sq,
        sq.size(1),
        largest,
        largest.numel(),
        powers,
        powers.numel(),
        bits(exponent),
        bits(eps),
        dtype=dtype,
        mixed=master,
        MASTER=master,
        SIGN=exponent == 0,
        SKIP=skip_nonfinite,
        COUNT=counters.numel() > 0,
        PASSES=sq.size(0),
    )
