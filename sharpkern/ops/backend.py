"""Which backend runs an op. torch's dispatcher is the registry; nothing here keeps a table of its own.

The reference serves every device (``CompositeExplicitAutograd``). The compiled module ``_C``, when it was
built, takes the CPU from it, and CUDA when it was built with CUDA. Triton takes what devices are left that it
has a driver for. ``use_backend`` pushes another choice in front of these for a while.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import reference, schema

try:
    import sharpkern._C as _C
except ImportError as error:  # built without the extension, or for another torch or Python
    _missing: str | None = f"the extension could not be imported: {error}"
    _package = Path(__file__).parents[1]
    if (_package.parent / "setup.py").exists() and not any(_package.glob("_C.*.so")):
        _missing = f"{_missing}. This is the source tree, not what pip installed: install with -e, or run elsewhere"
    _built: dict[str, Any] = {}
else:
    _missing = None
    _built = _C.build_info()

NAMES = ("cpp", "triton", "reference")  # the first that can runs by default

# Device types that kernels were written for, and their dispatch keys.
_KEYS = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU"}

# The backend of use_backend, of the environment, or none: each device has its default then.
_chosen: str | None = None
# The kernels that stand in front of those that registered themselves at import.
_override: torch.library.Library | None = None
# Compute capabilities of the CUDA devices that were met. Asking for one initialises CUDA: not at import.
_capabilities: set[tuple[int, int]] = set()


def _interpreting() -> bool:
    """Whether Triton kernels run in the interpreter: on the CPU, and nowhere else."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not(name: str, device_type: str) -> str | None:
    """Why a backend cannot run on a type of device; None when it can."""
    if name == "cpp":
        if _missing is not None:
            return _missing
        if device_type == "cpu":
            return None
        if device_type != "cuda":
            return f"the extension has no kernels for {device_type}"
        if not _built["cuda_architectures"]:
            return "the extension was built without CUDA"
        if torch.version.hip:
            return "the extension has kernels for CUDA, this torch is for ROCm"
        if torch.version.cuda and int(torch.version.cuda.split(".")[0]) < int(_built["cuda"].split(".")[0]):
            return f"the extension was built with CUDA {_built['cuda']}, this torch with CUDA {torch.version.cuda}"
        return next(filter(None, (_misses(_built["cuda_architectures"], c) for c in sorted(_capabilities))), None)
    if name == "triton":
        if device_type not in _KEYS:
            return f"Triton has no driver for {device_type}"
        if not _has_triton():
            return "Triton is not installed"
        if device_type == "cpu" and not _interpreting():
            return "Triton runs on the CPU only in its interpreter (TRITON_INTERPRET=1)"
        if device_type != "cpu" and _interpreting():
            return "Triton's interpreter (TRITON_INTERPRET=1) runs on the CPU only"
        if _capabilities and min(_capabilities) < (7, 0) and not torch.version.hip:
            return "Triton needs compute capability 7.0"
    return None


def available_backends(device: str | torch.device = "cpu") -> list[str]:
    """Backends that can run on ``device``, the one that runs by default first.

    ``"cpp"`` is the compiled extension (C++ on the CPU, CUDA C++ on CUDA), ``"triton"`` its twin in Triton,
    ``"reference"`` plain PyTorch.
    """
    device_type = torch.device(device).type
    _meet(torch.device(device))
    return _available(device_type)


def _available(device_type: str) -> list[str]:
    # The interpreter is for tests: never a default.
    names = ("cpp", "reference", "triton") if device_type == "cpu" else NAMES
    return [name for name in names if why_not(name, device_type) is None]


@functools.cache
def _current(device_type: str) -> str:
    available = _available(device_type)
    return _chosen if _chosen in available else available[0]


def current_backend(device: str | torch.device = "cpu") -> str:
    """The backend that an op on ``device`` runs on now."""
    _meet(torch.device(device))
    return _current(torch.device(device).type)


def walks_lists(device_type: str) -> bool:
    """Whether the backend now in charge walks lists of tensors, or reads a table of addresses."""
    return _current(device_type) == "reference"


# Device types whose users know already.
_noticed: set[str] = set()


