"""What the kernels that add up share: every program leaves its sums in ``partials``, and the last one to arrive adds
them up, always in the same order, in the same launch.

``partials[0]`` counts the programs that are through, as an integer; from ``1 + N i`` on are the N sums of program i.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .walk import check


@triton.jit
def leave(partials, sums, rest, n: tl.constexpr, N: tl.constexpr, MAX: tl.constexpr = False):
    """Sum n of this program, or the largest: ``sums`` from whole blocks, ``rest`` from the others."""
    own = partials + 1 + N * tl.program_id(0) + n
    if MAX:
        tl.store(own, tl.maximum(tl.max(sums), tl.max(rest)).to(tl.float64))
    else:
        tl.store(own, tl.sum(sums.to(tl.float64)) + tl.sum(rest.to(tl.float64)))


@triton.jit
def is_last(partials):
    """Whether this program is the last one to arrive: it sees the sums of all."""
    # The partial sums have to be there before the ticket says so.
    tl.debug_barrier()
    ticket = tl.cast(partials, tl.pointer_type(tl.int64))
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1
    tl.debug_barrier()
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def total(partials, n, N, MAX: tl.constexpr = False):
    """Sum n over all programs, or the largest of what is >= 0."""
    programs = tl.num_programs(0)
    lanes = tl.arange(0, 1024)
    sums = tl.zeros((1024,), tl.float64)
    for first in range(0, programs, 1024):
        # Written by other multiprocessors: not from this one's own cache.
        of = partials + 1 + N * (first + lanes) + n
        theirs = tl.load(of, first + lanes < programs, other=0.0, cache_modifier=".cg")
        if MAX:
            sums = tl.maximum(sums, theirs)
        else:
            sums += theirs
    return tl.max(sums) if MAX else tl.sum(sums)


def check_partials(partials: Tensor, table: Tensor, blocks: Tensor, sums: int = 1) -> None:
    """The scratch for so many sums.

    Raises:
        RuntimeError: when it is too small, or something else.
    """
    check(partials, table, torch.float64, "partials", 1 + sums * max(1, blocks.size(0)))


def check_sums(sq: Tensor, partials: Tensor, table: Tensor, blocks: Tensor, sums: int = 1) -> None:
    """Where so many sums go, and the scratch for them.

    Raises:
        RuntimeError: for arguments that do not fit together.
    """
    fits = sq.numel() == sums and (sums == 1 or sq.dim() == 1)
    if sq.dtype != torch.float64 or not fits or sq.device != table.device:
        what = "one float64 element" if sums == 1 else f"a float64 row of {sums} elements"
        raise RuntimeError(f"sharpkern: sq should be {what}, on {table.device}")
    check_partials(partials, table, blocks, sums)
