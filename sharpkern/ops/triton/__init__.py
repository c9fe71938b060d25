"""Every op as a Triton kernel, for any device that Triton has a driver for; in its interpreter, for the CPU.

The same stems and formulas as csrc. This package is imported by the first op that runs on it: importing
sharpkern does not import Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .adam import adam
from .ascend import ascend, ascend_scaled
from .norm import norm, norm_scaled
from .restore import restore
from .sgd import sgd

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "norm": norm,
    "norm_scaled": norm_scaled,
    "ascend": ascend,
    "ascend_scaled": ascend_scaled,
    "restore": restore,
    "sgd": sgd,
    "adam": adam,
}
