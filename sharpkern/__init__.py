"""sharpkern: fused sharpness-aware optimizers for PyTorch."""

from . import policy
from .batch_stats import frozen_batch_stats, frozen_buffers
from .direction import norm_layers
from .distributed import replicate
from .ops import available_backends, build_info, use_backend
from .optim import (
    AESAM,
    ASAM,
    ESAM,
    GSAM,
    SALR,
    SAM,
    SSSAM,
    WSAM,
    AELookSAM,
    FriendlySAM,
    LookSAM,
    MomentumSAM,
    NudgedSGD,
    StableSAM,
    VaSSO,
)

__version__ = "0.2.0"

__all__ = [
    "AESAM",
    "ASAM",
    "ESAM",
    "GSAM",
    "SALR",
    "SAM",
    "SSSAM",
    "WSAM",
    "AELookSAM",
    "FriendlySAM",
    "LookSAM",
    "MomentumSAM",
    "NudgedSGD",
    "StableSAM",
    "VaSSO",
    "__version__",
    "available_backends",
    "build_info",
    "frozen_batch_stats",
    "frozen_buffers",
    "norm_layers",
    "policy",
    "replicate",
    "use_backend",
]
