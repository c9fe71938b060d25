"""The Trainer of transformers, with every pass of a step over all its micro-batches."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from .accelerate import adopt

if not (hasattr(Trainer, "_clip_grad_norm") and hasattr(Trainer, "_get_grad_norm")):
    raise ImportError("sharpkern.integrations.transformers needs a Trainer whose clipping is a method: transformers 5")


class SharpnessAware:
    """To be put before a Trainer: ``class MyTrainer(SharpnessAware, Seq2SeqTrainer)``. See
    :class:`SharpnessAwareTrainer`."""

    _clips = False

    def training_step(self: Any, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The first pass of a micro-batch; ``optimizer.step()`` calls it again for each further one.

        Raises:
            TypeError: for an optimizer that is not one of sharpkern.
        """
        take = super().training_step  # type: ignore[misc]
        loss: Tensor = adopt(self.optimizer, self.accelerator).accumulate(
            lambda: take(model, copy.copy(inputs), num_items_in_batch)
        )
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
        return norm if scaler is None else norm / torch.as_tensor(scaler.get_scale()).to(norm)


class SharpnessAwareTrainer(SharpnessAware, Trainer):
    """A Trainer of an optimizer of sharpkern, given as ``optimizer_cls_and_kwargs=`` or ``optimizers=``.

    Gradient accumulation, ``no_sync`` between processes, ``bf16`` and ``fp16`` are as in the Trainer, and
    ``training_step`` is called once a pass and micro-batch. ``max_grad_norm`` of the arguments clips the gradient of
    the last pass, where the optimizer has none of its own. The ``loss`` and the ``grad_norm`` that are logged are of
    the first pass. Not with DeepSpeed, Megatron-LM or XLA.
    """
