"""sharpkern: fused sharpness-aware optimizers for PyTorch."""

from . import policy
from .batch_stats import frozen_batch_stats, frozen_buffers
from .ops import available_backends, build_info, use_backend
from .optim import AESAM, ASAM, GSAM, SALR, SAM, SSSAM, AELookSAM, LookSAM, NudgedSGD

__version__ = "0.1.0"

__all__ = [
    "AESAM",
    "ASAM",
    "GSAM",
    "SALR",
    "SAM",
    "SSSAM",
    "AELookSAM",
    "LookSAM",
    "NudgedSGD",
    "__version__",
    "available_backends",
    "build_info",
    "frozen_batch_stats",
    "frozen_buffers",
    "policy",
    "use_backend",
]
