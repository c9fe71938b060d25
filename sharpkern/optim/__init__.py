"""Layer 3: one short file an algorithm."""

from .asam import ASAM
from .sam import SAM
from .sssam import SSSAM

__all__ = ["ASAM", "SAM", "SSSAM"]
