"""SGD from the backup or in place:  d = +-clip g + weight_decay w;  buf = momentum buf + (1 - dampening) d;
w -= lr (nesterov ? d + momentum buf : buf).

Bytes a parameter, fp32: reads w 4, g 4, buf 4, writes w 4, buf 4; without momentum 12.
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

LR, MOMENTUM, DAMPENING, WEIGHT_DECAY, NESTEROV, MAXIMIZE, VALUES = map(tl.constexpr, range(len(schema.SGD) + 1))


@triton.jit
def step_block(
    param, source, grad, buffer, offset, left, lr, weight_decay, gradient, momentum, intake, from_gradient,
    from_buffer, T: tl.constexpr, A: tl.constexpr, BUFFER: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    mask = in_row(left, FULL)
    w = tl.load(elements(source, offset, T, FULL), mask).to(A)
    d = gradient * tl.load(elements(grad, offset, T, FULL), mask).to(A) + weight_decay * w
    if BUFFER:
        pointers = elements(buffer, offset, A, FULL)
        b = momentum * tl.load(pointers, mask) + intake * d
        tl.store(pointers, b, mask)
        d = from_gradient * d + from_buffer * b
    tl.store(elements(param, offset, T, FULL), (w - lr * d).to(T), mask)


@triton.jit
def step_blocks(
    param, source, grad, buffer, k, count, numel, lr, weight_decay, gradient, momentum, intake, from_gradient,
    from_buffer, T: tl.constexpr, A: tl.constexpr, BUFFER: tl.constexpr,
):  # fmt: skip
    end_whole = whole(param | source | grad | buffer, numel, k, count)
    for i in range(k, end_whole):
        step_block(param, source, grad, buffer, i * BLOCK, BLOCK, lr, weight_decay, gradient, momentum, intake,
                   from_gradient, from_buffer, T, A, BUFFER, True)  # fmt: skip
    last = tl.minimum((k + count) * BLOCK, numel)
    for offset in range(end_whole * BLOCK, last, STEP):
        step_block(param, source, grad, buffer, offset, last - offset, lr, weight_decay, gradient, momentum, intake,
                   from_gradient, from_buffer, T, A, BUFFER, False)  # fmt: skip


@triton.jit(do_not_specialize=["n_blocks", "max_norm"])
def sgd_kernel(
    table, stride_row, stride_column, blocks, n_blocks, momentum_buffer, step, counters, backup, values, sq, n_buffers,
    max_norm, T: tl.constexpr, A: tl.constexpr, BUFFER: tl.constexpr, BACKED: tl.constexpr, SKIP: tl.constexpr,
    COUNT: tl.constexpr, PASSES: tl.constexpr,
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
            v = values + VALUES * cell(table, row, GROUP, stride_row, stride_column)
            lr = tl.load(v + LR).to(A)
            weight_decay = tl.load(v + WEIGHT_DECAY).to(A)
            gradient = tl.where(tl.load(v + MAXIMIZE) != 0, -clip, clip).to(A)
            momentum = tl.load(v + MOMENTUM)
            buffered = tl.full((), 0, tl.int1)
            if BUFFER:
                buffered = momentum != 0
            if buffered:
                before = tl.load(step + row)
                first = before == 0
                nesterov = tl.load(v + NESTEROV) != 0
                # The first buffer is the raw gradient, without dampening.
                decay = tl.where(first, 0.0, momentum).to(A)
                intake = tl.where(first, 1.0, 1.0 - tl.load(v + DAMPENING)).to(A)
                from_gradient = tl.where(nesterov, 1.0, 0.0).to(A)
                from_buffer = tl.where(nesterov, momentum, 1.0).to(A)
                buffer = address(momentum_buffer, slot, A)
                step_blocks(param, source, grad, buffer, k, stop - b, numel, lr, weight_decay, gradient, decay, intake,
                            from_gradient, from_buffer, T, A, True)  # fmt: skip
                advance(table, row, stride_row, stride_column, step, before, stop - b, count)
            else:
                none = tl.full((), 0, A)
                step_blocks(param, source, grad, param, k, stop - b, numel, lr, weight_decay, gradient, none, none,
                            none, none, T, A, False)  # fmt: skip
        elif source != param:
            copy_blocks(param, source, k, stop - b, numel, T)
        b = stop
    count_skipped(counters, go, COUNT)


def sgd(
    params: Sequence[Tensor],
    momentum_buffer: Tensor,
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
        values,
        sq,
        sq.size(1),
        limit,
        dtype=dtype,
        mixed=momentum_buffer.numel() > 0,
        BUFFER=momentum_buffer.numel() > 0,
        BACKED=backup.numel() > 0,
        SKIP=skip_nonfinite,
        COUNT=counters.numel() > 0,
        PASSES=sq.size(0),
    )
