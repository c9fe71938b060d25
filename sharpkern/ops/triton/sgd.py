"""SGD from the backup or in place:  d = +-clip (a g + b v) + weight_decay w;  buf = momentum buf + (1 - dampening) d;
w -= lr (nesterov ? d + momentum buf : buf). Without a direction v  d = +-clip a g + weight_decay w.

Bytes a parameter, fp32: reads w 4, g 4, buf 4, writes w 4, buf 4; without momentum 12; v 4 more. Of a half type with
its master: reads that 4 and g 2, writes both, 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import schema
from .descend import advance, count_skipped, give_back, launch_rule, plus, scales, source_of, store_weights
from .walk import address, load, norms, share, store, stretch, walk

LR, MOMENTUM, DAMPENING, WEIGHT_DECAY, NESTEROV, MAXIMIZE, VALUES = map(tl.constexpr, range(len(schema.SGD) + 1))


@triton.jit
def update(
    piece, param, source, grad, direction, buffer, lr, weight_decay, a, b, sign, momentum, intake,
    from_gradient, from_buffer, T: tl.constexpr, A: tl.constexpr, V: tl.constexpr, MASTER: tl.constexpr,
    BUFFER: tl.constexpr,
):  # fmt: skip
    w = load(source, piece, A if MASTER else T).to(A)
    d = a * load(grad, piece, T).to(A)
    if V is not None:
        d += b * load(direction, piece, V).to(A)
    d = plus(sign * d, weight_decay, w)
    if BUFFER:
        buf = momentum * load(buffer, piece, A) + intake * d
        store(buffer, buf, piece, A)
        d = from_gradient * d + from_buffer * buf
    store_weights(param, source, w - lr * d, piece, T, A, MASTER)


@triton.jit(do_not_specialize=["stride_column", "n_blocks", "max_norm"])
def sgd_kernel(
    table, stride_row, stride_column, blocks, n_blocks, momentum_buffer, step, counters, backup, direction, values,
    sq, n_buffers, coefficients, max_norm: tl.int64, T: tl.constexpr, A: tl.constexpr, V: tl.constexpr,
    BUFFER: tl.constexpr, MIXED: tl.constexpr, BACKED: tl.constexpr, MASTER: tl.constexpr, SKIP: tl.constexpr,
    COUNT: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    norm, finite = norms(sq, n_buffers, PASSES)
    go = finite | (not SKIP)
    a, b = scales(norm, max_norm, coefficients, A, MIXED)
    # Now: after the loop, without momentum, ptxas would spill what this needs.
    count_skipped(counters, go, COUNT)
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
            addresses = param | source | grad | v
            x = values + VALUES * at.group
            lr = tl.load(x + LR).to(A)
            weight_decay = tl.load(x + WEIGHT_DECAY).to(A)
            sign = tl.where(tl.load(x + MAXIMIZE) != 0, -1.0, 1.0).to(A)
            momentum = tl.load(x + MOMENTUM)
            buffered = tl.full((), 0, tl.int1)
            if BUFFER:
                buffered = momentum != 0
            if buffered:
                before = tl.load(step + at.row)
                first = before == 0
                nesterov = tl.load(x + NESTEROV) != 0
                # The first buffer is the raw gradient, without dampening.
                decay = tl.where(first, 0.0, momentum).to(A)
                intake = tl.where(first, 1.0, 1.0 - tl.load(x + DAMPENING)).to(A)
                from_gradient = tl.where(nesterov, 1.0, 0.0).to(A)
                from_buffer = tl.where(nesterov, momentum, 1.0).to(A)
                buffer = address(momentum_buffer, at.slot, A)
                walk(update, addresses | buffer, at,
                     (param, source, grad, v, buffer, lr, weight_decay, a, b, sign, decay, intake,
                      from_gradient, from_buffer, T, A, V, MASTER, True))  # fmt: skip
                advance(step, before, at)
            else:
                walk(update, addresses, at,
                     (param, source, grad, v, None, lr, weight_decay, a, b, sign, None, None, None, None,
                      T, A, V, MASTER, False))  # fmt: skip
        else:
            give_back(at, source, T, A, MASTER)
        i += at.n


def sgd(params: Sequence[Tensor], momentum_buffer: Tensor, *args: Any, **numbers: Any) -> None:
    optional = {"momentum_buffer": momentum_buffer}
    buffered = momentum_buffer.numel() > 0
    launch_rule(sgd_kernel, schema.SGD, {}, optional, params, *args, BUFFER=buffered, **numbers)
