"""skorch: a net that takes every pass of a step over all its batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from skorch.callbacks import GradientNormClipping
from skorch.utils import TeeGenerator
from torch import Tensor

from ..optim.optimizer import SharpnessAwareOptimizer

__all__ = ["SharpnessAware"]


class SharpnessAware:
    """To be put before a net: ``class Net(SharpnessAware, NeuralNetClassifier)``, with ``optimizer=sharpkern.SAM`` and
    its options ``optimizer__rho``, ``optimizer__base_optimizer``, ...

    What is recorded, and ``on_grad_computed``, is of the first pass.

    Args:
        gradient_accumulation_steps: batches a step; each loss is divided by it for the backward. The last step of an
            epoch may have fewer.

    Raises:
        TypeError: in a fit, for an optimizer that is not one of sharpkern.
        RuntimeError: in a fit, with the callback ``GradientNormClipping``: ``optimizer__max_grad_norm=`` clips; with
            accumulation, for a ``train_step_single`` that takes its loss from no ``get_loss``.
    """

    _taken = 0  # batches of the step

    def __init__(self: Any, *args: Any, gradient_accumulation_steps: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gradient_accumulation_steps = gradient_accumulation_steps

    def initialize_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As in skorch; nothing is taken yet."""
        self._taken = 0
        return super().initialize_optimizer(*args, **kwargs)  # type: ignore[misc]

    def set_params(self: Any, **params: Any) -> Any:
        """As in skorch, which changes groups: for an option that is of no group (``optimizer__k``) the optimizer is
        made anew, and goes on where the one before was."""
        opt: Any = getattr(self, "optimizer_", None)
        own = {}
        if isinstance(opt, SharpnessAwareOptimizer):
            groups = ("param_groups", *opt.defaults)
            options = {key: value for key, value in params.items() if key.startswith("optimizer__")}
            own = {key: value for key, value in options.items() if key.split("__")[1] not in groups}
        if own:
            before, state = dict(vars(self)), opt.state_dict()
            try:
                vars(self).update(own)
                self.initialize_optimizer()
                if "optimizer__base_optimizer" not in own:
                    self.optimizer_.load_state_dict(state)
            except BaseException:
                vars(self).clear()
                vars(self).update(before)
                raise
            self.optimizer_.zero_grad()  # they were used
        super().set_params(**{key: value for key, value in params.items() if key not in own})  # type: ignore[misc]
        return self

    def train_step(self: Any, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """Take a batch, and the step with the last one."""
        opt = self.optimizer_
        first: list[dict[str, Any]] = []
        if not isinstance(opt, SharpnessAwareOptimizer):
            raise TypeError(f"the optimizer should be one of sharpkern, but got {opt!r}")
        if any(isinstance(callback, GradientNormClipping) for _, callback in self.callbacks_):
            raise RuntimeError(
                "GradientNormClipping would clip in every pass: optimizer__max_grad_norm= clips the last"
            )

        def closure() -> Tensor:
            step = self._part_of_step(lambda: self.train_step_single(batch, **fit_params))
            if not first:
                first.append(step)
                parameters = TeeGenerator(self.get_all_learnable_params())
                self.notify("on_grad_computed", named_parameters=parameters, batch=batch, training=True)
            loss: Tensor = step["loss"]
            return loss

        taken, self._taken = self._taken + 1, 0
        if taken < self.gradient_accumulation_steps:
            opt.accumulate(closure)
            self._taken = taken
        else:
            opt.step(closure)
        return {**first[0], "loss": first[0]["loss"].detach() * self.gradient_accumulation_steps}

    def _part_of_step(self: Any, one_pass: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A pass in which what ``get_loss`` returns, the user's own, is divided by the number of batches a step."""
        parts, get_loss, divided = self.gradient_accumulation_steps, self.get_loss, False
        if parts == 1:
            return one_pass()

        def part(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal divided
            divided = True
            loss: Tensor = get_loss(*args, **kwargs) / parts
            return loss

        vars(self)["get_loss"] = part
        try:
            step = one_pass()
        finally:
            del vars(self)["get_loss"]
        if not divided:
            raise RuntimeError(f"train_step_single() called no get_loss(), whose loss would be divided by {parts}")
        return step

    def run_single_epoch(self: Any, iterator: Any, training: bool, *args: Any, **kwargs: Any) -> None:
        """Take the step of what is left, too."""
        super().run_single_epoch(iterator, training, *args, **kwargs)  # type: ignore[misc]
        if training and self._taken:
            self._taken = 0
            self.optimizer_.step()
