"""The Hessian of a loss, as its products with vectors, and its top eigenvalues. autograd differentiates twice.

The eigenvalues are scipy's, by ARPACK's Lanczos: of the libraries for this, curvlinops brings requirements that replace
the torch that is installed, and hessian-eigenthings is an alpha.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..checks import check_count, check_number
from .loss import Generators, Loss, Losses, check_parameters, flat, gradients, progress_bar, shaped, zero_vector

# Which k eigenvalues, as scipy says it: an order of all of them.
_WHICH: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "LM": lambda values: -abs(values),
    "LA": lambda values: -values,
    "SA": lambda values: values,
}


class Hessian:
    r"""The matrix :math:`H = \nabla^2 L + \lambda I` of a mean loss, as what it does to vectors; ``products`` counts.

    Rows and columns of frozen parameters are zero.

    Args:
        losses, params, l2: as in :func:`top_eigenpairs`.
    """

    def __init__(self, losses: Losses, params: Iterable[Tensor], l2: float = 0.0) -> None:
        check_number(l2, "l2")
        if isinstance(losses, Iterator):
            raise TypeError("losses should be something to iterate over again and again: give a function that makes it")
        self.params = check_parameters(params)
        self.zero = zero_vector(self.params)
        self.products = 0
        self._losses, self._l2 = losses, float(l2)
        self._trained = [p for p in self.params if p.requires_grad]
        self._single = False
        self._kept: list[tuple[Sequence[Tensor], float]] = []

    def _graphs(self) -> Iterator[tuple[Sequence[Tensor], float]]:
        if self._kept:
            yield from self._kept
            return
        with torch.enable_grad():
            losses = self._losses() if callable(self._losses) else self._losses
        # Of a single batch the first derivative's graph is kept: a product then takes a backward pass and no more.
        self._single = isinstance(losses, Tensor) or operator.length_hint(losses, 0) == 1
        for _, grads, weight in gradients(losses, self.params, create_graph=True):
            if self._single:
                self._kept.append((grads, weight))
            yield grads, weight

    def __matmul__(self, v: Tensor) -> Tensor:
        """H v, for a flat v."""
        parts = [part for part, p in zip(shaped(v, self.params), self.params, strict=True) if p.requires_grad]
        total, count = torch.zeros_like(self.zero), 0.0
        with sdpa_kernel(SDPBackend.MATH):  # of the attention kernels the one that has a second derivative
            for grads, weight in self._graphs():
                # A loss that is linear in a parameter has a constant gradient.
                curved = [(g, part.to(g)) for g, part in zip(grads, parts, strict=True) if g.requires_grad]
                if curved:
                    columns = torch.autograd.grad(
                        [g for g, _ in curved],
                        self._trained,
                        [part for _, part in curved],
                        retain_graph=self._single,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                    total += weight * flat(columns, self.params, total)
                count += weight
        total /= count
        if self._l2:
            total += self._l2 * flat(parts, self.params, total)
        if not total.isfinite().all():
            raise ValueError("the Hessian is not finite: a second derivative of the loss is infinite or NaN")
        self.products += 1
        return total

    def on_host(self, v: Tensor) -> Tensor:
        """H v, both in float64 on the CPU."""
        return (self @ v.to(self.zero)).cpu().double()

    def random(self, seed: int, normal: bool) -> Iterator[Tensor]:
        """Vectors of independent entries, normal ones or signs, in float64 on the CPU."""
        n, generator = self.zero.numel(), torch.Generator().manual_seed(seed)
        while True:
            if normal:
                v = torch.randn(n, generator=generator, device="cpu")
            else:
                v = torch.randint(0, 2, (n,), generator=generator, device="cpu") * 2 - 1
            yield v.double()


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Eigenvalues of a Hessian, the largest first, and their eigenvectors.

    Args:
        values: ``[k]``, float64, on the CPU.
        vectors: ``[k, n]``, of length 1 and orthogonal, flat in the order of the parameters, on their device; of their
            dtype, half precision as float32. An eigenvector has no sign.
        matvecs: products of the Hessian with a vector that it took.
        params: the parameters.
    """

    values: Tensor
    vectors: Tensor
    matvecs: int
    params: Sequence[Tensor]

    def as_parameters(self, i: int) -> list[Tensor]:
        """Vector i in parts, shaped like the parameters."""
        return shaped(self.vectors[i], self.params)


