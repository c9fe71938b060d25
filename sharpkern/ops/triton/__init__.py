"""Every op as a Triton kernel, for any device that Triton has a driver for; in its interpreter, for the CPU.

The same stems and formulas as csrc. This package is imported by the first op that runs on it: importing
sharpkern does not import Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import adam, ascend, combine, mix, norm, nudge, pnorm, project, restore, sgd

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "norm": norm.norm,
    "norm_scaled": norm.norm_scaled,
    "norm_max": pnorm.norm_max,
    "norm_p": pnorm.norm_p,
    "ascend_p": pnorm.ascend_p,
    "dots": project.dots,
    "project": project.project,
    "combine": combine.combine,
    "ascend": ascend.ascend,
    "ascend_scaled": ascend.ascend_scaled,
    "restore": restore.restore,
    "mix": mix.mix,
    "sgd": sgd.sgd,
    "adam": adam.adam,
    "nudge_dots": nudge.nudge_dots,
    "nudge_sgd": nudge.nudge_sgd,
}
