"""Flat buffers: where each parameter's backup and state lie.

The parameters of one (device, dtype) share one layout; of DTensors those of one mesh and placements, by their local
tensors. Parameter i owns the elements ``[slot_i, slot_i + numel_i)`` of every flat buffer (backup, momentum, ...), in
the parameter's own memory order, so that a buffer's slot seen with the parameter's shape and strides is its state.
Slots start at multiples of 64 bytes in every buffer of the layout. Weights and gradients stay where they are; a table
of their addresses is what the kernels walk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..flatten import Flattened
from ..ops import schema
from ..ops.backend import prepare, walks_lists
from ..ops.scan import increment_version
from .shapes import ALIGNMENT, blocks_of, is_dense, slots_of
from .shards import Placing, Shards, placing
from .table import Table

# Buffers that mean something between two passes only: the weights and their first gradient, in the parameters' dtype,
# and what the first ascent goes along, in the state's.
SCRATCH = ("backup", "gradient", "direction")
# The name in ``opt.state`` of what the backup of a layout with masters holds.
MASTER = "master"


class Layout:
    """Slots, table and flat buffers of the parameters of one (device, dtype).

    Args:
        params: leaf tensors of one device and dtype; all plain ones, or DTensors that lie alike.
        names: what errors call them.
        groups: index of each one's parameter group.
        scale: which T_w each one has, a value of ``schema.SCALE``.
        flatten: move weights and gradients into flat buffers too.
        own: names of the algorithm's state, whose flat buffers are the rows of one tensor.
        mastered: whether parameters of a half type have masters: the backup is float32 then and holds the weights at
            any time, of which the parameters are the rounded values between two steps.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        names: Sequence[str],
        groups: Sequence[int],
        scale: Sequence[int],
        flatten: bool = False,
        own: Sequence[str] = (),
        mastered: bool = False,
    ) -> None:
        prepare(params[0].device)
        self.params, self.names, self.groups = list(params), list(names), list(groups)
        self.device, self.dtype = self.params[0].device, self.params[0].dtype
        self.state_dtype = schema.state_dtype(self.dtype)
        # Names in the optimizer's state that come with this layout.
        self.masters = (MASTER,) if mastered and self.dtype != self.state_dtype else ()
        # Of each parameter that agrees with its master: the version that this was seen of, -1 of one that may not; and
        # the storage. `p.data = x` keeps the version, and x may lie where the old memory did.
        self._versions = [-1] * len(self.params)
        self._storages: list[StorageWeakRef | None] = [None] * len(self.params)
        self.placing: Placing = placing(self.params[0])
        self.shards = None if self.placing is None else Shards(self.params)
        memory = self._memory()
        self.slots, self.size = slots_of(memory)
        if self.shards is not None:
            self.size = max(self.size, ALIGNMENT)  # a buffer of no elements is none
        # A parameter with gaps between its elements is served by a dense copy of it.
        self.copies = {
            i: p.detach().clone(memory_format=torch.contiguous_format) for i, p in enumerate(memory) if not is_dense(p)
        }
        self.segments = [self.copies.get(i, p) for i, p in enumerate(memory)]
        # As laid out: the user may change a parameter's strides later, not those of its slot.
        self._shapes = [(s.size(), s.stride()) for s in self.segments]
        self.flat = Flattened(self.params, self.slots, self.size) if flatten else None
        self.table = Table(memory, self.segments, self.slots, self.groups, scale, self.shards is not None)
        blocks = blocks_of([p.numel() for p in memory])
        self.blocks = blocks.to(self.device)
        self._own = tuple(own)
        partials = schema.partials_size(self.size, len(blocks), len(own))
        self.partials = torch.zeros(partials, dtype=schema.scalar_dtype(self.device), device=self.device)
        self.empty = torch.empty(0, dtype=self.state_dtype, device=self.device)
        self.no_sums = self.partials[:0]
        self.buffers: dict[str, Tensor] = {}
        self.grads: list[Tensor] = []
        self._meta = list(map(_meta, memory))
        self.moved = False  # whether any parameter has moved since it was seen that none shares memory with another

    def _memory(self) -> list[Tensor]:
        """Where the elements of each parameter lie that this process has."""
        return self.params if self.shards is None else self.shards.local()

    # Flat buffers.

    def buffer(self, name: str) -> Tensor:
        """The flat buffer ``name``, made when first asked for: zeros; the backup is not initialised. Those of the
        algorithm's state are made together. ``master`` is the backup."""
        if name == MASTER:
            name = "backup"
        if name not in self.buffers and name in self._own:
            matrix = torch.zeros(len(self._own), self.size, dtype=self.state_dtype, device=self.device)
            self.buffers.update(zip(self._own, matrix, strict=True))
        elif name not in self.buffers:
            make = torch.empty if name == "backup" else torch.zeros
            own_dtype = name == "gradient" or (name == "backup" and not self.masters)
            dtype = self.dtype if own_dtype else self.state_dtype
            self.buffers[name] = make(self.size, dtype=dtype, device=self.device)
        return self.buffers[name]

    def rows(self, names: Sequence[str]) -> Tensor:
        """[names, size]: the flat buffers of the algorithm's state of these names, the first ones that it declares."""
        assert tuple(names) == self._own[: len(names)]
        return self.buffer(names[0]).as_strided((len(names), self.size), (self.size, 1))

    def view(self, name: str, i: int) -> Tensor:
        """Parameter i's slot of the buffer ``name``, with the parameter's shape and (dense) strides."""
        buffer = self.buffer(name)
        return buffer.as_strided(*self._shapes[i], buffer.storage_offset() + self.slots[i])

    def shown(self, name: str, i: int) -> Tensor:
        """Parameter i's slot as users see it: of a DTensor, a DTensor that lies as it does."""
        view = self.view(name, i)
        return view if self.shards is None else self.shards.wrapped(i, view)

    def take(self, name: str, i: int, value: Tensor) -> Tensor:
        """Copy a value of parameter i's shape into its slot, and return that as users see it."""
        self.view(name, i).copy_(value if self.shards is None else self.shards.shard_of(value))
        return self.shown(name, i)

    # Masters.

    @property
    def master(self) -> Tensor:
        """The flat buffer of the masters; empty where there are none."""
        return self.buffer("backup") if self.masters else self.empty

    def take_master(self, i: int, found: Tensor | None) -> None:
        """Parameter i's master: what was found in the optimizer's state, or its weights as they are. The backup has it
        already where the weights are away."""
        if found is not None:
            self.take(MASTER, i, found)
            self._versions[i] = -1  # the parameter may be of another run
        elif not self.table.is_marked(i):
            p = self._memory()[i]
            self.view(MASTER, i).copy_(p)
            self._agree(i, p)

    def return_master(self, i: int, master: Tensor) -> None:
        """The exact weights of parameter i, which was of a half type, where nobody wrote any since."""
        found, p = (master if self.shards is None else self.shards.shard_of(master)), self._memory()[i]
        if any(torch.equal(found.to(half).to(p.dtype), p) for half in (torch.bfloat16, torch.float16)):
            p.copy_(found)

    def _agree(self, i: int, p: Tensor) -> None:
        self._versions[i], self._storages[i] = p._version, StorageWeakRef(p.untyped_storage())

    def doubt_parameters(self) -> None:
        """Any of them may have been written."""
        self._versions = [-1] * len(self.params)

    def heed_parameters(self) -> None:
        """Weights at home that somebody else wrote since they were last seen are the masters from here on, where they
        are not what the half type has of those. Nothing is launched where nobody wrote, as far as versions and storages
        tell."""
        seen = zip(self._memory(), self._versions, self._storages, strict=True)
        for i, (p, version, storage) in enumerate(seen):
            same = p._version == version and storage is not None and storage.cdata == p.untyped_storage()._cdata
            if not same and not self.table.is_marked(i):
                master, w = self.view(MASTER, i), p.detach()
                master.copy_(torch.where(master.to(w.dtype) == w, master, w.to(master.dtype)))
                self._agree(i, p)

    # Where the weights are.

    def attached(self) -> bool:
        """Whether this layout still serves its parameters; follows those that merely moved.

        False when one changed device, dtype, shape or strides, or left the flat buffer: a new layout is due.

        Raises:
            RuntimeError: for a parameter whose storage was freed.
        """
        memory = self._memory()
        addresses = self.table.moved(memory)
        if addresses is None:
            return True
        for name, p in zip(self.names, memory, strict=True):
            if p.numel() and p.layout == torch.strided and not p.data_ptr():
                raise RuntimeError(f"{name} has no memory behind it (was its storage resized?)")
        if self.flat is not None or list(map(_meta, memory)) != self._meta:
            return False
        if self.shards is not None:
            self.segments[:] = [self.copies.get(i, p) for i, p in enumerate(memory)]
        self.table.follow(addresses)
        self.moved = True
        self.doubt_parameters()
        return True

    def unflatten(self) -> None:
        """Undo ``flatten``: every parameter and gradient gets memory of its own again. ``attached`` notices."""
        if self.flat is not None:
            self.flat.undo()
            self.flat = None

    # One pass.

    def collect(self, error: Callable[[str, Tensor], Exception], fresh: bool = True) -> None:
        """Take the gradients of a pass as autograd left them; nothing of the parameters changes.

        Args:
            error: makes the exception for a gradient that no kernel can use (sparse), of its parameter's
                name and the gradient.
            fresh: whether no weights are away.
        """
        if self.flat is not None:
            self.flat.take()
        self.grads = []
        if walks_lists(self.device.type) or not self.table.scan():
            self._gather(error)
        if self.copies:
            memory = self._memory()
            for i, segment in self.copies.items():
                segment.copy_(memory[i])
        self.table.send(fresh)

    def _gather(self, error: Callable[[str, Tensor], Exception]) -> None:
        """Take the gradients as a list, with a copy of each that no kernel can use as it is."""
        none = self.table.none
        if self.shards is None:
            grads = [none if (g := p.grad) is None else g for p in self.params]
        else:
            found = self.shards.gradients(self.names)
            grads = [none if g is None else g for g in found]
            self.table.note_empty([g is not None for g in found])
        for i in self.table.gather(grads):
            grad, (size, stride) = grads[i], self._shapes[i]
            if grad.layout != torch.strided or grad.size() != size or (grad.numel() and not grad.data_ptr()):
                raise error(self.names[i], grad)
            grads[i] = torch.empty_strided(size, stride, dtype=self.dtype, device=self.device).copy_(grad)
            self.table.grad_column[i] = grads[i].data_ptr()
        self.grads = grads

    def follow(self, name: str, rows: Sequence[bool]) -> None:
        """Take the slots of a flat buffer for the gradients of these rows until the next pass; the others have none."""
        if self.buffer(name).dtype != self.dtype:
            self.buffer("gradient").copy_(self.buffer(name))  # a kernel reads gradients of the parameters' dtype
            name = "gradient"
        self.table.follow_buffer(self.buffer(name), rows)
        self.grads = []
        if walks_lists(self.device.type):
            self.grads = [self.view(name, i) if taken else self.table.none for i, taken in enumerate(rows)]

    @property
    def has_gradients(self) -> bool:
        """Whether any parameter had a gradient when they were collected."""
        return self.table.missing < len(self.params)

    @property
    def any_scaled(self) -> bool:
        """Whether any parameter has another T_w than 1."""
        return self.table.any_scaled

    @property
    def walk(self) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """What every op takes: ``params``, ``grads``, ``table``, ``blocks``. The lists are for a backend that walks
        them; the others read the table, and get empty ones."""
        if walks_lists(self.device.type):
            return self.segments, self.grads or [self.table.none] * len(self.params), self.table.host, self.blocks
        return [], [], self.table.rows, self.blocks

    def keep_others(self) -> None:
        """Keep the weights of parameters that have a gradient now, but had none when the others were kept."""
        for i in self.table.unmarked_with_gradient():
            self._keep(i)

    def _keep(self, i: int) -> None:
        if not self.masters:  # those have them
            self.view("backup", i).copy_(self.segments[i])
        self.table.mark(i)

    def keep_rows(self, rows: Sequence[bool]) -> None:
        """Keep the weights of these parameters, too: none of them has moved where they are not kept yet."""
        for i, (wanted, marked) in enumerate(zip(rows, self.table.touched(), strict=True)):
            if wanted and not marked:
                self._keep(i)

    def complete_kept_gradient(self) -> None:
        """Of parameters that have a gradient now, but had none when the first one was kept, that one was zero."""
        for i in self.table.unmarked_with_gradient():
            self.view("gradient", i).zero_()

    def take_over(self, i: int, other: Layout, j: int) -> None:
        """What the other layout keeps of a perturbed parameter: its j-th, this one's i-th."""
        for name in SCRATCH:
            if name in other.buffers:
                self.view(name, i).copy_(other.view(name, j))
        self.table.mark(i)

    def give_back(self, i: int) -> None:
        """The weights of a perturbed parameter that no layout serves from here on, unless it has another shape now."""
        p, kept = self._memory()[i].detach(), self.view("backup", i)
        if p.size() == kept.size():
            p.copy_(kept)

    def written(self) -> None:
        """A kernel wrote weights through the table: tell autograd, which could not see it."""
        params = self.params
        if self.table.missing or self.copies:
            touched, memory = self.table.touched(), self._memory()
            for i, segment in self.copies.items():
                if touched[i]:
                    memory[i].copy_(segment)
            params = [p for p, t in zip(params, touched, strict=True) if t]
        if self.shards is None:
            increment_version(params)
        else:
            self.shards.written(params)
        if self.masters:
            touched = self.table.touched()
            for i, p in enumerate(self._memory()):
                if touched[i]:
                    self._versions[i] = p._version

    def finish(self) -> None:
        """After the last pass of a step: no gradient is held, no backup is in use, nothing drawn for it is left out."""
        self.table.clear_marks()
        self.table.take_back_in()
        self.grads = []


def _meta(p: Tensor) -> tuple[object, ...]:
    return p.device, p.dtype, p.size(), p.stride()
