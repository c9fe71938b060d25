"""ignite: its supervised training, with every pass of a step over all its batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from ignite.engine import DeterministicEngine, Engine, Events, _prepare_batch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from ..optim.optimizer import SharpnessAwareOptimizer

__all__ = ["create_supervised_trainer", "supervised_training_step"]


def supervised_training_step(
    model: nn.Module,
    optimizer: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    prepare_batch: Callable[..., Any] = _prepare_batch,
    model_transform: Callable[[Any], Any] = lambda output: output,
    output_transform: Callable[..., Any] = lambda x, y, y_pred, loss: loss.item(),
    gradient_accumulation_steps: int = 1,
    model_fn: Callable[[nn.Module, Any], Any] = lambda model, x: model(x),
    *,
    autocast: Callable[[], Any] = contextlib.nullcontext,
    scaler: GradScaler | None = None,
) -> Callable[[Engine, Any], Any]:
    """A process function for an optimizer of sharpkern, with the arguments of ``ignite.engine``'s.

    Args:
        gradient_accumulation_steps: batches a step; each loss is divided by it.
        autocast: makes a context for the forward pass, such as ``lambda: torch.autocast("cuda", torch.bfloat16)``.
        scaler: of the losses; its update is made here.

    Returns:
        A function for ``Engine``; what it gives to ``output_transform`` is of the first pass.

    Raises:
        TypeError: for an optimizer that is not one of sharpkern.
    """
    if not isinstance(optimizer, SharpnessAwareOptimizer):
        raise TypeError(f"the optimizer should be one of sharpkern, but got {optimizer!r}")
    if gradient_accumulation_steps <= 0:
        raise ValueError(f"Invalid gradient_accumulation_steps: {gradient_accumulation_steps}")

    def update(engine: Engine, batch: Any) -> Any:
        model.train()
        x, y = prepare_batch(batch, device=device, non_blocking=non_blocking)
        first: list[Any] = []

        def closure() -> Tensor:
            with autocast():
                y_pred = model_transform(model_fn(model, x))
                loss = loss_fn(y_pred, y)
            part = loss / gradient_accumulation_steps
            (part if scaler is None else scaler.scale(part)).backward()
            if not first:
                first.extend((y_pred, loss))
            return part

        if (engine.state.iteration - 1) % gradient_accumulation_steps == 0:
            optimizer.zero_grad()
        if engine.state.iteration % gradient_accumulation_steps:
            optimizer.accumulate(closure)
        else:
            optimizer.step(closure, scaler=scaler)
            if scaler is not None:
                scaler.update()
        return output_transform(x, y, *first)

    return update


def create_supervised_trainer(
    model: nn.Module, optimizer: Any, *arguments: Any, deterministic: bool = False, **options: Any
) -> Engine:
    """An engine that trains, of the arguments of :func:`supervised_training_step`. Batches that are left when a run
    ends or fails are dropped; an epoch ends at the model's own weights.

    Args:
        deterministic: make a ``DeterministicEngine``.
    """
    update = supervised_training_step(model, optimizer, *arguments, **options)
    engine = (DeterministicEngine if deterministic else Engine)(update)

    def at_home() -> None:
        if optimizer.is_perturbed:  # else a step may go on in the next epoch
            optimizer.restore()

    def failed(engine: Engine, exception: BaseException) -> None:
        optimizer.restore()
        if len(engine._event_handlers[Events.EXCEPTION_RAISED]) == 1:
            raise exception  # as without a handler

    engine.add_event_handler(Events.EPOCH_COMPLETED, at_home)
    for event in (Events.COMPLETED, Events.TERMINATE):
        engine.add_event_handler(event, lambda: optimizer.restore())
    engine.add_event_handler(Events.EXCEPTION_RAISED, failed)
    return engine