def top_eigenpairs(
    losses: Losses,
    params: Iterable[Tensor],
    k: int = 5,
    *,
    which: str = "LM",
    tol: float = 1e-4,
    seed: int = 0,
    l2: float = 0.0,
    progress: bool = False,
) -> Eigenpairs:
    r"""The k eigenvalues of largest magnitude of the Hessian of a loss, and their eigenvectors.

    .. math::
        H = \frac{\sum_b n_b \nabla^2 L_b(w)}{\sum_b n_b} + \lambda I, \qquad H e_i = \lambda_i e_i

    :func:`top_eigenvalues` is this for a model and its batches, and looks after the model; here the losses are the
    caller's. torch's random generators are what they were afterwards, and at the start of every pass over the losses.

    Beside the products it takes max(2 k + 1, 20) vectors of float64 on the host; where there are no more parameters
    than that, the whole matrix.

    Args:
        losses: a function that returns the loss; or one that returns pairs (L_b, n_b), or an iterable of such pairs
            that makes them afresh in every pass. Losses are scalars that autograd can differentiate twice.
        params: tensors. Frozen ones are constants: their parts of the vectors are zero.
        k: how many.
        which: ``LM``, the largest in magnitude; ``LA``, the largest, or ``SA``, the smallest.
        tol: relative accuracy of the eigenpairs' residuals; 0 is that of float64, which float32 products never reach.
        seed: of the vector to start from.
        l2: :math:`\lambda`, of a term :math:`\tfrac{\lambda}{2} \|w\|^2` of the loss, as ``weight_decay``.
        progress: show a bar of the products.

    Returns:
        The eigenpairs, by falling (signed) value.

    Raises:
        ValueError, TypeError: for arguments out of range; k above the number of parameters; a loss that is not a finite
            real scalar, or that has no graph; a Hessian that is not finite.
        RuntimeError: while the weights are perturbed; where ARPACK does not converge; of torch, for an operation that
            cannot be differentiated twice.

    Source: `ARPACK <https://doi.org/10.1137/1.9780898719628>`_, through ``scipy.sparse.linalg.eigsh``.
    """
    check_count(k, "k")
    check_number(tol, "tol")
    if which not in _WHICH:
        raise ValueError(f"Invalid which: {which!r} (there are {', '.join(_WHICH)})")
    hessian = Hessian(losses, params, l2)
    n = hessian.zero.numel()
    if k > n:
        raise ValueError(f"Invalid k: {k} (there are {n} parameters)")
    generators, linear = Generators(), True

    def product(x: NDArray[np.float64]) -> NDArray[np.float64]:
        nonlocal linear
        generators.restore()
        y: NDArray[np.float64] = hessian.on_host(torch.from_numpy(x.reshape(-1))).numpy()
        linear = linear and not y.any()
        advance()
        return y

    basis = max(2 * k + 1, 20)
    try:
        with progress_bar(progress, "Hessian-vector products", n if n <= basis else None) as advance:
            if n <= basis:
                dense = np.stack([product(column) for column in np.eye(n)])
                values, vectors = np.linalg.eigh((dense + dense.T) / 2)
                chosen = np.argsort(_WHICH[which](values), kind="stable")[:k]
                values, vectors = values[chosen], vectors[:, chosen]
            else:
                matrix = LinearOperator((n, n), matvec=product, dtype=np.float64)
                v0 = np.random.default_rng(seed).standard_normal(n)
                values, vectors = eigsh(matrix, k=k, which=which, v0=v0, ncv=basis, tol=tol)
    except ArpackError:
        if not linear:
            raise
        values, vectors = np.zeros(k), np.eye(n, k)
    finally:
        generators.restore()
    order = np.argsort(-values, kind="stable")
    return Eigenpairs(
        torch.from_numpy(values[order]),
        torch.from_numpy(np.ascontiguousarray(vectors.T[order])).to(hessian.zero),
        hessian.products,
        hessian.params,
    )


def top_eigenvalues(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    k: int = 5,
    *,
    params: Iterable[Tensor] | None = None,
    forward: Callable[[nn.Module, Any], tuple[Any, Any]] | None = None,
    eval_mode: bool = True,
    l2: float = 0.0,
    which: str = "LM",
    tol: float = 1e-4,
    seed: int = 0,
    progress: bool = False,
) -> Eigenpairs:
    """The k eigenvalues of largest magnitude of the Hessian of a model's mean loss, and their eigenvectors, as
    :func:`top_eigenpairs` finds them.

    Nothing of the model changes, whatever is raised: its weights, gradients, buffers and modes, torch's random
    generators and that of a ``DataLoader`` come out as they went in, to the bit.

    A product takes a forward and two backward passes over all batches; of a single batch the graph is kept, and it
    takes one backward pass.

    Args:
        model: not one that is wrapped in data parallelism, or compiled: these are not differentiated twice.
        loss_fn: ``loss_fn(output, target)`` is the mean loss of a batch.
        batches: pairs ``(x, y)``, of which tensors are moved to the model's device. They are gone through again for
            each product, so that a generator, which is empty then, is refused. A ``DataLoader`` may shuffle and augment
            by torch's generators: they give the same in every pass.
        k: how many.
        params: what the loss is a function of; by default the model's parameters that are not frozen. Frozen ones are
            constants: their parts of the vectors are zero.
        forward: ``forward(model, batch)`` returns output and target, where a batch is no pair. The length of the target
            is the batch's weight.
        eval_mode: in evaluation mode, where the loss is a function of the weights alone; else in the modules' own
            modes, and dropout drops the same in every pass.
        l2: of a term l2 / 2 * norm(w)**2, as ``weight_decay``.
        which, tol, seed: as in :func:`top_eigenpairs`.
        progress: show a bar.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`top_eigenpairs`; and for batches that are none.

    Source: Jastrzebski et al. 2019, `On the Relation Between the Sharpest Directions of DNN Loss and the SGD Step
    Length <https://arxiv.org/abs/1807.05031>`_, which follows these along a training.
    """
    loss = Loss(model, loss_fn, batches, params=params, forward=forward, eval_mode=eval_mode, l2=l2)
    with loss.held():
        return top_eigenpairs(loss, loss.params, k, which=which, tol=tol, seed=seed, l2=l2, progress=progress)
