"""The mean loss of a model over batches, as a function of its parameters. What an evaluation touches is put back."""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from ..batch_stats import Buffers
from ..checks import check_number, type_name
from ..memory.layouts import is_away

Pairs = Iterable[tuple[Tensor, float]]
# The loss of each batch and its weight, afresh in every pass; or one loss. Each a scalar that can be differentiated.
Losses = Pairs | Callable[[], Tensor | Pairs]


# Parameters, and vectors as long as all of them: flat, in their order.


def check_parameters(params: Iterable[Tensor]) -> list[Tensor]:
    """Those that a loss is looked at as a function of.

    Raises:
        ValueError, TypeError: for what is no parameter, given twice, or when none of them is trained.
        RuntimeError: while an optimizer holds their weights in a backup.
    """
    if isinstance(params, (Tensor, nn.Module)) or not isinstance(params, Iterable):
        raise TypeError(f"params should be an iterable of tensors, but got {type_name(params)}")
    params = list(params)
    for i, p in enumerate(params):
        if not isinstance(p, Tensor):
            raise TypeError(f"parameter {i} should be a tensor, but got {type_name(p)}")
        if not p.is_floating_point() or p.layout != torch.strided:
            raise TypeError(f"parameter {i} should be dense and real, but it is {p.dtype}, {p.layout}")
    if len({id(p) for p in params}) < len(params):
        raise ValueError("some parameters are given more than once")
    if not any(p.requires_grad and p.numel() for p in params):
        raise ValueError("none of params requires a gradient")
    if is_away(params):
        raise RuntimeError("the weights are perturbed: call second_step() or restore() of their optimizer first")
    return params


def zero_vector(params: Sequence[Tensor]) -> Tensor:
    """Where vectors lie and of their dtype: float32, or what is wider among the parameters."""
    dtype = functools.reduce(torch.promote_types, (p.dtype for p in params), torch.float32)
    return torch.zeros(sum(p.numel() for p in params), dtype=dtype, device=params[0].device)


def flat(tensors: Iterable[Tensor], params: Sequence[Tensor], like: Tensor) -> Tensor:
    """A vector of what belongs to the trained ones of the parameters, and of zeros for the others."""
    given = iter(tensors)
    parts = (next(given) if p.requires_grad else torch.zeros_like(p) for p in params)
    return torch.cat([part.detach().reshape(-1).to(like) for part in parts])


def shaped(vector: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """A vector's parts, shaped like the parameters and where they are: views, where all of them are on one device."""
    parts = vector.split([p.numel() for p in params])
    return [part.view(p.shape).to(p.device) for part, p in zip(parts, params, strict=True)]


# Means over batches.


def terms(losses: Losses | Tensor, finite: bool = True) -> Iterator[tuple[Tensor, float]]:
    """One pass: the loss and the weight of every batch.

    Raises:
        ValueError, TypeError: for a loss that is no number, or not finite; for none at all.
    """
    found = losses() if callable(losses) else losses
    if not isinstance(found, Iterable):
        raise TypeError(f"the loss should be a tensor, but got {type_name(found)}")
    count = 0
    for loss, weight in [(found, 1.0)] if isinstance(found, Tensor) else found:
        if not isinstance(loss, Tensor):
            raise TypeError(f"the loss should be a tensor, but got {type_name(loss)}")
        if loss.numel() != 1 or not loss.is_floating_point():
            raise ValueError(f"the loss should be a real scalar, but it is {loss.dtype} of shape {list(loss.shape)}")
        check_number(weight, "weight of a batch", positive=True)
        if finite and not math.isfinite(loss.item()):
            raise ValueError(f"the loss should be finite, but it is {loss.item()}")
        count += 1
        yield loss, weight
    if not count:
        raise ValueError("there are no batches")


@torch.enable_grad()
def gradients(
    losses: Losses | Tensor, params: Sequence[Tensor], create_graph: bool = False
) -> Iterator[tuple[float, Sequence[Tensor], float]]:
    """One pass: the loss of every batch, its gradient by the trained ones of the parameters, and its weight.

    Raises:
        ValueError: for a loss that depends on none of them.
    """
    trained = [p for p in params if p.requires_grad]
    for loss, weight in terms(losses):
        grads: Sequence[Tensor | None] = [None]
        if loss.requires_grad:
            grads = torch.autograd.grad(loss.sum(), trained, create_graph=create_graph, allow_unused=True)
        if all(g is None for g in grads):
            raise ValueError("the loss does not depend on params, or not in a way that autograd has recorded")
        if any(g is not None and g.layout != torch.strided for g in grads):
            raise TypeError("the gradient of the loss is sparse: give the embedding sparse=False")
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, trained, strict=True)]
        yield loss.item(), filled, weight