def prepare(device: torch.device) -> None:
    """Before the first op on a device: see that there is a backend for it; tell, once for each type of device,
    when that is only the reference."""
    _meet(device)
    if walks_lists(device.type) and _chosen != "reference" and device.type not in _noticed:
        _noticed.add(device.type)
        reasons = dict.fromkeys(filter(None, (why_not(name, device.type) for name in NAMES)))
        warnings.warn(
            f"sharpkern runs its plain PyTorch reference on {device.type}, right but slow: {'; '.join(reasons)}",
            UserWarning,
            stacklevel=2,
        )


def _meet(device: torch.device) -> None:
    """Take note of what a CUDA device can run."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return
    capability = torch.cuda.get_device_capability(device)
    if capability not in _capabilities:
        _capabilities.add(capability)
        _select(_chosen)


def _misses(architectures: str, capability: tuple[int, int]) -> str | None:
    """Why code for these architectures, such as "8.0 9.0+PTX", does not run on a device of this capability."""
    for architecture in architectures.split():
        number, _, ptx = architecture.partition("+")
        major, minor = map(int, number.rstrip("af").split("."))
        if number.endswith("a"):  # for this very one
            runs = (major, minor) == capability
        else:
            # Machine code runs on later minor versions of its major one, PTX on every later device.
            runs = major == capability[0] and minor <= capability[1]
            runs = runs or (bool(ptx) and not number.endswith("f") and (major, minor) <= capability)
        if runs:
            return None
    return f"the extension was built for {architectures}, this device is {capability[0]}.{capability[1]}"


def _triton(op: str) -> Callable[..., None]:
    def call(*args: Any, **kwargs: Any) -> None:
        from . import triton  # only now: importing sharpkern must not import Triton

        triton.IMPLEMENTATIONS[op](*args, **kwargs)

    return call


_WALKING = [op for op in schema.SCHEMAS if op != "gather"]  # gather is host work, whatever the device


def _registered(device_type: str) -> str:
    """The backend whose kernels the dispatcher has for a device when nothing was chosen."""
    if _missing is None and (device_type == "cpu" or (device_type == "cuda" and _built["cuda_architectures"])):
        return "cpp"
    return "triton" if device_type != "cpu" and _has_triton() else "reference"


def _select(name: str | None) -> None:
    global _chosen, _override
    _chosen = name
    _current.cache_clear()
    if _override is not None:
        _override._destroy()
        _override = None
    changed = {d: key for d, key in _KEYS.items() if _current(d) != _registered(d)}
    if not changed:
        return
    # The dispatcher keeps a stack of kernels for each key; the newest one runs.
    _override = torch.library.Library("sharpkern", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for device_type, key in changed.items():
            kernels: dict[str, Any] = dict(reference.IMPLEMENTATIONS)
            if _current(device_type) == "triton":
                kernels = {op: _triton(op) for op in _WALKING}
            for op, kernel in kernels.items():
                _override.impl(op, kernel, key, allow_override=True)


def _devices() -> list[str]:
    """Types of the devices of this machine."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op on the backend ``name`` inside the ``with`` block (process-wide, nests).

    It takes the devices that it can run on; the others keep their default. The environment variable
    ``SHARPKERN_BACKEND`` chooses from the start, in the same way.

    Raises:
        ValueError: when there is no such backend for any device here.
    """
    _check(name)
    before = _chosen
    _select(name)
    try:
        yield
    finally:
        _select(before)


def _check(name: str) -> None:
    devices = _devices()
    if any(name in available_backends(d) for d in devices):
        return
    available = {d: available_backends(d) for d in devices}
    reasons = dict.fromkeys(why_not(name, d) for d in devices) if name in NAMES else {}
    raise ValueError(f"Invalid backend: {name!r}, available: {available}" + "".join(f"; {why}" for why in reasons))


def build_info() -> dict[str, Any]:
    """How the extension was built (compiler, instruction sets, torch, CUDA architectures), and what runs."""
    info: dict[str, Any] = {"extension": _missing is None, **_built}
    if _missing is not None:
        info["error"] = _missing
    info["backend"] = {d: current_backend(d) for d in _devices()}
    return info


_fallback = torch.library.Library("sharpkern", "IMPL")
for _device_type, _key in _KEYS.items():
    if _registered(_device_type) == "triton":
        for _op in _WALKING:
            _fallback.impl(_op, _triton(_op), _key)
if _wish := os.environ.get("SHARPKERN_BACKEND"):
    # No look at the devices: it would be too early for those who fork processes after the import.
    if _wish not in NAMES:
        raise ValueError(f"Invalid SHARPKERN_BACKEND: {_wish!r}, expected one of {NAMES}")
    _select(_wish)
