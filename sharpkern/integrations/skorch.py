"""skorch: a net that takes every pass of a step over all its batches."""

from __future__ import annotations

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
        RuntimeError: in a fit, with the callback ``GradientNormClipping``: ``optimizer__max_grad_norm=`` clips.
    """

    _taken = 0  # batches of the step

    def __init__(self: Any, *args: Any, gradient_accumulation_steps: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gradient_accumulation_steps = gradient_accumulation_steps

    def initialize_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As in skorch; nothing is taken yet."""
        self._taken = 0
        return super().initialize_optimizer(*args, **kwargs)  # type: ignore[misc]

    def get_loss(self: Any, *args: Any, training: bool = False, **kwargs: Any) -> Tensor:
        """In training the batch's part of the step's loss."""
        loss: Tensor = super().get_loss(*args, training=training, **kwargs)  # type: ignore[misc]
        return loss / self.gradient_accumulation_steps if training else loss

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
            step = self.train_step_single(batch, **fit_params)
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

    def run_single_epoch(self: Any, iterator: Any, training: bool, *args: Any, **kwargs: Any) -> None:
        """Take the step of what is left, too."""
        super().run_single_epoch(iterator, training, *args, **kwargs)  # type: ignore[misc]
        if training and self._taken:
            self._taken = 0
            self.optimizer_.step()
