"""Where parameters and gradients lie, asked of all of them in one call of the extension."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

try:
    from sharpkern._C import Scan
except ImportError:  # built without the extension, or for another torch or Python
    Scan = None  # type: ignore[assignment, misc]

# DLPack's table of functions, of torch 2.11 and later; without it the op ``gather`` finds tensors.
_EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def available() -> bool:
    """Whether tensors are found that way."""
    return Scan is not None and _EXCHANGE is not None


def make_scan(params: list[Tensor], like: Tensor, param_layouts: Tensor, grad_layouts: Tensor) -> Any:
    """The extension's ``Scan`` of parameters; None where it cannot be, as of tensors that wrap others.

    Args:
        params: the list is kept.
        like: of their dtype, on their device.
        param_layouts, grad_layouts: how they lie, and how their gradients have to: ``memory.shapes.strides_of``. Kept
            by the caller.
    """
    if not available() or any(type(p) not in _PLAIN for p in params):
        return None
    rows = param_layouts.data_ptr(), grad_layouts.data_ptr(), grad_layouts.size(1)
    return Scan(_EXCHANGE, params, like, *rows)
