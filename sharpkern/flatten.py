"""flatten=True: weights and gradients in flat buffers too, so that kernels and collectives see one long segment."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor


class Flattened:
    """Parameters and gradients as slots of two flat buffers. Shapes and strides stay as they were.

    A gradient that is missing stays so: tools tell by that whether an optimizer was stepped. One that autograd made
    elsewhere is moved, a copy, by the pass that takes it; autograd adds to the slot from then on, until ``grad`` is set
    to None.

    Args:
        params: of one device and dtype, without gaps in memory.
        slots: first element of each one's slot.
        size: elements of a flat buffer.
    """

    def __init__(self, params: Sequence[Tensor], slots: Sequence[int], size: int) -> None:
        self._all = params
        self._where = [(p.size(), p.stride(), slot) for p, slot in zip(params, slots, strict=True)]
        # Zeros, not empty: whoever reads the whole buffer (a collective, a norm) sees no garbage in gaps.
        self.params = torch.zeros(size, dtype=params[0].dtype, device=params[0].device)
        self.grads = torch.zeros_like(self.params)
        for i, p in enumerate(params):
            view = self.params.as_strided(*self._where[i])
            view.copy_(p.detach())
            p.data = view
        self._make_views()
        self._held = [True] * len(params)  # whether a slot of the gradients may hold other than zeros
        for p, view in zip(params, self._views, strict=True):
            if p.grad is not None:
                view.copy_(p.grad.to_dense() if p.grad.layout != torch.strided else p.grad)
        self._point()

    def _make_views(self) -> None:
        self._views = [self.grads.as_strided(*where) for where in self._where]
        self._addresses = list(map(Tensor.data_ptr, self._views))

    def _point(self) -> None:
        for p, view in zip(self._all, self._views, strict=True):
            grad = p.grad
            if grad is None:
                continue
            if not p.requires_grad:
                p.grad = None  # a gradient of zeros would still decay a frozen weight
            elif grad is view:
                continue
            elif grad.dtype == view.dtype:
                p.grad = view
            else:
                grad.zero_()

    def take(self) -> None:
        """Move the gradients that lie elsewhere into the flat buffer; those that no kernel can use stay as they are."""
        grads = [p.grad for p in self._all]
        if all(map(operator.is_, grads, self._views)):  # most often
            self._held = [True] * len(grads)
            return
        for i, (p, grad, view) in enumerate(zip(self._all, grads, self._views, strict=True)):
            if grad is None:
                if self._held[i]:
                    view.zero_()
            elif grad is not view and (grad.layout, grad.dtype, grad.size()) == (view.layout, view.dtype, view.size()):
                p.grad = view.copy_(grad)
            self._held[i] = grad is not None

    def zero_grads(self) -> None:
        """Zero the flat gradients in one go; every ``grad`` that is there is a slot of them afterwards."""
        self.grads.zero_()
        if list(map(Tensor.data_ptr, self._views)) != self._addresses:
            self._make_views()  # somebody replaced a view's data
        self._point()

    def undo(self) -> None:
        """Give every parameter and gradient its own memory again."""
        grads = self.grads.untyped_storage().data_ptr()
        for p in self._all:
            grad = p.grad
            p.data = p.data.clone()
            if grad is not None and grad.untyped_storage().data_ptr() == grads:
                p.grad = grad.clone()
