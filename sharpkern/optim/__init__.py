"""Layer 3: one short file an algorithm."""

from .aelooksam import AELookSAM
from .aesam import AESAM
from .asam import ASAM
from .looksam import LookSAM
from .salr import SALR
from .sam import SAM
from .sssam import SSSAM

__all__ = ["AESAM", "ASAM", "SALR", "SAM", "SSSAM", "AELookSAM", "LookSAM"]
