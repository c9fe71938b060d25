"""How much the loss can rise in a ball around the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_count, check_number, check_real
from .loss import Loss, kept_weights, move, progress_bar, shaped


def _norm(x: Tensor, p: float) -> Tensor:
    """The p-norm; the largest element is taken out first, so that no power of it overflows."""
    largest = x.abs().max()
    relative: Tensor = torch.linalg.vector_norm(x / largest.clamp(min=torch.finfo(x.dtype).tiny), p)
    return largest * relative


def _steepest(g: Tensor, p: float) -> Tensor:
    """Of all vectors of p-norm 1 the one along which g is largest; zero where g is."""
    q = 1.0 if math.isinf(p) else p / (p - 1)
    share = g.abs() / _norm(g, q).clamp(min=torch.finfo(g.dtype).tiny)
    return g.sign() * share ** (q - 1)


def _into_ball(z: Tensor, rho: float, p: float) -> Tensor:
    """z, or where its p-norm is above rho a vector of that norm in its direction; by element where p is infinite."""
    if math.isinf(p):
        return z.clamp(-rho, rho)
    return z * (rho / _norm(z, p).clamp(min=rho)) if rho else torch.zeros_like(z)


def _increase(loss: Loss, rho: float, p: float, adaptive: bool, steps: int) -> float:
    with kept_weights(loss.params) as home:
        start, g = loss.value_and_gradient()
        w, z, best = torch.cat([t.reshape(-1).to(g) for t in home]), torch.zeros_like(g), -math.inf
        for step in range(1, steps + 1):
            z = _into_ball(z + rho * min(1.0, 2.5 / steps) * _steepest(g * w.abs() if adaptive else g, p), rho, p)
            move(loss.params, shaped(w + (w.abs() * z if adaptive else z), loss.params))
            if step < steps:
                value, g = loss.value_and_gradient()
            else:
                value = loss.value()
            best = max(best, value - start)
        return best


def sharpness(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    rho: float,
    p: float = 2.0,
    adaptive: bool = False,
    steps: int = 1,
    m: int | None = None,
    **options: Any,
) -> float:
    r"""The increase of the loss, to where it is largest in a ball around the weights, as far as ascent finds it.

    .. math::
        S = \max_{\|T_w^{-1} e\|_p \le \rho} L(w + e) - L(w), \qquad
        T_w = |w| \text{ if adaptive, else } 1

    One step is that of SAM, to the surface of the ball: :math:`e = \rho\, T_w \operatorname{sign}(a) (|a| /
    \|a\|_q)^{q-1}` with :math:`a = T_w \nabla L(w)` and 1/p + 1/q = 1. More are steps of length :math:`\min(1, 2.5 /
    \text{steps})\, \rho`, each followed by a projection onto the ball, and the largest of their increases counts.

    Nothing of the model changes, whatever is raised: the weights, too, come out as they went in, to the bit.

    Args:
        model, loss_fn, batches: as in :func:`sharpkern.analysis.top_eigenvalues`.
        rho: radius of the ball.
        p: its norm, in (1, inf].
        adaptive: elementwise relative to the weights.
        steps: of ascent, a forward and a backward pass over all batches each, and one forward pass.
        m: m-sharpness: the mean over m samples at a time, each with an ascent of its own. Batches are tuples of
            tensors then, and the last samples of one may be fewer.
        **options: ``params``, ``forward``, ``eval_mode``, ``l2`` and ``progress``, as there.

    Returns:
        S. One step may go too far, where the loss is lower: S is below 0 then.

    Raises:
        ValueError, TypeError: for arguments out of range; as there.
        RuntimeError: as there.

    Source: Foret et al. 2021, `Sharpness-Aware Minimization <https://arxiv.org/abs/2010.01412>`_; with T_w and steps
    Andriushchenko et al. 2023, `A Modern Look at the Relationship between Sharpness and Generalization
    <https://arxiv.org/abs/2302.07011>`_.
    """
    check_number(rho, "rho")
    check_real(p, "p")
    if not p > 1:
        raise ValueError(f"Invalid p: {p}")
    if not isinstance(adaptive, bool):
        raise TypeError(f"adaptive should be a bool, but got {adaptive!r}")
    check_count(steps, "steps")
    if m is not None:
        check_count(m, "m")
    loss = Loss(model, loss_fn, batches, **options)
    with loss.held(), progress_bar(loss.progress, "sharpness") as advance:
        total = count = 0.0
        for part, size in [(loss, 1)] if m is None else loss.split(m):
            total, count = total + size * _increase(part, float(rho), float(p), adaptive, steps), count + size
            advance()
    if not count:
        raise ValueError("there are no batches")
    return total / count
