"""SGD from the backup or in place:  d = +-clip g + weight_decay w;  buf = momentum buf + (1 - dampening) d;
w -= lr (nesterov ? d + momentum buf : buf). LookSAM's g is g + mix g_v.

Bytes a parameter, fp32: reads w 4, g 4, buf 4, writes w 4, buf 4; without momentum 12; g_v 4 more.
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

LR, MOMENTUM, DAMPENING, WEIGHT_DECAY, NESTEROV, MAXIMIZE, VALUES = map(tl.constexpr, range(len(schema.SGD) + 1))


@triton.jit
def update(
    piece, param, source, grad, direction, buffer, mix, lr, weight_decay, gradient, momentum, intake, from_gradient,
    from_buffer, T: tl.constexpr, A: tl.constexpr, BUFFER: tl.constexpr, MIX: tl.constexpr,
):  # fmt: skip
    w = load(source, piece, T).to(A)
    g = load(grad, piece, T).to(A)
    if MIX:
        g += mix * load(direction, piece, A)
    d = gradient * g + weight_decay * w
    if BUFFER:
        b = momentum * load(buffer, piece, A) + intake * d
        store(buffer, b, piece, A)
        d = from_gradient * d + from_buffer * b
    store(param, w - lr * d, piece, T)


@triton.jit(do_not_specialize=["n_blocks", "max_norm", "alpha"])
def sgd_kernel(
    table, stride_row, stride_column, blocks, n_blocks, momentum_buffer, step, counters, backup, g_v, values, sq,
    g_v_sq, n_buffers, alpha, max_norm, T: tl.constexpr, A: tl.constexpr, BUFFER: tl.constexpr, MIX: tl.constexpr,
    BACKED: tl.constexpr, SKIP: tl.constexpr, COUNT: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    norm, finite = norms(sq, n_buffers, PASSES)
    go = finite | (not SKIP)
    clip = clip_factor(norm, max_norm).to(A)
    mix = mix_factor(norm, g_v_sq, n_buffers, alpha, MIX).to(A)
    # Now: after the loop, without momentum, ptxas would spill what this needs.
    count_skipped(counters, go, COUNT)
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
            addresses = param | source | grad | direction
            v = values + VALUES * at.group
            lr = tl.load(v + LR).to(A)
            weight_decay = tl.load(v + WEIGHT_DECAY).to(A)
            gradient = tl.where(tl.load(v + MAXIMIZE) != 0, -clip, clip)
            momentum = tl.load(v + MOMENTUM)
            buffered = tl.full((), 0, tl.int1)
            if BUFFER:
                buffered = momentum != 0
            if buffered:
                before = tl.load(step + at.row)
                first = before == 0
                nesterov = tl.load(v + NESTEROV) != 0
                # The first buffer is the raw gradient, without dampening.
                decay = tl.where(first, 0.0, momentum).to(A)
                intake = tl.where(first, 1.0, 1.0 - tl.load(v + DAMPENING)).to(A)
                from_gradient = tl.where(nesterov, 1.0, 0.0).to(A)
                from_buffer = tl.where(nesterov, momentum, 1.0).to(A)
                buffer = address(momentum_buffer, at.slot, A)
                walk(update, addresses | buffer, at,
                     (param, source, grad, direction, buffer, mix, lr, weight_decay, gradient, decay, intake,
                      from_gradient, from_buffer, T, A, True, MIX))  # fmt: skip
                advance(step, before, at)
            else:
                walk(update, addresses, at,
                     (param, source, grad, direction, None, mix, lr, weight_decay, gradient, None, None,
                      None, None, T, A, False, MIX))  # fmt: skip
        elif source != param:
            walk(copy, param | source, at, (param, source, T))
        b += at.n


def sgd(
    params: Sequence[Tensor],
    momentum_buffer: Tensor,
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
    check_values(values, table, len(schema.SGD), "values")
    check(momentum_buffer, table, schema.state_dtype(dtype), "momentum_buffer")
    launch(
        sgd_kernel,
        table,
        blocks,
        momentum_buffer,
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
        mixed=momentum_buffer.numel() + g_v.numel() > 0,
        BUFFER=momentum_buffer.numel() > 0,
        MIX=g_v.numel() > 0,
        BACKED=backup.numel() > 0,
        SKIP=skip_nonfinite,
        COUNT=counters.numel() > 0,
        PASSES=sq.size(0),
    )
