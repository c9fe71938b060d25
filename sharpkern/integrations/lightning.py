"""Lightning: a callback with which every pass of a step is of all its batches, in every precision; and Fabric."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.core.optimizer import do_nothing_closure
from lightning.pytorch.loops.optimization.automatic import Closure, _AutomaticOptimization
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.model_helpers import is_overridden

from ..optim.optimizer import SharpnessAwareOptimizer


class SharpnessAware(Callback):
    """``Trainer(callbacks=[SharpnessAware()])``: optimizers of sharpkern under automatic and manual optimization.

    - ``accumulate_grad_batches``: all batches of a step are in both passes.
    - ``gradient_clip_val``: clips the gradient of the last pass, where the optimizer has no ``max_grad_norm`` itself.
    - ``precision="16-mixed"``: the optimizer has the gradients of every pass unscaled. In manual optimization, by hand,
      give ``first_step`` the scaler: ``scaler=self.trainer.precision_plugin.scaler``.
    - What ``training_step`` logs, and the loss that hooks are given, is of the first pass. ``on_before_optimizer_step``
      is called after the first pass. Metrics that it updates itself see a batch once a pass.

    Raises:
        RuntimeError: when a fit starts, for what cannot be done right: other strategies than one device and DDP,
            clipping by value or by ``configure_gradient_clipping``, no optimizer of sharpkern; and for a validation at
            perturbed weights, between two batches of a MomentumSAM step.
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the place of the trainer's own steps."""
        opts = _ours(trainer)
        if not opts:
            raise RuntimeError("SharpnessAware() is for optimizers of sharpkern, and there is none")
        strategy = trainer.strategy
        known = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))
        if not known or strategy.handles_gradient_accumulation:
            raise RuntimeError(f"SharpnessAware() does not support {type(strategy).__name__}: one device, or DDP")
        if is_overridden("configure_gradient_clipping", pl_module):
            raise RuntimeError("SharpnessAware() calls no configure_gradient_clipping(): max_grad_norm= clips")
        if trainer.gradient_clip_val:
            if str(trainer.gradient_clip_algorithm or "norm").rpartition(".")[2].lower() != "norm":
                raise RuntimeError("SharpnessAware() clips by norm, not by value")
            for opt in opts:
                if opt.max_grad_norm is None:
                    opt.max_grad_norm = float(trainer.gradient_clip_val)
        loop = trainer.fit_loop.epoch_loop.automatic_optimization
        if not hasattr(_AutomaticOptimization, "_make_closure"):
            raise RuntimeError("SharpnessAware() does not know this version of Lightning")
        if pl_module.automatic_optimization:
            loop.__class__ = _Optimization
        plugin = strategy.precision_plugin
        plugin.optimizer_step = functools.partial(_step, plugin, type(plugin).optimizer_step)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give it back."""
        vars(trainer.strategy.precision_plugin).pop("optimizer_step", None)
        trainer.fit_loop.epoch_loop.automatic_optimization.__class__ = _AutomaticOptimization

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse weights that are not the model's."""
        if any(opt.is_perturbed for opt in _ours(trainer)):
            raise RuntimeError(
                "validation in the middle of a step, whose weights are perturbed: validate between steps"
            )


def _ours(trainer: Any) -> list[Any]:
    return [opt for opt in trainer.optimizers if isinstance(opt, SharpnessAwareOptimizer)]


class _Closure(Closure):
    """Of a batch. What it keeps, and what it logs, is of its first call."""

    batch: tuple[Any, Any, Any]  # trainer, optimizer, and whether the step waits for more batches
    called = False

    def __call__(self, *_: Any, **__: Any) -> Any:
        _, optimizer, accumulates = self.batch
        if accumulates:
            optimizer.accumulate(self.evaluate)
            return None
        return self.evaluate()

    def evaluate(self) -> Any:
        trainer, _, accumulates = self.batch
        with contextlib.ExitStack() as stack:
            if self.called:
                stack.enter_context(_no_log(trainer.lightning_module))
            stack.enter_context(_block_parallel_sync_behavior(trainer.strategy, block=accumulates))
            result = self.closure()
        if not self.called:
            self._result, self.called = result, True
        return result.loss


class _Optimization(_AutomaticOptimization):
    """Automatic optimization, in which batches whose gradients are accumulated are the optimizer's."""

    def _make_closure(self, kwargs: Any, optimizer: Any, batch_idx: int) -> Any:
        made = super()._make_closure(kwargs, optimizer, batch_idx)
        closure = _Closure(made._step_fn, made._backward_fn, made._zero_grad_fn)
        closure.batch = self.trainer, optimizer, self.trainer.fit_loop._should_accumulate()
        return closure


@contextlib.contextmanager
def _no_log(module: Any) -> Iterator[None]:
    module.log = module.log_dict = lambda *_, **__: None
    try:
        yield
    finally:
        del module.log, module.log_dict


def _step(plugin: Any, original: Any, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
    """In place of the precision plugin's step: every pass is the optimizer's, and so is the scaler."""
    opt, scaler = optimizer, getattr(plugin, "scaler", None)
    nothing = closure is do_nothing_closure
    if not isinstance(opt, SharpnessAwareOptimizer) or (nothing and not opt._step.micro_batches):
        result = original(plugin, optimizer, model=model, closure=closure, **kwargs)
        if isinstance(opt, SharpnessAwareOptimizer):
            opt.restore()  # by hand: the scaler does not step after an overflow
        return result
    calls = itertools.count()

    def evaluate() -> Any:
        loss = closure()
        if next(calls) == 0:
            call._call_callback_hooks(model.trainer, "on_before_optimizer_step", opt)
            call._call_lightning_module_hook(model.trainer, "on_before_optimizer_step", opt)
        return loss

    result = opt.step(evaluate, scaler=scaler, **kwargs)
    if scaler is not None:
        scaler.update()
    return result


def fabric_step(fabric: Any, optimizer: Any, closure: Callable[[], Any] | None = None) -> Any:
    """``optimizer.step(closure)`` of an optimizer that Fabric set up, in every precision.

    Args:
        closure: computes the loss, calls ``fabric.backward(loss)`` and returns the loss. None: the step of what
            ``optimizer.accumulate`` took.
    """
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    if scaler is None:
        return optimizer.step(closure)
    loss = optimizer.optimizer.step(closure, scaler=scaler)
    scaler.update()
    return loss
