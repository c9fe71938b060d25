"""Where parameters and gradients lie, asked of all of them in one call of compiled code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

try:
    from sharpkern._C import Scan
except ImportError:  # built without the extension, or for another torch or Python
    Scan = None  # type: ignore[assignment, misc]

# torch's own C++ classes, which are those of one version.
try:
    import sharpkern._aten as _aten
except ImportError:
    _aten = None  # type: ignore[assignment]
else:
    if _aten.torch_version != f"{torch.__version__} {torch.version.git_version}":
        _aten = None  # type: ignore[assignment]

# DLPack's table of functions; where torch has none, the op ``gather`` finds tensors.
_EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def path() -> str:
    """Who finds tensors: "aten", the extension's part that is of this torch alone; "dlpack", by torch's table of
    functions; "op", slower where a model has many."""
    if _aten is not None:
        return "aten"
    return "op" if Scan is None or _EXCHANGE is None else "dlpack"


def make_scan(params: list[Tensor], like: Tensor, param_layouts: Tensor, grad_layouts: Tensor) -> Any:
    """A ``Scan`` of parameters, which it does not hold; None where there can be none, as of tensors that wrap others.

    Args:
        params: those that each call will bring.
        like: of their dtype, on their device.
        param_layouts, grad_layouts: how they lie, and how their gradients have to: ``memory.shapes.strides_of``. Kept
            by the caller.
    """
    found = path()
    if found == "op" or any(type(p) not in _PLAIN for p in params):
        return None
    rows = param_layouts.data_ptr(), grad_layouts.data_ptr(), grad_layouts.size(1)
    count = len(params)
    return _aten.Scan(count, like, *rows) if found == "aten" else Scan(_EXCHANGE, count, like, *rows)


def increment_version(tensors: list[Tensor]) -> None:
    """Tell autograd that these were written to."""
    (torch.autograd.graph if _aten is None else _aten).increment_version(tensors)
