"""Layer 1: ``torch.ops.sharpkern``, its schemas, its reference and the choice of a backend."""

from .backend import available_backends, build_info, current_backend, use_backend

__all__ = ["available_backends", "build_info", "current_backend", "use_backend"]
