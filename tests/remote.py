"""The CPU in the place of a device whose kernels cannot read the host's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sharpkern import flat
from sharpkern.flat import Sender


def pretend(patch: pytest.MonkeyPatch) -> None:
    """The flat layer takes the way of a device; pinned memory is any memory."""
    empty = torch.empty

    def empty_or_pinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        assert not pin_memory or kwargs["device"] == "cpu"
        return empty(*args, **kwargs)

    patch.setattr(flat, "is_remote", lambda device: True)
    patch.setattr(torch, "empty", empty_or_pinned)
    patch.setattr(Tensor, "pin_memory", lambda self: self.clone())


class Graphs:
    """CUDA graphs of Triton kernels in the interpreter: a capture notes copies and launches, and runs nothing."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpretedFunction

        self._tape: list[Callable[[], object]] | None = None
        self.sent: list[tuple[int, ...]] = []
        patch.setattr(flat, "is_capturing", lambda device: self._tape is not None)
        patch.setattr("sharpkern.optim.optimizer.is_capturing", lambda device: self._tape is not None)
        send = Sender.send

        def noted_send(sender: Sender, values: Tensor) -> None:
            self.sent.append(tuple(values.size()))
            if self._tape is None:
                send(sender, values)
                return
            target, sender.target = sender.target, sender.target.clone()
            try:
                send(sender, values)
            finally:
                sender.target = target
            pinned, count = sender._kept[-1], values.size(0)
            self._tape.append(lambda: target[:count].copy_(pinned[:count]))

        patch.setattr(Sender, "send", noted_send)
        launch = InterpretedFunction.run

        def noted_launch(*args: Any, **kwargs: Any) -> None:
            if self._tape is None:
                launch(*args, **kwargs)
            else:
                self._tape.append(lambda: launch(*args, **kwargs))

        patch.setattr(InterpretedFunction, "run", noted_launch)

    def capture(self, step: Callable[[], object]) -> Callable[[], None]:
        """A function that replays what ``step`` would have done."""
        self._tape, self.sent = [], []
        try:
            step()
            tape = self._tape
        finally:
            self._tape = None
        return lambda: [run() for run in tape] and None
