"""Adam and AdamW from the backup or in place (the decay's form is a value of the group):
d = +-clip (a g + b v) + weight_decay w;  m = beta1 m + (1 - beta1) d;  s = beta2 s + (1 - beta2) d^2;
w -= lr / (1 - beta1^t) m / (sqrt(s) / sqrt(1 - beta2^t) + eps). Without a direction v  d = +-clip a g + weight_decay w.

Bytes a parameter, fp32: reads w 4, g 4, m 4, s 4, writes w 4, m 4, s 4; amsgrad 8 more, v 4 more. Of a half type
with its master: reads that 4 and g 2, writes both, 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import schema
from .descend import advance, count_skipped, give_back, launch_rule, scales, source_of, store_weights
from .walk import address, load, norms, share, store, stretch, walk

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
    piece, param, source, grad, direction, exp_avg, exp_avg_sq, max_exp_avg_sq, a, b, sign, shrink,
    weight_decay, one_minus_beta1, beta2, one_minus_beta2, step_size, correction, eps,
    T: tl.constexpr, A: tl.constexpr, V: tl.constexpr, MASTER: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    d = a * load(grad, piece, T).to(A)
    if V is not None:
        d += b * load(direction, piece, V).to(A)
    w = load(source, piece, A if MASTER else T).to(A)
    d = sign * d
    if weight_decay != 0:  # as plus(), which takes registers that float64 does not have here
        d += weight_decay * w
    m = load(exp_avg, piece, A)
    m = m + one_minus_beta1 * (d - m)
    store(exp_avg, m, piece, A)
    s = beta2 * load(exp_avg_sq, piece, A) + (one_minus_beta2 * d) * d
    store(exp_avg_sq, s, piece, A)
    if MAX:
        largest = load(max_exp_avg_sq, piece, A)
        s = tl.where(largest > s, largest, s)
        store(max_exp_avg_sq, s, piece, A)
    change = step_size * divide(m, root(s, A) * correction + eps, A)
    store_weights(param, source, shrink * w - change, piece, T, A, MASTER)


@triton.jit(do_not_specialize=["stride_column", "n_blocks", "max_norm"])
def adam_kernel(
    table, stride_row, stride_column, blocks, n_blocks, exp_avg, exp_avg_sq, max_exp_avg_sq, step, counters, backup,
    direction, values, sq, n_buffers, coefficients, max_norm: tl.int64, T: tl.constexpr, A: tl.constexpr,
    V: tl.constexpr, MAX: tl.constexpr, MIXED: tl.constexpr, BACKED: tl.constexpr, MASTER: tl.constexpr,
    SKIP: tl.constexpr, COUNT: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    norm, finite = norms(sq, n_buffers, PASSES)
    go = finite | (not SKIP)
    a, b = scales(norm, max_norm, coefficients, A, MIXED)
    i, end = share(n_blocks)
    while i < end:
        at = stretch(table, stride_row, stride_column, blocks, i, n_blocks, BACKWARDS=True)
        param = at.param
        grad = at.grad
        source = source_of(at, backup, T, A, BACKED, MASTER)
        if go & (grad != 0):
            v = param
            if V is not None:
                v = address(direction, at.slot, V)
            x = values + VALUES * at.group
            lr = tl.load(x + LR)
            beta1 = tl.load(x + BETA1)
            beta2 = tl.load(x + BETA2)
            decay = tl.load(x + WEIGHT_DECAY)
            decoupled = tl.load(x + DECOUPLED) != 0
            sign = tl.where(tl.load(x + MAXIMIZE) != 0, -1.0, 1.0).to(A)
            before = tl.load(step + at.row)
            t = before.to(tl.float64) + 1
            shrink = tl.where(decoupled, 1 - lr * decay, 1.0).to(A)
            weight_decay = tl.where(decoupled, 0.0, decay).to(A)
            one_minus_beta1 = (1 - beta1).to(A)
            one_minus_beta2 = (1 - beta2).to(A)
            step_size = (lr / (1 - power(beta1, t))).to(A)
            correction = (1 / tl.sqrt(1 - power(beta2, t))).to(A)
            eps = tl.load(x + EPS).to(A)
            m = address(exp_avg, at.slot, A)
            s = address(exp_avg_sq, at.slot, A)
            addresses = param | source | grad | v | m | s
            amsgrad = tl.full((), 0, tl.int1)
            if MAX:
                amsgrad = tl.load(x + AMSGRAD) != 0
            if amsgrad:
                largest = address(max_exp_avg_sq, at.slot, A)
                walk(update, addresses | largest, at,
                     (param, source, grad, v, m, s, largest, a, b, sign, shrink, weight_decay,
                      one_minus_beta1, beta2.to(A), one_minus_beta2, step_size, correction, eps,
                      T, A, V, MASTER, True))  # fmt: skip
            else:
                walk(update, addresses, at,
                     (param, source, grad, v, m, s, None, a, b, sign, shrink, weight_decay,
                      one_minus_beta1, beta2.to(A), one_minus_beta2, step_size, correction, eps,
                      T, A, V, MASTER, False))  # fmt: skip
            advance(step, before, at)
        else:
            give_back(at, source, T, A, MASTER)
        i += at.n
    count_skipped(counters, go, COUNT)


def adam(
    params: Sequence[Tensor],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor,
    *args: Any,
    **numbers: Any,
) -> None:
    state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    optional = {"max_exp_avg_sq": max_exp_avg_sq}
    amsgrad = max_exp_avg_sq.numel() > 0
    launch_rule(adam_kernel, schema.ADAM, state, optional, params, *args, MAX=amsgrad, **numbers)
