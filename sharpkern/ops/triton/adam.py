"""Adam and AdamW from the backup or in place (the decay's form is a value of the group):
m = beta1 m + (1 - beta1) d;  v = beta2 v + (1 - beta2) d^2;
w -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps).

Bytes a parameter, fp32: reads w 4, g 4, m 4, v 4, writes w 4, m 4, v 4; amsgrad 8 more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import schema
from .descend import advance, clip_factor, count_skipped, descent
from .restore import copy_blocks
from .walk import (
    BACKUP,
    BLOCK,
    GRAD,
    GROUP,
    NUMEL,
    PARAM,
    SLOT,
    STEP,
    address,
    addressed,
    cell,
    check,
    check_values,
    elements,
    in_row,
    launch,
    norms,
    share,
    whole,
)

LR, BETA1, BETA2, EPS, WEIGHT_DECAY, AMSGRAD, MAXIMIZE, DECOUPLED, VALUES = map(
    tl.constexpr, range(len(schema.ADAM) + 1)
)


@triton.jit
def divide(x, y, A: tl.constexpr):
    """x / y, rounded to nearest: Triton's own float32 division is not."""
    if tl.float32 == A:
        q = tl.div_rn(x, y)
    else:
        q = x / y
    return q


@triton.jit
def root(x, A: tl.constexpr):
    if tl.float32 == A:
        r = tl.sqrt_rn(x)
    else:
        r = tl.sqrt(x)
    return r


@triton.jit
def power(x, t):
    """x^t for 0 <= x < 1 in float64; 0 as far as it matters for an x below 1e-30."""
    return tl.exp(t * tl.log(tl.maximum(x, 1e-30)))


