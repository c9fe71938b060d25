"""Perturbation:  backup = w;  w += s g  (ascend)  or  w += s T^2 g  (ascend_scaled),
s = rho / (norm + eps), rho signed by maximize. ascend can do without the backup, and can keep g, too.

Bytes a parameter, fp32: reads w 4 and g 4, writes w 4 and backup 4; the kept gradient 4 more. Of a half type with its
master: reads that 4 and g 2, writes w 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .walk import (
    BACKUP,
    LEFT_OUT,
    SCALED,
    address,
    bits,
    check,
    check_backup,
    check_counters,
    check_norms,
    check_segments,
    check_values,
    float64,
    launch,
    load,
    norms,
    share,
    store,
    stretch,
    walk,
)


@triton.jit
def move(
    piece, param, grad, kept_param, kept_grad, go, s, scaled, eta,
    T: tl.constexpr, A: tl.constexpr, WEIGHTS: tl.constexpr, BACKED: tl.constexpr, KEEP: tl.constexpr,
    MASTER: tl.constexpr,
):  # fmt: skip
    if MASTER:
        old = load(kept_param, piece, A)
    else:
        old = load(param, piece, T)
    g = load(grad, piece, T)
    w = old.to(A)
    step = s * g.to(A)
    if WEIGHTS:
        t = tl.where(scaled, tl.abs(w) + eta, 1.0)
        step = t * (t * step)
    if BACKED and not MASTER:
        store(kept_param, old, piece, T)
    if KEEP:
        store(kept_grad, g, piece, T)
    # 0 * inf is NaN: a skipped perturbation must not show the gradient.
    store(param, tl.where(go, (w + step).to(T), old), piece, T)


@triton.jit(do_not_specialize=["stride_column", "n_blocks", "eps"])
def ascend_kernel(
    table, stride_row, stride_column, blocks, n_blocks, backup, gradient, counters, radius, sq, n_buffers,
    eps: tl.int64, T: tl.constexpr, A: tl.constexpr, WEIGHTS: tl.constexpr, BACKED: tl.constexpr, KEEP: tl.constexpr,
    MASTER: tl.constexpr, SKIP: tl.constexpr, COUNT: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = A if MASTER else T
    norm, finite = norms(sq, n_buffers, PASSES)
    go = finite | (not SKIP)
    b, end = share(n_blocks)
    while b < end:
        at = stretch(table, stride_row, stride_column, blocks, b, n_blocks, BACKWARDS=True)
        param = at.param
        grad = at.grad
        if WEIGHTS:
            grad = tl.where(at.scale == LEFT_OUT, 0, grad)
        s = (tl.load(radius + 2 * at.group) / (norm + float64(eps))).to(A)
        eta = tl.load(radius + 2 * at.group + 1).to(A)
        scaled = at.scale == SCALED
        kept_param = param
        if BACKED:
            kept_param = address(backup, at.slot, W)
            if at.k == 0:
                # For every row, so that no mark of an earlier step is left.
                tl.store(at.cells + BACKUP * at.stride, (grad != 0).to(tl.int64))
        kept_grad = grad
        if KEEP:
            kept_grad = address(gradient, at.slot, T)
        moves = grad != 0
        if MASTER:
            moves = moves & go  # what the parameters are is not read
        if moves:
            walk(move, param | grad | kept_param | kept_grad, at,
                 (param, grad, kept_param, kept_grad, go, s, scaled, eta, T, A, WEIGHTS, BACKED, KEEP,
                  MASTER))  # fmt: skip
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
    check_segments(params, grads, table, blocks, dtype)
    check_norms(sq, table)
    check_values(radius, table, 2, "radius")
    check_counters(counters, table)
    master = check_backup(backup, table, dtype, numel=1 if weights and blocks.numel() else 0)
    check(gradient, table, dtype, "gradient")
    launch(
        ascend_kernel,
        table,
        blocks,
        backup,
        gradient,
        counters,
        radius,
        sq,
        sq.size(1),
        bits(eps),
        dtype=dtype,
        mixed=master,
        MASTER=master,
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
