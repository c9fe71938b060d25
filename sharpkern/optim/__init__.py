"""Layer 4: the algorithms, one short file each."""

from .adaptive import AESAM, AELookSAM
from .gsam import GSAM
from .looksam import LookSAM
from .nudged import NudgedSGD
from .salr import SALR
from .sam import ASAM, SAM, SSSAM

__all__ = ["AESAM", "ASAM", "GSAM", "SALR", "SAM", "SSSAM", "AELookSAM", "LookSAM", "NudgedSGD"]
