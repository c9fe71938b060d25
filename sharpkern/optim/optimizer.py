"""The driver: it runs an algorithm's passes for ``step(closure)``, for stepping by hand and through exceptions.

An algorithm is a subclass with ``passes``, a generator that says what happens between the passes in the order of its
paper: verbs of the step (``measure.py``, ``step.py``), and a yield where it needs the caller.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_number, check_params, warn_half
from ..direction import Direction
from ..memory.layouts import check_aliases, entries
from ..policy import Always, Policy, choose
from ..rules import make_rule
from .checkpoint import Checkpoints
from .measure import Settings
from .step import AGAIN, DONE, Passes, Step, Wish


class SharpnessAwareOptimizer(Checkpoints):
    """Base class of the optimizers that may look at the gradient more than once a step.

    Args:
        params, base_optimizer: as in :class:`sharpkern.SAM`, with the keyword arguments that all classes share.
        own: this algorithm's group options and their defaults.
    """

    # What an algorithm declares: where it goes; whether it takes more passes than stepping by hand has; arguments that
    # it refuses; and, set before ``__init__`` is called, numbers that it keeps (``memory/scalars.py``).
    direction = Direction()
    closure_only = False
    refused: tuple[str, ...] = ()
    scalars: Mapping[str, Any] = {}

    def __init__(
        self,
        params: Any,
        base_optimizer: Any,
        own: dict[str, Any],
        /,
        *,
        policy: Policy | None = None,
        perturb_eps: float = 1e-12,
        model: nn.Module | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        flatten: bool = False,
        **base_kwargs: Any,
    ) -> None:
        check_number(perturb_eps, "perturb_eps", positive=True)  # 0 would make a zero gradient NaN
        if max_grad_norm is not None:
            check_number(max_grad_norm, "max_grad_norm", positive=True)
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model should be a torch.nn.Module, but got {torch.typename(model)}")
        self.policy = choose(policy, Always)
        rule = make_rule(base_optimizer, base_kwargs, tuple(own), type(self).__name__)
        self.direction.check(own)
        max_norm = math.inf if max_grad_norm is None else float(max_grad_norm)
        self._knobs = (*vars(self), "_knobs")  # what a copy takes along; the rest is torch's, or made anew
        settings = Settings(float(perturb_eps), model, max_norm, bool(skip_nonfinite))
        self._step = Step(self, rule, settings, bool(flatten))
        super().__init__(params, {**rule.defaults, **own})
        warn_half(p for p, *_ in entries(self.param_groups))
        rule.share(self._bound().layouts, self.state_names)
        if flatten:
            self._step.layouts.lay_out()

    def __init_subclass__(cls) -> None:
        """Show the shared keyword arguments in the signature of every class; they are spelled once, above."""
        super().__init_subclass__()
        signature = inspect.signature(cls.__init__)
        own = [p for p in signature.parameters.values() if p.name != "self"]
        if cls.__init__.__module__.startswith("sharpkern.") and "kwargs" in signature.parameters:
            shared = inspect.signature(SharpnessAwareOptimizer.__init__).parameters
            left_out = {*signature.parameters, *cls.refused}
            rest = [p for p in shared.values() if p.kind == p.KEYWORD_ONLY and p.name not in left_out]
            own = [*own[:-1], *rest, shared["base_kwargs"]]
        cls.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]

    def passes(self, step: Step) -> Passes:
        """The algorithm. It starts with the gradients of the first pass, and yields where it needs the caller."""
        raise TypeError(f"{type(self).__name__} has no passes")

    def check_options(self, group: Mapping[str, Any]) -> None:
        """Raise for a group whose options are out of range."""
        self.direction.check(group)
        self._step.rule.check(dict(group))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch.

        Raises:
            ValueError, TypeError: for options out of range and parameters that cannot be optimized, before
                anything changed.
            RuntimeError: while a step is pending.
        """
        self._refuse_open("add_param_group()")
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        if "params" not in param_group:
            raise ValueError("param_group has no 'params'")
        group = dict(param_group)
        if not isinstance(group["params"], (Tensor, set)):
            group["params"] = list(group["params"])
        self.check_options({**self.defaults, **group})
        params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        known = {p for other in self.param_groups for p in other["params"]}
        trained = [(p, name) for p, _, _, name in entries(self.param_groups) if p.requires_grad and not p.is_meta]
        check_aliases(trained + check_params(params, len(self.param_groups), known))
        super().add_param_group(group)
        self._step.layouts.valid = False

    # Stepping.

    def _run(self, closure: Callable[[], Any] | None, begin: bool) -> Wish | None:
        """Run the algorithm: with a closure to its end, without to where it needs the caller.

        Args:
            begin: a new step, with the gradients that are there.

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
                    if begin:
                        step.passes = self.passes(step)
                    wish = step.send(loss)
                    if wish is DONE:
                        step.finish()
                        return None
                    if not isinstance(wish, Wish):
                        raise RuntimeError(f"{type(self).__name__}.passes yielded {wish!r}: expected AGAIN or AS_IS")
                    if wish is AGAIN:
                        step.freeze()
                    else:
                        step.count_plain()
                    if wish is AGAIN or closure is None:
                        step.release()
                if closure is None:
                    return wish
                begin, collect, loss = False, wish is AGAIN, None
                if collect:
                    self.zero_grad()
                    with torch.enable_grad():
                        result = closure()
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
        """Whether the weights are those of another pass: between ``first_step`` and ``second_step``."""
        return self._step.layouts.away

    def _refuse_by_hand(self) -> None:
        if self.closure_only:
            raise RuntimeError(f"{type(self).__name__} takes more passes than two: call step(closure)")

    def first_step(self, zero_grad: bool = False) -> bool:
        """After the first backward: measure the gradient and perturb the weights, where the policy wants it.

        When it returns False the gradients may still be changed (clipped, averaged) before ``second_step``, which
        measures them once more.

        Args:
            zero_grad: reset the gradients afterwards, when a second backward is wanted.

        Returns:
            True when the weights are perturbed and a second backward is wanted; False when ``second_step`` is to
            use the gradients that are there.

        Raises:
            RuntimeError: when a first pass is pending already, for a sparse gradient, or for an algorithm of more
                passes; nothing changed.
        """
        self._refuse_by_hand()
        if self._step.is_open:
            raise RuntimeError("first_step() was called twice: call second_step(), step() or restore() in between")
        again = self._run(None, begin=True) is AGAIN
        if again and zero_grad:
            self.zero_grad()
        return again

    def second_step(self, zero_grad: bool = False) -> None:
        """After the second backward: the base update, from the unperturbed weights. Runs through ``step()``.

        Args:
            zero_grad: reset the gradients afterwards.

        Raises:
            RuntimeError: without a ``first_step`` before it.
        """
        self._refuse_by_hand()
        if not self._step.is_open:
            raise RuntimeError("second_step() was called before first_step()")
        self.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step.

        Args:
            closure: computes the loss, calls backward and returns the loss. It is called once a pass, with
                gradients reset before each call.

        Returns:
            The loss of the first call; None without a closure. Without one, a pending step is finished; when
            none is pending this is a plain step of the base optimizer.

        Raises:
            RuntimeError: with a closure while a step is pending, or for a sparse gradient.
        """
        step = self._bound()
        if closure is not None:
            if step.is_open:
                raise RuntimeError("step(closure) while a step is pending: call second_step() or restore() first")
            self.zero_grad()
            with torch.enable_grad():
                step.loss = loss = closure()
            self._run(closure, begin=True)
            return loss
        with torch.no_grad():
            step.refresh()
            step.collect()
            if not step.is_open:
                step.descend()
                step.finish()
        if step.is_open and self._run(None, begin=False) is not None:
            self.restore()
            raise RuntimeError(f"{type(self).__name__} takes more passes than two: call step(closure)")
        return None

    @torch.no_grad()
    def restore(self) -> None:
        """Give the unperturbed weights back and cancel the pending step. Does nothing when none is pending."""
        step = self._bound()
        if step.layouts.away:
            step.refresh()
            step.back()
        try:
            if step.passes is not None:
                step.passes.close()
        finally:
            step.finish()

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as in torch. With ``flatten=True`` they stay views of the flat buffer, of zeros."""
        step = self._bound()
        if not step.layouts.flatten or not len(step.layouts):
            super().zero_grad(set_to_none)
            return
        step.refresh()  # a moved parameter takes its gradient along
        step.layouts.zero_grads()

    def unflatten(self) -> None:
        """Undo ``flatten=True``: every parameter and gradient gets memory of its own again."""
        self._step.layouts.unflatten()

    @property
    def base_optimizer(self) -> SharpnessAwareOptimizer:
        """This optimizer: scripts that hand ``opt.base_optimizer`` to a scheduler find the groups here."""
        return self

    @property
    def stats(self) -> dict[str, Tensor]:
        """0-d tensors on the device of the parameters, read without waiting for it.

        ``grad_norm``: the norm of the last first pass that was measured; ``steps``: first passes; ``second_passes``;
        ``skipped_steps``: steps that met a gradient that was not finite. With an adaptive policy, of the squared
        gradient norm: ``ema_mean``, ``ema_var`` and ``threshold``, what it was compared with last (NaN before).
        """
        scalars = self._step.scalars
        steps, second, skipped = scalars["counters"].clone().unbind()
        stats = {
            "grad_norm": scalars["squared_norm"].sqrt(),
            "steps": steps + scalars["plain_steps"],
            "second_passes": second,
            "skipped_steps": skipped,
        }
        if "ema" in scalars:
            stats["ema_mean"], stats["ema_var"], stats["threshold"], _ = scalars["ema"].clone().unbind()
        return stats
