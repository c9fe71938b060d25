"""How flat the loss is around the weights that a training ends at.

It is measured with batch norm in evaluation mode: the loss is a function of the weights alone.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from .data import CHUNK

SHARPNESS_RHO = 0.05  # the same ball for everyone, whatever radius the optimizer trained with
SLICE_POINTS = 41


def mean_loss(model: nn.Module, x: Tensor, y: Tensor, backward: bool = False) -> float:
    """Mean loss over all examples; with ``backward`` its gradient is added to that of the parameters."""
    total = 0.0
    with torch.set_grad_enabled(backward):
        for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            loss = F.cross_entropy(model(a), b, reduction="sum") / len(y)
            if backward:
                loss.backward()
            total += loss.item()
    return total


def sharpness(model: nn.Module, x: Tensor, y: Tensor, rho: float = SHARPNESS_RHO) -> float:
    """L(w + rho g / |g|) - L(w), where L is the mean loss over all examples and g its gradient at w."""
    model.eval()
    model.zero_grad()
    loss = mean_loss(model, x, y, backward=True)
    params = [p for p in model.parameters() if p.grad is not None]
    weights = [p.detach().clone() for p in params]
    grads = [p.grad for p in params]
    norm = torch.nn.utils.get_total_norm(grads)
    with torch.no_grad():
        torch._foreach_add_(params, torch._foreach_mul(grads, rho / (norm.item() + 1e-12)))
        perturbed = mean_loss(model, x, y)
        torch._foreach_copy_(params, weights)
    model.zero_grad()
    return perturbed - loss


def largest_eigenpair(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """Largest eigenvalue of the Hessian of the mean loss and its eigenvector, of length 1, by Lanczos."""
    model.eval()
    params = list(model.parameters())
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), params, create_graph=True)
    gradient = torch.cat([g.reshape(-1) for g in grads])

    def product(vector: np.ndarray) -> np.ndarray:
        v = torch.from_numpy(vector.reshape(-1)).to(gradient)
        columns = torch.autograd.grad(gradient, params, grad_outputs=v, retain_graph=True)
        return torch.cat([c.reshape(-1) for c in columns]).double().cpu().numpy()

    n = gradient.numel()
    start = np.random.default_rng(0).standard_normal(n)
    hessian = LinearOperator((n, n), matvec=product, dtype=np.float64)
    # The model is float32: digits beyond the tolerance would be noise.
    values, vectors = eigsh(hessian, k=1, which="LA", v0=start, tol=1e-4)
    return float(values[0]), torch.from_numpy(vectors[:, 0]).to(gradient)


@torch.no_grad()
def loss_slice(model: nn.Module, x: Tensor, y: Tensor, direction: Tensor, radius: float) -> list[float]:
    """Mean loss at w + t * direction for SLICE_POINTS values of t from -radius to radius, in evaluation mode."""
    model.eval()
    params = list(model.parameters())
    weights = nn.utils.parameters_to_vector(params)
    losses = []
    for t in np.linspace(-radius, radius, SLICE_POINTS):
        nn.utils.vector_to_parameters(weights + t * direction, params)
        losses.append(mean_loss(model, x, y))
    nn.utils.vector_to_parameters(weights, params)
    # An eigenvector has no sign: the steeper side is on the right, so that runs can be compared.
    return losses if losses[0] <= losses[-1] else losses[::-1]
