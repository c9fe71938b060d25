"""Numbers between the host and a device: tables go there without waiting, a decision comes back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import schema
from ..ops.backend import walks_lists


def is_remote(device: torch.device) -> bool:
    """Whether kernels on a device cannot read the host's memory."""
    return device.type != "cpu"


def reads_there(device: torch.device) -> bool:
    """Whether kernels read tables on the device itself: they do, unless the backend in charge walks lists."""
    return is_remote(device) and not walks_lists(device.type)


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Sender:
    """Sends host values to one tensor on a device, without waiting for it.

    The copy starts from pinned memory that nothing writes to while the copy may still read it: torch's
    allocator hands out a block anew only after the streams that used it have come so far. A CUDA graph reads
    its block on every replay, so the blocks that went into a capture are kept; they are taken from a stock,
    because memory cannot be pinned while a graph is captured.

    Args:
        target: the tensor.
        rows: of the target, at most, that are sent in a capture.
    """

    STOCK = 32  # sends that may go into captures

    def __init__(self, target: Tensor, rows: int) -> None:
        self.target = target
        self._rows = rows
        self._stock: list[Tensor] | None = None
        self._zeros: Tensor | None = None
        self._kept: list[Tensor] = []
        # Replays may overwrite what was sent since: from the first capture on nobody knows what is there.
        self.captured = False

    def send(self, values: Tensor) -> None:
        """``target[: len(values)] = values``, in the order of the current stream.

        Raises:
            RuntimeError: in a capture, when its stock is used up, or nothing was sent before.
        """
        target = self.target[: values.size(0)]
        if not reads_there(target.device):
            target.copy_(values)  # nobody counts its launches, and not every device can pin memory
            return
        if is_capturing(target.device):
            if not self._stock or values.size(0) > self._rows:
                raise RuntimeError(
                    "take one step before the first capture"
                    if self._stock is None or values.size(0) > self._rows
                    else f"too many steps were captured: an optimizer sends a table into {self.STOCK} of them at most"
                )
            self.captured = True
            self._kept.append(self._stock.pop())
            pinned = self._kept[-1][: values.size(0)].copy_(values)
        else:
            if self._stock is None:
                shape = (self.STOCK, self._rows, *values.size()[1:])
                self._stock = list(torch.empty(shape, dtype=values.dtype, device="cpu", pin_memory=True))
            pinned = values.pin_memory()
        target.copy_(pinned, non_blocking=True)

    def clear(self, row: int) -> None:
        """``target[row] = 0``, outside of captures, in the order of the current stream."""
        target = self.target[row]
        if not reads_there(target.device):
            target.zero_()
            return
        if self._zeros is None:
            self._zeros = torch.empty(target.size(), dtype=target.dtype, device="cpu", pin_memory=True).zero_()
        target.copy_(self._zeros, non_blocking=True)


class Receiver:
    """Reads numbers from a device: the host waits for what computes them, and for nothing that is launched later."""

    def __init__(self) -> None:
        self._pinned: Tensor | None = None

    def read(self, values: Tensor) -> Tensor:
        """A copy on the host.

        Raises:
            RuntimeError: in a capture, which cannot wait.
        """
        if values.device.type != "cuda":
            return values.cpu()
        if is_capturing(values.device):
            raise RuntimeError("a step that depends on what its gradient is cannot be captured in a CUDA graph")
        if self._pinned is None or self._pinned.size() != values.size():
            self._pinned = torch.empty(values.size(), dtype=values.dtype, device="cpu", pin_memory=True)
        self._pinned.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(values.device))
        event.synchronize()
        return self._pinned


class GroupTable:
    """A table of group values on a device, rewritten where a value changed.

    Args:
        shape: groups, values a group.
        device: where the kernels read it.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.shape = shape
        self._sender = Sender(torch.zeros(shape, dtype=schema.scalar_dtype(device), device=device), shape[0])
        self._sent: list[list[float | None]] | None = None

    def update(self, rows: list[list[float | Tensor]]) -> Tensor:
        """The table with these values. A tensor's value goes there from its device, every time."""
        table = self._sender.target
        numbers = [[None if isinstance(x, Tensor) else x for x in row] for row in rows]
        if numbers != self._sent or self._sender.captured or is_capturing(table.device):
            self._sent = None  # an interrupt may come between the copy and the note of it
            self._sender.send(
                torch.tensor(
                    [[math.nan if x is None else x for x in row] for row in numbers], dtype=table.dtype, device="cpu"
                )
            )
            self._sent = numbers
        for g, row in enumerate(rows):
            for c, x in enumerate(row):
                if isinstance(x, Tensor):
                    table[g, c].copy_(x.reshape(()))
        return table
