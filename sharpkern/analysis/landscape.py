"""The loss around the weights, along lines and in planes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_number
from .loss import Loss, check_parameters, flat, gradients, kept_weights, move, progress_bar, shaped, zero_vector


def _check_direction(direction: Any, like: Tensor) -> Tensor:
    if not isinstance(direction, Tensor) or direction.shape != like.shape or not direction.isfinite().all():
        what = f"shape {list(direction.shape)}" if isinstance(direction, Tensor) else repr(direction)
        raise ValueError(f"a direction should be a finite vector of {like.numel()} elements, but got {what}")
    return direction.detach().to(like)


def loss_along(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    directions: Tensor | Sequence[Tensor],
    alphas: Sequence[float] | Tensor,
    betas: Sequence[float] | Tensor | None = None,
    **options: Any,
) -> Tensor:
    r"""The loss on a line or in a plane through the weights.

    .. math::
        L(w + \alpha\, d) \qquad \text{or} \qquad L(w + \alpha\, d_1 + \beta\, d_2)

    Nothing of the model changes, whatever is raised: the weights, too, come out as they went in, to the bit.

    Args:
        model, loss_fn, batches: as in :func:`sharpkern.analysis.top_eigenvalues`.
        directions: flat, in the order of the parameters: a tensor ``[n]``, or two of them (``[2, n]``) for a plane. One
            of :class:`sharpkern.analysis.Eigenpairs`'s ``vectors``, say; :func:`filter_normalized` and
            :func:`sgd_step_along` make others.
        alphas: the multiples of the first.
        betas: those of the second; by default the same.
        **options: ``params``, ``forward``, ``eval_mode``, ``l2`` and ``progress``, as there.

    Returns:
        ``[alphas]`` or ``[alphas, betas]``, float64, on the CPU. Far away a loss may be infinite or NaN.

    Raises:
        ValueError, TypeError: for directions of another length; as there.
        RuntimeError: as there.

    Source: Goodfellow, Vinyals and Saxe 2015, `Qualitatively characterizing neural network optimization problems
    <https://arxiv.org/abs/1412.6544>`_; in planes Li et al. 2018, see :func:`filter_normalized`.
    """
    loss = Loss(model, loss_fn, batches, **options)
    like = zero_vector(loss.params)
    line = isinstance(directions, Tensor) and directions.dim() == 1
    ways = [_check_direction(d, like) for d in ([directions] if line else directions)]
    if len(ways) != 1 + (not line):
        raise ValueError(f"expected one direction or two, but got {len(ways)}")
    if line and betas is not None:
        raise ValueError("betas are for a second direction")
    axes = [torch.as_tensor(alphas, dtype=torch.float64, device="cpu")]
    if not line:
        axes.append(axes[0] if betas is None else torch.as_tensor(betas, dtype=torch.float64, device="cpu"))
    if any(axis.dim() != 1 for axis in axes):
        raise ValueError("alphas and betas should be of one dimension")
    points = torch.cartesian_prod(*axes).view(-1, len(axes)).tolist()
    losses = []
    with loss.held(), kept_weights(loss.params) as home, progress_bar(loss.progress, "losses", len(points)) as advance:
        w = torch.cat([t.reshape(-1).to(like) for t in home])
        for point in points:
            move(loss.params, shaped(w + sum(x * way for x, way in zip(point, ways, strict=True)), loss.params))
            losses.append(loss.value(finite=False))
            advance()
    return torch.tensor(losses, dtype=torch.float64, device="cpu").view([len(axis) for axis in axes])


def filter_normalized(model: nn.Module, seed: int = 0, params: Iterable[Tensor] | None = None) -> Tensor:
    r"""A random direction whose filters have the norms of the model's filters.

    .. math::
        d_{ij} = \frac{g_{ij}}{\|g_{ij}\|}\, \|w_{ij}\|, \qquad g \sim \mathcal{N}(0, I)

    over the filters j of every layer i: the slices of a weight along its first dimension. Biases and the parameters of
    norm layers, which have one dimension, have zeros.

    Args:
        model: whose parameters are meant that are not frozen.
        seed: of g.
        params: others than these.

    Returns:
        It, flat, as :func:`loss_along` takes it.

    Raises:
        ValueError, TypeError, RuntimeError: for params as in :func:`sharpkern.analysis.top_eigenvalues`.

    Source: Li et al. 2018, `Visualizing the Loss Landscape of Neural Nets <https://arxiv.org/abs/1712.09913>`_.
    """
    params = check_parameters((p for p in model.parameters() if p.requires_grad) if params is None else params)
    generator, parts = torch.Generator().manual_seed(seed), []
    like = zero_vector(params)
    for p in params:
        w = p.detach().flatten(1).to(like) if p.dim() > 1 else p.new_zeros(p.numel(), 1).to(like)
        g = torch.randn(w.shape, generator=generator, device="cpu").to(like)
        parts.append((g * (w.norm(dim=1, keepdim=True) / g.norm(dim=1, keepdim=True))).reshape(-1))
    return torch.cat(parts)


def sgd_step_along(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    eigenvector: Tensor,
    lr: float,
    **options: Any,
) -> Tensor:
    r"""The part of an SGD step that goes along an eigenvector, of its expected length.

    .. math::
        \delta_e = -\operatorname{sign}(\langle \nabla L, e \rangle)\; \eta\, \mathbb{E}_B
        |\langle \nabla L_B, e \rangle|\; e

    the mean over the batches, which are those that SGD steps with; downhill. ``loss_along(..., sgd_step_along(...),
    [0.5, 1, 2])`` tells whether such steps are too long to lower the loss along e.

    Args:
        model, loss_fn, batches: as in :func:`sharpkern.analysis.top_eigenvalues`.
        eigenvector: e, flat and of length 1.
        lr: :math:`\eta`.
        **options: ``params``, ``forward``, ``eval_mode``, ``l2`` and ``progress``, as there.

    Returns:
        It, flat, as :func:`loss_along` takes it.

    Raises:
        ValueError, TypeError, RuntimeError: for a vector of another length; as there.

    Source: Jastrzebski et al. 2019, `On the Relation Between the Sharpest Directions of DNN Loss and the SGD Step
    Length <https://arxiv.org/abs/1807.05031>`_.
    """
    check_number(lr, "lr")
    loss = Loss(model, loss_fn, batches, **options)
    e = _check_direction(eigenvector, zero_vector(loss.params))
    norm = e.double().norm().item()
    if not math.isclose(norm, 1.0, abs_tol=1e-3):
        raise ValueError(f"the eigenvector should be of length 1, but its length is {norm}")
    trained = [p for p in loss.params if p.requires_grad]
    total = length = count = 0.0
    with loss.held(), progress_bar(loss.progress, "gradients") as advance:
        for _, grads, weight in gradients(loss, loss.params):
            g = flat(grads, loss.params, e) + loss.l2 * flat(trained, loss.params, e)
            slope = (g.cpu().double() @ e.cpu().double()).item()
            total, length, count = total + weight * slope, length + weight * abs(slope), count + weight
            advance()
    return e * (-lr * length / count * (1 if total > 0 else -1 if total < 0 else 0))
