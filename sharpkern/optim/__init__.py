"""Layer 4: the algorithms, one short file each."""

from .adaptive import AESAM, AELookSAM
from .looksam import LookSAM
from .salr import SALR
from .sam import ASAM, SAM, SSSAM

__all__ = ["AESAM", "ASAM", "SALR", "SAM", "SSSAM", "AELookSAM", "LookSAM"]
