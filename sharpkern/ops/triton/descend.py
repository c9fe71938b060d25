"""What every base rule shares: the clip factor, from where a row steps, and who advances its counter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .walk import TICKET, bits, check, check_counters, check_norms, float64


@triton.jit
def clip_factor(norm, max_norm):
    """torch.nn.utils.clip_grad_norm_'s factor; a NaN norm gives NaN, as there."""
    limit = float64(max_norm)
    # 1e-6 would be a float32.
    factor = limit / (norm + tl.full((), 1, tl.float64) / 1000000)
    return tl.where((limit == float("inf")) | (factor > 1.0), 1.0, factor)


@triton.jit
def count_skipped(counters, go, COUNT: tl.constexpr):
    if COUNT:
        if (tl.program_id(0) == 0) & (not go):
            tl.store(counters + 2, tl.load(counters + 2) + 1)


@triton.jit
def advance(table, row, stride_row, stride_column, step, before, done, count):
    """After ``done`` of the ``count`` blocks of a row: whoever completes them advances the row's counter.

    Every program must have read the counter before anyone writes it, hence the ticket.
    """
    ticket = table + row * stride_row + TICKET * stride_column
    tl.debug_barrier()
    if tl.atomic_add(ticket, done, sem="acq_rel") + done == count:
        tl.store(ticket, 0)
        tl.store(step + row, before + 1)


def descent(
    table: Tensor,
    blocks: Tensor,
    step: Tensor,
    counters: Tensor,
    backup: Tensor,
    sq: Tensor,
    max_norm: float,
    dtype: torch.dtype,
) -> int:
    """Check what every rule takes; ``max_norm`` as ``float64`` wants it.

    Raises:
        RuntimeError: for arguments that do not fit together.
    """
    check_norms(sq, table)
    check_counters(counters, table)
    check(step, table, torch.float32, "step", table.size(0))
    check(backup, table, dtype, "backup")
    return bits(max_norm)
