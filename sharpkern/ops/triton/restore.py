"""Undo the perturbation:  w = backup  wherever the backup holds the weights.

Bytes a parameter, fp32: reads backup 4, writes w 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .walk import (
    BACKUP,
    BLOCK,
    NUMEL,
    PARAM,
    SLOT,
    STEP,
    address,
    addressed,
    cell,
    check,
    elements,
    in_row,
    launch,
    share,
    whole,
)


@triton.jit
def copy_block(target, source, offset, left, T: tl.constexpr, FULL: tl.constexpr):
    mask = in_row(left, FULL)
    tl.store(elements(target, offset, T, FULL), tl.load(elements(source, offset, T, FULL), mask), mask)


@triton.jit
def copy_blocks(target, source, k, count, numel, T: tl.constexpr):
    """``count`` blocks of a row from block k on, from one address to another."""
    end_whole = whole(target | source, numel, k, count)
    for i in range(k, end_whole):
        copy_block(target, source, i * BLOCK, BLOCK, T, True)
    last = tl.minimum((k + count) * BLOCK, numel)
    for offset in range(end_whole * BLOCK, last, STEP):
        copy_block(target, source, offset, last - offset, T, False)


@triton.jit(do_not_specialize=["n_blocks"])
def restore_kernel(
    table, stride_row, stride_column, blocks, n_blocks, backup, T: tl.constexpr, A: tl.constexpr
):  # fmt: skip
    b, end = share(n_blocks)
    while b < end:
        row = tl.load(blocks + 2 * b).to(tl.int64)
        k = tl.load(blocks + 2 * b + 1).to(tl.int64)
        numel = cell(table, row, NUMEL, stride_row, stride_column)
        param = cell(table, row, PARAM, stride_row, stride_column)
        kept = address(backup, cell(table, row, SLOT, stride_row, stride_column), T)
        stop = tl.minimum(end, b + tl.cdiv(numel, BLOCK) - k)
        if cell(table, row, BACKUP, stride_row, stride_column) != 0:
            copy_blocks(param, kept, k, stop - b, numel, T)
        b = stop


def restore(params: Sequence[Tensor], backup: Tensor, table: Tensor, blocks: Tensor, *, dtype: torch.dtype) -> None:
    table = addressed(table, params, [], dtype, blocks)
    check(backup, table, dtype, "backup", 1 if blocks.numel() else 0)
    launch(restore_kernel, table, blocks, backup, dtype=dtype)
