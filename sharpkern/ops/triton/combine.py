"""A direction or a running average of the gradients:  out = a x + b v  and  sq = ||out||^2,  x the gradients or a flat
buffer; out may be v.

Bytes a parameter, fp32: reads x 4 and v 4, writes out 4.
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
    check_norms,
    check_segments,
    launch,
    load,
    norms,
    share,
    store,
    stretch,
    walk_sums,
)


@triton.jit
def write_combined(piece, sums, target, first, second, a, b, X: tl.constexpr, A: tl.constexpr):
    d = b * load(second, piece, A) + a * load(first, piece, X).to(A)
    store(target, d, piece, A)
    return sums + d * d


@triton.jit
def add_kept(piece, sums, second, A: tl.constexpr):
    v = load(second, piece, A)
    return sums + v * v


@triton.jit(do_not_specialize=["stride_column", "n_blocks"])
def combine_kernel(
    table, stride_row, stride_column, blocks, n_blocks, out, sq, partials, x, v, coefficients, checks, n_buffers,
    FLAT: tl.constexpr, IN_PLACE: tl.constexpr, PASSES: tl.constexpr, T: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    _, go = norms(checks, n_buffers, PASSES)
    a = tl.load(coefficients).to(A)
    b = tl.load(coefficients + 1).to(A)
    X: tl.constexpr = A if FLAT else T
    sums = tl.zeros((BLOCK,), A)
    rest = tl.zeros((STEP,), A)
    begin, end = share(n_blocks)
    while go & (begin < end):
        at = stretch(table, stride_row, stride_column, blocks, begin, n_blocks)
        target = address(out, at.slot, A)
        second = address(v, at.slot, A)
        if FLAT:
            taken = at.backup != 0
            first = address(x, at.slot, A)
        else:
            taken = at.grad != 0
            first = at.grad
        if taken:
            sums, rest = walk_sums(write_combined, target | first | second, at, sums, rest,
                                    (target, first, second, a, b, X, A))  # fmt: skip
        elif IN_PLACE:
            sums, rest = walk_sums(add_kept, second, at, sums, rest, (second, A))
        begin += at.n
    leave(partials, sums, rest, 0, 1)
    if is_last(partials) & go:
        tl.store(sq, total(partials, 0, 1))


def combine(
    out: Tensor,
    sq: Tensor,
    partials: Tensor,
    x: Tensor,
    v: Tensor,
    grads: Sequence[Tensor],
    table: Tensor,
    blocks: Tensor,
    coefficients: Tensor,
    checks: Tensor,
    *,
    dtype: torch.dtype,
) -> None:
    check_segments([], grads, table, blocks, dtype)
    check_sums(sq, partials, table, blocks)
    some = 1 if blocks.numel() else 0
    state = schema.state_dtype(dtype)
    check(out, table, state, "out", some)
    check(v, table, state, "v", some)
    check(x, table, state, "x")
    check(coefficients, table, torch.float64, "coefficients", 2)
    passes = checks.size(0) if checks.numel() else 0
    if passes:
        check_norms(checks, table, "checks")
    launch(
        combine_kernel,
        table,
        blocks,
        out,
        sq,
        partials,
        x,
        v,
        coefficients,
        checks,
        checks.size(-1),
        FLAT=x.numel() != 0,
        IN_PLACE=out.data_ptr() == v.data_ptr(),
        PASSES=passes,
        dtype=dtype,
        mixed=True,
    )
