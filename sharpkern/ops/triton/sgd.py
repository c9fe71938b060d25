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
from .restore import copy_blocks
from .walk import (
    BACKUP,
    BLOCK,
    STEP,
    address,
    addressed,
    bits,
    cell,
    check,
    check_values,
    elements,
    in_row,
    last_element,
    launch,
    norms,
    share,
    stretch,
    whole,
)

LR, MOMENTUM, DAMPENING, WEIGHT_DECAY, NESTEROV, MAXIMIZE, VALUES = map(tl.constexpr, range(len(schema.SGD) + 1))


@triton.jit
def step_block(
    param, source, grad, direction, buffer, offset, left, mix, lr, weight_decay, gradient, momentum, intake,
    from_gradient, from_buffer, T: tl.constexpr, A: tl.constexpr, BUFFER: tl.constexpr, MIX: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    mask = in_row(left, FULL)
    w = tl.load(elements(source, offset, T, FULL), mask).to(A)
    g = tl.load(elements(grad, offset, T, FULL), mask).to(A)
    if MIX:
        g += mix * tl.load(elements(direction, offset, A, FULL), mask)
    d = gradient * g + weight_decay * w
    if BUFFER:
        pointers = elements(buffer, offset, A, FULL)
        b = momentum * tl.load(pointers, mask) + intake * d
        tl.store(pointers, b, mask)
        d = from_gradient * d + from_buffer * b
    tl.store(elements(param, offset, T, FULL), (w - lr * d).to(T), mask)


@triton.jit
def step_blocks(
    param, source, grad, direction, buffer, at, mix, lr, weight_decay, gradient, momentum, intake, from_gradient,
    from_buffer, T: tl.constexpr, A: tl.constexpr, BUFFER: tl.constexpr, MIX: tl.constexpr,
):  # fmt: skip
    end_whole = whole(param | source | grad | direction | buffer, at)
    for i in range(at.k, end_whole):
        step_block(param, source, grad, direction, buffer, i * BLOCK, BLOCK, mix, lr, weight_decay, gradient, momentum,
                   intake, from_gradient, from_buffer, T, A, BUFFER, MIX, True)  # fmt: skip
    last = last_element(at)
    for offset in range(end_whole * BLOCK, last, STEP):
        step_block(param, source, grad, direction, buffer, offset, last - offset, mix, lr, weight_decay, gradient,
                   momentum, intake, from_gradient, from_buffer, T, A, BUFFER, MIX, False)  # fmt: skip


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
            marked = cell(table, at.row, BACKUP, stride_row, stride_column) != 0
            source = tl.where(marked, address(backup, at.slot, T), param)
        if go & (grad != 0):
            direction = param
            if MIX:
                direction = address(g_v, at.slot, A)
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
                step_blocks(param, source, grad, direction, buffer, at, mix, lr, weight_decay, gradient, decay, intake,
                            from_gradient, from_buffer, T, A, True, MIX)  # fmt: skip
                advance(table, stride_row, stride_column, step, before, at)
            else:
                none = tl.full((), 0, A)
                step_blocks(param, source, grad, direction, param, at, mix, lr, weight_decay, gradient, none, none,
                            none, none, T, A, False, MIX)  # fmt: skip
        elif source != param:
            copy_blocks(param, source, at, T)
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
