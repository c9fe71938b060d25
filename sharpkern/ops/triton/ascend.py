"""Perturbation:  backup = w;  w += s g  (ascend)  or  w += s T^2 g  (ascend_scaled),
s = rho / (norm + eps), rho signed by maximize. ascend can do without the backup, and can keep g, too.

Bytes a parameter, fp32: reads w 4 and g 4, writes w 4 and backup 4; the kept gradient 4 more.
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
    SCALED,
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
    last_element,
    launch,
    norms,
    share,
    stretch,
    whole,
)


@triton.jit
def move(
    param, grad, kept_param, kept_grad, offset, left, go, s, scaled, eta,
    T: tl.constexpr, A: tl.constexpr, WEIGHTS: tl.constexpr, BACKED: tl.constexpr, KEEP: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    mask = in_row(left, FULL)
    pointers = elements(param, offset, T, FULL)
    old = tl.load(pointers, mask)
    w = old.to(A)
    g = tl.load(elements(grad, offset, T, FULL), mask)
    step = s * g.to(A)
    if WEIGHTS:
        t = tl.where(scaled, tl.abs(w) + eta, 1.0)
        step = t * (t * step)
    if BACKED:
        tl.store(elements(kept_param, offset, T, FULL), old, mask)
    if KEEP:
        tl.store(elements(kept_grad, offset, T, FULL), g, mask)
    # 0 * inf is NaN: a skipped perturbation must not show the gradient.
    tl.store(pointers, tl.where(go, (w + step).to(T), old), mask)


@triton.jit(do_not_specialize=["n_blocks", "eps"])
def ascend_kernel(
    table, stride_row, stride_column, blocks, n_blocks, marks, stride_marks, backup, gradient, counters, radius, sq,
    n_buffers, eps, T: tl.constexpr, A: tl.constexpr, WEIGHTS: tl.constexpr, BACKED: tl.constexpr, KEEP: tl.constexpr,
    SKIP: tl.constexpr, COUNT: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    norm, finite = norms(sq, n_buffers, PASSES)
    go = finite | (not SKIP)
    b, end = share(n_blocks)
    while b < end:
        at = stretch(table, stride_row, stride_column, blocks, b, end)
        param = at.param
        grad = at.grad
        s = (tl.load(radius + 2 * at.group) / (norm + float64(eps))).to(A)
        eta = tl.load(radius + 2 * at.group + 1).to(A)
        scaled = tl.full((), 0, tl.int1)
        if WEIGHTS:
            scaled = cell(table, at.row, SCALED, stride_row, stride_column) != 0
        kept_param = param
        if BACKED:
            kept_param = address(backup, at.slot, T)
            if at.k == 0:
                # For every row, so that no mark of an earlier step is left.
                tl.store(marks + at.row * stride_marks, (grad != 0).to(tl.int64))
        kept_grad = grad
        if KEEP:
            kept_grad = address(gradient, at.slot, T)
        if grad != 0:
            end_whole = whole(param | grad | kept_param | kept_grad, at)
            for i in range(at.k, end_whole):
                move(param, grad, kept_param, kept_grad, i * BLOCK, BLOCK, go, s, scaled, eta,
                     T, A, WEIGHTS, BACKED, KEEP, True)  # fmt: skip
            last = last_element(at)
            for offset in range(end_whole * BLOCK, last, STEP):
                move(param, grad, kept_param, kept_grad, offset, last - offset, go, s, scaled, eta,
                     T, A, WEIGHTS, BACKED, KEEP, False)  # fmt: skip
        b += at.n
    if COUNT:
        if tl.program_id(0) == 0:
            tl.store(counters, tl.load(counters) + 1)
            tl.store(counters + 1, tl.load(counters + 1) + 1)


def _run(
    params: Sequence[Tensor],
    backup: Tensor,
    gradient: Tensor,
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
    check(backup, table, dtype, "backup", 1 if weights and blocks.numel() else 0)
    check(gradient, table, dtype, "gradient")
    launch(
        ascend_kernel,
        walked,
        blocks,
        table[:, schema.BACKUP],
        table.stride(0),
        backup,
        gradient,
        counters,
        radius,
        sq,
        sq.size(1),
        bits(eps),
        dtype=dtype,
        WEIGHTS=weights,
        BACKED=backup.numel() > 0,
        KEEP=gradient.numel() > 0,
        SKIP=skip_nonfinite,
        COUNT=counters.numel() > 0,
        PASSES=sq.size(0),
    )


def ascend(*args: Tensor, eps: float, skip_nonfinite: bool, dtype: torch.dtype) -> None:
    _run(*args, eps=eps, skip_nonfinite=skip_nonfinite, dtype=dtype, weights=False)  # type: ignore[arg-type]


def ascend_scaled(
    params: Sequence[Tensor], backup: Tensor, *args: Tensor, eps: float, skip_nonfinite: bool, dtype: torch.dtype
) -> None:
    none = backup[:0]
    _run(params, backup, none, *args, eps=eps, skip_nonfinite=skip_nonfinite, dtype=dtype, weights=True)  # type: ignore[arg-type]
