"""Squared norm of the gradient of one flat buffer:  sq[buffer] = sum_i (T_i g_i)^2,  T = 1 (norm) or |w| + eta
(norm_scaled); where AE-SAM's statistics are kept, then their mean and variance of n = sum(sq), and whether
n >= mean + coefficient sqrt(var).

Bytes a parameter, fp32: reads g 4 (and w 4), writes nothing but a partial sum a program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import schema
from .reduce import check_partials, is_last, leave, total
from .walk import (
    BLOCK,
    LEFT_OUT,
    SCALED,
    STEP,
    address,
    bits,
    check,
    check_master,
    check_segments,
    check_values,
    check_vector,
    float64,
    launch,
    load,
    share,
    stretch,
    walk_sums,
)

MEAN, VAR, THRESHOLD, FIRED = map(tl.constexpr, range(len(schema.EMA)))


@triton.jit
def add_squares(
    piece, sums, param, grad, scaled, eta, T: tl.constexpr, A: tl.constexpr, W: tl.constexpr, WEIGHTS: tl.constexpr
):  # fmt: skip
    a = load(grad, piece, T).to(A)
    if WEIGHTS:
        a = tl.where(scaled, a * (tl.abs(load(param, piece, W).to(A)) + eta), a)
    return sums + a * a


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


@triton.jit(do_not_specialize=["stride_column", "n_blocks", "buffer", "decay", "coefficient"])
def norm_kernel(
    table, stride_row, stride_column, blocks, n_blocks, sq, n_buffers, buffer, partials, master, radius, ema,
    decay: tl.int64, coefficient: tl.int64, T: tl.constexpr, A: tl.constexpr, WEIGHTS: tl.constexpr,
    MASTER: tl.constexpr, EMA: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = A if MASTER else T
    sums = tl.zeros((BLOCK,), A)
    rest = tl.zeros((STEP,), A)
    b, end = share(n_blocks)
    while b < end:
        at = stretch(table, stride_row, stride_column, blocks, b, n_blocks)
        grad = at.grad
        addresses = grad
        param = at.param
        if MASTER:
            param = address(master, at.slot, A)
        eta = tl.full((), 0, A)
        if WEIGHTS:
            grad = tl.where(at.scale == LEFT_OUT, 0, grad)
            addresses |= param
            eta = tl.load(radius + 2 * at.group + 1).to(A)
        if grad != 0:
            sums, rest = walk_sums(add_squares, addresses, at, sums, rest,
                                   (param, grad, at.scale == SCALED, eta, T, A, W, WEIGHTS))  # fmt: skip
        b += at.n
    leave(partials, sums, rest, 0, 1)
    if is_last(partials):
        own = total(partials, 0, 1)
        tl.store(sq + buffer, own)
        if EMA:
            n = tl.full((), 0, tl.float64)
            for i in range(n_buffers):
                n += tl.where(i == buffer, own, tl.load(sq + i))
            update_ema(ema, n, float64(decay), float64(coefficient))


def _run(
    sq: Tensor,
    partials: Tensor,
    ema: Tensor,
    params: Sequence[Tensor],
    master: Tensor | None,
    grads: Sequence[Tensor],
    table: Tensor,
    blocks: Tensor,
    radius: Tensor | None,
    *,
    buffer: int,
    decay: float,
    coefficient: float,
    dtype: torch.dtype,
) -> None:
    check_segments(params, grads, table, blocks, dtype)
    check_vector(sq, table, "sq")
    if not 0 <= buffer < sq.numel():
        raise RuntimeError(f"sharpkern: buffer should be an index of sq, which has {sq.numel()} elements")
    check_partials(partials, table, blocks)
    check(ema, table, torch.float64, "ema", len(schema.EMA) if ema.numel() else 0)
    if radius is not None:
        check_values(radius, table, 2, "radius")
    mastered = master is not None and check_master(master, table, dtype)
    launch(
        norm_kernel,
        table,
        blocks,
        sq,
        sq.numel(),
        buffer,
        partials,
        master,
        radius,
        ema,
        bits(decay),
        bits(coefficient),
        dtype=dtype,
        mixed=mastered,
        MASTER=mastered,
        WEIGHTS=radius is not None,
        EMA=ema.numel() > 0,
    )


def norm(
    sq: Tensor, partials: Tensor, ema: Tensor, grads: Sequence[Tensor], table: Tensor, blocks: Tensor, **numbers: Any
) -> None:
    _run(sq, partials, ema, [], None, grads, table, blocks, None, **numbers)


def norm_scaled(*args: Any, **numbers: Any) -> None:
    _run(*args, **numbers)
