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
    BACKUP,
    BLOCK,
    STEP,
    address,
    addressed,
    cell,
    check,
    elements,
    in_row,
    last_element,
    launch,
    share,
    stretch,
    sum_buffers,
    whole,
)


@triton.jit
def multiply(first, second, offset, left, has_first, T: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    """(g_s^2, g g_s)"""
    mask = in_row(left, FULL)
    g = tl.load(elements(first, offset, T, FULL), mask).to(A)
    g_s = tl.load(elements(second, offset, T, FULL), mask).to(A)
    square = g_s * g_s
    product = tl.where(has_first, g * g_s, 0.0)
    if not FULL:
        square = tl.where(mask, square, 0.0)
        product = tl.where(mask, product, 0.0)
    return square, product


@triton.jit(do_not_specialize=["n_blocks"])
def dots_kernel(
    table, stride_row, stride_column, blocks, n_blocks, sq, stride_sq, partials, gradient,
    T: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    squares = tl.zeros((BLOCK,), A)
    products = tl.zeros((BLOCK,), A)
    rest_squares = tl.zeros((STEP,), A)
    rest_products = tl.zeros((STEP,), A)
    b, end = share(n_blocks)
    while b < end:
        at = stretch(table, stride_row, stride_column, blocks, b, end)
        second = at.grad
        has_first = cell(table, at.row, BACKUP, stride_row, stride_column) != 0
        first = tl.where(has_first, address(gradient, at.slot, T), second)  # read in any case
        if second != 0:
            end_whole = whole(first | second, at)
            for i in range(at.k, end_whole):
                square, product = multiply(first, second, i * BLOCK, BLOCK, has_first, T, A, True)
                squares += square
                products += product
            last = last_element(at)
            for offset in range(end_whole * BLOCK, last, STEP):
                square, product = multiply(first, second, offset, last - offset, has_first, T, A, False)
                rest_squares += square
                rest_products += product
        b += at.n
    leave(partials, squares, rest_squares, 0, 2)
    leave(partials, products, rest_products, 1, 2)
    if is_last(partials):
        tl.store(sq, total(partials, 0, 2))
        tl.store(sq + stride_sq, total(partials, 1, 2))


@triton.jit
def project_block(
    target, first, second, offset, left, has_first, has_second, along,
    T: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The squares of what is written."""
    mask = in_row(left, FULL)
    g = tl.load(elements(first, offset, T, FULL), mask).to(A)
    g_s = tl.where(has_second, tl.load(elements(second, offset, T, FULL), mask).to(A), 0.0)
    g_v = tl.where(has_first, g_s - along * g, g_s)
    tl.store(elements(target, offset, A, FULL), g_v, mask)
    if not FULL:
        g_v = tl.where(mask, g_v, 0.0)
    return g_v * g_v


@triton.jit(do_not_specialize=["n_blocks"])
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
        at = stretch(table, stride_row, stride_column, blocks, b, end)
        has_first = cell(table, at.row, BACKUP, stride_row, stride_column) != 0
        has_second = at.grad != 0
        target = address(g_v, at.slot, A)
        # The flat buffer can be read where nobody wrote to it.
        first = address(gradient, at.slot, T)
        second = tl.where(has_second, at.grad, first)
        end_whole = whole(target | first | second, at)
        for i in range(at.k, end_whole):
            sums += project_block(target, first, second, i * BLOCK, BLOCK, has_first, has_second, along, T, A, True)
        last = last_element(at)
        for offset in range(end_whole * BLOCK, last, STEP):
            rest += project_block(target, first, second, offset, last - offset, has_first, has_second, along,
                                  T, A, False)  # fmt: skip
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
    table = addressed(table, [], grads, dtype, blocks)
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
    table = addressed(table, [], grads, dtype, blocks)
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
