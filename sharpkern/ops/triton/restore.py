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
    whole,
)


@triton.jit
def copy_block(target, source, offset, left, T: tl.constexpr, FULL: tl.constexpr):
    mask = in_row(left, FULL)
    tl.store(elements(target, offset, T, FULL), tl.load(elements(source, offset, T, FULL), mask), mask)


@triton.jit
def copy_blocks(target, source, at, T: tl.constexpr):
    """A stretch of a row, from one address to another."""
    end_whole = whole(target | source, at)
    for i in range(at.k, end_whole):
        copy_block(target, source, i * BLOCK, BLOCK, T, True)
    last = last_element(at)
    for offset in range(end_whole * BLOCK, last, STEP):
        copy_block(target, source, offset, last - offset, T, False)


@triton.jit(do_not_specialize=["n_blocks"])
def restore_kernel(
    table, stride_row, stride_column, blocks, n_blocks, backup, T: tl.constexpr, A: tl.constexpr
):  # fmt: skip
    b, end = share(n_blocks)
    while b < end:
        at = stretch(table, stride_row, stride_column, blocks, b, end)
        if cell(table, at.row, BACKUP, stride_row, stride_column) != 0:
            copy_blocks(at.param, address(backup, at.slot, T), at, T)
        b += at.n


def restore(params: Sequence[Tensor], backup: Tensor, table: Tensor, blocks: Tensor, *, dtype: torch.dtype) -> None:
    table = addressed(table, params, [], dtype, blocks)
    check(backup, table, dtype, "backup", 1 if blocks.numel() else 0)
    launch(restore_kernel, table, blocks, backup, dtype=dtype)
