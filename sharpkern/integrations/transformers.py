"""The Trainer of transformers, with every pass of a step over all its micro-batches."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..optim.optimizer import SharpnessAwareOptimizer
from .accelerate import adopt

__all__ = ["SharpnessAware", "SharpnessAwareTrainer"]

if not (hasattr(Trainer, "_clip_grad_norm") and hasattr(Trainer, "_get_grad_norm")):
    raise ImportError("sharpkern.integrations.transformers needs a Trainer whose clipping is a method: transformers 5")


class SharpnessAware:
    """To be put before a Trainer: ``class MyTrainer(SharpnessAware, Seq2SeqTrainer)``. See
    :class:`SharpnessAwareTrainer`."""

    _clips = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a ``training_step`` around the mixin's, which would be in the first pass only."""
        super().__init_subclass__(**kwargs)
        for before in cls.__mro__[: cls.__mro__.index(SharpnessAware)]:
            if "training_step" in vars(before):
                raise TypeError(
                    f"training_step() of {before.__name__} would run in the first pass only: put it into a Trainer "
                    "that comes after the mixin: class MyTrainer(SharpnessAware, ThatTrainer)"
                )

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer. At its end a step that is not done is dropped, and the clipping is taken back."""
        self._drop()
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._drop()
            if self._clips:
                self._clips, _own(self.optimizer).max_grad_norm = False, None

    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        """One of ``optimizer_cls_and_kwargs`` gets ``model=`` as well, unless there is one among those."""
        given = self.optimizer_cls_and_kwargs
        if self.optimizer is not None or not given or not _is_ours(given[0]):
            return super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        rest = dict(given[1])
        model = rest.pop("model", self.model)  # which the Trainer takes for the parameters
        self.optimizer_cls_and_kwargs = given[0], rest
        try:
            made = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.optimizer_cls_and_kwargs = given
        step = made._step
        step.settings = dataclasses.replace(step.settings, model=model)
        return made

    def _maybe_log_save_evaluate(self: Any, *args: Any, **kwargs: Any) -> None:
        """At the model's own weights: an epoch may be stopped in the middle of a step."""
        self._drop()
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]

    def evaluation_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer.

        Raises:
            RuntimeError: at perturbed weights, between two micro-batches of a MomentumSAM step.
        """
        self._refuse_perturbed("evaluate")
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def save_model(self: Any, *args: Any, **kwargs: Any) -> None:
        """As in the Trainer.

        Raises:
            RuntimeError: at perturbed weights, between two micro-batches of a MomentumSAM step.
        """
        self._refuse_perturbed("save")
        super().save_model(*args, **kwargs)  # type: ignore[misc]

    def _refuse_perturbed(self: Any, what: str) -> None:
        opt = _own(self.optimizer)
        if opt is not None and opt.is_perturbed:
            raise RuntimeError(f"the weights are perturbed, in the middle of a step: {what} between steps")

    def _drop(self: Any) -> None:
        opt = _own(self.optimizer)
        if opt is not None and (opt._step.is_open or opt._step.micro_batches):
            opt.restore()

    def training_step(self: Any, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The first pass of a micro-batch; ``optimizer.step()`` calls it again for each further one.

        Raises:
            TypeError: for an optimizer that is not one of sharpkern.
        """
        take, prepared = super().training_step, adopt(self.optimizer, self.accelerator)  # type: ignore[misc]
        if model not in prepared._models:
            prepared.take_models([model])
        loss: Tensor = prepared.accumulate(lambda: take(model, copy.copy(inputs), num_items_in_batch))
        return loss

    def _clip_grad_norm(self: Any, model: nn.Module) -> None:
        """Have the gradient of the last pass clipped; a ``max_grad_norm`` that the optimizer was given stays."""
        opt = self.optimizer.optimizer
        if self._clips or opt.max_grad_norm is None:
            self._clips, opt.max_grad_norm = True, float(self.args.max_grad_norm)

    def _get_grad_norm(self: Any, model: nn.Module, grad_norm: Any = None) -> Tensor:
        """That of the first pass, for the log; nothing is scaled or clipped here."""
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        scaler = self.accelerator.scaler
        return norm if scaler is None else norm / torch.as_tensor(scaler.get_scale(), device="cpu").to(norm)


def _is_ours(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, SharpnessAwareOptimizer)


def _own(optimizer: Any) -> Any:
    """The optimizer of sharpkern that this is, or that was prepared; None for any other."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return optimizer if isinstance(optimizer, SharpnessAwareOptimizer) else None


class SharpnessAwareTrainer(SharpnessAware, Trainer):
    """A Trainer of an optimizer of sharpkern, given as ``optimizer_cls_and_kwargs=`` or ``optimizers=``.

    Gradient accumulation, ``no_sync`` between processes, ``bf16`` and ``fp16`` are as in the Trainer, and
    ``training_step`` is called once a pass and micro-batch. ``max_grad_norm`` of the arguments clips the gradient of
    the last pass, where the optimizer has none of its own. The ``loss`` and the ``grad_norm`` that are logged are of
    the first pass. Not with DeepSpeed, Megatron-LM or XLA.
    """
