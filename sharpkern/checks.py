"""Arguments out of range, in torch's wording."""

from __future__ import annotations

import inspect
import math
import numbers
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .memory.shapes import SUPPORTED_DTYPES, overlaps
from .memory.shards import check_supported, local


def warn(message: str) -> None:
    """A warning at the user's line: the first one outside of this package and of torch's wrappers."""
    level, frame = 1, inspect.currentframe()
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in ("sharpkern", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def type_name(value: Any) -> str:
    """The type of an object, as it is imported; ``torch.typename`` names tensors by their dtype."""
    cls = type(value)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def check_real(value: Any, name: str) -> None:
    """Raise TypeError for what is no number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} should be a number, but got {value!r}")


def check_number(value: Any, name: str, positive: bool = False) -> None:
    """Raise for what is no finite number >= 0 (> 0)."""
    check_real(value, name)
    if not (math.isfinite(value) and value >= 0) or (positive and value == 0):
        raise ValueError(f"Invalid {name}: {value}")


def check_count(value: Any, name: str) -> None:
    """Raise for what is no integer from 1 up."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} should be an integer, but got {value!r}")
    if value < 1:
        raise ValueError(f"Invalid {name}: {value}")


def check_probability(value: Any, name: str) -> None:
    """Raise for what is no number from 0 to 1."""
    check_real(value, name)
    if not 0 <= value <= 1:
        raise ValueError(f"Invalid {name}: {value}")


def check_params(entries: Sequence[Any], index: int, known: set[Tensor]) -> list[tuple[Tensor, str]]:
    """Raise for parameters that cannot be optimized.

    Args:
        entries: tensors or (name, tensor) pairs: a new parameter group.
        index: of the group.
        known: parameters of the other groups.

    Returns:
        (tensor, its name in errors) of those that are trained and have memory.
    """
    seen: set[Tensor] = set()
    trained = []
    for i, entry in enumerate(entries):
        named = isinstance(entry, tuple) and len(entry) == 2
        param = entry[1] if named else entry
        if not isinstance(param, Tensor):
            continue  # torch names the type
        name = f"parameter {entry[0]!r}" if named else f"parameter {i} of group {index}"
        if param in known:
            raise ValueError(f"some parameters appear in more than one parameter group: {name} does")
        if param in seen:
            raise ValueError(f"{name} appears more than once in its group: kernels would write it twice at once")
        seen.add(param)
        if is_lazy(param):
            raise ValueError(f"{name} is not initialized: run a forward pass of its lazy module first")
        if not param.requires_grad:
            continue  # only a trainable parameter is ever touched
        if param.layout != torch.strided:
            raise TypeError(f"{name} should be a dense tensor, but its layout is {param.layout}")
        check_supported(param, name)
        if param.dtype not in SUPPORTED_DTYPES:
            supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES)
            raise TypeError(f"{name} has dtype {param.dtype}; supported are {supported}")
        if overlaps(local(param)):
            raise ValueError(f"{name} has elements that share memory (an expanded tensor?)")
        if not param.is_meta:  # it may get memory before the first step
            trained.append((param, name))
    return trained


_warned_half = False


def warn_half(params: Iterable[Tensor]) -> None:
    """Warn, once, of half-precision parameters that are trained."""
    global _warned_half
    if not _warned_half and any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in params):
        _warned_half = True
        warn(
            "half-precision parameters round a perturbation of the usual radius away: most weights do not move, "
            "and the direction is lost. Keep float32 parameters and use torch.autocast, or pass master_weights=True."
        )
