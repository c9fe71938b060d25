"""Squared norm of the gradient:  sq = sum_i (T_i g_i)^2,  T = 1 (norm) or |w| + eta (norm_scaled).

Bytes a parameter, fp32: reads g 4 (and w 4), writes nothing but a partial sum a program. The program that
arrives last adds the partial sums up, always in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .walk import (
    BLOCK,
    GRAD,
    GROUP,
    NUMEL,
    PARAM,
    SCALED,
    STEP,
    addressed,
    cell,
    check,
    check_values,
    elements,
    in_row,
    launch,
    share,
    whole,
)


@triton.jit
def squares(param, grad, offset, left, scaled, eta, T: tl.constexpr, A: tl.constexpr, WEIGHTS: tl.constexpr,
            FULL: tl.constexpr):  # fmt: skip
    mask = in_row(left, FULL)
    a = tl.load(elements(grad, offset, T, FULL), mask).to(A)
    if WEIGHTS:
        w = tl.load(elements(param, offset, T, FULL), mask).to(A)
        a = tl.where(scaled, a * (tl.abs(w) + eta), a)
    if not FULL:
        a = tl.where(mask, a, 0.0)
    return a * a


@triton.jit(do_not_specialize=["n_blocks"])
def norm_kernel(
    table, stride_row, stride_column, blocks, n_blocks, sq, partials, radius,
    T: tl.constexpr, A: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    sums = tl.zeros((BLOCK,), A)
    rest = tl.zeros((STEP,), A)
    b, end = share(n_blocks)
    while b < end:
        row = tl.load(blocks + 2 * b).to(tl.int64)
        k = tl.load(blocks + 2 * b + 1).to(tl.int64)
        numel = cell(table, row, NUMEL, stride_row, stride_column)
        grad = cell(table, row, GRAD, stride_row, stride_column)
        param = cell(table, row, PARAM, stride_row, stride_column)
        scaled = tl.full((), 0, tl.int1)
        eta = tl.full((), 0, A)
        address = grad
        if WEIGHTS:
            scaled = cell(table, row, SCALED, stride_row, stride_column) != 0
            eta = tl.load(radius + 2 * cell(table, row, GROUP, stride_row, stride_column) + 1).to(A)
            address = grad | param
        stop = tl.minimum(end, b + tl.cdiv(numel, BLOCK) - k)
        if grad != 0:
            end_whole = whole(address, numel, k, stop - b)
            for i in range(k, end_whole):
                sums += squares(param, grad, i * BLOCK, BLOCK, scaled, eta, T, A, WEIGHTS, True)
            last = tl.minimum((k + stop - b) * BLOCK, numel)
            for offset in range(end_whole * BLOCK, last, STEP):
                rest += squares(param, grad, offset, last - offset, scaled, eta, T, A, WEIGHTS, False)
        b = stop
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tl.store(partials + 1 + program, tl.sum(sums.to(tl.float64)) + tl.sum(rest.to(tl.float64)))
    # The partial sum has to be there before the ticket says so.
    tl.debug_barrier()
    ticket = tl.cast(partials, tl.pointer_type(tl.int64))
    if tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1:
        tl.debug_barrier()
        lanes = tl.arange(0, 1024)
        total = tl.zeros((1024,), tl.float64)
        for first in range(0, programs, 1024):
            # Written by other multiprocessors: not from this one's own cache.
            total += tl.load(partials + 1 + first + lanes, first + lanes < programs, other=0.0, cache_modifier=".cg")
        tl.store(sq, tl.sum(total))
        tl.store(ticket, 0)


def _reduce(
    sq: Tensor,
    partials: Tensor,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    table: Tensor,
    blocks: Tensor,
    radius: Tensor,
    dtype: torch.dtype,
    weights: bool,
) -> None:
    table = addressed(table, params, grads, dtype, blocks)
    if sq.dtype != torch.float64 or sq.numel() != 1 or sq.device != table.device:
        raise RuntimeError(f"sharpkern: sq should be one float64 element, on {table.device}")
    check(partials, table, torch.float64, "partials", 1 + max(1, blocks.size(0)))
    launch(norm_kernel, table, blocks, sq, partials, radius, dtype=dtype, WEIGHTS=weights)


def norm(
    sq: Tensor, partials: Tensor, grads: Sequence[Tensor], table: Tensor, blocks: Tensor, *, dtype: torch.dtype
) -> None:
    _reduce(sq, partials, [], grads, table, blocks, sq, dtype, False)


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
    _reduce(sq, partials, params, grads, table, blocks, radius, dtype, True)
