"""How a Triton kernel walks the segments, and how it is launched.

The blocks of ``schema.BLOCK`` elements are cut into runs of neighbours. A fixed number of programs takes them in turns,
program p the runs p, p + programs, ...: what is read at the same time lies side by side, and rows with nothing to do
leave no program idle. What moves goes through the blocks backwards, since the sum before it has left the end in the
cache. A program reads a row's addresses and coefficients once a run. Whole blocks take a loop without masks, which the
compiler turns into 16-byte accesses; the end of a row, and rows whose addresses are not multiples of 16 bytes, take
another one.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import schema

BLOCK = tl.constexpr(schema.BLOCK)
PARAM = tl.constexpr(schema.PARAM)
GRAD = tl.constexpr(schema.GRAD)
BACKUP = tl.constexpr(schema.BACKUP)
SLOT = tl.constexpr(schema.SLOT)
NUMEL = tl.constexpr(schema.NUMEL)
GROUP = tl.constexpr(schema.GROUP)
SCALE = tl.constexpr(schema.SCALE)
SCALED = tl.constexpr(schema.SCALED)
LEFT_OUT = tl.constexpr(schema.LEFT_OUT)
TICKET = tl.constexpr(schema.TICKET)

ELEMENT = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

# Elements at a time where there are masks: so few that this path costs the other one no registers.
STEP = tl.constexpr(256)
# Programs a multiprocessor gets: no more of 256 threads fit. With the registers of ``options`` 4 of them run at a time
# at least, of float64 2; of kernels that take fewer registers, as only the compiler knows, more do. The others wait for
# runs like those of the first ones. So the number, on which the order of a sum depends, goes by the device alone.
PROGRAMS = 8
# Blocks of a run: 128 KiB of float32, beside which a row's cells and coefficients are little.
RUN = tl.constexpr(16)


@triton.jit
def last_round(n_blocks):
    """(how many rounds of runs of RUN blocks there are before the last one; this program's blocks [begin, end) in that,
    which shares out what remains)."""
    programs = tl.num_programs(0)
    rounds = n_blocks // (programs * RUN)
    first = rounds * programs * RUN
    # In 64 bits, whose division is a call: without one ptxas would unroll other loops until it spills.
    program = tl.program_id(0).to(tl.int64)
    rest = n_blocks - first
    begin = first + (rest * program // programs).to(tl.int32)
    end = first + (rest * (program + 1) // programs).to(tl.int32)
    return rounds, begin, end


@triton.jit
def share(n_blocks):
    """[begin, end): the numbers of this program's blocks, in the order in which it takes them."""
    rounds, begin, end = last_round(n_blocks)
    return tl.full((), 0, tl.int32), rounds * RUN + end - begin


@triton.jit
def rest_of_run(i, n_blocks, BACKWARDS: tl.constexpr):
    """The blocks [begin, end) from the one with this program's number i to the end of its run."""
    rounds, begin, end = last_round(n_blocks)
    round = i // RUN
    if round < rounds:
        begin = (round * tl.num_programs(0) + tl.program_id(0)) * RUN
        end = begin + RUN
    if BACKWARDS:
        begin, end = n_blocks - end, n_blocks - begin
    return begin + i % RUN, end


class Stretch(NamedTuple):
    """Neighbouring blocks of one row, and what the row's cells say."""

    row: tl.tensor
    k: tl.tensor  # the first of the blocks
    n: tl.tensor  # how many they are
    blocks: tl.tensor  # how many the row has
    cells: tl.tensor  # the address of the row in the table, and the way from one column to the next
    stride: tl.tensor
    param: tl.tensor
    grad: tl.tensor
    backup: tl.tensor
    slot: tl.tensor
    numel: tl.tensor
    group: tl.tensor
    scale: tl.tensor


