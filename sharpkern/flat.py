"""Flat buffers and segments: where each parameter's state lies, and how a kernel reaches its weights.

The parameters of one (device, dtype) share one layout. Parameter i owns the elements
``[slot_i, slot_i + numel_i)`` of every flat buffer (backup, momentum, ...), in the parameter's own memory
order, so that a buffer's slot seen with the parameter's shape and strides is its state. Slots start at
multiples of 64 bytes in every buffer of the layout. Weights and gradients stay where they are; a table of
their addresses is what the kernels walk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .ops import schema
from .ops.backend import prepare, walks_lists

SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Elements a slot is aligned to: 64 bytes of the smallest element any buffer of a layout can have (2 bytes).
ALIGNMENT = 32

# Buffers that mean something between two passes only, in the parameters' dtype: the weights and their gradient.
_SCRATCH = ("backup", "gradient")

_gather = torch.ops.sharpkern.gather.default


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in any order of dimensions and without overlap."""
    if t.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.size(), strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def overlaps(t: Tensor) -> bool:
    """Whether two elements share memory, as in an expanded tensor."""
    if t.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.size(), strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


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
        if self._pinned is None:
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
                    table[g, c].copy_(x)
        return table


def blocks_of(numels: Sequence[int]) -> Tensor:
    """``[row, k]`` of every ``schema.BLOCK`` elements of every row, in order: what a device kernel walks."""
    counts = torch.tensor([-(-n // schema.BLOCK) for n in numels], dtype=torch.int64, device="cpu")
    rows = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), counts)
    k = torch.arange(rows.numel(), device="cpu") - (counts.cumsum(0) - counts)[rows]
    return torch.stack([rows, k], dim=1).to(torch.int32)


class FlatBuffers:
    """Slots, table and flat state of the parameters of one (device, dtype).

    Args:
        params: leaf tensors of one device and dtype.
        names: what errors call them.
        groups: index of each one's parameter group.
        scaled: whether the elementwise scale T_w = abs(w) + eta applies to each one.
        flatten: move weights and gradients into flat buffers too.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        names: Sequence[str],
        groups: Sequence[int],
        scaled: Sequence[bool],
        flatten: bool = False,
    ) -> None:
        prepare(params[0].device)
        self.params = list(params)
        self.names = list(names)
        self.groups = list(groups)
        self.device = self.params[0].device
        self.dtype = self.params[0].dtype
        self.state_dtype = schema.state_dtype(self.dtype)
        self.flat_params: Tensor | None = None
        self.flat_grads: Tensor | None = None
        self._grad_views: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.buffers: dict[str, Tensor] = {}
        self.any_scaled = any(scaled)
        # State names of each row that stand in the optimizer's state as views; and those of each group
        # once every row has what its group needs, so that a step need not look at the rows again.
        self.exposed: list[tuple[str, ...]] = [()] * len(self.params)
        self.exposed_groups: list[tuple[str, ...]] | None = None
        self.own_exposed = [False] * len(self.params)  # the algorithm's own state

        self.slots: list[int] = []
        size = 0
        for p in self.params:
            self.slots.append(size)
            size += -(-p.numel() // ALIGNMENT) * ALIGNMENT
        self.size = size

        # A parameter with gaps between its elements is served by a dense copy of it.
        self.segments: list[Tensor] = []
        self._copies: list[tuple[int, Tensor]] = []
        for p in self.params:
            segment = p
            if not is_dense(p):
                segment = p.detach().clone(memory_format=torch.contiguous_format)
                self._copies.append((len(self.segments), segment))
            self.segments.append(segment)
        # As laid out: the user may change a parameter's strides later, not those of its slot.
        self._shapes = [(s.size(), s.stride()) for s in self.segments]
        self._none = torch.empty(0, dtype=self.dtype, device=self.device)
        self.empty = torch.empty(0, dtype=self.state_dtype, device=self.device)

        table = torch.zeros(len(self.params), schema.COLUMNS, dtype=torch.int64, device="cpu")
        table[:, schema.SLOT] = torch.tensor(self.slots, device="cpu")
        table[:, schema.NUMEL] = torch.tensor([p.numel() for p in self.params], device="cpu")
        table[:, schema.GROUP] = torch.tensor(self.groups, device="cpu")
        table[:, schema.SCALED] = torch.tensor(list(scaled), dtype=torch.int64, device="cpu")
        self.table = table
        self._grad_column = table[:, schema.GRAD]
        self._backup_column = table[:, schema.BACKUP]
        self._layout = _layouts(self.segments)
        self._status = torch.zeros(2, dtype=torch.int64, device="cpu")
        self._missing = 0  # parameters without a gradient in the last pass
        blocks = blocks_of([p.numel() for p in self.params])
        self.blocks = blocks.to(self.device)
        self.partials = torch.zeros(
            schema.partials_size(size, len(blocks)), dtype=schema.scalar_dtype(self.device), device=self.device
        )
        self.coefficients = self.partials.new_zeros(2)  # of a g + b v, where there is a v
        self.step = torch.zeros(len(self.params), dtype=torch.float32, device=self.device)
        if flatten:
            self._flatten()
        self._meta = [_meta(p) for p in self.params]
        # Where the parameters lie: gather, turned on them, finds their addresses and checks their layouts.
        self._param_layout = _layouts(self.params)
        self._found = torch.zeros_like(table)
        self._found_status = torch.zeros(2, dtype=torch.int64, device="cpu")
        self._addresses = self._locate().clone()
        self._point()
        # The table on a device: column after column, so that the ones that change go there in one copy.
        self._upload: Sender | None = None
        self._sent: Tensor | None = None  # the columns PARAM and GRAD as they are there
        self._complete = False  # whether the other columns are there
        self._marked = False  # whether a kernel may have marked backups there

    # Where the weights are.

    def _locate(self) -> Tensor:
        """Addresses of the parameters now; MISMATCH for one whose dtype, shape or strides changed."""
        _gather(self._found, self._found_status, self.params, self._param_layout, self._none, dtype=self.dtype)
        return self._found[:, schema.GRAD]

    def _point(self) -> None:
        self.table[:, schema.PARAM] = torch.tensor([s.data_ptr() for s in self.segments], device="cpu")

    def attached(self) -> bool:
        """Whether this layout still serves its parameters; follows those that merely moved.

        False when one changed device, dtype, shape or strides, or left the flat buffer: a new layout is due.

        Raises:
            RuntimeError: for a parameter whose storage was freed.
        """
        addresses = self._locate()
        if torch.equal(addresses, self._addresses):
            return True
        for name, p in zip(self.names, self.params, strict=True):
            if p.numel() and p.layout == torch.strided and not p.data_ptr():
                raise RuntimeError(f"{name} has no memory behind it (was its storage resized?)")
        if self.flat_params is not None or [_meta(p) for p in self.params] != self._meta:
            return False
        self._follow(addresses)
        return True

    def _follow(self, addresses: Tensor) -> None:
        """Take the parameters where they are now."""
        self._point()
        if self._complete:
            self._send_table(fresh=False)
        self._addresses = addresses.clone()  # last: an interrupt before it finds them changed again

    # The table on a device.

    @property
    def rows(self) -> Tensor:
        """The table for the backend in charge: the host's, or the one on the device where kernels read it there,
        which is sent if it never was."""
        if not reads_there(self.device):
            return self.table
        if not self._complete:
            self._send_table(fresh=False)
        assert self._upload is not None
        return self._upload.target.t()

    def _send_table(self, fresh: bool) -> None:
        """Bring the device's table up to date; its marks of backups too when no step is pending (``fresh``)."""
        if not reads_there(self.device):
            return
        if self._upload is None:
            shape = (schema.COLUMNS, len(self.params))
            target = torch.zeros(shape, dtype=torch.int64, device=self.device)
            self._upload = Sender(target, schema.BACKUP + 1)
        capturing = is_capturing(self.device)
        columns = self.table.t()
        if not self._complete:
            count = schema.COLUMNS
        elif (
            capturing or self._upload.captured or self._sent is None
            or not torch.equal(columns[: schema.BACKUP], self._sent)
        ):  # fmt: skip
            # A graph brings its own addresses along, for eager steps between its replays may send others; and
            # they send theirs again, for a replay may have been in between.
            count = schema.BACKUP + fresh
        else:
            count = (schema.BACKUP + 1) * (fresh and self._marked)
        if not count:
            return
        self._sent = None  # an interrupt may come between the copy and the note of it
        self._upload.send(columns[:count].contiguous())
        self._sent = columns[: schema.BACKUP].clone()
        self._complete = True
        if fresh:
            self._marked = False

    # One pass.

    def collect(self, error: Callable[[str, Tensor], Exception], fresh: bool = True) -> None:
        """Take the gradients of a pass as autograd left them; nothing of the parameters changes.

        Args:
            error: makes the exception for a gradient that no kernel can use (sparse), of its parameter's
                name and the gradient.
            fresh: whether no parameter is perturbed now.
        """
        none = self._none
        grads = [none if (g := p.grad) is None else g for p in self.params]
        _gather(self.table, self._status, grads, self._layout, none, dtype=self.dtype)
        mismatches, self._missing = self._status.tolist()
        if mismatches:
            self._copy_mismatches(grads, error)
        for i, segment in self._copies:
            segment.copy_(self.params[i])
        self.grads = grads
        self._send_table(fresh)

    def _copy_mismatches(self, grads: list[Tensor], error: Callable[[str, Tensor], Exception]) -> None:
        for i in (self._grad_column == schema.MISMATCH).nonzero().flatten().tolist():
            grad, segment = grads[i], self.segments[i]
            if grad.layout != torch.strided or grad.size() != segment.size() or not grad.data_ptr():
                raise error(self.names[i], grad)
            grads[i] = torch.empty_strided(
                segment.size(), segment.stride(), dtype=self.dtype, device=self.device
            ).copy_(grad)
            self.table[i, schema.GRAD] = grads[i].data_ptr()

    def mark(self, i: int) -> None:
        """The backup holds the weights of parameter i: it came from another layout."""
        self._backup_column[i] = 1

    def take_over(self, i: int, other: FlatBuffers, j: int) -> None:
        """What the other layout keeps of a perturbed parameter: its j-th, this one's i-th."""
        for name in _SCRATCH:
            if name in other.buffers:
                self.view(name, i).copy_(other.view(name, j))
        self.mark(i)

    def keep_others(self) -> None:
        """Keep the weights of parameters that have a gradient now, but had none when the others were kept."""
        others = ((self._grad_column != 0) & (self._backup_column == 0)).nonzero().flatten().tolist()
        for i in others:
            self.view("backup", i).copy_(self.segments[i])
            self.mark(i)
        if others:
            self._complete = False  # the marks are the host's

    def ascending(self) -> None:
        """Before a kernel perturbs the parameters: it may mark backups on the device from now on."""
        self._marked = True

    def ascended(self) -> None:
        """After a kernel perturbed the parameters with a gradient, and kept them in the backup."""
        if walks_lists(self.device.type):
            self._complete = False  # the marks are the host's
        elif is_remote(self.device):
            self._backup_column.copy_(self._grad_column != 0)
        self.written()

    def written(self) -> None:
        """After a kernel wrote weights through the table: tell autograd, which could not see it."""
        for i, segment in self._copies:
            if self._grad_column[i] or self._backup_column[i]:
                self.params[i].copy_(segment)
        params = self.params
        if self._missing:
            params = [p for p, t in zip(params, self.touched(), strict=True) if t]
        torch.autograd.graph.increment_version(params)

    def touched(self) -> list[bool]:
        """Whether each parameter had a gradient in this pass, or in the one that perturbed."""
        touched: list[bool] = ((self._grad_column != 0) | (self._backup_column != 0)).tolist()
        return touched

    def finish(self) -> None:
        """After the last pass of a step: no gradient is held, no backup is in use."""
        self._backup_column.zero_()
        self.grads = []

    @property
    def has_gradients(self) -> bool:
        """Whether any parameter had a gradient when they were collected."""
        return self._missing < len(self.params)

    @property
    def lists(self) -> tuple[list[Tensor], list[Tensor]]:
        """(parameters, gradients) for the backend in charge: empty ones when it reads the table."""
        if walks_lists(self.device.type):
            return self.segments, self.grads or [self._none] * len(self.params)
        return [], []

    # Flat state.

    def buffer(self, name: str) -> Tensor:
        """The flat buffer ``name``, made when first asked for: zeros, or what lasts a step only (not initialised)."""
        if name not in self.buffers:
            if name in _SCRATCH:
                self.buffers[name] = torch.empty(self.size, dtype=self.dtype, device=self.device)
            else:
                self.buffers[name] = torch.zeros(self.size, dtype=self.state_dtype, device=self.device)
        return self.buffers[name]

    def view(self, name: str, i: int) -> Tensor:
        """Parameter i's slot of the buffer ``name``, with the parameter's shape and (dense) strides."""
        return self._slot(self.buffer(name), i)

    def _slot(self, buffer: Tensor, i: int) -> Tensor:
        return buffer.as_strided(*self._shapes[i], self.slots[i])

    def forget_state(self) -> None:
        """Start state afresh, for a rule to take over what the optimizer holds now. What lasts a step stays."""
        self.buffers = {name: buffer for name, buffer in self.buffers.items() if name in _SCRATCH}
        self.step = torch.zeros_like(self.step)
        self.forget_exposed()

    def forget_exposed(self) -> None:
        """No row's state stands in the optimizer's state any more."""
        self.exposed = [()] * len(self.params)
        self.exposed_groups = None
        self.own_exposed = [False] * len(self.params)

    def perturbed(self) -> list[bool]:
        """Whether the backup holds the weights, for each parameter. Waits for a device."""
        return [mark != 0 for mark in self.rows[:, schema.BACKUP].tolist()]

    # flatten=True.

    def _flatten(self) -> None:
        if self._copies:
            name = self.names[self._copies[0][0]]
            raise ValueError(f"flatten=True needs parameters without gaps in memory, but {name} has some")
        # Zeros, not empty: whoever reads the whole buffer (a collective, a norm) sees no garbage in gaps.
        self.flat_params = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        self.flat_grads = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for i, p in enumerate(self.params):
            view = self._slot(self.flat_params, i)
            view.copy_(p.detach())
            p.data = view
        self._make_grad_views()
        for p, view in zip(self.params, self._grad_views, strict=True):
            if p.grad is not None:
                view.copy_(p.grad.to_dense() if p.grad.layout != torch.strided else p.grad)
        self._point_grads()

    def _make_grad_views(self) -> None:
        assert self.flat_grads is not None
        self._grad_views = [self._slot(self.flat_grads, i) for i in range(len(self.params))]
        self._grad_addresses = list(map(Tensor.data_ptr, self._grad_views))

    def _point_grads(self) -> None:
        for p, view in zip(self.params, self._grad_views, strict=True):
            if not p.requires_grad:
                p.grad = None  # a gradient of zeros would still decay a frozen weight
            elif p.grad is not view:
                p.grad = view

    def zero_grads(self) -> None:
        """Zero the flat gradients in one go and make them every parameter's ``grad`` again."""
        assert self.flat_grads is not None
        self.flat_grads.zero_()
        if list(map(Tensor.data_ptr, self._grad_views)) != self._grad_addresses:
            self._make_grad_views()  # somebody replaced a view's data
        self._point_grads()

    def unflatten(self) -> None:
        """Give every parameter and gradient its own memory again."""
        if self.flat_params is None or self.flat_grads is None:
            return
        grads = self.flat_grads.untyped_storage().data_ptr()
        for p in self.params:
            grad = p.grad
            p.data = p.data.clone()
            if grad is not None and grad.untyped_storage().data_ptr() == grads:
                p.grad = grad.clone()
        self.flat_params = self.flat_grads = None
        self._grad_views = []
        self._follow(self._locate())


def _layouts(tensors: Sequence[Tensor]) -> Tensor:
    """What gather compares with: a row [dim, sizes..., strides...] a tensor, filled up with zeros."""
    dim = max(t.dim() for t in tensors)
    rows = [[t.dim(), *t.size(), *t.stride(), *([0] * 2 * (dim - t.dim()))] for t in tensors]
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _meta(p: Tensor) -> tuple[object, ...]:
    return p.device, p.dtype, p.size(), p.stride()
