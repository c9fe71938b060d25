"""Which backend runs an op. torch's dispatcher is the registry; nothing here keeps a table of its own.

The reference serves every device (``CompositeExplicitAutograd``); the compiled module ``_C``, when it was
built, takes the CPU from it. ``use_backend`` pushes the reference in front of it for a while.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import reference

# Why the compiled kernels are missing, None when they are there.
_missing: str | None = None
try:
    import sharpkern._C as _C
except ImportError as error:  # built without the extension, or for another torch or Python
    _missing = str(error)

# The reference's kernels, while they stand in front of the compiled ones.
_override: torch.library.Library | None = None


def available_backends(device: str | torch.device = "cpu") -> list[str]:
    """Backends that can run on ``device``, the one that runs by default first.

    ``"cpp"`` is the compiled extension, ``"reference"`` plain PyTorch.
    """
    compiled = ["cpp"] if _missing is None and torch.device(device).type == "cpu" else []
    return [*compiled, "reference"]


def current_backend(device: str | torch.device = "cpu") -> str:
    """The backend that an op on ``device`` runs on now."""
    return "reference" if walks_lists(torch.device(device).type) else "cpp"


def walks_lists(device_type: str) -> bool:
    """Whether the backend now in charge walks lists of tensors, or reads a table of addresses."""
    return _missing is not None or _override is not None or device_type != "cpu"


# Device types whose users know already.
_noticed: set[str] = set()


def notice_reference(device_type: str) -> None:
    """Tell once, for each device type, that no compiled kernels run there."""
    if _override is None and walks_lists(device_type) and device_type not in _noticed:
        _noticed.add(device_type)
        why = _missing if device_type == "cpu" else "the extension has none for this device"
        warnings.warn(
            f"sharpkern runs its plain PyTorch reference on {device_type}, right but slow: {why}",
            UserWarning,
            stacklevel=2,
        )


def _select(name: str) -> None:
    global _override
    if name == "reference" and _override is None and _missing is None:
        # The dispatcher keeps a stack of kernels for each key; the newest one runs.
        _override = torch.library.Library("sharpkern", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
            for op, implementation in reference.IMPLEMENTATIONS.items():
                _override.impl(op, implementation, "CPU", allow_override=True)
    elif name == "cpp" and _override is not None:
        _override._destroy()
        _override = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op on the backend ``name`` inside the ``with`` block (process-wide, nests).

    Raises:
        ValueError: when there is no such backend here.
    """
    if name not in available_backends():
        missing = f"; the extension could not be imported: {_missing}" if name == "cpp" and _missing else ""
        raise ValueError(f"Invalid backend: {name!r}, available: {available_backends()}{missing}")
    before = current_backend()
    _select(name)
    try:
        yield
    finally:
        _select(before)


def build_info() -> dict[str, Any]:
    """How the extension was built (compiler, instruction sets, torch, CUDA architectures), and what runs."""
    info: dict[str, Any] = {"extension": _missing is None}
    if _missing is None:
        info.update(_C.build_info())
    else:
        info["error"] = _missing
    info["backend"] = {"cpu": current_backend("cpu")}
    return info
