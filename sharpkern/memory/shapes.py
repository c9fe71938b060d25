"""How tensors fill memory, and how rows of a table are cut into blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import schema

SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Elements a slot is aligned to: 64 bytes of the smallest element any buffer of a layout can have (2 bytes).
ALIGNMENT = 32


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in any order of dimensions and without overlap, as they are
    (torch may keep a tensor's negative)."""
    if t.numel() == 0:
        return True
    if t.is_neg():
        return False
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.size(), strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def overlaps(t: Tensor) -> bool:
    """Whether two elements share memory, as in an expanded tensor."""
    if t.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.size(), strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def span_of(t: Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a tensor and of the one past its last."""
    reach = sum(stride * (size - 1) for stride, size in zip(t.stride(), t.size(), strict=True)) + 1
    return t.data_ptr(), t.data_ptr() + (reach * t.element_size() if t.numel() else 0)


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose spans meet have any element in common."""
    if is_dense(a) and is_dense(b):
        return True
    # In units of so many bytes that both consist of whole ones: of one dtype, elements.
    unit = math.gcd(a.element_size(), b.element_size(), a.data_ptr() - b.data_ptr())
    places = []
    for t in (a, b):
        (begin, end), item = span_of(t), t.element_size()
        offsets = torch.arange((end - begin) // item, device="cpu").as_strided(t.size(), t.stride()).flatten()
        units = torch.arange(item // unit, device="cpu")
        places.append((begin // unit + item // unit * offsets[:, None] + units).flatten())
    return bool(torch.isin(*places).any())


def slots_of(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """(first element of each tensor's slot, elements of a flat buffer)."""
    slots, size = [], 0
    for t in tensors:
        slots.append(size)
        size += -(-t.numel() // ALIGNMENT) * ALIGNMENT
    return slots, size


def blocks_of(numels: Sequence[int]) -> Tensor:
    """``[row, k]`` of every ``schema.BLOCK`` elements of every row, in order: what a device kernel walks."""
    counts = torch.tensor([-(-n // schema.BLOCK) for n in numels], dtype=torch.int64, device="cpu")
    rows = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), counts)
    k = torch.arange(rows.numel(), device="cpu") - (counts.cumsum(0) - counts)[rows]
    return torch.stack([rows, k], dim=1).to(torch.int32)


def strides_of(tensors: Sequence[Tensor]) -> Tensor:
    """What the op gather compares with: a row [dim, sizes..., strides...] a tensor, filled up with zeros."""
    dim = max(t.dim() for t in tensors)
    rows = [[t.dim(), *t.size(), *t.stride(), *([0] * 2 * (dim - t.dim()))] for t in tensors]
    return torch.tensor(rows, dtype=torch.int64, device="cpu")
