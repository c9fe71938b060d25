"""What a step measures: norms, products, AE-SAM's decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import everybody_of
from ..memory.layout import SCRATCH, Layout
from ..memory.layouts import Layouts
from ..memory.scalars import BASE, Scalars, merged, of_state
from ..memory.shards import Processes
from ..memory.state import Names
from ..memory.transfer import GroupTable, Receiver
from ..ops import schema
from ..ops.reference import update_ema
from ..policy import Scheduled
from ..rules import FusedRule, Rule
from .gradients import Gradients
from .msharpness import make_msharpness

ops = torch.ops.sharpkern
FIRED = schema.EMA.index("fired")  # the last one


@dataclass(frozen=True)
class Settings:
    """What every optimizer takes beside its algorithm's options."""

    perturb_eps: float
    model: nn.Module | None
    max_norm: float
    skip_nonfinite: bool
    m_sharpness: Any = "global"
    master_weights: bool = False


class Measurements(Gradients):
    """Measurements of the step that is under way, and the memory that all steps of an optimizer share.

    Args:
        opt: the optimizer, which declares direction, state_names, scalars and policy. It is not held.
        rule: how it moves.
        flatten: move parameters and gradients into flat buffers.
    """

    def __init__(self, opt: Any, rule: Rule, settings: Settings, flatten: bool) -> None:
        self.settings, self._direction, self.state_names = settings, opt.direction, opt.state_names
        self.parallel: nn.Module | None = None  # in which a trainer wrapped the model
        self.declared = merged(opt.scalars, *map(of_state, opt.state_names))
        scalars = Scalars(merged(BASE, self.declared, opt.policy.scalars, opt.direction.scalars))
        fused = isinstance(rule, FusedRule)
        self.owns_state = fused or bool(opt.state_names)  # whether any state lies in flat buffers
        layouts = Layouts(
            scalars, opt.direction, rule.buffers, opt.state_names, fused, flatten, settings.master_weights
        )
        super().__init__(type(opt).__name__, rule, layouts, scalars, settings.model)
        # The sum that holds the norm of the gradients that are there, and whether that is of the gradient as it is.
        self._measured: str | None = None
        self._plain = False
        self._mixed = False  # whether the coefficients are of this gradient
        self._followed: str | None = None  # the direction that stands for the gradients
        self._tables: dict[tuple[str, torch.device], GroupTable] = {}
        self._receiver = Receiver()
        self.apart = make_msharpness(settings.model, settings.m_sharpness, isinstance(opt.policy, Scheduled))
        self._common = False  # whether the sum "first" is everybody's, where the first gradient was not

    @property
    def t(self) -> int:
        """The number of this step, from 0."""
        return int(self.scalars["t"])

    def collect(self) -> None:
        """Take the gradients that are there now; nothing of the parameters changes, nothing of them is measured."""
        if self.apart and self.apart.settle(self.layouts):
            self._norm("first")
            self._common = True
        self._measured, self._mixed = None, False
        super().collect()

    def put_gradients(self, grads: Mapping[Tensor, Tensor]) -> None:
        """Give parameters the gradients that they had in the first pass; the norm of them is known."""
        super().put_gradients(grads)
        self._measured, self._plain = "first", True

    # Measuring.

    @property
    def spread(self) -> bool:
        """Whether other processes have a part of the numbers that are measured."""
        return self.layouts.scope is not None or self.alone

    @property
    def alone(self) -> bool:
        """Whether the first gradient is not everybody's."""
        return self.apart is not None and self.apart.local

    def _complete(self, *sums: str, largest: bool = False) -> None:
        """The parts of these sums were measured, each where it lies: now every device has all of them, and every
        process those of all: one all-reduce, of sums or, with ``largest``, of the largest ones."""
        for name in sums:
            self.scalars.share(name)
        scope = self.layouts.scope
        if scope is not None:
            home = self.layouts[0].device
            own = self.apart is not None and self.apart.own
            complete = scope.complete(torch.stack([self.scalars.row(name, home) for name in sums]), largest, not own)
            for device in self.layouts.devices:
                for name, parts in zip(sums, complete, strict=True):
                    self.scalars.row(name, device).copy_(parts)

    def norm(self, into: str = "first", *, ema: tuple[float, float] | None = None) -> None:
        r"""The squared norm of the gradient over all parameters, :math:`\|T_w g\|_2^2` where the direction scales; that
        in the ball of a p-norm too, beside the sum ``largest`` that the ascent needs there. Measured once: a policy may
        have asked before.

        Args:
            into: the sum.
            ema: (decay, coefficient): update AE-SAM's statistics in the same launch.
        """
        if self._measured != into or ema:
            self._norm(into, True, ema)

    def plain_norm(self) -> str:
        r"""The sum that holds :math:`\|g\|_2^2` of the gradients that are there; measured now where none does."""
        if self._measured is None or not self._plain:
            self._norm("last")
            return "last"
        return self._measured

    def _norm(self, into: str, directed: bool = False, ema: tuple[float, float] | None = None) -> None:
        scaled = directed and self.layouts.scaled
        peaked = directed and self._direction.exponent not in (0.0, 1.0)
        # The statistics need the norms of all layouts: they lie with the first one, whose launch is the last.
        for i in reversed(range(len(self.layouts))):
            layout = self.layouts[i]
            statistics, decay, coefficient = layout.empty, 0.0, 0.0
            if ema and i == 0 and not self.spread:
                self.scalars.share(into)
                statistics, (decay, coefficient) = self.scalars["ema"], ema
            sq, scratch = self.scalars.row(into, layout.device), (layout.partials, statistics)
            params, *walk = layout.walk
            numbers = {"buffer": i, "decay": decay, "coefficient": coefficient, "dtype": layout.dtype}
            if scaled and layout.any_scaled:
                radius = self._radius(None, layout.device)
                ops.norm_scaled.default(sq, *scratch, params, layout.master, *walk, radius, **numbers)
            elif peaked:
                ops.norm_max.default(sq, self.scalars.row("largest", layout.device), *scratch, *walk, **numbers)
            else:
                ops.norm.default(sq, *scratch, *walk, **numbers)
        self._complete(into)
        if peaked:
            self._complete("largest", largest=True)
        if ema and self.spread:
            sq = self.scalars.row(into, self.layouts[0].device)
            update_ema(self.scalars["ema"], self.apart.mean(sq) if self.apart else sq, *ema)
        self._measured, self._plain = into, not scaled

    def powers(self) -> None:
        r"""The sum ``powers`` :math:`= \sum_i (|g_i| / m)^q` of the gradient whose largest magnitude m ``norm`` found:
        :math:`\|g\|_q = m\, \text{powers}^{1/q}`."""
        for i, layout in enumerate(self.layouts):
            powers, largest = (self.scalars.row(name, layout.device) for name in ("powers", "largest"))
            _, *walk = layout.walk
            q = self._direction.exponent + 1
            ops.norm_p.default(powers[i], layout.partials, *walk, largest, q=q, dtype=layout.dtype)
        self._complete("powers")

    def fired(self) -> bool:
        """AE-SAM's decision of this step, read on the host."""
        return bool(self._receiver.read(self.scalars["ema"][FIRED:]))

    def all_finite(self, *sums: str) -> Tensor:
        """Whether all of these sums are finite, 0-d on the device."""
        device = self.layouts[0].device
        return torch.stack([self.scalars.row(name, device).sum() for name in sums]).sum().isfinite()

    @property
    def everybody(self) -> Processes | None:
        """The processes that average their gradients, where ``model=``, a trainer or DTensors tell of them."""
        scope = self.layouts.scope
        return everybody_of(self.parallel, scope) or everybody_of(self.settings.model, scope)

    def read(self, *values: Any, mean: bool = False) -> list[float]:
        """Numbers or tensors of one element, read on the host in one go.

        Args:
            mean: over ``everybody``: one all-reduce.
        """
        like = self.scalars.row("first", self.layouts[0].device)
        wide = [x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64, device="cpu") for x in values]
        numbers = torch.stack([x.detach().reshape(()).to(like) for x in wide])
        if mean and (found := self.everybody) is not None:
            numbers = found.all_reduce(numbers) / found.size
        read: list[float] = self._receiver.read(numbers).tolist()
        return read

    def dots(self) -> None:
        r"""The sums ``last`` :math:`= \|g_s\|_2^2` and ``dot`` :math:`= \langle g, g_s \rangle` of the gradient that is
        there, g_s, and the kept one, g."""
        for i, layout in enumerate(self.layouts):
            sums = self.scalars.rows("last", "dot", layout.device)[:, i]
            kept = layout.buffer("gradient")
            _, *walk = layout.walk
            ops.dots.default(sums, layout.partials, kept, *walk, dtype=layout.dtype)
        self._complete("last", "dot")
        self._measured, self._plain = "last", True

    def project(self, into: str) -> None:
        r"""The state ``into`` :math:`= g_s - \frac{\langle g, g_s \rangle}{\|g\|_2^2}\, g`, and as a sum its squared
        norm."""
        names = ((into,),) * len(self.layouts.param_groups)
        for i, layout in enumerate(self.layouts):
            head = (layout.buffer(into), self.scalars.row(into, layout.device)[i], layout.partials)
            products = self.scalars.rows("first", "dot", layout.device)
            kept = layout.buffer("gradient")
            _, *walk = layout.walk
            ops.project.default(*head, kept, *walk, products, dtype=layout.dtype)
            self.layouts.states[i].expose(self.layouts.state, names, layout.table.touched)
        self._complete(into)
        self.layouts.count_own()

    def combine(self, into: str, v: str, a: float, b: float, *, x: str | None = None) -> None:
        r"""The flat buffer ``into`` :math:`= a\, x + b\, v`; x alone as long as there is no v. And as a sum its squared
        norm: the state's own, or ``first`` for the scratch ``direction``.

        Args:
            into: a name of the algorithm's state, or ``direction``. State is written only where the norms of the
                gradients of all passes so far are finite; so write it when the last one is there.
            v: a name of the algorithm's state; may be ``into``. A parameter that has none yet has zeros. There is no v
                where its norm over all parameters is up to ``schema.NORM_MIN``.
            x: a flat buffer, of the parameters that had a gradient in the pass that perturbed: before ``descend``.
                None: the gradients that are there. Other parameters' state stays as it is.
        """
        keeps = into in self.state_names
        checked = self._checked_sums() if keeps and self.settings.skip_nonfinite else None
        self.mix(v, v, constant=(1, 0), slope=(a - 1, b))
        self._mixed = False  # not for the descent
        total = into if keeps else "first"
        names = ((into,),) * len(self.layouts.param_groups)
        for i, layout in enumerate(self.layouts):
            first = layout.buffer(x) if x else layout.empty
            checks = self.scalars.rows(*checked, layout.device) if checked else layout.no_sums
            head = (layout.buffer(into), self.scalars.row(total, layout.device)[i], layout.partials)
            rest = (self.scalars.coefficients[layout.device], checks)
            _, *walk = layout.walk
            ops.combine.default(*head, first, layout.buffer(v), *walk, *rest, dtype=layout.dtype)
            if keeps:
                self.layouts.states[i].expose(self.layouts.state, names, layout.table.touched)
        self._complete(total)
        if keeps:
            self.layouts.count_own()

    def follow(self, name: str) -> None:
        """Take a flat buffer for the gradients that are there, until the next pass: ``norm`` measures it, ``ascend``
        goes along it. ``p.grad`` stays what it is.

        Args:
            name: ``direction``, of the parameters that have a gradient; its norm is known. Or state, of those that are
                trained and have such state.

        Raises:
            RuntimeError: for a direction of each process's own where one may lack gradients that another one has.
        """
        if self.alone and self.apart and self.apart.copies.looks_for_parameters:
            raise RuntimeError(
                f"{self._owner} averages what each process goes along: with m_sharpness= all of them need gradients of "
                "the same parameters, find_unused_parameters=False"
            )
        for layout, state in zip(self.layouts, self.layouts.states, strict=True):
            layout.follow(name, layout.table.has_gradient() if name in SCRATCH else state.trained(name))
        self._measured, self._plain = ("first", True) if name in SCRATCH else (None, False)
        self._followed = name if name in SCRATCH else None

    def _checked_sums(self) -> tuple[str, str]:
        """The first and the last of the sums that say whether the gradients of all passes so far are finite."""
        last = self.plain_norm()
        reduced = not self.alone or self._common
        return "first" if self.layouts.away and reduced else last, last

    def reduce_first(self) -> None:
        """The sum ``first`` of each process's own gradient becomes the mean of all: one number, in one collective."""
        if self.apart and not self._common:
            mean = self.apart.mean(self.scalars.row("first", self.layouts[0].device))
            for device in self.layouts.devices:
                self.scalars.row("first", device).copy_(mean)
            self._common = True

    def products_along(self, directions: Names, products: Names, rows: list[list[float | Tensor]]) -> None:
        r"""The sums ``first`` :math:`= \|g\|_2^2` and ``products``, of SGD's next momentum buffer with each of the
        directions: two each, of what does not depend on the gradient and of what it adds before clipping.

        Args:
            rows: the groups' numbers, ``schema.NUDGED``.
        """
        for i, (layout, state) in enumerate(zip(self.layouts, self.layouts.states, strict=True)):
            sq = self.scalars.row("first", layout.device)[i]
            along = self.scalars.rows(products[0], products[-1], layout.device)[:, i]
            values = self._group_table("nudged", rows, layout.device)
            params, grads, *walk = layout.walk
            momentum = layout.buffers.get("momentum_buffer", layout.empty)
            sums, weights = (sq, along, layout.partials), (params, layout.master)
            rest = (grads, momentum, state.step, layout.rows(directions))
            ops.nudge_dots.default(*sums, *weights, *rest, *walk, values, dtype=layout.dtype)
        self._complete("first", *products)
        self._measured, self._plain = "first", True

    def has(self, name: str) -> bool:
        """Whether there is such state of any parameter."""
        return any(name in layout.buffers for layout in self.layouts)

    def mix(
        self,
        numerator: str = "first",
        denominator: str = "first",
        *,
        constant: tuple[float, float],
        slope: tuple[float, float] = (0, 0),
        root: bool = False,
    ) -> None:
        """Let ``descend`` step along a g + b v with [a, b] = constant + slope q, q = numerator / denominator.

        Args:
            numerator, denominator: sums; with ``root`` their square roots. ``last`` is that of the gradient that is
                there, measured now where it was not. q is 0 where the denominator's root is up to ``schema.NORM_MIN``.
        """
        names = [self.plain_norm() if name == "last" else name for name in (numerator, denominator)]
        if self.alone and any(slope) and "first" in names:
            self.reduce_first()
        for device, coefficients in self.scalars.coefficients.items():
            x, y = (self.scalars.row(name, device) for name in names)
            ops.mix.default(coefficients, x, y, constant=constant, slope=slope, root=root)
        self._mixed = True

    # Numbers of the parameter groups.

    def _radius(self, length: float | None, device: torch.device) -> Tensor:
        """[groups, 2]: how far, with the sign of the group, and eta."""
        rows: list[list[float | Tensor]] = []
        for group in self.layouts.param_groups:
            rho, eta = self._direction.radius(group) if length is None else (length, 0.0)
            rows.append([-rho if group.get("maximize") else rho, eta])
        return self._group_table("radius" if length is None else "ascent" if length > 0 else "descent", rows, device)

    def _group_table(self, name: str, rows: list[list[float | Tensor]], device: torch.device) -> Tensor:
        shape = (len(rows), len(rows[0]))
        table = self._tables.get((name, device))
        if table is None or table.shape != shape:
            table = self._tables[name, device] = GroupTable(shape, device)
        return table.update(rows)

    def _counters_for(self, layout: Layout, counted: bool = True) -> Tensor:
        """The counters for one layout of a step, so that each step counts once; nothing for the others."""
        counters: Tensor = self.scalars["counters"]
        return counters if counted and layout is self.layouts[0] else counters[:0]
