"""Lightning: a callback with which every pass of a step is of all its batches, in every precision; and Fabric."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.core.optimizer import do_nothing_closure
from lightning.pytorch.loops.optimization.automatic import Closure, _AutomaticOptimization
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from ..optim.optimizer import SharpnessAwareOptimizer

__all__ = ["SharpnessAware", "fabric_step"]


class SharpnessAware(Callback):
    """``Trainer(callbacks=[SharpnessAware()])``: optimizers of sharpkern under automatic and manual optimization.

    - ``accumulate_grad_batches``: all batches of a step are in both passes.
    - ``gradient_clip_val``: clips the gradient of the last pass, where the optimizer has no ``max_grad_norm`` itself.
    - ``precision="16-mixed"``: the optimizer has the gradients of every pass unscaled. In manual optimization, by hand,
      give ``first_step`` the scaler: ``scaler=self.trainer.precision_plugin.scaler``.
    - What ``training_step`` logs, and the loss that hooks are given, is of the first pass; in manual optimization what
      a closure logs. Metrics that it updates itself see a batch once a pass.
    - ``on_before_optimizer_step`` is called after the first pass, with its gradients unscaled.
    - What a fit leaves of a step that it did not end is dropped, and the weights are given back.

    Raises:
        RuntimeError: when a fit starts, for what cannot be done right: other strategies than one device and DDP,
            clipping by value or by ``configure_gradient_clipping``, ``training_step(dataloader_iter)``, no optimizer of
            sharpkern; for gradients that ``on_before_optimizer_step`` changed, which no further pass would have; and
            for a validation at perturbed weights, between two batches of a MomentumSAM step.
    """

    _clips: Sequence[SharpnessAwareOptimizer] = ()  # that have the trainer's norm

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Come before a LearningRateFinder, which takes its steps when a fit starts."""
        if stage == "fit":
            trainer.callbacks = [self, *(callback for callback in trainer.callbacks if callback is not self)]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the place of the trainer's own steps."""
        opts = _ours(trainer)
        if not opts:
            raise RuntimeError("SharpnessAware() is for optimizers of sharpkern, and there is none")
        _restore(trainer)
        strategy = trainer.strategy
        known = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))
        if not known or strategy.handles_gradient_accumulation:
            raise RuntimeError(f"SharpnessAware() does not support {type(strategy).__name__}: one device, or DDP")
        if is_overridden("configure_gradient_clipping", pl_module):
            raise RuntimeError("SharpnessAware() calls no configure_gradient_clipping(): max_grad_norm= clips")
        automatic = pl_module.automatic_optimization
        if automatic and is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise RuntimeError(
                "SharpnessAware() does not support training_step(dataloader_iter): every pass would take the next "
                "batch. Take training_step(batch, batch_idx)"
            )
        algorithm = str(trainer.gradient_clip_algorithm or "norm").rpartition(".")[2].lower()
        if trainer.gradient_clip_val and algorithm != "norm":
            raise RuntimeError("SharpnessAware() clips by norm, not by value")
        loop = trainer.fit_loop.epoch_loop.automatic_optimization
        if not hasattr(_AutomaticOptimization, "_make_closure"):
            raise RuntimeError("SharpnessAware() does not know this version of Lightning")
        if trainer.gradient_clip_val:
            self._clips = [opt for opt in opts if opt.max_grad_norm is None]
            for opt in self._clips:
                opt.max_grad_norm = float(trainer.gradient_clip_val)
        if automatic:
            loop.__class__ = _Optimization
        for opt in opts:
            opt._step.parallel = strategy.model
        plugin = strategy.precision_plugin
        plugin.optimizer_step = functools.partial(_step, plugin, type(plugin).optimizer_step)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give it back."""
        self._give_back(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The weights are the model's again, whatever the last step came to."""
        _restore(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lightning does not tear down then."""
        self._give_back(trainer)

    def _give_back(self, trainer: Any) -> None:
        _restore(trainer)
        for opt in _ours(trainer):
            opt._step.parallel = None
        for opt in self._clips:
            opt.max_grad_norm = None
        self._clips = ()
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


def _restore(trainer: Any) -> None:
    for opt in _ours(trainer):
        opt.restore()


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
                stack.enter_context(_logging(trainer.lightning_module, False))
            stack.enter_context(_block_parallel_sync_behavior(trainer.strategy, block=accumulates))
            result = self.closure()
        if not self.called:
            self._result, self.called = result, True
        return result.loss


class _Optimization(_AutomaticOptimization):
    """Automatic optimization, in which batches whose gradients are accumulated are the optimizer's."""

    def _make_closure(self, kwargs: Any, optimizer: Any, batch_idx: int) -> Any:
        made = super()._make_closure(kwargs, optimizer, batch_idx)
        if made._backward_fn is None:
            return made
        closure = _Closure(made._step_fn, made._backward_fn, made._zero_grad_fn)
        closure.batch = self.trainer, optimizer, self.trainer.fit_loop._should_accumulate()
        return closure

    def _training_step(self, kwargs: Any) -> Any:
        """With a batch of each pass's own, as far as its outermost container goes: a step may take things out of it."""
        containers = dict, list, UserDict
        own = ((name, copy.copy(value) if isinstance(value, containers) else value) for name, value in kwargs.items())
        return super()._training_step(OrderedDict(own))


@contextlib.contextmanager
def _logging(module: Any, on: bool) -> Iterator[None]:
    """``module.log`` and ``log_dict`` log, or do nothing."""
    own, names = vars(module), ("log", "log_dict")
    before = {name: own.pop(name) for name in names if name in own}
    if not on:
        own.update(dict.fromkeys(names, lambda *_, **__: None))
    try:
        yield
    finally:
        for name in names:
            own.pop(name, None)
        own.update(before)


def _before_step(module: Any, opt: SharpnessAwareOptimizer) -> None:
    """The hooks that look at the gradients of the first pass."""
    marks = opt._step.marks()
    call._call_callback_hooks(module.trainer, "on_before_optimizer_step", opt)
    call._call_lightning_module_hook(module.trainer, "on_before_optimizer_step", opt)
    if not (opt.one_gradient or opt.one_pass) and opt._step.changed_since(marks):
        raise RuntimeError(
            "on_before_optimizer_step() changed the gradients of the first pass, and another pass has its own: "
            "gradient_clip_val or max_grad_norm= clips, and what changes gradients belongs into on_after_backward(), "
            "which is called in every pass"
        )


def _step(plugin: Any, original: Any, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
    """In place of the precision plugin's step: every pass is the optimizer's, and so is the scaler."""
    opt, scaler = optimizer, getattr(plugin, "scaler", None)
    if isinstance(opt, SharpnessAwareOptimizer) and getattr(closure, "_backward_fn", closure) is None:
        return closure()  # nothing is trained: StochasticWeightAveraging looks at the norm layers' statistics
    nothing = closure is do_nothing_closure
    if not isinstance(opt, SharpnessAwareOptimizer) or (nothing and not opt._step.micro_batches):
        result = original(plugin, optimizer, model=model, closure=closure, **kwargs)
        if isinstance(opt, SharpnessAwareOptimizer):
            opt.restore()  # by hand: the scaler does not step after an overflow
        return result
    calls, scaled = itertools.count(), scaler is not None and scaler.is_enabled()

    def before_step() -> None:
        with _logging(model, True):
            _before_step(model, opt)

    def evaluate() -> Any:
        first = next(calls) == 0
        with _logging(model, first):
            loss = closure()
        if first and not scaled:
            before_step()
        return loss

    if scaled:
        opt._step.unscaler.after_first = before_step
    try:
        with _logging(model, False):
            result = opt.step(evaluate, scaler=scaler, **kwargs)
    finally:
        opt._step.unscaler.after_first = None
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
