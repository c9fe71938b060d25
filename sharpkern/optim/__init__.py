"""Layer 4: the algorithms, one short file each."""

from .adaptive import AESAM, AELookSAM
from .esam import ESAM
from .gsam import GSAM
from .looksam import LookSAM
from .salr import SALR
from .sam import ASAM, SAM, SSSAM

__all__ = ["AESAM", "ASAM", "ESAM", "GSAM", "SALR", "SAM", "SSSAM", "AELookSAM", "LookSAM"]
