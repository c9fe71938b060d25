"""Adam and AdamW from the backup or in place (the decay's form is a value of the group):
m = beta1 m + (1 - beta1) d;  v = beta2 v + (1 - beta2) d^2;
w -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps). LookSAM's g is g + mix g_v.

Bytes a parameter, fp32: reads w 4, g 4, m 4, v 4, writes w 4, m 4, v 4; amsgrad 8 more, g_v 4 more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import schema
from .descend import advance, clip_factor, count_skipped, descent, mix_factor
from .restore import copy
from .walk import (
    address,
    addressed,
    bits,
    check,
    check_values,
    launch,
    load,
    norms,
    share,
    store,
    stretch,
    walk,
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
def update(
    piece, param, source, grad, direction, exp_avg, exp_avg_sq, max_exp_avg_sq, mix, gradient, shrink, weight_decay,
    one_minus_beta1, beta2, one_minus_beta2, step_size, correction, eps,
    T: tl.constexpr, A: tl.constexpr, MAX: tl.constexpr, MIX: tl.constexpr,
):  # fmt: skip
    w = load(source, piece, T).to(A)
    g = load(grad, piece, T).to(A)
    if MIX:
        g += mix * load(direction, piece, A)
    d = gradient * g + weight_decay * w
    m = load(exp_avg, piece, A)
    m = m + one_minus_beta1 * (d - m)
    store(exp_avg, m, piece, A)
    v = beta2 * load(exp_avg_sq, piece, A) + (one_minus_beta2 * d) * d
    store(exp_avg_sq, v, piece, A)
    if MAX:
        largest = load(max_exp_avg_sq, piece, A)
        v = tl.where(largest > v, largest, v)
        store(max_exp_avg_sq, v, piece, A)
    change = step_size * divide(m, divide(root(v, A), correction, A) + eps, A)
    store(param, shrink * w - change, piece, T)


@triton.jit(do_not_specialize=["n_blocks", "max_norm", "alpha"])
def adam_kernel(
    table, stride_row, stride_column, blocks, n_blocks, exp_avg, exp_avg_sq, max_exp_avg_sq, step, counters, backup,
    g_v, values, sq, g_v_sq, n_buffers, alpha, max_norm, T: tl.constexpr, A: tl.constexpr, MAX: tl.constexpr,
    MIX: tl.constexpr, BACKED: tl.constexpr, SKIP: tl.constexpr, COUNT: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    norm, finite = norms(sq, n_buffers, PASSES)
    go = finite | (not SKIP)
    clip = clip_factor(norm, max_norm).to(A)
    mix = mix_factor(norm, g_v_sq, n_buffers, alpha, MIX).to(A)
    b, end = share(n_blocks)
    while b < end:
        at = stretch(table, stride_row, stride_column, blocks, b, end)
        param = at.param
        grad = at.grad
        source = param
        if BACKED:
            source = tl.where(at.backup != 0, address(backup, at.slot, T), param)
        if go & (grad != 0):
            direction = param
            if MIX:
                direction = address(g_v, at.slot, A)
            x = values + VALUES * at.group
            lr = tl.load(x + LR)
            beta1 = tl.load(x + BETA1)
            beta2 = tl.load(x + BETA2)
            decay = tl.load(x + WEIGHT_DECAY)
            decoupled = tl.load(x + DECOUPLED) != 0
            before = tl.load(step + at.row)
            t = before.to(tl.float64) + 1
            gradient = tl.where(tl.load(x + MAXIMIZE) != 0, -clip, clip)
            shrink = tl.where(decoupled, 1 - lr * decay, 1.0).to(A)
            weight_decay = tl.where(decoupled, 0.0, decay).to(A)
            one_minus_beta1 = (1 - beta1).to(A)
            one_minus_beta2 = (1 - beta2).to(A)
            step_size = (lr / (1 - power(beta1, t))).to(A)
            correction = tl.sqrt(1 - power(beta2, t)).to(A)
            eps = tl.load(x + EPS).to(A)
            m = address(exp_avg, at.slot, A)
            v = address(exp_avg_sq, at.slot, A)
            addresses = param | source | grad | direction | m | v
            amsgrad = tl.full((), 0, tl.int1)
            if MAX:
                amsgrad = tl.load(x + AMSGRAD) != 0
            if amsgrad:
                largest = address(max_exp_avg_sq, at.slot, A)
                walk(update, addresses | largest, at,
                     (param, source, grad, direction, m, v, largest, mix, gradient, shrink, weight_decay,
                      one_minus_beta1, beta2.to(A), one_minus_beta2, step_size, correction, eps,
                      T, A, True, MIX))  # fmt: skip
            else:
                walk(update, addresses, at,
                     (param, source, grad, direction, m, v, None, mix, gradient, shrink, weight_decay,
                      one_minus_beta1, beta2.to(A), one_minus_beta2, step_size, correction, eps,
                      T, A, False, MIX))  # fmt: skip
            advance(step, before, at)
        elif source != param:
            walk(copy, param | source, at, (param, source, T))
        b += at.n
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
    g_v: Tensor,
    table: Tensor,
    blocks: Tensor,
    values: Tensor,
    sq: Tensor,
    g_v_sq: Tensor,
    *,
    alpha: float,
    max_norm: float,
    skip_nonfinite: bool,
    dtype: torch.dtype,
) -> None:
    table = addressed(table, params, grads, dtype, blocks)
    descent(table, blocks, step, counters, backup, g_v, sq, g_v_sq, dtype)
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
        g_v,
        values,
        sq,
        g_v_sq if g_v.numel() else sq,
        sq.size(1),
        bits(alpha),
        bits(max_norm),
        dtype=dtype,
        mixed=True,
        MAX=max_exp_avg_sq.numel() > 0,
        MIX=g_v.numel() > 0,
        BACKED=backup.numel() > 0,
        SKIP=skip_nonfinite,
        COUNT=counters.numel() > 0,
        PASSES=sq.size(0),
    )