@triton.jit
def stretch(table, stride_row, stride_column, blocks, i, n_blocks, BACKWARDS: tl.constexpr = False):
    """Of this program's blocks, from its number i on, those of one run and row. What a kernel does not use of it is
    not read."""
    b, end = rest_of_run(i, n_blocks, BACKWARDS)
    row = tl.load(blocks + 2 * b).to(tl.int64)
    k = tl.load(blocks + 2 * b + 1).to(tl.int64)
    cells = table + row * stride_row
    numel = tl.load(cells + NUMEL * stride_column)
    count = tl.cdiv(numel, BLOCK)
    return Stretch(
        row,
        k,
        tl.minimum(end - b, (count - k).to(tl.int32)),
        count,
        cells,
        stride_column,
        tl.load(cells + PARAM * stride_column),
        tl.load(cells + GRAD * stride_column),
        tl.load(cells + BACKUP * stride_column),
        tl.load(cells + SLOT * stride_column),
        numel,
        tl.load(cells + GROUP * stride_column),
        tl.load(cells + SCALE * stride_column),
    )


@triton.jit
def address(buffer, slot, T: tl.constexpr):
    """The address of a slot of a flat buffer. In integers: the compiler would fold a pointer's way there and
    back, and with it the hint in ``elements``."""
    return tl.cast(buffer, tl.int64) + slot * (T.primitive_bitwidth // 8)


class Piece(NamedTuple):
    """Elements of a row that are handled at once."""

    offset: tl.tensor  # of the first one in its row, int64
    mask: tl.tensor | None  # which of STEP elements the row has; None: a whole block, aligned to 16 bytes


@triton.jit
def elements(address, piece, T: tl.constexpr):
    """Pointers to a piece of the row at an address."""
    base = tl.cast(address, tl.pointer_type(T))
    if piece.mask is None:
        pointers = tl.multiple_of(base, 16) + piece.offset + tl.arange(0, BLOCK)
    else:
        pointers = base + piece.offset + tl.arange(0, STEP)
    return pointers


@triton.jit
def load(address, piece, T: tl.constexpr):
    """A piece of the row at an address, 0 beyond the row's end."""
    if piece.mask is None:
        values = tl.load(elements(address, piece, T))
    else:
        values = tl.load(elements(address, piece, T), piece.mask, 0.0)
    return values


@triton.jit
def store(address, values, piece, T: tl.constexpr):
    """Rounded to the row's type."""
    tl.store(elements(address, piece, T), values.to(T), piece.mask)


@triton.jit
def whole(addresses, at):
    """The end of a stretch's whole blocks; its first block when 16-byte accesses do not work from an address (all
    of them or-ed together)."""
    return tl.where((addresses & 15) == 0, tl.minimum(at.k + at.n, at.numel // BLOCK), at.k)


@triton.jit
def last_element(at):
    """The end of a stretch in elements of its row."""
    return tl.minimum((at.k + at.n) * BLOCK, at.numel)


@triton.jit
def before(last, offset):
    """Which of STEP elements from ``offset`` on lie before the last one."""
    return tl.arange(0, STEP) < tl.minimum(last - offset, STEP).to(tl.int32)


@triton.jit
def walk(body: tl.constexpr, addresses, at, args):
    """``body(piece, *args)`` for every piece of a stretch; ``addresses``: where the body goes, or-ed together."""
    end_whole = whole(addresses, at)
    for i in range(at.k, end_whole):
        body(Piece(i * BLOCK, None), *args)
    last = last_element(at)
    for offset in range(end_whole * BLOCK, last, STEP):
        body(Piece(offset, before(last, offset)), *args)


@triton.jit
def walk_sums(body: tl.constexpr, addresses, at, sums, rest, args):
    """The same for a body that adds up, ``sums = body(piece, sums, *args)``: the sums of whole blocks, BLOCK wide, and
    those of the rest, STEP wide."""
    end_whole = whole(addresses, at)
    for i in range(at.k, end_whole):
        sums = body(Piece(i * BLOCK, None), sums, *args)
    last = last_element(at)
    for offset in range(end_whole * BLOCK, last, STEP):
        rest = body(Piece(offset, before(last, offset)), rest, *args)
    return sums, rest


@triton.jit
def walk_with(body: tl.constexpr, addresses, at, sums, args):
    """The same for sums of any shape, which are not as wide as the pieces."""
    end_whole = whole(addresses, at)
    for i in range(at.k, end_whole):
        sums = body(Piece(i * BLOCK, None), sums, *args)
    last = last_element(at)
    for offset in range(end_whole * BLOCK, last, STEP):
        sums = body(Piece(offset, before(last, offset)), sums, *args)
    return sums


@triton.jit
def sum_buffers(row, n_buffers):
    """What the flat buffers have together, in their order."""
    s = tl.load(row)
    for i in range(1, n_buffers):
        s += tl.load(row + i)
    return s


@triton.jit
def norms(sq, n_buffers, PASSES: tl.constexpr):
    """(norm of the last pass, whether the squared norm of every pass is finite)."""
    finite = tl.full((), 1, tl.int1)
    last = tl.full((), 0, tl.float64)
    for p in tl.static_range(PASSES):
        last = sum_buffers(sq + p * n_buffers, n_buffers)
        finite = finite & (tl.abs(last) < float("inf"))
    return tl.sqrt(last), finite


@triton.jit
def float64(bits):
    """A Python float reaches a kernel as float32; this one came as the bits of its float64. Its kernel's parameter is
    annotated: 0.0 would be an int32, and another compilation."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)  # the interpreter knows of no annotation


def bits(value: float) -> int:
    """For ``float64`` above."""
    number: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return number


@functools.cache
def _programs(device: torch.device) -> int:
    if device.type == "cpu":
        return 3  # the interpreter runs one after the other; a few, so that a program has blocks of several rows
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    count: int = properties["multiprocessor_count"]
    return PROGRAMS * count


def options(backend: str, dtype: torch.dtype, mixed: bool) -> dict[str, Any]:
    """How a kernel is compiled for one of Triton's backends.

    Args:
        mixed: whether the kernel has float32 state beside its parameters, whatever their dtype, or needs as many
            registers. Half-precision parameters then get 16 elements a thread, which an H100 goes through faster than
            4 or 8.
    """
    half = dtype.itemsize == 2
    threads = 128 if half and mixed else 256
    chosen: dict[str, Any] = {"num_warps": threads // (64 if backend == "hip" else 32), "enable_fp_fusion": True}
    if backend == "cuda":
        # Left to itself, ptxas unrolls until few warps fit on a multiprocessor. Nothing is spilled with these.
        chosen["maxnreg"] = 128 if dtype == torch.float64 or (half and mixed) else 64
    return chosen


@functools.cache
def _options(device_type: str, dtype: torch.dtype, mixed: bool) -> dict[str, Any]:
    if device_type == "cpu":
        return {}  # the interpreter
    return options(triton.runtime.driver.active.get_current_target().backend, dtype, mixed)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a device the one that kernels are launched on."""
    guard: AbstractContextManager[Any] = (
        nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device.index)
    )
    return guard


def launch(
    kernel: Any,
    table: Tensor,
    blocks: Tensor,
    *args: Any,
    dtype: torch.dtype,
    mixed: bool = False,
    **constants: Any,
) -> None:
    """Run a kernel over the blocks. One program runs even when there are none: somebody has to count."""
    device = table.device
    n = blocks.size(0)
    grid = (max(1, min(n, _programs(device))),)
    with current(device):
        kernel[grid](
            table,
            *table.stride(),
            blocks,
            n,
            *args,
            T=ELEMENT[dtype],
            A=tl.float64 if dtype == torch.float64 else tl.float32,
            **constants,
            **_options(device.type, dtype, mixed),
        )


def check_segments(
    params: Sequence[Tensor], grads: Sequence[Tensor], table: Tensor, blocks: Tensor, dtype: torch.dtype
) -> None:
    """The segments that a kernel walks, as far as they can be checked without waiting for a device.

    Raises:
        RuntimeError: for lists of tensors, and for arguments that do not fit together.
    """
    if params or grads:
        raise RuntimeError("sharpkern: this backend reads addresses from the table; lists are for the reference")
    if dtype not in ELEMENT:
        raise RuntimeError(f"sharpkern: unsupported dtype {dtype}")
    if table.dtype != torch.int64 or table.dim() != 2 or table.size(1) != schema.COLUMNS:
        raise RuntimeError(f"sharpkern: table should be an int64 tensor of {schema.COLUMNS} columns")
    if blocks.dtype != torch.int32 or blocks.dim() != 2 or blocks.size(1) != 2 or not blocks.is_contiguous():
        raise RuntimeError("sharpkern: blocks should be a contiguous int32 tensor of 2 columns")
    if blocks.device != table.device:
        raise RuntimeError(f"sharpkern: blocks are on {blocks.device}, the table on {table.device}")


def check(t: Tensor, table: Tensor, dtype: torch.dtype, name: str, numel: int = 0) -> None:
    """A contiguous buffer of a dtype with at least ``numel`` elements, on the table's device.

    Raises:
        RuntimeError: when it is not; empty ones pass where ``numel`` is 0.
    """
    if t.numel() == 0 and numel == 0:
        return
    if t.dtype != dtype or not t.is_contiguous() or t.numel() < numel or t.device != table.device:
        raise RuntimeError(
            f"sharpkern: {name} should be contiguous, {dtype}, with at least {numel} elements, on {table.device}"
        )


def check_backup(backup: Tensor, table: Tensor, dtype: torch.dtype, name: str = "backup", numel: int = 0) -> bool:
    """A flat buffer of weights: a backup of the parameters' dtype, or a master of the state's.

    Returns:
        Whether it is a master: of every row's weights, of which the parameters of a half type have the rounded values.

    Raises:
        RuntimeError: when it is neither.
    """
    wide = schema.state_dtype(dtype)
    master = dtype != wide and backup.dtype == wide and backup.numel() > 0
    check(backup, table, wide if master else dtype, name, numel)
    return master


def check_master(master: Tensor, table: Tensor, dtype: torch.dtype) -> bool:
    """A master, or none.

    Returns:
        Whether there is one.

    Raises:
        RuntimeError: when it is something else.
    """
    if master.numel() and not check_backup(master, table, dtype, "master"):
        raise RuntimeError("sharpkern: master should be float32, beside parameters of bfloat16 or float16")
    return master.numel() > 0


def check_norms(sq: Tensor, table: Tensor, name: str = "sq") -> None:
    """The squared norms of the passes of a step.

    Raises:
        RuntimeError: when they are none.
    """
    if sq.dim() != 2 or not 1 <= sq.size(0) <= 2 or sq.size(1) == 0:
        raise RuntimeError(f"sharpkern: {name} should be a contiguous float64 matrix")
    check(sq, table, torch.float64, name, sq.numel())


def check_vector(t: Tensor, table: Tensor, name: str) -> None:
    """A float64 element for each flat buffer.

    Raises:
        RuntimeError: when it is something else.
    """
    if t.dim() != 1 or t.numel() == 0:
        raise RuntimeError(f"sharpkern: {name} should be a contiguous float64 vector")
    check(t, table, torch.float64, name, 1)


def check_values(t: Tensor, table: Tensor, columns: int, name: str) -> None:
    """A float64 table of group values.

    Raises:
        RuntimeError: when it is none.
    """
    if t.dim() != 2 or t.size(1) != columns or t.size(0) == 0:
        raise RuntimeError(f"sharpkern: {name} should be a contiguous float64 tensor of {columns} columns")
    check(t, table, torch.float64, name, columns)


def check_counters(counters: Tensor, table: Tensor) -> None:
    """The three counters, or none.

    Raises:
        RuntimeError: when they are something else.
    """
    check(counters, table, torch.int64, "counters", 3 if counters.numel() else 0)