class Generators:
    """torch's random generators, and those of a DataLoader and its samplers, as they are: to go back to."""

    def __init__(self, batches: Any = None) -> None:
        cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
        found = [torch.default_generator, *cuda]
        drawing = [batches]
        for drawn in drawing:
            found.append(getattr(drawn, "generator", None))
            within = (getattr(drawn, name, None) for name in ("batch_sampler", "sampler"))
            drawing += [x for x in within if x is not None and not any(x is known for known in drawing)]
        self._states = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]

    def restore(self) -> None:
        for generator, state in self._states:
            generator.set_state(state)


@contextmanager
def apart(batches: Any) -> Iterator[Any]:
    """A DataLoader apart from whoever is in the middle of it: with workers of its own, afresh, and, of one that
    Accelerate prepared, a count of its own. Anything else as it is."""
    if not isinstance(batches, DataLoader):
        yield batches
        return
    view: Any = object.__new__(type(batches))  # neither class allows a copy to be changed
    own = vars(view)
    own.update(vars(batches))
    own.update({name: value for name, value in (("_iterator", None), ("persistent_workers", False)) if name in own})
    with apart(own.get("base_dataloader")) as base:
        if base is not None:
            own["base_dataloader"] = base
        try:
            yield view
        finally:
            if hasattr(view, "gradient_state"):  # Accelerate's list of loaders that are being gone through
                view.end()


def move(params: Sequence[Tensor], weights: Iterable[Tensor]) -> None:
    """Write weights into the parameters."""
    with torch.no_grad():
        for p, weight in zip(params, weights, strict=True):
            p.copy_(weight)
    # An autocast region around it keeps low-precision copies of the weights.
    torch.clear_autocast_cache()


