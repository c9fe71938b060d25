"""The whole spectrum of a loss's Hessian, from its products with random vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor, nn

from ..checks import check_count, check_number
from .hessian import Hessian
from .loss import Loss, progress_bar


class Estimate(NamedTuple):
    """A mean over random vectors.

    Args:
        value: what was asked for.
        standard_error: of it; NaN with one sample.
        samples: ``[samples]``, float64, what the mean was taken of.
    """

    value: float
    standard_error: float
    samples: Tensor


def _sampled(
    loss: Loss, what: str, samples: int, seed: int, normal: bool, sample: Callable[[Tensor, Tensor], Tensor]
) -> Estimate:
    """The mean of sample(v, H v)."""
    check_count(samples, "samples")
    hessian, found = Hessian(loss, loss.params, loss.l2), []
    with loss.held(), progress_bar(loss.progress, what, samples) as advance:
        for _, v in zip(range(samples), hessian.random(seed, normal), strict=False):
            found.append(sample(v, hessian.on_host(v)).item())
            advance()
    values = torch.tensor(found, dtype=torch.float64, device="cpu")
    error = values.std().item() / math.sqrt(samples) if samples > 1 else math.nan
    return Estimate(values.mean().item(), error, values)


def trace(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    *,
    samples: int = 100,
    seed: int = 0,
    **options: Any,
) -> Estimate:
    r"""The trace of the Hessian, by Hutchinson's estimator.

    .. math::
        \operatorname{tr} H = \mathbb{E}\, v^\top H v, \qquad v_i = \pm 1 \text{ with equal probability}

    Args:
        model, loss_fn, batches: as in :func:`sharpkern.analysis.top_eigenvalues`.
        samples: number of vectors v, a product each.
        seed: of the vectors.
        **options: ``params``, ``forward``, ``eval_mode``, ``l2`` and ``progress``, as there.

    Raises:
        ValueError, TypeError, RuntimeError: as there.

    Source: Yao et al. 2020, `PyHessian: Neural Networks Through the Lens of the Hessian
    <https://arxiv.org/abs/1912.07145>`_.
    """
    loss = Loss(model, loss_fn, batches, **options)
    return _sampled(loss, "trace", samples, seed, False, lambda v, hv: v @ hv)


def frobenius_norm(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    *,
    samples: int = 100,
    seed: int = 0,
    **options: Any,
) -> Estimate:
    r"""The Frobenius norm of the Hessian, the root of the sum of its squared eigenvalues.

    .. math::
        \|H\|_F = \sqrt{\mathbb{E}\, \|H v\|_2^2}, \qquad v \sim \mathcal{N}(0, I)

    The samples are the squares; the standard error is that of the root, to first order.

    Args:
        model, loss_fn, batches, samples, seed, **options: as in :func:`trace`.

    Raises:
        ValueError, TypeError, RuntimeError: as in :func:`sharpkern.analysis.top_eigenvalues`.
    """
    loss = Loss(model, loss_fn, batches, **options)
    square = _sampled(loss, "Frobenius norm", samples, seed, True, lambda v, hv: hv @ hv)
    value = math.sqrt(square.value)
    return Estimate(value, square.standard_error / (2 * value) if value else 0.0, square.samples)


class SpectralDensity(NamedTuple):
    """How the eigenvalues are distributed. All float64, on the CPU.

    Args:
        grid: ``[points]``, values.
        density: ``[points]``, the share of eigenvalues a unit, smoothed; its integral is 1.
        standard_error: ``[points]``, of the density; NaN with one sample.
        nodes, weights: what was smoothed: values, and the share of each. The shares sum up to 1.
    """

    grid: Tensor
    density: Tensor
    standard_error: Tensor
    nodes: Tensor
    weights: Tensor


def _lanczos(hessian: Hessian, v: Tensor, steps: int, advance: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the Hessian restricted to v, H v, H^2 v, ..., and the squares of v's parts along theirs."""
    basis = v.new_zeros(steps, v.numel())
    diagonal: list[float] = []
    beside: list[float] = []
    w, size = v, v.norm().item()
    for j in range(steps):
        basis[j] = w / size
        w = hessian.on_host(basis[j])
        advance()
        diagonal.append((w @ basis[j]).item())
        for _ in range(2):  # to all before it, or rounding brings them back
            w = w - (basis[: j + 1] @ w) @ basis[: j + 1]
        size = w.norm().item()
        if j + 1 == steps or size <= 10 * torch.finfo(torch.float64).eps * max(map(abs, diagonal + beside)):
            break
        beside.append(size)
    values, vectors = eigh_tridiagonal(np.array(diagonal), np.array(beside))
    return torch.from_numpy(values), torch.from_numpy(vectors[0] ** 2)


def spectral_density(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    *,
    samples: int = 4,
    steps: int = 50,
    points: int = 1000,
    sigma: float | None = None,
    seed: int = 0,
    **options: Any,
) -> SpectralDensity:
    r"""The density of the Hessian's eigenvalues, by stochastic Lanczos quadrature.

    .. math::
        \phi(t) = \frac{1}{n} \sum_i \mathcal{N}(t;\ \lambda_i, \sigma^2) \approx
        \mathbb{E}_v \sum_j \tau_j\, \mathcal{N}(t;\ \theta_j, \sigma^2)

    with the eigenvalues :math:`\theta_j` of the tridiagonal matrix that Lanczos makes from a random v of signs, and
    :math:`\tau_j` the squares of the first components of its eigenvectors. As many vectors of float64 as steps are
    kept on the host.

    Args:
        model, loss_fn, batches: as in :func:`sharpkern.analysis.top_eigenvalues`.
        samples: number of vectors v.
        steps: of Lanczos, a product each; no more than there are parameters.
        points: of the grid, which goes five sigmas beyond the values.
        sigma: width of what a value is smoothed to; by default a hundredth of their range.
        seed: of the vectors.
        **options: ``params``, ``forward``, ``eval_mode``, ``l2`` and ``progress``, as there.

    Raises:
        ValueError, TypeError, RuntimeError: as there.

    Source: Ghorbani, Krishnan and Xiao 2019, `An Investigation into Neural Net Optimization via Hessian Eigenvalue
    Density <https://arxiv.org/abs/1901.10159>`_; PyHessian's definition, too.
    """
    for name, value in (("samples", samples), ("steps", steps), ("points", points)):
        check_count(value, name)
    if sigma is not None:
        check_number(sigma, "sigma", positive=True)
    loss = Loss(model, loss_fn, batches, **options)
    hessian = Hessian(loss, loss.params, loss.l2)
    steps = min(steps, hessian.zero.numel())
    with loss.held(), progress_bar(loss.progress, "spectral density", samples * steps) as advance:
        vectors = zip(range(samples), hessian.random(seed, normal=False), strict=False)
        found = [_lanczos(hessian, v, steps, advance) for _, v in vectors]
    nodes = torch.cat([theta for theta, _ in found])
    low, high = nodes.min().item(), nodes.max().item()
    if sigma is None:
        sigma = (high - low) / 100 or abs(high) / 100 or 1.0
    grid = torch.linspace(low - 5 * sigma, high + 5 * sigma, points, dtype=torch.float64, device="cpu")
    bells = [torch.exp(-(((grid[:, None] - theta) / sigma) ** 2) / 2) @ tau for theta, tau in found]
    densities = torch.stack(bells) / (sigma * math.sqrt(2 * math.pi))
    error = densities.std(0) / math.sqrt(samples) if samples > 1 else torch.full_like(grid, math.nan)
    return SpectralDensity(grid, densities.mean(0), error, nodes, torch.cat([tau for _, tau in found]) / samples)
