"""What every base rule shares: how far it steps along the gradient and along v, who advances a row's counter, and the
launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import schema
from .restore import copy
from .walk import (
    ELEMENT,
    TICKET,
    address,
    bits,
    check,
    check_backup,
    check_counters,
    check_norms,
    check_segments,
    check_values,
    float64,
    launch,
    store,
    walk,
)


@triton.jit
def plus(sum, c, x):
    """sum + c x. A c of 0 takes no x, as in torch.optim: 0 * inf would be NaN."""
    return tl.where(c != 0, sum + c * x, sum)


@triton.jit
def scales(norm, max_norm, coefficients, A: tl.constexpr, MIXED: tl.constexpr):
    """clip a and clip b: a rule steps along  +-clip (a g + b v).  clip is the factor of
    torch.nn.utils.clip_grad_norm_; a NaN norm gives NaN, as there."""
    limit = float64(max_norm)
    # 1e-6 would be a float32.
    factor = limit / (norm + tl.full((), 1, tl.float64) / 1000000)
    clip = tl.where((limit == float("inf")) | (factor > 1.0), 1.0, factor)
    a = clip
    b = clip
    if MIXED:
        a *= tl.load(coefficients)
        b *= tl.load(coefficients + 1)
    return a.to(A), b.to(A)


@triton.jit
def source_of(at, backup, T: tl.constexpr, A: tl.constexpr, BACKED: tl.constexpr, MASTER: tl.constexpr):
    """The address of the weights that a row steps from."""
    source = at.param
    if MASTER:
        source = address(backup, at.slot, A)
    elif BACKED:
        source = tl.where(at.backup != 0, address(backup, at.slot, T), at.param)
    return source


@triton.jit
def store_weights(param, source, w, piece, T: tl.constexpr, A: tl.constexpr, MASTER: tl.constexpr):
    """New weights: rounded into the parameter, as they are into a master."""
    if MASTER:
        store(source, w, piece, A)
    store(param, w, piece, T)


@triton.jit
def give_back(at, source, T: tl.constexpr, A: tl.constexpr, MASTER: tl.constexpr):
    """Of a row that does not step: what its backup holds."""
    if MASTER:
        if at.backup != 0:
            walk(copy, at.param | source, at, (at.param, source, T, A))
    else:
        if source != at.param:
            walk(copy, at.param | source, at, (at.param, source, T, T))


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


def launch_rule(
    kernel: Any,
    columns: Sequence[str],
    state: Mapping[str, Tensor],
    optional: Mapping[str, Tensor],
    params: Sequence[Tensor],
    step: Tensor,
    counters: Tensor,
    grads: Sequence[Tensor],
    backup: Tensor,
    direction: Tensor,
    table: Tensor,
    blocks: Tensor,
    values: Tensor,
    sq: Tensor,
    coefficients: Tensor,
    *,
    max_norm: float,
    skip_nonfinite: bool,
    dtype: torch.dtype,
    **constants: bool,
) -> None:
    """Check a rule's arguments, and launch its kernel.

    Args:
        columns: of its values.
        state: its state buffers by their names.
        optional: those of them that may be empty.

    Raises:
        RuntimeError: for arguments that do not fit together.
    """
    check_segments(params, grads, table, blocks, dtype)
    check_norms(sq, table)
    check_counters(counters, table)
    check(step, table, torch.float32, "step", table.size(0))
    master = check_backup(backup, table, dtype)
    check_values(values, table, len(columns), "values")
    state_dtype = schema.state_dtype(dtype)
    for name, buffer in state.items():
        check(buffer, table, state_dtype, name, 1 if blocks.numel() else 0)
    for name, buffer in optional.items():
        check(buffer, table, state_dtype, name)
    if direction.numel():
        check(direction, table, dtype if direction.dtype == dtype else state_dtype, "direction")
    if direction.numel() or coefficients.numel():
        check(coefficients, table, torch.float64, "coefficients", 2)
    buffers = (*state.values(), *optional.values())
    in_state = (*buffers, direction) if direction.dtype != dtype else buffers
    launch(
        kernel,
        table,
        blocks,
        *buffers,
        step,
        counters,
        backup,
        direction,
        values,
        sq,
        sq.size(1),
        coefficients,
        bits(max_norm),
        dtype=dtype,
        mixed=master or any(buffer.numel() for buffer in in_state),
        MASTER=master,
        V=ELEMENT[direction.dtype] if direction.numel() else None,
        MIXED=coefficients.numel() > 0,
        BACKED=backup.numel() > 0,
        SKIP=skip_nonfinite,
        COUNT=counters.numel() > 0,
        PASSES=sq.size(0),
        **constants,
    )
