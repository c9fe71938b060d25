"""The verbs of a step: what an algorithm says between its passes.

``norm`` and ``dots`` measure, ``keep`` leaves tensors out of the direction, ``ascend`` moves the weights away,
``rewind`` and ``back`` bring them home, ``project`` makes LookSAM's direction, ``combine`` a running average or a
direction that an ascent can ``follow``, ``mix`` the coefficients of a mixed gradient. ``descend`` takes the base rule's
step, ``nudge`` SGD's with its part along some directions scaled, ``shift`` one past it. A step is one object for
the whole life of an optimizer, mutated and never replaced: trainers wrap optimizers in proxies that share its
attributes and keep their own writes.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from enum import Enum
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..batch_stats import Buffers
from ..memory import transfer
from ..memory.state import Names
from ..rules import FusedRule, WrappedRule
from ..rules.fused import SGDRule
from .accumulation import MicroBatches
from .measure import Measurements, ops
from .unscaler import Unscaler


class Wish(Enum):
    """What an algorithm yields where it needs the caller."""

    AGAIN = "another gradient, where the weights are now"
    AS_IS = "the gradients that are there, which the caller may still change"


AGAIN, AS_IS = Wish.AGAIN, Wish.AS_IS
DONE = object()  # what the driver gets at an algorithm's end

# An algorithm between two passes: it yields a wish, and where it is stepped by a closure only, it is sent the loss of
# the evaluation that followed; else None.
Passes = Generator[Wish, Any, None]


@cache
def _plain_sgd() -> SGDRule:
    """What moves weights past the base rule. Made late: a torch optimizer imports torch._dynamo."""
    return SGDRule(torch.optim.SGD, {})


class Step(Measurements):
    """The step that is under way, with the arguments of :class:`Measurements`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # An open step is one whose algorithm is under way.
        self.passes: Passes | None = None
        self.loss: Any = None  # what the closure returned in the first pass
        self.loading: dict[str, Any] | None = None  # the state dict that is being loaded
        self._sums = "last", "last"  # of the last descent: the first and the last norm of its gradients
        self._counted = False  # whether this step counts in the statistics already
        self._buffers: Buffers | None = None  # of the model, as the first pass left them
        self.unscaler = Unscaler(self.layouts, id(arguments[0]), self.apart)
        self.micro_batches = MicroBatches()

    # Moving.

    def ascend(self, length: float | None = None, *, along: str = "first", keep_gradient: bool = False) -> None:
        """Move the weights along the gradient: by the direction's radius, or by a length. A first ascent keeps them.

        Args:
            length: in units of the weights; below 0 it descends. None: the groups' radius, and along the first
                gradient a second pass counts.
            along: the sum that holds the squared norm of the gradient, measured now where it was not.
            keep_gradient: for ``dots`` and ``project``, and as the direction ``gradient`` of ``descend``.

        Raises:
            RuntimeError: for a kept gradient where the direction is not along it.
        """
        exponent = self._direction.exponent if length is None else 1.0
        if keep_gradient and length is None and (exponent != 1 or self.layouts.scaled):
            raise RuntimeError("ascend(keep_gradient=True) goes along the whole gradient, unscaled, in the 2-norm only")
        self.norm(along)
        if exponent not in (0.0, 1.0):
            self.powers()
        keep, counts = not self.layouts.away, length is None and along == "first" and not self._counted
        if counts:
            self._count(plain=False)
            if not len(self.layouts):  # nor a kernel that counts
                self.scalars["counters"][:2] += 1
        numbers = {"eps": self.settings.perturb_eps, "skip_nonfinite": self.settings.skip_nonfinite}
        # Before anything moves: an interrupt may come right after a kernel.
        self.layouts.away = True
        for layout in self.layouts:
            if keep:
                layout.table.before_ascent()
            else:
                layout.keep_others()
            backup = layout.buffer("backup") if keep else layout.empty
            kept = layout.buffer("gradient") if keep_gradient else layout.empty
            radius, sq = self._radius(length, layout.device), self.scalars.rows(along, along, layout.device)
            params, *walk = layout.walk
            rest = (self._counters_for(layout, counts), *walk, radius, sq)
            if layout.any_scaled and length is None:
                ops.ascend_scaled.default(params, backup, *rest, **numbers, dtype=layout.dtype)
            elif exponent != 1:
                sums = (self.scalars.row(name, layout.device) for name in ("largest", "powers"))
                ops.ascend_p.default(params, backup, *rest, *sums, exponent=exponent, **numbers, dtype=layout.dtype)
            else:
                ops.ascend.default(params, backup, kept, *rest, **numbers, dtype=layout.dtype)
            if keep:
                layout.table.after_ascent()
            layout.written()
        if counts and self.apart and self.apart.local:
            kept_for = "gradient" if keep_gradient else self._followed
            if kept_for:
                self.apart.keep(self.layouts, kept_for, partial(self.scalars.row, "first"))
        # An autocast region around the passes keeps low-precision copies of the weights.
        torch.clear_autocast_cache()

    def keep(self, kept: Tensor) -> bool:
        """Leave tensors out of the direction of this step: the norm is taken, and the ascent made, of the others.

        Args:
            kept: bool, one a parameter, in the order of the groups.

        Returns:
            Whether any gradient is left in it; True where there is none at all.

        Raises:
            RuntimeError: in a capture, whose replays would keep the same ones for ever.
        """
        if any(map(transfer.is_capturing, self.layouts.devices)):
            raise RuntimeError("a step that draws tensors cannot be captured in a CUDA graph")
        for layout, places in zip(self.layouts, self.layouts.places, strict=True):
            layout.table.leave_out(~kept[places])
        self._measured = None
        if self.apart and self.apart.local and self.apart.copies.may_miss:
            return True  # others may have a gradient that is left in
        return not self.has_gradients or any(layout.table.any_left_in() for layout in self.layouts)

    def rewind(self) -> None:
        """The weights are at home, and kept on: the next ascent starts from there."""
        self.layouts.restore()

    def back(self) -> None:
        """The weights are at home. Nothing happens where they already are."""
        if self.layouts.away:
            self.layouts.restore()
            self.layouts.finish()

    def descend(self, direction: str | None = None) -> None:
        """The base rule's step from the weights at home, with the gradients that are there, or along a g + b v after
        ``mix``. The norm of the gradient is measured where the check for infinities or the clipping needs it.

        Args:
            direction: the flat buffer v: ``gradient``, or a name of the algorithm's state.

        Raises:
            RuntimeError: for a direction that is not there, or without ``mix`` to say how much of it.

        Where the algorithm declares a number ``lr_scale``, every group's learning rate is scaled by it; the group's own
        stays the user's and the scheduler's.
        """
        if direction and len(self.layouts) and not (self._mixed and self.has(direction)):
            raise RuntimeError(f"descend({direction!r}) needs such a buffer, and mix() to say how much of it")
        self.count_plain()
        if self.settings.skip_nonfinite:
            first, last = self._checked_sums()
        else:
            first = last = "last" if math.isinf(self.settings.max_norm) else self.plain_norm()
        self._sums = first, last
        if direction == "gradient":
            for layout in self.layouts:
                layout.complete_kept_gradient()
        if isinstance(self.rule, WrappedRule):
            self._step_wrapped(self.rule, first, last, direction)
            self.layouts.state_written()
        else:
            self._step_fused(self.rule, first, last, direction)

    def shift(self, direction: str, scale: float = 1.0) -> None:
        r"""After ``descend`` :math:`w \leftarrow w - s\, \eta\, (a\, g + b\, v)`, past the base rule: with the group's
        learning rate, without momentum and decay. Where the descent was skipped nothing moves, and what it clipped is
        clipped by the same factor.

        Args:
            direction: v, as there; ``mix`` says how much of it.
            scale: s, 0 or more.
        """
        plain = _plain_sgd()
        lent = [
            {"lr": scale * group["lr"], "maximize": bool(group.get("maximize"))} for group in self.layouts.param_groups
        ]
        rows = [plain.values({**plain.defaults, **options}) for options in lent]
        for layout, state in zip(self.layouts, self.layouts.states, strict=True):
            layout.finish()  # in place: no backup is in use
            layout.collect(self._bad_gradient)
            plain.step(
                state,
                self._counters_for(layout, counted=False),
                layout.master,
                layout.buffer(direction),
                self._group_table("shift", rows, layout.device),
                self.scalars.rows(*self._sums, layout.device),
                self.scalars.coefficients[layout.device],
                self.settings.max_norm,
                self.settings.skip_nonfinite,
            )
            layout.written()

    def _lr_scale(self) -> float:
        return float(self.scalars["lr_scale"]) if "lr_scale" in self.scalars else 1.0

    def _step_fused(self, rule: FusedRule, first: str, last: str, direction: str | None) -> None:
        groups, lr_scale = self.layouts.param_groups, self._lr_scale()
        scaled = groups if lr_scale == 1.0 else [{**group, "lr": group["lr"] * lr_scale} for group in groups]
        rows = [rule.values(group) for group in scaled]
        self.expose()
        for layout, state in zip(self.layouts, self.layouts.states, strict=True):
            sums = self.scalars.rows(first, last, layout.device)
            rule.step(
                state,
                self._counters_for(layout),
                layout.buffer("backup") if self.layouts.away or layout.masters else layout.empty,
                layout.buffers.get(direction or "", layout.empty),
                self._group_table("values", rows, layout.device),
                sums,
                self.scalars.coefficients[layout.device] if self._mixed else layout.empty,
                self.settings.max_norm,
                self.settings.skip_nonfinite,
            )
            if layout.table.empty is not None:
                finite = sums.sum(-1).isfinite().all()
                state.count_empty(finite if self.settings.skip_nonfinite else finite | True)
            layout.written()
        self.layouts.away = False

    def expose(self, trained: bool = False) -> None:
        """Put state of rule and algorithm where it belongs: of parameters with a gradient, or of all trained ones."""
        rule, groups = self.rule, self.layouts.param_groups
        assert isinstance(rule, FusedRule)
        self.layouts.expose(tuple((*rule.state_names(group), *self.state_names) for group in groups), trained)

    def _step_wrapped(self, rule: WrappedRule, first: str, last: str, direction: str | None) -> None:
        self.back()
        sums = {device: self.scalars.rows(first, last, device).sum(-1) for device in self.layouts.devices}
        if sums and self.settings.skip_nonfinite and not bool(sums[self.layouts[0].device].isfinite().all()):
            self.scalars["counters"][2] += 1
            return
        self.layouts.expose((self.state_names,) * len(self.layouts.param_groups))
        max_norm, clip = self.settings.max_norm, {}
        if not math.isinf(max_norm):
            clip = {device: (max_norm / (sq[-1].sqrt() + 1e-6)).clamp(max=1.0) for device, sq in sums.items()}
        coefficients = self.scalars.coefficients if self._mixed else {}
        rule.step(self.layouts, self.state_names, direction, coefficients, clip, self._lr_scale())
        for layout in self.layouts:
            if layout.shards is not None:
                layout.shards.reshard()

    def nudge(self, directions: Names, products: Names) -> None:
        """SGD's step, whose part along orthonormal directions is scaled by the groups' ``nudge``. Nothing is written
        before all gradients and products are known.

        Args:
            directions: names of the algorithm's state, from its first one on.
            products: the sums of their products with the next momentum buffer, two each.
        """
        self.count_plain()
        groups, rule = self.layouts.param_groups, self.rule
        assert isinstance(rule, FusedRule)
        self.expose()
        rows: list[list[float | Tensor]] = [[*rule.values(group), float(group["nudge"])] for group in groups]
        self.products_along(directions, products, rows)
        numbers = {"max_norm": self.settings.max_norm, "skip_nonfinite": self.settings.skip_nonfinite}
        for layout, state in zip(self.layouts, self.layouts.states, strict=True):
            params, grads, *walk = layout.walk
            head = (params, layout.master, layout.buffers.get("momentum_buffer", layout.empty), state.step)
            values = self._group_table("nudged", rows, layout.device)
            sq = self.scalars.rows("first", "first", layout.device)
            along = self.scalars.rows(products[0], products[-1], layout.device)
            rest = (self._counters_for(layout), grads, layout.rows(directions), *walk, values, sq, along)
            ops.nudge_sgd.default(*head, *rest, **numbers, dtype=layout.dtype)
            layout.written()

    def skip(self) -> None:
        """Take no step, and count that."""
        self.count_plain()
        self.scalars["counters"][2] += 1

    # The driver's.

    @property
    def is_open(self) -> bool:
        """Whether a step is between two passes."""
        return self.passes is not None

    def refresh(self, leaving: bool = False) -> None:
        """Notice whatever the user moved, froze, loaded or added since the last pass; or to leave the step."""
        if self.apart:
            self.apart.wait()  # buffers may be laid out anew
        self.layouts.refresh(self.is_open, leaving)
        self.share()

    def reset_gradients(self) -> None:
        """Before a closure: no gradient; with ``flatten=True`` zeros where there are any. ``torch.optim``'s zero_grad
        tells profilers and compilers of itself, which takes longer than it does."""
        if self.layouts.flatten and len(self.layouts):
            with torch.no_grad():
                self.refresh()  # a moved parameter takes its gradient along
                self.layouts.zero_grads()
        else:
            for group in self.layouts.param_groups:
                for p in group["params"]:
                    p.grad = None
        self.note_gradient()

    def share(self, loaded: bool = False) -> None:
        """A wrapped optimizer has the same groups and the same state; ``loaded``: they hold something else now."""
        if isinstance(self.rule, WrappedRule):
            self.rule.share(self.layouts, self.state_names, loaded)

    def send(self, loss: Any) -> Any:
        """Run the algorithm to its next wish, with the loss of the evaluation that it wished for; DONE at its end."""
        passes = self.passes
        if passes is None:
            raise RuntimeError("restore() was called while the step ran")
        try:
            return passes.send(loss)
        except StopIteration:
            return DONE

    def count_plain(self) -> None:
        """This step takes no second pass that counts. A base step alone is none of an algorithm's."""
        if self.is_open and not self._counted:
            self._count(plain=True)

    def _count(self, plain: bool) -> None:
        self._counted = True
        self.scalars["t"] += 1
        self.scalars["plain_steps"] += plain

    def share_first(self) -> None:
        """The gradients of a first pass are those of the processes that share it."""
        if self.apart and self.apart.begin(self.layouts):
            self.collect()

    def join(self) -> None:
        """No second pass follows: the gradients become those of all processes."""
        if self.apart and self.apart.join(self.layouts):
            self.collect()

    def freeze(self) -> None:
        """Every pass from here on computes with the buffers of the model as the first pass left them, and its gradients
        are those of all processes."""
        if self.apart:
            self.apart.own = False
        if self._buffers is not None:
            self._buffers.restore()
        elif self.settings.model is not None:
            trained = (p for group in self.layouts.param_groups for p in group["params"])
            self._buffers = Buffers(self.settings.model, trained)

    def finish(self) -> None:
        """No step is open: the weights are at home, wherever its algorithm left them; no gradient is held."""
        was_open = self.is_open
        try:
            self.back()
            self.passes, self.loss, self._measured = None, None, None
            self._counted = self._mixed = self._common = False
            self._followed = None
            if self.apart:
                self.apart.end()
            self.micro_batches.drop()
            self.layouts.finish()
            self.unwatch()
            self.choose_witness()
        finally:
            if was_open:
                self.unscaler.end()
            if self._buffers is not None:
                self._buffers.restore()
                self._buffers = None
            torch.clear_autocast_cache()
