"""Undo the perturbation:  w = backup  wherever the backup holds the weights.

Bytes a parameter, fp32: reads backup 4, writes w 4; of a half type with its master: writes w 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .walk import address, check_backup, check_segments, launch, load, share, store, stretch, walk


@triton.jit
def copy(piece, target, source, T: tl.constexpr, W: tl.constexpr):
    store(target, load(source, piece, W), piece, T)


@triton.jit(do_not_specialize=["stride_column", "n_blocks"])
def restore_kernel(
    table, stride_row, stride_column, blocks, n_blocks, backup, T: tl.constexpr, A: tl.constexpr,
    MASTER: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = A if MASTER else T
    b, end = share(n_blocks)
    while b < end:
        at = stretch(table, stride_row, stride_column, blocks, b, n_blocks)
        if at.backup != 0:
            source = address(backup, at.slot, W)
            walk(copy, at.param | source, at, (at.param, source, T, W))
        b += at.n


def restore(params: Sequence[Tensor], backup: Tensor, table: Tensor, blocks: Tensor, *, dtype: torch.dtype) -> None:
    check_segments(params, [], table, blocks, dtype)
    master = check_backup(backup, table, dtype, numel=1 if blocks.numel() else 0)
    launch(restore_kernel, table, blocks, backup, dtype=dtype, mixed=master, MASTER=master)
