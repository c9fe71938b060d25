"""Nudged SGD, whose next momentum buffer is scaled along orthonormal directions e_k:
along = [<the terms of buf without g, e_k>, <that of g, e_k>] and sq = ||g||^2  (nudge_dots), then
buf = momentum buf + (1 - dampening) (+-clip g + weight_decay w);
w -= lr (buf + (nudge - 1) sum_k <buf, e_k> e_k)  (nudge_sgd).

Bytes a parameter, fp32, of K directions: reads w 4, g 4, buf 4 and e 4 K, each of the two; nudge_sgd writes w 4,
buf 4. Without momentum no buf.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import schema
from .descend import advance, count_skipped, give_back, plus, scales, source_of, store_weights
from .reduce import check_partials, check_sums, is_last, total
from .walk import (
    address,
    bits,
    check,
    check_counters,
    check_master,
    check_norms,
    check_segments,
    check_values,
    launch,
    load,
    norms,
    share,
    store,
    stretch,
    sum_buffers,
    walk,
    walk_with,
)

LR, MOMENTUM, DAMPENING, WEIGHT_DECAY, NESTEROV, MAXIMIZE, NUDGE, VALUES = map(
    tl.constexpr, range(len(schema.NUDGED) + 1)
)
# What ||g||^2 and two sums a direction fit into.
LANES = tl.constexpr(triton.next_power_of_2(1 + 2 * schema.DIRECTIONS))


@triton.jit
def group_of(values, step, at, A: tl.constexpr, BUFFER: tl.constexpr):
    """(the group's values, its weight decay and sign; whether the row has a momentum buffer, and how it takes it up:
    the first buffer is the raw gradient, without dampening)."""
    x = values + VALUES * at.group
    weight_decay = tl.load(x + WEIGHT_DECAY).to(A)
    sign = tl.where(tl.load(x + MAXIMIZE) != 0, -1.0, 1.0).to(A)
    momentum = tl.load(x + MOMENTUM)
    buffered = tl.full((), 0, tl.int1)
    if BUFFER:
        buffered = momentum != 0
    before = tl.load(step + at.row)
    first = (before == 0) | (not buffered)
    decay = tl.where(first, 0.0, momentum).to(A)
    intake = tl.where(first, 1.0, 1.0 - tl.load(x + DAMPENING)).to(A)
    return x, weight_decay, sign, buffered, before, decay, intake


@triton.jit
def add_products(
    piece, sums, source, grad, buffer, direction, size, count, weight_decay, sign, decay, intake,
    T: tl.constexpr, A: tl.constexpr, MASTER: tl.constexpr, BUFFER: tl.constexpr,
):  # fmt: skip
    g = load(grad, piece, T).to(A)
    kept = intake * plus(0.0 * g, weight_decay, load(source, piece, A if MASTER else T).to(A))
    if BUFFER:
        kept += decay * load(buffer, piece, A)
    pulled = intake * (sign * g)
    lanes = tl.arange(0, LANES)
    sums += tl.where(lanes == 0, tl.sum(g * g), 0.0)
    for k in range(count):
        e = load(direction + k * size, piece, A)
        sums += tl.where(lanes == 2 * k + 1, tl.sum(kept * e), 0.0)
        sums += tl.where(lanes == 2 * k + 2, tl.sum(pulled * e), 0.0)
    return sums


@triton.jit(do_not_specialize=["stride_column", "n_blocks", "count"])
def nudge_dots_kernel(
    table, stride_row, stride_column, blocks, n_blocks, sq, along, stride_along, partials, master, momentum_buffer,
    step, eigenvectors, size, count, values, T: tl.constexpr, A: tl.constexpr, MASTER: tl.constexpr,
    BUFFER: tl.constexpr,
):  # fmt: skip
    sums = tl.zeros((LANES,), tl.float64)
    row_bytes = size.to(tl.int64) * (A.primitive_bitwidth // 8)
    b, end = share(n_blocks)
    while b < end:
        at = stretch(table, stride_row, stride_column, blocks, b, n_blocks)
        if at.grad != 0:
            _, weight_decay, sign, buffered, _, decay, intake = group_of(values, step, at, A, BUFFER)
            direction = address(eigenvectors, at.slot, A)
            source = source_of(at, master, T, A, False, MASTER)
            addresses = source | at.grad | direction | row_bytes
            if buffered:
                buffer = address(momentum_buffer, at.slot, A)
                sums = walk_with(add_products, addresses | buffer, at, sums,
                                 (source, at.grad, buffer, direction, row_bytes, count, weight_decay, sign, decay,
                                  intake, T, A, MASTER, True))  # fmt: skip
            else:
                sums = walk_with(add_products, addresses, at, sums,
                                 (source, at.grad, None, direction, row_bytes, count, weight_decay, sign, decay,
                                  intake, T, A, MASTER, False))  # fmt: skip
        b += at.n
    lanes = tl.arange(0, LANES)
    n = 1 + 2 * count
    tl.store(partials + 1 + n * tl.program_id(0) + lanes, sums, lanes < n)
    if is_last(partials):
        tl.store(sq, total(partials, 0, n))
        for k in range(2 * count):
            tl.store(along + k * stride_along, total(partials, k + 1, n))


@triton.jit
def update(
    piece, param, source, grad, buffer, direction, size, along, n_buffers, count, lr, weight_decay, clip, sign, decay,
    intake, nudge, T: tl.constexpr, A: tl.constexpr, MASTER: tl.constexpr, BUFFER: tl.constexpr,
):  # fmt: skip
    w = load(source, piece, A if MASTER else T).to(A)
    buf = intake * plus(sign * (clip.to(A) * load(grad, piece, T).to(A)), weight_decay, w)
    if BUFFER:
        buf += decay * load(buffer, piece, A)
        store(buffer, buf, piece, A)
    for k in range(count):
        kept = sum_buffers(along + 2 * k * n_buffers, n_buffers)
        pulled = sum_buffers(along + (2 * k + 1) * n_buffers, n_buffers)
        buf += (nudge * (kept + clip * pulled)).to(A) * load(direction + k * size, piece, A)
    store_weights(param, source, w - lr * buf, piece, T, A, MASTER)


# With one buffer alone sum_buffers would be no loop, and ptxas would unroll the one around it until it spills.
@triton.jit(do_not_specialize=["stride_column", "n_blocks", "count", "n_buffers", "max_norm"])
def nudge_sgd_kernel(
    table, stride_row, stride_column, blocks, n_blocks, master, momentum_buffer, step, counters, eigenvectors, size,
    count, values, sq, along, n_buffers, max_norm: tl.int64, T: tl.constexpr, A: tl.constexpr, MASTER: tl.constexpr,
    BUFFER: tl.constexpr, SKIP: tl.constexpr, COUNT: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    norm, finite = norms(sq, n_buffers, PASSES)
    go = finite | (not SKIP)
    clip, _ = scales(norm, max_norm, None, tl.float64, False)
    count_skipped(counters, go, COUNT)
    row_bytes = size.to(tl.int64) * (A.primitive_bitwidth // 8)
    i, end = share(n_blocks)
    while i < end:
        at = stretch(table, stride_row, stride_column, blocks, i, n_blocks, BACKWARDS=True)
        source = source_of(at, master, T, A, False, MASTER)
        if go & (at.grad != 0):
            x, weight_decay, sign, buffered, before, decay, intake = group_of(values, step, at, A, BUFFER)
            lr = tl.load(x + LR).to(A)
            nudge = tl.load(x + NUDGE) - 1.0
            direction = address(eigenvectors, at.slot, A)
            addresses = at.param | source | at.grad | direction | row_bytes
            if buffered:
                buffer = address(momentum_buffer, at.slot, A)
                walk(update, addresses | buffer, at,
                     (at.param, source, at.grad, buffer, direction, row_bytes, along, n_buffers, count, lr,
                      weight_decay, clip, sign, decay, intake, nudge, T, A, MASTER, True))  # fmt: skip
                advance(step, before, at)
            else:
                walk(update, addresses, at,
                     (at.param, source, at.grad, None, direction, row_bytes, along, n_buffers, count, lr,
                      weight_decay, clip, sign, decay, intake, nudge, T, A, MASTER, False))  # fmt: skip
        else:
            give_back(at, source, T, A, MASTER)
        i += at.n


def check_directions(eigenvectors: Tensor, table: Tensor, dtype: torch.dtype) -> None:
    """The rows of eigenvectors.

    Raises:
        RuntimeError: when they are none.
    """
    if eigenvectors.dim() != 2 or not 1 <= eigenvectors.size(0) <= schema.DIRECTIONS:
        raise RuntimeError(f"sharpkern: eigenvectors should be 1 to {schema.DIRECTIONS} rows")
    check(eigenvectors, table, schema.state_dtype(dtype), "eigenvectors")


def nudge_dots(
    sq: Tensor,
    along: Tensor,
    partials: Tensor,
    params: Sequence[Tensor],
    master: Tensor,
    grads: Sequence[Tensor],
    momentum_buffer: Tensor,
    step: Tensor,
    eigenvectors: Tensor,
    table: Tensor,
    blocks: Tensor,
    values: Tensor,
    *,
    dtype: torch.dtype,
) -> None:
    check_segments(params, grads, table, blocks, dtype)
    check_directions(eigenvectors, table, dtype)
    count = eigenvectors.size(0)
    check_sums(sq, partials, table, blocks)
    check_partials(partials, table, blocks, 1 + 2 * count)
    if along.dtype != torch.float64 or along.dim() != 1 or len(along) != 2 * count or along.device != table.device:
        raise RuntimeError(f"sharpkern: along should be {2 * count} float64 elements, on {table.device}")
    mastered = check_master(master, table, dtype)
    check(momentum_buffer, table, schema.state_dtype(dtype), "momentum_buffer")
    check(step, table, torch.float32, "step", table.size(0))
    check_values(values, table, len(schema.NUDGED), "values")
    launch(
        nudge_dots_kernel,
        table,
        blocks,
        sq,
        along,
        along.stride(0),
        partials,
        master,
        momentum_buffer,
        step,
        eigenvectors,
        eigenvectors.size(1),
        count,
        values,
        dtype=dtype,
        mixed=True,
        MASTER=mastered,
        BUFFER=momentum_buffer.numel() > 0,
    )


def nudge_sgd(
    params: Sequence[Tensor],
    master: Tensor,
    momentum_buffer: Tensor,
    step: Tensor,
    counters: Tensor,
    grads: Sequence[Tensor],
    eigenvectors: Tensor,
    table: Tensor,
    blocks: Tensor,
    values: Tensor,
    sq: Tensor,
    along: Tensor,
    *,
    max_norm: float,
    skip_nonfinite: bool,
    dtype: torch.dtype,
) -> None:
    check_segments(params, grads, table, blocks, dtype)
    check_directions(eigenvectors, table, dtype)
    count = eigenvectors.size(0)
    check_norms(sq, table)
    if along.dim() != 2 or along.size(0) != 2 * count or along.size(1) == 0:
        raise RuntimeError(f"sharpkern: along should be a contiguous float64 matrix of {2 * count} rows")
    check(along, table, torch.float64, "along", along.numel())
    mastered = check_master(master, table, dtype)
    check(momentum_buffer, table, schema.state_dtype(dtype), "momentum_buffer")
    check(step, table, torch.float32, "step", table.size(0))
    check_counters(counters, table)
    check_values(values, table, len(schema.NUDGED), "values")
    launch(
        nudge_sgd_kernel,
        table,
        blocks,
        master,
        momentum_buffer,
        step,
        counters,
        eigenvectors,
        eigenvectors.size(1),
        count,
        values,
        sq,
        along,
        along.size(1),
        bits(max_norm),
        dtype=dtype,
        mixed=True,
        MASTER=mastered,
        BUFFER=momentum_buffer.numel() > 0,
        SKIP=skip_nonfinite,
        COUNT=counters.numel() > 0,
        PASSES=sq.size(0),
    )
