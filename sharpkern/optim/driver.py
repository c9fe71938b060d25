"""The driver: it runs an algorithm's passes for ``step(closure)``, for stepping by hand and through exceptions.

A step is open while its algorithm is under way; whether weights are away the layouts know.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as uncompiled  # torch.compiler.disable, which imports torch._dynamo at once
from torch.amp.grad_scaler import GradScaler

from ..policy import Scheduled
from .accumulation import kept
from .checkpoint import Checkpoints
from .step import AGAIN, AS_IS, DONE, Passes, Step, Wish

# Said of a first pass, by hand and by a closure.
NO_GRADIENT = (
    "first_step() found no gradient, so the weights do not move: call backward() before it",
    "the closure left no gradient, so this step trains nothing: does it call loss.backward()? (A trainer that hands "
    "over a closure which does nothing wants first_step() and second_step())",
)
# Said of a first step whose backward is yet to come.
EARLY = (
    "first_step() of {} comes before the only backward of a step, and does not look at the gradients that are there: a "
    "loop with a backward before it, too, costs twice as much. Where another loss left them, zero_grad() says so"
)


class Driver(Checkpoints):
    """Steps, whatever the algorithm. A compiled function that contains one has a graph break there."""

    # Whether the algorithm takes more passes than stepping by hand has.
    closure_only = False
    # Whether it takes one gradient, and moves the weights before there is any. ``first_step`` then comes before the
    # backward, and a closure is called once.
    one_gradient = False
    # Whether it takes one pass, always: ``step()`` without a closure is then the algorithm's step.
    one_pass = False
    # Composer's question whether ``step`` takes a closure that unscales under AMP: it hands none to other optimizers.
    _step_supports_amp_closure = True

    def passes(self, step: Step) -> Passes:
        """The algorithm. It starts with the gradients of the first pass, and yields where it needs the caller."""
        raise TypeError(f"{type(self).__name__} has no passes")

    def _run(self, closure: Callable[[], Any] | None, begin: bool, through: bool = False) -> Wish | None:
        """Run the algorithm: with a closure to its end, without to where it needs the caller.

        Args:
            begin: a new step, with the gradients that are there.
            through: without a closure to its end, too: it takes one pass.

        Returns:
            What it needs; None at its end.
        """
        step, loss, collect = self._bound(), None, begin
        try:
            while True:
                with torch.no_grad():
                    if collect:
                        step.refresh()
                        step.collect()
                        alone = step.apart is not None and step.apart.local  # others may have some
                        if begin != self.one_gradient and not through and not alone:
                            step.warn_without_gradients(NO_GRADIENT[closure is not None])
                    if begin:
                        step.share_first()
                        step.passes = self.passes(step)
                        if not isinstance(step.passes, Generator):
                            raise TypeError(f"{type(self).__name__}.passes should be a generator: it has no yield")
                    wish = step.send(loss)
                    if wish is DONE:
                        step.finish()
                        return None
                    if not isinstance(wish, Wish):
                        raise RuntimeError(f"{type(self).__name__}.passes yielded {wish!r}: expected AGAIN or AS_IS")
                    if wish is AGAIN and not self.one_gradient:
                        step.freeze()
                    elif wish is AS_IS:
                        step.join()
                        step.count_plain()
                    if wish is AGAIN or (closure is None and not through):
                        step.release()
                if closure is None and not (through and wish is AS_IS):
                    if wish is AS_IS:
                        step.watch()
                    elif not self.one_gradient:
                        step.watch_reset()
                    return wish
                begin, collect, loss = False, wish is AGAIN, None
                if collect and closure is not None:
                    step.reset_gradients()
                    result = self._evaluate(closure)
                    # What a two-pass algorithm does not look at need not live on: a loss holds its graph.
                    loss = result if self.closure_only else None
                    del result
                    if not step.is_open:
                        return None  # the closure cancelled the step: restore()
        except BaseException:
            self.restore()
            raise

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are those of another pass, as between ``first_step`` and ``second_step``."""
        return self._step.layouts.away

    def _refuse_by_hand(self) -> None:
        if self.closure_only:
            raise RuntimeError(f"{type(self).__name__} takes more passes than two: call step(closure)")

    def _refuse_accumulated(self, what: str) -> None:
        if self._step.micro_batches:
            raise RuntimeError(f"{what} after accumulate(): step() takes all passes of it, restore() drops it")

    @uncompiled
    def first_step(self, zero_grad: bool = False, *, scaler: GradScaler | None = None) -> bool:
        """After the first backward: measure the gradient and perturb the weights, where the policy wants it. An
        algorithm of one gradient perturbs before it.

        When it returns False the gradients may still be changed (clipped, averaged) before ``second_step``, which
        measures them once more.

        Args:
            zero_grad: reset the gradients afterwards, when a second backward is wanted.
            scaler: that scaled the losses, where it did: the gradients are measured unscaled. They are unscaled in
                place where another backward is wanted, and scaled as before where none is, so that the same may follow:
                ``scaler.unscale_(opt)`` and clipping, if wanted; ``second_step()``, which unscales them otherwise, or
                ``scaler.step(opt)``.

        Returns:
            True when the weights are perturbed and a second backward is wanted; False when ``second_step`` is to
            use the gradients that are there.

        Raises:
            RuntimeError: when a first pass is pending already, for a sparse gradient, or for an algorithm of more
                passes; for a scaler with ``skip_nonfinite=False`` or before its update. No weight changed.
            TypeError: for what is no scaler.
        """
        self._refuse_by_hand()
        self._refuse_accumulated("first_step()")
        if self._step.is_open:
            raise RuntimeError(
                "first_step() was called twice: call second_step(), step() or restore() in between (a GradScaler does "
                "not step after an overflow: restore() after scaler.step())"
            )
        apart = self._step.apart
        if apart and (apart.inside or not apart.taken):
            raise RuntimeError(
                "with m_sharpness the first forward and backward belong into `with opt.first_pass():`, which leaves "
                "out the exchange of gradients"
            )
        step, unscaler = self._bound(), self._step.unscaler
        if self.one_gradient:
            step.warn_of_discarded_gradients(EARLY.format(type(self).__name__))
        unscaler.begin(scaler, step.settings.skip_nonfinite, self)

        def measure() -> bool:
            return self._run(None, begin=True) is AGAIN

        again = measure() if self.one_gradient else unscaler.measuring(measure)
        if again and zero_grad:
            self.zero_grad()
        return again

    def first_pass(self) -> AbstractContextManager[None]:
        """Around the first forward and backward of a step by hand, where ``m_sharpness`` is not "global": gradients are
        not exchanged there when another pass may follow. Elsewhere, and in a step's closure, it does nothing.

        Example::

            with opt.first_pass():
                loss_fn(parallel(x), y).backward()
            if opt.first_step(zero_grad=True):
                loss_fn(parallel(x), y).backward()
            opt.second_step(zero_grad=True)
        """
        apart = self._step.apart
        if apart is None or self._step.is_open:
            return nullcontext()
        policy = self.policy
        return apart.first_pass(not isinstance(policy, Scheduled) or policy.second_pass(self._step.t))

    @uncompiled
    def second_step(self, zero_grad: bool = False) -> None:
        """After the second backward: the base update, from the unperturbed weights. Runs through ``step()``.

        Args:
            zero_grad: reset the gradients afterwards.

        Raises:
            RuntimeError: without a ``first_step`` before it.
        """
        self._refuse_by_hand()
        self._refuse_accumulated("second_step()")
        if not self._step.is_open:
            raise RuntimeError("second_step() was called before first_step()")
        self.step()
        if self._step.is_open:
            self.restore()  # a scaler within a wrapper's step met an overflow, and did not step
        if zero_grad:
            self.zero_grad()

    @uncompiled
    def accumulate(self, closure: Callable[[], Any]) -> Any:
        """Add the gradient of a micro-batch. ``step()`` without a closure takes the step of all of them: to the bit
        that of ``step(closure)`` with a closure that calls theirs in their order.

        The first one of a step resets the gradients, as ``step(closure)`` does. Closures are kept, with what they refer
        to, until the step is done or dropped: by ``restore()``, ``zero_grad()`` or an exception in any of them. An
        algorithm that takes one pass keeps none; one of one gradient has its weights away from the first micro-batch to
        the step.

        Args:
            closure: computes the loss of the micro-batch, calls backward and returns the loss, divided by their number
                where the step is to be of the mean. It resets no gradients. It is called now, and once more for each
                further pass: it must not read what changes meanwhile, such as the variables of a loop.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: between ``first_step`` and ``second_step``, within such a closure, where the gradients were
                changed since the last one (clipped, unscaled, reset), which further passes would not see, with
                ``m_sharpness``, and for an algorithm whose passes are not sums over micro-batches.
        """
        step = self._bound()
        micro_batches, keep = step.micro_batches, not (self.one_gradient or self.one_pass)
        if not callable(closure):
            raise TypeError(f"closure should be a function, but got {closure!r}")
        if step.apart:
            raise RuntimeError(
                "accumulate() with m_sharpness: call step(closure) with a closure that goes over the micro-batches"
            )
        first = not micro_batches
        if first:
            self._refuse_open("accumulate()")
            step.warn_of_discarded_gradients()
            step.reset_gradients()
            if self.one_gradient:
                self._run(None, begin=True)
        elif keep:
            self._check_accumulated()
        loss = self._evaluate(lambda: micro_batches.take(closure, keep))
        step.choose_witness()
        if keep:
            step.note_accumulated(first)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What ``scaler.step(opt)`` asks first: no. It unscaled the gradients of the first pass and no other's."""
        if self._step.micro_batches.kept:
            raise RuntimeError("scaler.step() after accumulate(): call step(scaler=scaler), which unscales each pass")
        return False

    def _check_accumulated(self) -> None:
        """Drop what was accumulated, and raise, where another pass would not have the gradients that are there."""
        try:
            self._step.micro_batches.check_between()
            self._step.check_unchanged()
        except RuntimeError:
            self.restore()
            raise

    def _accumulated(self, closure: Callable[[], Any] | None, scaler: GradScaler | None) -> Callable[[], Any] | None:
        """A closure for all passes of the step that ``accumulate`` began, its first call done; ``closure`` is one more
        micro-batch. None where that dropped them."""
        step = self._step
        try:
            if closure is not None:
                self.accumulate(closure)
            elif not (self.one_gradient or self.one_pass):
                self._check_accumulated()
            if not step.micro_batches:
                return None
            step.unscaler.begin(scaler, step.settings.skip_nonfinite)
            step.unscaler.refuse_unscaled()
            return step.micro_batches.closure()
        except BaseException:
            self.restore()
            raise

    @uncompiled
    def step(self, closure: Callable[[], Any] | None = None, *, scaler: GradScaler | None = None) -> Any:
        """One optimizer step.

        Args:
            closure: computes the loss, calls backward and returns the loss. It is called once a pass, with
                gradients reset before each call: those that are there already are not used, and a warning says so
                once. A closure that leaves no gradient trains nothing, which a warning says once, too.
            scaler: with a closure that calls ``scaler.scale(loss).backward()`` and returns the loss itself: gradients
                are unscaled in place after each call, a step that overflowed in any pass is skipped, and the scaler
                hears of it; ``scaler.update()`` is left to the caller.

        Returns:
            What the first call returned, of a tensor a copy without its graph; None without a closure.

        After ``accumulate`` this is the step of all its micro-batches, of which a closure is one more (one that does
        nothing will do); it returns the sum of what they returned in the first pass, where those are numbers.

        After ``first_step`` this finishes the step with the gradients that are there. A closure is called once
        before, at the perturbed weights; gradients are not reset then, so that one that does nothing will do (trainers
        pass such a one).

        Without a closure and without a ``first_step`` before it, this is a plain step of the base optimizer: no
        policy and no statistic sees it. ``stats["base_steps"]`` counts it, and a warning says so once; a step with a
        learning rate of 0 on zero gradients, by which tools make an optimizer's state, does neither. Of an algorithm
        that takes one pass it is the step.

        Raises:
            RuntimeError: for a sparse gradient; within a closure of an algorithm of more passes than two; for a scaler
                without a closure or micro-batches, with ``skip_nonfinite=False``, or before its update.
            TypeError: for what is no scaler.
        """
        step, loss = self._bound(), None
        if step.apart and step.apart.inside:
            raise RuntimeError("step() within first_pass(), which is for the first forward and backward by hand")
        accumulated = bool(step.micro_batches)
        if accumulated:
            closure = self._accumulated(closure, scaler)
            if closure is None:
                return None
            if step.is_open:  # the weights are away already
                loss, closure = closure(), None
        elif scaler is not None and (closure is None or step.is_open):
            raise RuntimeError("step(scaler=) goes with a closure of all passes; by hand: first_step(scaler=)")
        if step.is_open:
            self._refuse_by_hand()
            if closure is not None:
                loss = self._evaluate(closure)
            if step.is_open:  # else the closure cancelled it
                try:
                    step.unscaler.unscale_last()
                    with torch.no_grad():
                        step.refresh()
                        step.collect()
                except BaseException:
                    if accumulated:  # nobody began a step by hand
                        self.restore()
                    raise
                step.warn_of_added_gradients()
                step.warn_of_kept_gradients()
                step.warn_without_gradients("second_step() found no gradient, so this step trains nothing")
                if self._run(None, begin=False) is not None:
                    self.restore()
                    raise RuntimeError(f"{type(self).__name__} takes more passes than two: call step(closure)")
        elif closure is not None:
            if not accumulated:
                closure = self.adapt(closure)
                step.warn_of_discarded_gradients()
                step.reset_gradients()
                step.unscaler.begin(scaler, step.settings.skip_nonfinite)
            closure = step.unscaler.unscaling(closure)
            if self.one_gradient:
                losses: list[Any] = []
                self._run(lambda: losses.append(closure()), begin=True)
                (loss,) = map(kept, losses)
            else:
                step.loss = loss = kept(self._evaluate(closure, first=True))
                self._run(closure, begin=True)
        elif self.one_pass:
            self._run(None, begin=True, through=True)
        else:
            with torch.no_grad():
                try:
                    step.refresh()
                    step.collect()
                    step.join()
                    step.count_base_step()
                    step.descend()
                finally:
                    step.finish()
        return loss

    def adapt(self, closure: Callable[..., Any]) -> Callable[[], Any]:
        """What a new step calls once a pass; an algorithm may ask another kind of closure of its user."""
        return closure

    def _evaluate(self, closure: Callable[[], Any], first: bool = False) -> Any:
        """What a closure returns; where it raises, the weights are given back."""
        try:
            with torch.enable_grad(), self.first_pass() if first else nullcontext():
                return closure()
        except BaseException:
            self.restore()
            raise

    @uncompiled
    @torch.no_grad()
    def restore(self) -> None:
        """Give the unperturbed weights back and cancel the pending step. Does nothing when none is pending.

        The step's number stays taken: a policy that wanted its second pass does not make up for it.

        Raises:
            RuntimeError: amid what a step computes between its passes, as from a signal's handler.
        """
        step = self._bound()
        if getattr(step.passes, "gi_running", False):
            raise RuntimeError(
                "restore() was called while the step computes (from a signal's handler?): raise an exception there, "
                "and the step gives the weights back"
            )
        if step.layouts.away:
            step.refresh(leaving=True)
            step.back()
        try:
            if step.passes is not None:
                step.passes.close()
        finally:
            step.finish()

    @uncompiled
    @torch.no_grad()
    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Reset the gradients, as in torch.

        Args:
            set_to_none: to None, or to zero where there are any. By default to None, but with ``flatten=True`` to zero:
                autograd adds to what lies in the flat buffer, which takes 16 bytes a parameter (float32) in a backward.
                None under ``flatten`` has each pass copy the gradients there, which takes 8.
        """
        step = self._bound()
        if step.micro_batches.resetting():
            self.restore()
        if set_to_none is None:
            set_to_none = not step.layouts.flatten
        if set_to_none or not step.layouts.flatten or not len(step.layouts):
            super().zero_grad(set_to_none)
            step.note_gradient()
        else:
            step.reset_gradients()

    def take_parameters(self) -> None:
        """With ``master_weights=True``: the parameters as they are now are the weights, wherever they are not what the
        half type has of their masters. After writes that torch does not count as such (through ``.data``, by
        collectives of ``torch.distributed``, between replays of a CUDA graph); others are noticed by themselves.

        Raises:
            RuntimeError: while the weights are perturbed.
        """
        self._refuse_perturbed("take_parameters()")
        for layout in self._bound().layouts:
            layout.doubt_parameters()

    def unflatten(self) -> None:
        """Undo ``flatten=True``: every parameter and gradient gets memory of its own again."""
        self._step.layouts.unflatten()

    @property
    def base_optimizer(self) -> Driver:
        """This optimizer, so that scripts which hand ``opt.base_optimizer`` to a scheduler find the groups."""
        return self

    @property
    def stats(self) -> dict[str, Tensor]:
        """0-d tensors on the device of the parameters, read without waiting for it.

        ``grad_norm``: the norm of the last first pass that was measured; ``steps``: first passes; ``second_passes``;
        ``skipped_steps``: steps that met a gradient that was not finite; ``base_steps``: those of the base optimizer
        alone, by ``step()`` without a closure or a first pass. With an adaptive policy, of the squared
        gradient norm: ``ema_mean``, ``ema_var`` and ``threshold``, what it was compared with last (NaN before). And
        every fraction that the algorithm declares.
        """
        scalars = self._step.scalars
        steps, second, skipped = scalars["counters"].clone().unbind()
        stats = {
            "grad_norm": scalars["squared_norm"].sqrt(),
            "steps": steps + scalars["plain_steps"],
            "second_passes": second,
            "skipped_steps": skipped,
            "base_steps": torch.full_like(steps, scalars["base_steps"]),
        }
        if "ema" in scalars:
            stats["ema_mean"], stats["ema_var"], stats["threshold"], _ = scalars["ema"].clone().unbind()
        fractions = {name: value for name, value in scalars.host.items() if isinstance(value, float)}
        return stats | {name: torch.full_like(stats["grad_norm"], value) for name, value in fractions.items()}
