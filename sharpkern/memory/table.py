"""The table of segments: a row a parameter, with the addresses of its weights and its gradient.

It is the host's; kernels of a device read a copy there, column after column, so that the columns which change go
there in one transfer: addresses when a parameter or a gradient moved, scales when rows were left out, marks of backups
after each step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import schema
from ..ops.backend import walks_lists
from ..ops.scan import make_scan
from . import transfer
from .shapes import strides_of
from .transfer import Sender

_gather = torch.ops.sharpkern.gather.default


class Table:
    """Rows of the parameters of one (device, dtype).

    Args:
        params: the parameters.
        segments: the memory that kernels use for each one: the parameter itself, or a dense copy of it.
        slots: first element of each one's slot.
        groups: index of each one's parameter group.
        scale: which T_w each one has, a value of ``schema.SCALE``.
        shards: whether these are shards, of which an empty one has a gradient where its parameter has one.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        segments: Sequence[Tensor],
        slots: Sequence[int],
        groups: Sequence[int],
        scale: Sequence[int],
        shards: bool = False,
    ) -> None:
        self.device, self.dtype = params[0].device, params[0].dtype
        self.segments = segments
        self.none = torch.empty(0, dtype=self.dtype, device=self.device)  # stands for a gradient that is missing
        self.host = torch.zeros(len(params), schema.COLUMNS, dtype=torch.int64, device="cpu")
        self.host[:, schema.SLOT] = torch.tensor(slots, device="cpu")
        self.host[:, schema.NUMEL] = torch.tensor([p.numel() for p in params], device="cpu")
        self.host[:, schema.GROUP] = torch.tensor(groups, device="cpu")
        self._scale_column = self.host[:, schema.SCALE]
        self._scale = torch.tensor(list(scale), dtype=torch.int64, device="cpu")
        self._scale_column.copy_(self._scale)
        self._drawn = False  # whether rows are left out of this step
        self.any_scaled = bool(self._scale.any())  # whether any row has another T_w than 1
        self.grad_column = self.host[:, schema.GRAD]
        self._grads_at = self.grad_column.data_ptr()
        self._backup_column = self.host[:, schema.BACKUP]
        self._grad_strides = strides_of(segments)
        self._status = torch.zeros(2, dtype=torch.int64, device="cpu")
        self.missing = 0  # parameters without a gradient in the last pass
        # Empty shards, and which of them have a gradient in this pass: no kernel sees it. None where there are none.
        self._empty_rows = self.host[:, schema.NUMEL] == 0
        self.empty: Tensor | None = self._empty_rows & False if shards and bool(self._empty_rows.any()) else None
        # gather, turned on the parameters themselves, finds their addresses and checks how they lie.
        self._param_strides = strides_of(params)
        self._found = torch.zeros_like(self.host)
        self._found_status = torch.zeros(2, dtype=torch.int64, device="cpu")
        self._addresses = torch.zeros(len(params), dtype=torch.int64, device="cpu")
        self._addresses_at = self._addresses.data_ptr()
        rows = self._param_strides, self._grad_strides
        self._params = list(params)
        self._scan = None if shards else make_scan(self._params, self.none, *rows)
        # The copy on a device.
        self._copy: Sender | None = None
        self._sent: Tensor | None = None  # the columns before BACKUP as they are there
        self._touched = True  # whether they may be others here since
        self._complete = False  # whether the other columns are there
        self._marked_there = False  # whether a kernel may have marked backups there
        self.follow(self.locate(params))

    # Addresses.

    def locate(self, params: Sequence[Tensor]) -> Tensor:
        """Addresses of the parameters now; MISMATCH for one whose dtype, shape or strides changed."""
        _gather(self._found, self._found_status, params, self._param_strides, self.none, dtype=self.dtype)
        return self._found[:, schema.GRAD]

    def moved(self, params: Sequence[Tensor]) -> Tensor | None:
        """Addresses of the parameters, where they lie elsewhere than this table says."""
        if self._scan is not None and self._scan.unmoved(self._params, self._addresses_at):
            return None
        addresses = self.locate(params)
        return None if torch.equal(addresses, self._addresses) else addresses

    def follow(self, addresses: Tensor) -> None:
        """Take the parameters where they are now."""
        self._point()
        self._touched = True
        if self._complete:
            self.send()
        self._addresses.copy_(addresses)  # last: an interrupt before it finds them changed again

    def _point(self) -> None:
        self.host[:, schema.PARAM] = torch.tensor([s.data_ptr() for s in self.segments], device="cpu")

    def scan(self) -> bool:
        """Take a pass's gradients from the parameters. False where that cannot be, or one is of no use as it is."""
        if self._scan is None:
            return False
        # An interrupt may come when addresses are written: they count as others until it is known that they are not.
        touched, self._touched = self._touched, True
        mismatches, self.missing, changed = self._scan.gather(self._params, self._grads_at, schema.COLUMNS)
        self._touched = touched or changed
        return not mismatches

    def gather(self, grads: list[Tensor]) -> list[int]:
        """Take a pass's gradients, ``none`` for a missing one. Returns the rows whose gradient no kernel can use."""
        self._touched = True
        _gather(self.host, self._status, grads, self._grad_strides, self.none, dtype=self.dtype)
        mismatches, self.missing = self._status.tolist()
        if self.empty is not None:
            self.missing -= int(self.empty.sum())
        if not mismatches:
            return []
        rows: list[int] = (self.grad_column == schema.MISMATCH).nonzero().flatten().tolist()
        return rows

    def note_empty(self, having: Sequence[bool]) -> None:
        """Whether each parameter has a gradient, of which an empty shard is a part."""
        if self.empty is not None:
            self.empty = torch.tensor(having, dtype=torch.bool, device="cpu") & self._empty_rows

    def follow_buffer(self, buffer: Tensor, taken: Sequence[bool]) -> None:
        """Take slots of a flat buffer for the gradients of these rows; the others have none."""
        rows = torch.tensor(taken, dtype=torch.bool, device="cpu") & (self.host[:, schema.NUMEL] > 0)
        addresses = buffer.data_ptr() + self.host[:, schema.SLOT] * buffer.element_size()
        self._touched = True
        self.grad_column.copy_(addresses * rows)
        self.note_empty(taken)
        self.missing = len(taken) - int(rows.sum()) - (0 if self.empty is None else int(self.empty.sum()))
        self.send()

    # Marks: which backups hold weights.

    def mark(self, i: int) -> None:
        """The backup holds the weights of row i: the host says so."""
        self._backup_column[i] = 1
        self._complete, self._marked_there = False, True

    def before_ascent(self) -> None:
        """A kernel may mark backups on the device from now on."""
        self._marked_there = True

    def after_ascent(self) -> None:
        """A kernel marked the rows that moved: on the device, or in the host's table."""
        if walks_lists(self.device.type):
            self._complete = False
        elif transfer.is_remote(self.device):
            if self.missing or self.any_scaled:
                self._backup_column.copy_((self.grad_column != 0) & (self._scale_column != schema.LEFT_OUT))
            else:
                self._backup_column.fill_(1)
        if self.empty is not None:  # of nothing
            self._backup_column.masked_fill_(self.empty & (self._scale_column != schema.LEFT_OUT), 1)

    def clear_marks(self) -> None:
        """No backup is in use. The device hears of it with the next gradients."""
        self._backup_column.zero_()

    def marked(self) -> list[bool]:
        """Whether the backup holds the weights, for each row. Waits for a device."""
        return [mark != 0 for mark in self.rows[:, schema.BACKUP].tolist()]

    def is_marked(self, i: int) -> bool:
        """The same of row i, as far as the host knows: it does, of a backup that is a master."""
        return bool(self._backup_column[i])

    def _having(self) -> Tensor:
        having = self.grad_column != 0
        return having if self.empty is None else having | self.empty

    def has_gradient(self) -> list[bool]:
        """Whether each row had a gradient in this pass."""
        having: list[bool] = self._having().tolist()
        return having

    def touched(self) -> list[bool]:
        """Whether each row had a gradient in this pass, or in the one that perturbed."""
        touched: list[bool] = (self._having() | (self._backup_column != 0)).tolist()
        return touched

    def unmarked_with_gradient(self) -> list[int]:
        """Rows that have a gradient now, and whose weights no backup holds."""
        rows: list[int] = ((self.grad_column != 0) & (self._backup_column == 0)).nonzero().flatten().tolist()
        return rows

    # Scales: which rows are a part of the direction.

    def leave_out(self, rows: Tensor) -> None:
        """Leave rows (a mask) out of the direction of this step, beside those that always are."""
        self.any_scaled = self._drawn = self._touched = True
        self._scale_column.masked_fill_(rows, schema.LEFT_OUT)
        self.send()

    def any_left_in(self) -> bool:
        """Whether any row with a gradient is a part of the direction."""
        return bool(self._having().logical_and_(self._scale_column != schema.LEFT_OUT).any())

    def take_back_in(self) -> None:
        """Every row has its own T_w again. The device hears of it with the next gradients."""
        if self._drawn:
            self._scale_column.copy_(self._scale)
            self.any_scaled, self._drawn, self._touched = bool(self._scale.any()), False, True

    # The copy on a device.

    @property
    def rows(self) -> Tensor:
        """The table for the backend in charge: the host's, or the copy where kernels read it on the device, which
        is sent if it never was."""
        if not transfer.reads_there(self.device):
            return self.host
        if not self._complete:
            self.send()
        assert self._copy is not None
        return self._copy.target.t()

    def send(self, fresh: bool = False) -> None:
        """Bring the device's copy up to date; its marks of backups too when no weights are away (``fresh``)."""
        if not transfer.reads_there(self.device):
            return
        if self._copy is None:
            target = torch.zeros(schema.COLUMNS, self.host.size(0), dtype=torch.int64, device=self.device)
            self._copy = Sender(target, schema.BACKUP + 1)
        columns = self.host.t()
        if not self._complete:
            count = schema.COLUMNS
        elif (
            transfer.is_capturing(self.device) or self._copy.captured or self._sent is None
            or (self._touched and not torch.equal(columns[: schema.BACKUP], self._sent))
        ):  # fmt: skip
            # A graph brings its own addresses along, for eager steps between its replays may send others; and
            # they send theirs again, for a replay may have been in between.
            count = schema.BACKUP + fresh
        else:
            self._touched = False
            if fresh and self._marked_there:
                self._copy.clear(schema.BACKUP)
                self._marked_there = False
            return
        self._sent = None  # an interrupt may come between the copy and the note of it
        self._copy.send(columns[:count].contiguous())
        self._sent = columns[: schema.BACKUP].clone()
        self._complete, self._touched = True, False
        if fresh:
            self._marked_there = False
