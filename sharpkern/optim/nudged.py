"""Nudged SGD: a step that is shorter, or longer, along the sharpest directions."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_count, check_number
from ..direction import Direction, Group
from ..memory.scalars import Sum
from ..memory.shards import is_sharded
from ..ops import schema
from .optimizer import SharpnessAwareOptimizer
from .step import AS_IS, Passes, Step

# max |E E^T - I| of directions that are taken as orthonormal.
TOLERANCE = 1e-3


class Nudge(Direction):
    """The options of a group: by how much the step along the directions is scaled."""

    options = ("nudge",)
    whole = "its directions are of all parameters"

    def check(self, group: Group) -> None:
        check_number(group["nudge"], "nudge")
        if group.get("nesterov"):
            raise ValueError(
                "NudgedSGD takes no nesterov=True: the paper nudges a step along the momentum buffer, and defines none "
                "for another one"
            )
        self._check_perturb(group)

    def check_part(self, params: Iterable[Any]) -> None:
        if any(is_sharded(entry[1] if isinstance(entry, tuple) else entry) for entry in params):
            raise TypeError(
                "NudgedSGD takes no DTensor (fully_shard, tensor parallel): its directions are of whole parameters. "
                "Use DistributedDataParallel"
            )


class NudgedSGD(SharpnessAwareOptimizer):
    r"""SGD whose step is scaled by a factor along the K sharpest directions of the loss.

    .. math::
        g &= \nabla L_B(w), \qquad
        v \leftarrow \mu\, v + (1 - \tau)\, (g + \lambda w) \\
        w &\leftarrow w - \eta\, \Bigl( v + (\gamma - 1) \sum_{i=1}^{K} \langle v, e_i \rangle\, e_i \Bigr)

    with momentum :math:`\mu`, dampening :math:`\tau`, weight decay :math:`\lambda`, learning rate :math:`\eta`, nudge
    :math:`\gamma` and the orthonormal top eigenvectors :math:`e_i` of the Hessian; v is kept as SGD has it. The
    products are over all parameters of all groups together that have a gradient in the step; a parameter without one
    is not moved. With a constant learning rate this is the paper's recursion, which keeps :math:`-\eta v`; with a
    schedule it is torch's convention, which does not scale what the buffer holds.

    The directions come from :meth:`refresh`; the paper makes them anew in each epoch, on about 5 % of the training
    set. Without any, with ``k=0`` and where every group's nudge is 1, this is SGD as it is fused here, to the bit.

    A step takes one forward and backward pass: ``loss.backward(); opt.step()`` is one, ``step(closure)`` calls the
    closure once, ``first_step`` returns False. It takes two launches; with momentum in float32 the first one moves
    12 + 4 K bytes a parameter, the second one 20 + 4 K.

    Args:
        params: iterable of tensors, of dicts, or of (name, tensor) pairs.
        lr: learning rate.
        nudge: factor of the step along the directions, 0 or more; a group may have its own, and a schedule may write
            it. The paper has 0.01 to 10.
        k: directions at most, 0 to 8.
        momentum, dampening, weight_decay, maximize: as in ``torch.optim.SGD``. There is no nesterov: the paper does
            not define it.
        max_grad_norm: clip the gradient to this norm, before anything else.
        skip_nonfinite, flatten, master_weights: as in :class:`sharpkern.SAM`.
        **base_kwargs: ``foreach``, ``fused`` and ``capturable`` are taken and make no difference.

    State: ``opt.state[p]["eigenvector_0"]`` to ``k - 1``, float32 (float64 for float64 parameters), parameter-shaped,
    zeros where there is no direction. They and the number of directions in use are saved and loaded with the rest.

    Raises:
        ValueError, TypeError: for arguments out of range, before anything changed.

    Source: Jastrzebski et al. 2019, `On the Relation Between the Sharpest Directions of DNN Loss and the SGD Step
    Length <https://arxiv.org/abs/1807.05031>`_.
    """

    direction = Nudge()
    one_pass = True
    refused = ("policy", "perturb_eps", "model")
    # Of every k: another class leaves them out when it loads.
    state_names = tuple(f"eigenvector_{i}" for i in range(schema.DIRECTIONS))

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        nudge: float = 0.01,
        k: int = 5,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(lr, type):
            raise TypeError(
                f"NudgedSGD takes no base optimizer, but got {lr.__name__}: it steps as torch.optim.SGD does"
            )
        if k != 0 or isinstance(k, bool):
            check_count(k, "k")
        if k > schema.DIRECTIONS:
            raise ValueError(f"Invalid k: {k}, there are kernels for {schema.DIRECTIONS} directions at most")
        for name in ("policy", "perturb_eps", "model", "base_optimizer", "rho"):
            if kwargs.pop(name, None) is not None:
                raise TypeError(f"NudgedSGD takes no {name}=: it looks once, and steps as torch.optim.SGD does")
        self.k = int(k)
        self.state_names = self.state_names[: self.k]
        self.products = tuple(f"product_{i}" for i in range(2 * self.k))  # two a direction
        self.scalars = {**dict.fromkeys(self.products, Sum()), "directions": 0}
        sgd: dict[str, Any] = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, torch.optim.SGD, {"nudge": nudge}, maximize=maximize, **sgd, **kwargs)

    def passes(self, step: Step) -> Passes:
        """Nudged SGD: SGD's step, scaled along the directions."""
        yield AS_IS
        names = self.state_names[: step.scalars["directions"]]
        if names and step.has(names[0]) and any(group["nudge"] != 1 for group in self.param_groups):
            step.nudge(names, self.products[: 2 * len(names)])
        else:
            step.norm()
            step.descend()

    @property
    def directions(self) -> int:
        """How many directions the next step is nudged along, if its gradient and its nudge are what they should be."""
        return int(self._step.scalars["directions"])

    def refresh(self, directions: Any, eigenvalues: Sequence[float] | Tensor | None = None, **options: Any) -> None:
        r"""Take other directions: orthonormal ones, or those of the top eigenvalues of a loss.

        Args:
            directions: one of

                - a tensor ``[K, n]``, n elements of all parameters of the optimizer, in the order of its groups;
                - K sequences of tensors, each of the parameters' shapes, in that order;
                - an object with ``vectors`` (one of these) and ``values`` (K eigenvalues), such as what
                  ``sharpkern.analysis.top_eigenvalues`` returns. Where it has ``params``, its vectors are flat in the
                  order of these, which may be others: those of the optimizer that are not among them have zeros;
                - a function that returns the loss, on its graph, or pairs (such a loss, number of samples), or an
                  iterable that makes such pairs: the top eigenvectors of its Hessian, those of ``sharpkern.analysis``
                  (2 k asked for by magnitude, as in the paper). A weight decay is no part of such a loss: ``l2``. One
                  loss is computed once; pairs are asked for again in each product: call ``model.eval()`` before, or
                  norm statistics are updated each time;
                - None: none any more.
            eigenvalues: of the directions; those of 0 or less are left out: there the loss is not sharp. Without them
                all are taken. Of more than ``k`` the first ones are.
            **options: of ``sharpkern.analysis.top_eigenpairs``, such as ``tol``, ``seed`` and ``l2``; for a loss alone.

        Raises:
            ValueError: for directions of another shape than the parameters', that are not finite, or not orthonormal:
                max :math:`|E E^T - I|` above 1e-3 in float64. Nothing changed.
            TypeError: for what is none of these. Nothing changed.
            RuntimeError: between ``first_step`` and ``second_step``; for parameters on the meta device.
        """
        self._refuse_open("refresh()")
        step = self._bound()
        params = [p for group in self.param_groups for p in group["params"]]
        if _is_loss(directions):
            directions = self._top(directions, params, options)  # frozen ones have zeros there
        elif options:
            raise TypeError(f"refresh() takes {', '.join(options)} for a loss alone")
        if hasattr(directions, "vectors"):
            if eigenvalues is None:
                eigenvalues = getattr(directions, "values", None)
            directions = _ordered(directions, params)
        with torch.no_grad():
            step.refresh()
            rows = [] if directions is None else _rows(directions, params)
            if eigenvalues is not None:
                values = torch.as_tensor(eigenvalues, dtype=torch.float64, device="cpu").flatten().tolist()
                if len(values) != len(rows):
                    raise ValueError(
                        f"expected an eigenvalue for each of {len(rows)} directions, but got {len(values)}"
                    )
                rows = [row for row, value in zip(rows, values, strict=True) if value > 0]
            rows = rows[: self.k]
            lengths = _squared_lengths(rows)
            held = {x.untyped_storage().data_ptr() for p in params for x in self._own_directions(p)}
            rows = [[x.clone() if x.untyped_storage().data_ptr() in held else x for x in row] for row in rows]
            # Where this is interrupted there are none.
            step.scalars["directions"] = 0
            for i, name in enumerate(self.state_names):
                self._put_direction(name, params, rows[i] if i < len(rows) else None)
                step.scalars[f"{name}_squared_norm"] = lengths[i] if i < len(rows) else lengths.new_zeros(())
            step.refresh()
            step.scalars["directions"] = len(rows)
            # Tools that restore a checkpoint take state that is there for all of it.
            step.expose(trained=True)

    def _own_directions(self, p: Tensor) -> list[Tensor]:
        """A parameter's part of the directions that there are."""
        entry = self.state.get(p, {})
        return [entry[name] for name in self.state_names if name in entry]

    def _put_direction(self, name: str, params: Sequence[Tensor], row: Sequence[Tensor] | None) -> None:
        """One direction into the state; None: zeros where there is another one. The memory takes it over from there."""
        for i, p in enumerate(params):
            part = None if row is None else row[i]
            if part is not None and not p.requires_grad and not part.any():
                part = None  # a frozen parameter that is no part of it
            there = self.state[p].get(name) if p in self.state else None
            if part is not None:
                if there is None:
                    self.state[p][name] = part.to(p.device, schema.state_dtype(p.dtype), copy=True)
                else:
                    there.copy_(part)
            elif there is not None:
                there.zero_()

    def _top(self, losses: Any, params: Sequence[Tensor], options: Mapping[str, Any]) -> Any:
        """The top eigenpairs of a loss. By magnitude: some of twice as many may be negative."""
        analysis = importlib.import_module("sharpkern.analysis")  # a later layer, and an extra: when it is asked for

        elements = sum(p.numel() for p in params)
        return analysis.top_eigenpairs(losses, params, min(2 * self.k, elements), **options) if self.k else None

    def _take_numbers(self, loaded: dict[str, Any]) -> None:
        super()._take_numbers(loaded)
        scalars = self._step.scalars
        entries = [entry for entry in loaded["state"].values() if isinstance(entry, dict)]  # others are a user's
        there = any(self.state_names[0] in entry for entry in entries) if self.k else False
        scalars["directions"] = min(scalars["directions"], self.k) if there else 0


