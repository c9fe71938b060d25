"""What every base rule shares: the clip factor, what LookSAM mixes in, from where a row steps, and who advances its
counter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import schema
from .walk import TICKET, check, check_counters, check_norms, float64, norms

G_V_MIN = tl.constexpr(schema.G_V_MIN)


@triton.jit
def clip_factor(norm, max_norm):
    """torch.nn.utils.clip_grad_norm_'s factor; a NaN norm gives NaN, as there."""
    limit = float64(max_norm)
    # 1e-6 would be a float32.
    factor = limit / (norm + tl.full((), 1, tl.float64) / 1000000)
    return tl.where((limit == float("inf")) | (factor > 1.0), 1.0, factor)


@triton.jit
def mix_factor(norm, g_v_sq, n_buffers, alpha, MIX: tl.constexpr):
    """How much of g_v goes into the gradient: alpha ||g|| / ||g_v||."""
    factor = tl.full((), 0, tl.float64)
    if MIX:
        g_v_norm, _ = norms(g_v_sq, n_buffers, 1)
        factor = tl.where(g_v_norm > tl.full((), G_V_MIN, tl.float64), float64(alpha) * (norm / g_v_norm), 0.0)
    return factor


@triton.jit
def count_skipped(counters, go, COUNT: tl.constexpr):
    if COUNT:
        if (tl.program_id(0) == 0) & (not go):
            tl.store(counters + 2, tl.load(counters + 2) + 1)


@triton.jit
def advance(step, before, at):
    """After a stretch of a row: whoever completes the row advances its counter.

    Every program must have read the counter before anyone writes it, hence the ticket.
    """
    ticket = at.cells + TICKET * at.stride
    tl.debug_barrier()
    if tl.atomic_add(ticket, at.n, sem="acq_rel") + at.n == at.blocks:
        tl.store(ticket, 0)
        tl.store(step + at.row, before + 1)


def descent(
    table: Tensor,
    blocks: Tensor,
    step: Tensor,
    counters: Tensor,
    backup: Tensor,
    g_v: Tensor,
    sq: Tensor,
    g_v_sq: Tensor,
    dtype: torch.dtype,
) -> None:
    """Check what every rule takes.

    Raises:
        RuntimeError: for arguments that do not fit together.
    """
    check_norms(sq, table)
    check_counters(counters, table)
    check(step, table, torch.float32, "step", table.size(0))
    check(backup, table, dtype, "backup")
    check(g_v, table, schema.state_dtype(dtype), "g_v")
    if g_v.numel():
        if g_v_sq.dim() != 2 or g_v_sq.size(0) != 1 or g_v_sq.size(1) != sq.size(1):
            raise RuntimeError(f"sharpkern: g_v_sq should be a contiguous float64 row of {sq.size(1)} squared norms")
        check(g_v_sq, table, torch.float64, "g_v_sq", sq.size(1))
