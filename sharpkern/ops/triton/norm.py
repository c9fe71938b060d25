"""Squared norm of the gradient:  sq = sum_i (T_i g_i)^2,  T = 1 (norm) or |w| + eta (norm_scaled); norm_ema then
updates AE-SAM's mean and variance of n, the sum of all buffers' sq, and whether  n >= mean + coefficient sqrt(var).

Bytes a parameter, fp32: reads g 4 (and w 4), writes nothing but a partial sum a program.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import schema
from .reduce import check_sums, is_last, leave, total
from .walk import (
    BLOCK,
    STEP,
    addressed,
    bits,
    check,
    check_values,
    float64,
    launch,
    load,
    share,
    stretch,
    walk_sums,
)

MEAN, VAR, THRESHOLD, FIRED = map(tl.constexpr, range(len(schema.EMA)))


@triton.jit
def add_squares(piece, sums, param, grad, scaled, eta, T: tl.constexpr, A: tl.constexpr, WEIGHTS: tl.constexpr):
    a = load(grad, piece, T).to(A)
    if WEIGHTS:
        a = tl.where(scaled, a * (tl.abs(load(param, piece, T).to(A)) + eta), a)
    return sums + a * a


@triton.jit
def reduce_squares(
    table, stride_row, stride_column, blocks, n_blocks, partials, radius,
    T: tl.constexpr, A: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Whether this program is the last one: the total is complete."""
    sums = tl.zeros((BLOCK,), A)
    rest = tl.zeros((STEP,), A)
    b, end = share(n_blocks)
    while b < end:
        at = stretch(table, stride_row, stride_column, blocks, b, end)
        addresses = at.grad
        eta = tl.full((), 0, A)
        if WEIGHTS:
            addresses |= at.param
            eta = tl.load(radius + 2 * at.group + 1).to(A)
        if at.grad != 0:
            sums, rest = walk_sums(add_squares, addresses, at, sums, rest,
                                    (at.param, at.grad, at.scaled, eta, T, A, WEIGHTS))  # fmt: skip
        b += at.n
    leave(partials, sums, rest, 0, 1)
    return is_last(partials)


@triton.jit(do_not_specialize=["n_blocks"])
def norm_kernel(
    table, stride_row, stride_column, blocks, n_blocks, sq, partials, radius,
    T: tl.constexpr, A: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    if reduce_squares(table, stride_row, stride_column, blocks, n_blocks, partials, radius, T, A, WEIGHTS):
        tl.store(sq, total(partials, 0, 1))


@triton.jit
def update_ema(ema, n, decay, coefficient):
    mean = decay * tl.load(ema + MEAN) + (1 - decay) * n
    var = decay * tl.load(ema + VAR) + (1 - decay) * ((n - mean) * (n - mean))
    spread = tl.sqrt(var)
    # An infinite coefficient times a spread of 0 would be NaN.
    regular = (spread > 0) | (tl.abs(coefficient) < float("inf"))
    threshold = mean + tl.where(regular, coefficient * spread, coefficient)
    seen = tl.abs(var) < float("inf")  # nor is it when n is not
    if seen:
        tl.store(ema + MEAN, mean)
        tl.store(ema + VAR, var)
        tl.store(ema + THRESHOLD, threshold)
    tl.store(ema + FIRED, (seen & (n >= threshold)).to(tl.float64))


@triton.jit(do_not_specialize=["n_blocks", "buffer", "decay", "coefficient"])
def norm_ema_kernel(
    table, stride_row, stride_column, blocks, n_blocks, sq, n_buffers, buffer, partials, ema, decay, coefficient,
    T: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    if reduce_squares(table, stride_row, stride_column, blocks, n_blocks, partials, partials, T, A, False):
        own = total(partials, 0, 1)
        tl.store(sq + buffer, own)
        n = tl.full((), 0, tl.float64)
        for i in range(n_buffers):
            n += tl.where(i == buffer, own, tl.load(sq + i))
        update_ema(ema, n, float64(decay), float64(coefficient))


def norm(
    sq: Tensor, partials: Tensor, grads: Sequence[Tensor], table: Tensor, blocks: Tensor, *, dtype: torch.dtype
) -> None:
    table = addressed(table, [], grads, dtype, blocks)
    check_sums(sq, partials, table, blocks)
    launch(norm_kernel, table, blocks, sq, partials, sq, dtype=dtype, WEIGHTS=False)


def norm_scaled(
    sq: Tensor,
    partials: Tensor,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    table: Tensor,
    blocks: Tensor,
    radius: Tensor,
    *,
    dtype: torch.dtype,
) -> None:
    check_values(radius, table, 2, "radius")
    table = addressed(table, params, grads, dtype, blocks)
    check_sums(sq, partials, table, blocks)
    launch(norm_kernel, table, blocks, sq, partials, radius, dtype=dtype, WEIGHTS=True)


def norm_ema(
    sq: Tensor,
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
    table = addressed(table, [], grads, dtype, blocks)
    if sq.dtype != torch.float64 or sq.dim() != 1 or not sq.is_contiguous() or not 0 <= buffer < sq.numel():
        raise RuntimeError(f"sharpkern: sq should be a contiguous float64 row with an element {buffer}")
    check_sums(sq[buffer], partials, table, blocks)
    check(ema, table, torch.float64, "ema", len(schema.EMA))
    launch(
        norm_ema_kernel,
        table,
        blocks,
        sq,
        sq.numel(),
        buffer,
        partials,
        ema,
        bits(decay),
        bits(coefficient),
        dtype=dtype,
    )
