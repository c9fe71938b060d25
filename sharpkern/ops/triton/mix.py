"""The coefficients of a rule's gradient a g + b v from two sums over the flat buffers, x and y:
[a, b] = constant + slope q,  q = x / y  or  sqrt(x) / sqrt(y),  0 where sqrt(y) is next to nothing.

Bytes: reads 16 a flat buffer, writes 16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import schema
from .walk import bits, check, check_vector, current, float64, sum_buffers

NORM_MIN = tl.constexpr(schema.NORM_MIN)


@triton.jit
def on_line(constant, slope, q):
    """A slope of 0 takes no q: 0 * inf would be NaN."""
    return float64(constant) + tl.where(float64(slope) == 0, 0.0, float64(slope) * q)


@triton.jit(do_not_specialize=["constant_a", "constant_b", "slope_a", "slope_b"])
def mix_kernel(
    coefficients, numerator, n_numerators, denominator, n_denominators, constant_a: tl.int64, constant_b: tl.int64,
    slope_a: tl.int64, slope_b: tl.int64, ROOT: tl.constexpr,
):  # fmt: skip
    x = sum_buffers(numerator, n_numerators)
    y = sum_buffers(denominator, n_denominators)
    norm = tl.sqrt(y)
    if ROOT:
        q = tl.sqrt(x) / norm
    else:
        q = x / y
    q = tl.where(norm > tl.full((), NORM_MIN, tl.float64), q, 0.0)
    tl.store(coefficients, on_line(constant_a, slope_a, q))
    tl.store(coefficients + 1, on_line(constant_b, slope_b, q))


def mix(
    coefficients: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    *,
    constant: Sequence[float],
    slope: Sequence[float],
    root: bool,
) -> None:
    check(coefficients, coefficients, torch.float64, "coefficients", 2)
    check_vector(numerator, coefficients, "numerator")
    check_vector(denominator, coefficients, "denominator")
    lines = map(bits, (*constant, *slope))
    with current(coefficients.device):
        mix_kernel[(1,)](
            coefficients, numerator, numerator.numel(), denominator, denominator.numel(), *lines, ROOT=root, num_warps=1
        )