def _ordered(found: Any, params: Sequence[Tensor]) -> Any:
    """The vectors of an object, in the order of the optimizer's parameters where it tells its own."""
    own = getattr(found, "params", None)
    if own is None or not isinstance(found.vectors, Tensor) or found.vectors.dim() != 2:
        return found.vectors
    parts = dict(zip(own, found.vectors.split([p.numel() for p in own], 1), strict=True))
    for p in set(own).difference(params):
        if parts[p].any():
            raise ValueError(f"the directions have a part along a parameter of shape {list(p.shape)} that is not here")
    zeros = found.vectors.new_zeros
    return torch.cat([parts[p] if p in parts else zeros(len(found.vectors), p.numel()) for p in params], 1)


def _is_loss(directions: Any) -> bool:
    """Whether directions are to be made, not given."""
    if directions is None or isinstance(directions, Tensor) or hasattr(directions, "vectors"):
        return False
    if callable(directions):
        return True
    return isinstance(directions, Iterable) and not isinstance(directions, Sequence)


def _rows(directions: Any, params: Sequence[Tensor]) -> list[list[Tensor]]:
    """Each direction as tensors of the parameters' shapes.

    Raises:
        ValueError, TypeError: for what is none.
    """
    if isinstance(directions, Tensor):
        sizes = [p.numel() for p in params]
        if directions.dim() != 2 or directions.size(1) != sum(sizes):
            raise ValueError(
                f"directions should be [K, {sum(sizes)}], of all elements of the parameters, but got a tensor of shape "
                f"{tuple(directions.size())}"
            )
        parts = [flat.split(sizes) for flat in directions]
        found = [[x.view(p.shape) for x, p in zip(row, params, strict=True)] for row in parts]
    elif isinstance(directions, Sequence) and all(isinstance(row, Sequence) for row in directions):
        found = [list(row) for row in directions]
    else:
        raise TypeError(f"directions should be a tensor or sequences of tensors, but got {type(directions).__name__}")
    for i, row in enumerate(found):
        shapes = [tuple(x.size()) if isinstance(x, Tensor) else None for x in row]
        wanted = [tuple(p.size()) for p in params]
        if shapes != wanted:
            wrong = [f"{a} for {b}" for a, b in zip(shapes, wanted, strict=False) if a != b][:1]
            raise ValueError(
                f"direction {i} should be {len(wanted)} tensors of the parameters' shapes, but got {len(shapes)}"
                + "".join(f", one of shape {which}" for which in wrong)
            )
        if any(x.is_complex() or x.layout != torch.strided for x in row):
            raise TypeError(f"direction {i} should be dense real tensors")
    return found


def _squared_lengths(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Of each direction.

    Raises:
        ValueError: for directions that are not orthonormal, or not finite.
    """
    products = torch.zeros(len(rows), len(rows), dtype=torch.float64, device="cpu")
    for parts in zip(*rows, strict=True):
        e = torch.stack([part.detach().flatten().to(schema.scalar_dtype(part.device)) for part in parts])
        products += (e @ e.t()).to(products)
    off = (products - torch.eye(len(rows), dtype=torch.float64, device="cpu")).abs()
    if not (off <= TOLERANCE).all():
        worst = float(off.max())
        raise ValueError(f"directions should be orthonormal: |E E^T - I| is {worst:.3g} at most, above {TOLERANCE}")
    return products.diagonal().clone()
