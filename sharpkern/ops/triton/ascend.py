"""Perturbation with backup:  backup = w;  w += s g  (ascend)  or  w += s T^2 g  (ascend_scaled),
s = rho / (norm + eps), rho signed by maximize.

Bytes a parameter, fp32: reads w 4 and g 4, writes w 4 and backup 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import schema
from .walk import (
    BLOCK,
    GRAD,
    GROUP,
    NUMEL,
    PARAM,
    SCALED,
    SLOT,
    STEP,
    address,
    addressed,
    bits,
    cell,
    check,
    check_counters,
    check_norms,
    check_values,
    elements,
    float64,
    in_row,
    launch,
    norms,
    share,
    whole,
)


@triton.jit
def move(param, grad, kept, offset, left, go, s, scaled, eta, T: tl.constexpr, A: tl.constexpr, WEIGHTS: tl.constexpr,
         FULL: tl.constexpr):  # fmt: skip
    mask = in_row(left, FULL)
    pointers = elements(param, offset, T, FULL)
    old = tl.load(pointers, mask)
    w = old.to(A)
    step = s * tl.load(elements(grad, offset, T, FULL), mask).to(A)
    if WEIGHTS:
        t = tl.where(scaled, tl.abs(w) + eta, 1.0)
        step = t * (t * step)
    tl.store(elements(kept, offset, T, FULL), old, mask)
    # 0 * inf is NaN: a skipped perturbation must not show the gradient.
    tl.store(pointers, tl.where(go, w + step, w).to(T), mask)


@triton.jit(do_not_specialize=["n_blocks", "eps"])
def ascend_kernel(
    table, stride_row, stride_column, blocks, n_blocks, marks, stride_marks, backup, counters, radius, sq, n_buffers,
    eps, T: tl.constexpr, A: tl.constexpr, WEIGHTS: tl.constexpr, SKIP: tl.constexpr, COUNT: tl.constexpr,
    PASSES: tl.constexpr,
):  # fmt: skip
    norm, finite = norms(sq, n_buffers, PASSES)
    go = finite | (not SKIP)
    b, end = share(n_blocks)
    while b < end:
        row = tl.load(blocks + 2 * b).to(tl.int64)
        k = tl.load(blocks + 2 * b + 1).to(tl.int64)
        numel = cell(table, row, NUMEL, stride_row, stride_column)
        grad = cell(table, row, GRAD, stride_row, stride_column)
        param = cell(table, row, PARAM, stride_row, stride_column)
        group = cell(table, row, GROUP, stride_row, stride_column)
        kept = address(backup, cell(table, row, SLOT, stride_row, stride_column), T)
        s = (tl.load(radius + 2 * group) / (norm + float64(eps))).to(A)
        eta = tl.load(radius + 2 * group + 1).to(A)
        scaled = tl.full((), 0, tl.int1)
        if WEIGHTS:
            scaled = cell(table, row, SCALED, stride_row, stride_column) != 0
        stop = tl.minimum(end, b + tl.cdiv(numel, BLOCK) - k)
        if k == 0:
            # For every row, so that no mark of an earlier step is left.
            tl.store(marks + row * stride_marks, (grad != 0).to(tl.int64))
        if grad != 0:
            end_whole = whole(param | grad | kept, numel, k, stop - b)
            for i in range(k, end_whole):
                move(param, grad, kept, i * BLOCK, BLOCK, go, s, scaled, eta, T, A, WEIGHTS, True)
            last = tl.minimum((k + stop - b) * BLOCK, numel)
            for offset in range(end_whole * BLOCK, last, STEP):
                move(param, grad, kept, offset, last - offset, go, s, scaled, eta, T, A, WEIGHTS, False)
        b = stop
    if COUNT:
        if tl.program_id(0) == 0:
            tl.store(counters, tl.load(counters) + 1)
            tl.store(counters + 1, tl.load(counters + 1) + 1)


def _run(
    params: Sequence[Tensor],
    backup: Tensor,
    counters: Tensor,
    grads: Sequence[Tensor],
    table: Tensor,
    blocks: Tensor,
    radius: Tensor,
    sq: Tensor,
    *,
    eps: float,
    skip_nonfinite: bool,
    dtype: torch.dtype,
    weights: bool,
) -> None:
    walked = addressed(table, params, grads, dtype, blocks)
    check_norms(sq, table)
    check_values(radius, table, 2, "radius")
    check_counters(counters, table)
    check(backup, table, dtype, "backup", 1 if blocks.numel() else 0)
    launch(
        ascend_kernel,
        walked,
        blocks,
        table[:, schema.BACKUP],
        table.stride(0),
        backup,
        counters,
        radius,
        sq,
        sq.size(1),
        bits(eps),
        dtype=dtype,
        WEIGHTS=weights,
        SKIP=skip_nonfinite,
        COUNT=counters.numel() > 0,
        PASSES=sq.size(0),
    )


def ascend(*args: Tensor, eps: float, skip_nonfinite: bool, dtype: torch.dtype) -> None:
    _run(*args, eps=eps, skip_nonfinite=skip_nonfinite, dtype=dtype, weights=False)  # type: ignore[arg-type]


def ascend_scaled(*args: Tensor, eps: float, skip_nonfinite: bool, dtype: torch.dtype) -> None:
    _run(*args, eps=eps, skip_nonfinite=skip_nonfinite, dtype=dtype, weights=True)  # type: ignore[arg-type]
