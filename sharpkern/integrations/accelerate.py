"""Accelerate: an optimizer that takes the closure of each micro-batch, and Accelerate's scaler."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import accelerate
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn

from ..optim.optimizer import SharpnessAwareOptimizer

__all__ = ["Accelerator", "PreparedOptimizer"]

REFUSED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


class Accelerator(accelerate.Accelerator):
    """``accelerate.Accelerator``, which prepares optimizers of sharpkern to be stepped by closures of micro-batches.

    Example::

        for x, y in loader:
            with accelerator.accumulate(model):
                loss = opt.step(functools.partial(closure, x, y))  # forward, accelerator.backward(loss), return loss
                scheduler.step()

    Other optimizers are prepared as ever. Use ``max_grad_norm=`` of the optimizer, not ``clip_grad_norm_``.
    """

    _parallel: Sequence[nn.Module] = ()  # the models as they were prepared, where Accelerate keeps what it was given

    def prepare_optimizer(self, optimizer: Any, device_placement: bool | None = None) -> Any:
        """As in Accelerate.

        Raises:
            RuntimeError: for an optimizer of sharpkern under DeepSpeed, Megatron-LM or XLA.
        """
        prepared = super().prepare_optimizer(optimizer, device_placement)
        if isinstance(prepared.optimizer, SharpnessAwareOptimizer):
            adopt(prepared, self).take_models(self._parallel)
        return prepared

    def prepare_model(self, *args: Any, **kwargs: Any) -> Any:
        """As in Accelerate."""
        prepared = super().prepare_model(*args, **kwargs)
        self._parallel = [*self._parallel, prepared]
        for opt in (opt for opt in self._optimizers if isinstance(opt, PreparedOptimizer)):
            opt.take_models(self._parallel)
        return prepared

    def free_memory(self, *objects: Any) -> Any:
        """As in Accelerate."""
        self._parallel = []
        return super().free_memory(*objects)

    def get_state_dict(self, model: Any, unwrap: bool = True) -> Any:
        """As in Accelerate, also for ``save_state`` and ``save_model``.

        Raises:
            RuntimeError: at perturbed weights, between two batches of a MomentumSAM step.
        """
        if any(opt.is_perturbed for opt in self._optimizers if isinstance(opt, PreparedOptimizer)):
            raise RuntimeError("the weights are perturbed, in the middle of a step: save between steps, or restore()")
        return super().get_state_dict(model, unwrap)


class PreparedOptimizer(AcceleratedOptimizer):
    """What :class:`Accelerator` makes of an optimizer of sharpkern."""

    accelerator: Any
    _models: Sequence[nn.Module] = ()
    _is_overflow: bool

    def take_models(self, prepared: Sequence[nn.Module]) -> None:
        """Learn which models were prepared, in DistributedDataParallel where there are several processes."""
        self._models = prepared
        own = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        trained = (model for model in prepared if any(id(p) in own for p in model.parameters()))
        self.optimizer._step.parallel = next(trained, None)

    def accumulate(self, closure: Callable[[], Any]) -> Any:
        """Take a micro-batch; its gradients are exchanged between processes with those of the last one of a step."""
        return self.optimizer.accumulate(closure if self.gradient_state.sync_gradients else self._apart(closure))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a micro-batch, and the step with the last one; without a closure a step of those that were taken, or the
        end of one by hand.

        Args:
            closure: computes the loss, calls ``accelerator.backward(loss)`` and returns the loss.

        Returns:
            The loss of the micro-batch; with the last one, of the first pass, the sum over its micro-batches.
        """
        opt, scaler = self.optimizer, self.scaler
        if not self.gradient_state.sync_gradients:
            return None if closure is None else self.accumulate(closure)
        if scaler is None:
            return opt.step(closure)
        skipped = opt.stats["skipped_steps"]
        if closure is None and not opt._step.micro_batches:
            super().step()
            opt.restore()  # the scaler does not step after an overflow
            self._is_overflow |= bool(opt.stats["skipped_steps"] != skipped)
            return None
        loss = opt.step(closure, scaler=scaler)
        scaler.update()
        self._is_overflow = bool(opt.stats["skipped_steps"] != skipped)
        return loss

    def first_step(self, zero_grad: bool = False) -> bool:
        """By hand, with the scaler: whether another backward is wanted before ``step()``.

        Raises:
            RuntimeError: with accumulated gradients, of which the second pass would have the last batch only.
        """
        if self.gradient_state.num_steps > 1:
            raise RuntimeError(
                "first_step() with gradient_accumulation_steps > 1: the second pass would be of the last batch only. "
                "Call step(closure) with every batch"
            )
        return self.gradient_state.sync_gradients and bool(self.optimizer.first_step(zero_grad, scaler=self.scaler))

    @property
    def is_perturbed(self) -> bool:
        """As of the optimizer."""
        return bool(self.optimizer.is_perturbed)

    def restore(self) -> None:
        """Give the unperturbed weights back, and drop the batches of a step that is not done."""
        self.optimizer.restore()

    def _apart(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Also in passes that are taken when gradients are exchanged."""
        if not self.accelerator.use_distributed or self.gradient_state.plugin_kwargs.get("sync_each_batch", False):
            return closure

        @functools.wraps(closure)
        def apart() -> Any:
            with contextlib.ExitStack() as stack:
                for model in self._models:
                    stack.enter_context(self.accelerator.no_sync(model))
                return closure()

        return apart


def adopt(prepared: Any, accelerator: Any) -> Any:
    """Make what Accelerate prepared a :class:`PreparedOptimizer`, once."""
    if not isinstance(prepared, PreparedOptimizer):
        if not isinstance(getattr(prepared, "optimizer", None), SharpnessAwareOptimizer):
            raise TypeError(f"the optimizer should be one of sharpkern, but got {prepared!r}")
        if accelerator.distributed_type in REFUSED:
            raise RuntimeError(f"{accelerator.distributed_type}: it takes its steps itself, which have one pass only")
        prepared.__class__, prepared.accelerator = PreparedOptimizer, accelerator
    return prepared
