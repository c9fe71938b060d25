"""Layer 4: the algorithms, one short file each."""

from .adaptive import AESAM, AELookSAM
from .esam import ESAM
from .friendly import FriendlySAM
from .gsam import GSAM
from .looksam import LookSAM
from .momentum import MomentumSAM
from .nudged import NudgedSGD
from .salr import SALR
from .sam import ASAM, SAM, SSSAM
from .stable import StableSAM
from .vasso import VaSSO
from .wsam import WSAM

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
]
