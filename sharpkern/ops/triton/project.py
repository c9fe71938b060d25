"""LookSAM's second gradient g_s against the first one, g:  sq = [||g_s||^2, <g, g_s>]  (dots), and its part that is
orthogonal to g:  g_v = g_s - <g, g_s> / ||g||^2 g,  sq = ||g_v||^2  (project).

Bytes a parameter, fp32: reads g 4 and g_s 4; project writes g_v 4, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import schema
from .reduce import check_sums, is_last, leave, total
from .walk import (
    BLOCK,
    STEP,
    address,
    check,
    check_segments,
    launch,
    load,
    share,
    store,
    stretch,
    sum_buffers,
    walk_sums,
)


@triton.jit
def add_products(piece, sums, first, second, has_first, T: tl.constexpr, A: tl.constexpr):
    squares, products = sums
    g = load(first, piece, T).to(A)
    g_s = load(second, piece, T).to(A)
    return squares + g_s * g_s, products + tl.where(has_first, g * g_s, 0.0)


@triton.jit(do_not_specialize=["stride_column", "n_blocks"])
def dots_kernel(
    table, stride_row, stride_column, blocks, n_blocks, sq, stride_sq, partials, gradient, T: tl.constexpr,
    A: tl.constexpr,
):  # fmt: skip
    sums = (tl.zeros((BLOCK,), A), tl.zeros((BLOCK,), A))
    rest = (tl.zeros((STEP,), A), tl.zeros((STEP,), A))
    b, end = share(n_blocks)
    while b < end:
        at = stretch(table, stride_row, stride_column, blocks, b, n_blocks)
        has_first = at.backup != 0
        first = tl.where(has_first, address(gradient, at.slot, T), at.grad)  # read in any case
        if at.grad != 0:
            sums, rest = walk_sums(add_products, first | at.grad, at, sums, rest,
                                    (first, at.grad, has_first, T, A))  # fmt: skip
        b += at.n
    leave(partials, sums[0], rest[0], 0, 2)
    leave(partials, sums[1], rest[1], 1, 2)
    if is_last(partials):
        tl.store(sq, total(partials, 0, 2))
        tl.store(sq + stride_sq, total(partials, 1, 2))


@triton.jit
def write_rest(
    piece, sums, target, first, second, has_first, has_second, along, T: tl.constexpr, A: tl.constexpr
):  # fmt: skip
    g = load(first, piece, T).to(A)
    g_s = tl.where(has_second, load(second, piece, T).to(A), 0.0)
    g_v = tl.where(has_first, g_s - along * g, g_s)
    store(target, g_v, piece, A)
    return sums + g_v * g_v


@triton.jit(do_not_specialize=["stride_column", "n_blocks"])
def project_kernel(
    table, stride_row, stride_column, blocks, n_blocks, g_v, sq, partials, gradient, products, n_buffers,
    T: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    first_sq = sum_buffers(products, n_buffers)
    second_sq = sum_buffers(products + n_buffers, n_buffers)
    product = sum_buffers(products + 2 * n_buffers, n_buffers)
    finite = (first_sq < float("inf")) & (second_sq < float("inf")) & (tl.abs(product) < float("inf"))
    along = (product / first_sq).to(A)
    # A quotient may leave the range of float32.
    go = finite & (first_sq > 0) & (tl.abs(along) < float("inf"))
    sums = tl.zeros((BLOCK,), A)
    rest = tl.zeros((STEP,), A)
    b, end = share(n_blocks)
    while go & (b < end):
        at = stretch(table, stride_row, stride_column, blocks, b, n_blocks, BACKWARDS=True)
        has_first = at.backup != 0
        has_second = at.grad != 0
        target = address(g_v, at.slot, A)
        # The flat buffer can be read where nobody wrote to it.
        first = address(gradient, at.slot, T)
        second = tl.where(has_second, at.grad, first)
        sums, rest = walk_sums(write_rest, target | first | second, at, sums, rest,
                                (target, first, second, has_first, has_second, along, T, A))  # fmt: skip
        b += at.n
    leave(partials, sums, rest, 0, 1)
    if is_last(partials) & go:
        tl.store(sq, total(partials, 0, 1))


def dots(
    sq: Tensor,
    partials: Tensor,
    gradient: Tensor,
    grads: Sequence[Tensor],
    table: Tensor,
    blocks: Tensor,
    *,
    dtype: torch.dtype,
) -> None:
    check_segments([], grads, table, blocks, dtype)
    check_sums(sq, partials, table, blocks, 2)
    check(gradient, table, dtype, "gradient", 1 if blocks.numel() else 0)
    launch(dots_kernel, table, blocks, sq, sq.stride(0), partials, gradient, dtype=dtype)


def project(
    g_v: Tensor,
    sq: Tensor,
    partials: Tensor,
    gradient: Tensor,
    grads: Sequence[Tensor],
    table: Tensor,
    blocks: Tensor,
    products: Tensor,
    *,
    dtype: torch.dtype,
) -> None:
    check_segments([], grads, table, blocks, dtype)
    check_sums(sq, partials, table, blocks)
    some = 1 if blocks.numel() else 0
    check(g_v, table, schema.state_dtype(dtype), "g_v", some)
    check(gradient, table, dtype, "gradient", some)
    if products.dim() != 2 or products.size(0) != 3 or products.size(1) == 0:
        raise RuntimeError("sharpkern: products should be a contiguous float64 matrix of 3 rows")
    check(products, table, torch.float64, "products", products.numel())
    launch(
        project_kernel,
        table,
        blocks,
        g_v,
        sq,
        partials,
        gradient,
        products,
        products.size(1),
        dtype=dtype,
        mixed=True,
    )