@contextmanager
def kept_weights(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Copies of the weights. The block may write to the parameters: afterwards they are what they were, to the bit."""
    weights = [p.detach().clone() for p in params]
    try:
        yield weights
    finally:
        move(params, weights)


# The batches of a model.


def _pair(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(f"a batch should be a pair (x, y), but got {type_name(batch)}: give forward= for others")
    device = next((p.device for p in model.parameters()), None)
    x, y = (t.to(device) if isinstance(t, Tensor) else t for t in batch)
    return model(x), y


class Loss:
    r"""The mean loss of a model over batches of n_b samples. Iterating over it, within ``held``, makes the pairs
    (L_b, n_b).

    .. math::
        L(w) = \frac{\sum_b n_b L_b(w)}{\sum_b n_b} + \tfrac{\lambda}{2} \|w\|_2^2

    Args:
        model, loss_fn, batches, params, forward, eval_mode, l2: as in :func:`sharpkern.analysis.top_eigenvalues`.
        progress: for the functions that are given it with these.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        batches: Iterable[Any],
        *,
        params: Iterable[Tensor] | None = None,
        forward: Callable[[nn.Module, Any], tuple[Any, Any]] | None = None,
        eval_mode: bool = True,
        l2: float = 0.0,
        progress: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model should be a torch.nn.Module, but got {type_name(model)}")
        for name, value in (("loss_fn", loss_fn), ("forward", forward or _pair)):
            if not callable(value):
                raise TypeError(f"{name} should be callable, but got {type_name(value)}")
        if not isinstance(batches, Iterable) or isinstance(batches, Iterator):
            raise TypeError(
                f"batches should be something to iterate over again and again (a list, a DataLoader), but got a "
                f"{type_name(batches)}"
            )
        check_number(l2, "l2")
        self.model, self.loss_fn, self.batches = model, loss_fn, batches
        self.params = check_parameters((p for p in model.parameters() if p.requires_grad) if params is None else params)
        self.forward, self.eval_mode, self.l2, self.progress = forward or _pair, eval_mode, float(l2), progress
        self._generators: Generators | None = None
        self._buffers: Buffers | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """The block in which losses are computed: afterwards modes, buffers and generators are what they were."""
        modes = [(module, module.training) for module in self.model.modules()]
        self._generators, self._buffers = Generators(self.batches), Buffers(self.model, self.params)
        recurrent = any(isinstance(module, nn.RNNBase) for module in self.model.modules())
        cudnn = torch.backends.cudnn.enabled
        try:
            if self.eval_mode:
                self.model.eval()
            if recurrent:  # cuDNN has no second derivative, and in evaluation mode no first one
                torch.backends.cudnn.enabled = False
            with sdpa_kernel(SDPBackend.MATH):  # of the attention kernels the one that has a second derivative
                yield
        finally:
            if recurrent:
                torch.backends.cudnn.enabled = cudnn
            for module, training in modes:
                module.training = training
            self._rewind()

    def _rewind(self) -> None:
        if self._generators is not None and self._buffers is not None:
            self._generators.restore()
            self._buffers.restore()

    def __iter__(self) -> Iterator[tuple[Tensor, float]]:
        # Every pass sees the same: the order and the augmentation of a DataLoader, what dropout drops.
        self._rewind()
        with apart(self.batches) as batches:
            for batch in batches:
                output, target = self.forward(self.model, batch)
                if not isinstance(target, Sized) or (isinstance(target, Tensor) and not target.dim()):
                    raise TypeError(f"the target should have an entry for each sample, but got {type_name(target)}")
                yield self.loss_fn(output, target), len(target)

    def __length_hint__(self) -> int:
        return operator.length_hint(self.batches, 0)

    def _l2_term(self) -> float:
        if not self.l2:
            return 0.0
        norms = (float(torch.linalg.vector_norm(p.detach())) for p in self.params if p.requires_grad)
        return self.l2 / 2 * sum(norm * norm for norm in norms)

    @torch.no_grad()
    def value(self, finite: bool = True) -> float:
        """L at the weights."""
        total = count = 0.0
        for loss, weight in terms(self, finite):
            total, count = total + weight * loss.item(), count + weight
        return total / count + self._l2_term()

    def value_and_gradient(self) -> tuple[float, Tensor]:
        """L and its gradient at the weights, flat; that of a frozen parameter is zero."""
        total, count, gradient = 0.0, 0.0, zero_vector(self.params)
        for loss, grads, weight in gradients(self, self.params):
            total, count = total + weight * loss, count + weight
            gradient += weight * flat(grads, self.params, gradient)
        gradient /= count
        if self.l2:
            trained = [p for p in self.params if p.requires_grad]
            gradient += self.l2 * flat(trained, self.params, gradient)
        return total / count + self._l2_term(), gradient

    def split(self, m: int) -> Iterator[tuple[Loss, int]]:
        """The loss of every m samples, and their number. The last ones of a batch may be fewer."""
        with apart(self.batches) as batches:
            for batch in batches:
                if not isinstance(batch, (tuple, list)) or not all(isinstance(t, Tensor) and t.dim() for t in batch):
                    raise TypeError("m= takes apart batches that are tuples of tensors, a sample a row")
                drawn = Generators(self.batches)  # each part has the pass's first numbers, and the next batch goes on
                for part in zip(*(t.split(m) for t in batch), strict=True):
                    loss = copy.copy(self)
                    loss.batches = [part]
                    yield loss, len(part[0])
                drawn.restore()


@contextmanager
def progress_bar(shown: bool, what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """A function to call at each step of a computation. Where the bar is not shown it does nothing."""
    if not shown:
        yield lambda: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ModuleNotFoundError:
        raise ModuleNotFoundError('progress=True needs rich: pip install "sharpkern[analysis]"', name="rich") from None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
