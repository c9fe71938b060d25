"""How flat the loss is around the weights that a training ends at.

It is measured with batch norm in evaluation mode: the loss is a function of the weights alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharpkern import analysis

from .data import CHUNK

SHARPNESS_RHO = 0.05  # the same ball for everyone, whatever radius the optimizer trained with
SLICE_POINTS = 41
SLICE_RADIUS = 0.5  # how far the loss is followed along the eigenvector, in units of the weights


def chunks(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(CHUNK), y.split(CHUNK), strict=True))


def sharpness(model: nn.Module, x: Tensor, y: Tensor, rho: float = SHARPNESS_RHO) -> float:
    """L(w + rho g / |g|) - L(w), where L is the mean loss over all examples and g its gradient at w."""
    return analysis.sharpness(model, F.cross_entropy, chunks(x, y), rho)


def largest_eigenpair(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """Largest eigenvalue of the Hessian of the mean loss and its eigenvector, of length 1."""
    found = analysis.top_eigenvalues(model, F.cross_entropy, [(x, y)], k=1, which="LA")
    return found.values[0].item(), found.vectors[0]


def hessian_trace(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Trace of the Hessian of the mean loss, by 30 products with random vectors."""
    return analysis.trace(model, F.cross_entropy, [(x, y)], samples=30).value


def loss_slice(model: nn.Module, x: Tensor, y: Tensor, direction: Tensor, radius: float) -> list[float]:
    """Mean loss at w + t * direction for SLICE_POINTS values of t from -radius to radius, in evaluation mode."""
    points = torch.linspace(-radius, radius, SLICE_POINTS, dtype=torch.float64)
    losses = analysis.loss_along(model, F.cross_entropy, chunks(x, y), direction, points).tolist()
    # An eigenvector has no sign: the steeper side is on the right, so that runs can be compared.
    return losses if losses[0] <= losses[-1] else losses[::-1]