@triton.jit
def step_block(
    param, source, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, offset, left, gradient, shrink, weight_decay,
    one_minus_beta1, beta2, one_minus_beta2, step_size, correction, eps,
    T: tl.constexpr, A: tl.constexpr, MAX: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    mask = in_row(left, FULL)
    w = tl.load(elements(source, offset, T, FULL), mask).to(A)
    d = gradient * tl.load(elements(grad, offset, T, FULL), mask).to(A) + weight_decay * w
    pointers = elements(exp_avg, offset, A, FULL)
    m = tl.load(pointers, mask)
    m = m + one_minus_beta1 * (d - m)
    tl.store(pointers, m, mask)
    pointers = elements(exp_avg_sq, offset, A, FULL)
    v = beta2 * tl.load(pointers, mask) + (one_minus_beta2 * d) * d
    tl.store(pointers, v, mask)
    if MAX:
        pointers = elements(max_exp_avg_sq, offset, A, FULL)
        largest = tl.load(pointers, mask)
        v = tl.where(largest > v, largest, v)
        tl.store(pointers, v, mask)
    if not FULL:
        v = tl.where(mask, v, 0.0)  # no root of whatever lies behind the row
    update = step_size * divide(m, divide(root(v, A), correction, A) + eps, A)
    tl.store(elements(param, offset, T, FULL), (shrink * w - update).to(T), mask)


@triton.jit
def step_blocks(
    param, source, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, k, count, numel, gradient, shrink, weight_decay,
    one_minus_beta1, beta2, one_minus_beta2, step_size, correction, eps,
    T: tl.constexpr, A: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    end_whole = whole(param | source | grad | exp_avg | exp_avg_sq | max_exp_avg_sq, numel, k, count)
    for i in range(k, end_whole):
        step_block(param, source, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, i * BLOCK, BLOCK, gradient, shrink,
                   weight_decay, one_minus_beta1, beta2, one_minus_beta2, step_size, correction, eps,
                   T, A, MAX, True)  # fmt: skip
    last = tl.minimum((k + count) * BLOCK, numel)
    for offset in range(end_whole * BLOCK, last, STEP):
        step_block(param, source, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, offset, last - offset, gradient, shrink,
                   weight_decay, one_minus_beta1, beta2, one_minus_beta2, step_size, correction, eps,
                   T, A, MAX, False)  # fmt: skip


@triton.jit(do_not_specialize=["n_blocks", "max_norm"])
def adam_kernel(
    table, stride_row, stride_column, blocks, n_blocks, exp_avg, exp_avg_sq, max_exp_avg_sq, step, counters, backup,
    values, sq, n_buffers, max_norm, T: tl.constexpr, A: tl.constexpr, MAX: tl.constexpr, BACKED: tl.constexpr,
    SKIP: tl.constexpr, COUNT: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    norm, finite = norms(sq, n_buffers, PASSES)
    go = finite | (not SKIP)
    clip = clip_factor(norm, max_norm)
    b, end = share(n_blocks)
    while b < end:
        row = tl.load(blocks + 2 * b).to(tl.int64)
        k = tl.load(blocks + 2 * b + 1).to(tl.int64)
        numel = cell(table, row, NUMEL, stride_row, stride_column)
        grad = cell(table, row, GRAD, stride_row, stride_column)
        param = cell(table, row, PARAM, stride_row, stride_column)
        slot = cell(table, row, SLOT, stride_row, stride_column)
        source = param
        if BACKED:
            kept = address(backup, slot, T)
            source = tl.where(cell(table, row, BACKUP, stride_row, stride_column) != 0, kept, param)
        count = tl.cdiv(numel, BLOCK)
        stop = tl.minimum(end, b + count - k)
        if go & (grad != 0):
            x = values + VALUES * cell(table, row, GROUP, stride_row, stride_column)
            lr = tl.load(x + LR)
            beta1 = tl.load(x + BETA1)
            beta2 = tl.load(x + BETA2)
            decay = tl.load(x + WEIGHT_DECAY)
            decoupled = tl.load(x + DECOUPLED) != 0
            before = tl.load(step + row)
            t = before.to(tl.float64) + 1
            gradient = tl.where(tl.load(x + MAXIMIZE) != 0, -clip, clip).to(A)
            shrink = tl.where(decoupled, 1 - lr * decay, 1.0).to(A)
            weight_decay = tl.where(decoupled, 0.0, decay).to(A)
            one_minus_beta1 = (1 - beta1).to(A)
            one_minus_beta2 = (1 - beta2).to(A)
            step_size = (lr / (1 - power(beta1, t))).to(A)
            correction = tl.sqrt(1 - power(beta2, t)).to(A)
            eps = tl.load(x + EPS).to(A)
            m = address(exp_avg, slot, A)
            v = address(exp_avg_sq, slot, A)
            amsgrad = tl.full((), 0, tl.int1)
            if MAX:
                amsgrad = tl.load(x + AMSGRAD) != 0
            if amsgrad:
                largest = address(max_exp_avg_sq, slot, A)
                step_blocks(param, source, grad, m, v, largest, k, stop - b, numel, gradient, shrink, weight_decay,
                            one_minus_beta1, beta2.to(A), one_minus_beta2, step_size, correction, eps,
                            T, A, True)  # fmt: skip
            else:
                step_blocks(param, source, grad, m, v, v, k, stop - b, numel, gradient, shrink, weight_decay,
                            one_minus_beta1, beta2.to(A), one_minus_beta2, step_size, correction, eps,
                            T, A, False)  # fmt: skip
            advance(table, row, stride_row, stride_column, step, before, stop - b, count)
        elif source != param:
            copy_blocks(param, source, k, stop - b, numel, T)
        b = stop
    count_skipped(counters, go, COUNT)


def adam(
    params: Sequence[Tensor],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor,
    step: Tensor,
    counters: Tensor,
    grads: Sequence[Tensor],
    backup: Tensor,
    table: Tensor,
    blocks: Tensor,
    values: Tensor,
    sq: Tensor,
    *,
    max_norm: float,
    skip_nonfinite: bool,
    dtype: torch.dtype,
) -> None:
    table = addressed(table, params, grads, dtype, blocks)
    limit = descent(table, blocks, step, counters, backup, sq, max_norm, dtype)
    check_values(values, table, len(schema.ADAM), "values")
    some = 1 if blocks.numel() else 0
    for name, buffer, least in (
        ("exp_avg", exp_avg, some),
        ("exp_avg_sq", exp_avg_sq, some),
        ("max_exp_avg_sq", max_exp_avg_sq, 0),
    ):
        check(buffer, table, schema.state_dtype(dtype), name, least)
    launch(
        adam_kernel,
        table,
        blocks,
        exp_avg,
        exp_avg_sq,
        max_exp_avg_sq,
        step,
        counters,
        backup,
        values,
        sq,
        sq.size(1),
        limit,
        dtype=dtype,
        mixed=True,
        MAX=max_exp_avg_sq.numel() > 0,
        BACKED=backup.numel() > 0,
        SKIP=skip_nonfinite,
        COUNT=counters.numel() > 0,
        PASSES=sq.size(0),
    )
