"""m-sharpness: the first gradient of a step is that of one process's part of the batch, or of a few processes'.

What a process measures of its own gradient moves its own weights only. Whatever decides, or goes into weights and state
at home, is reduced over all processes first, so that it has the same bits on each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checks import type_name
from ..distributed import EXCHANGED, DataParallel, Replicas, replicas_of
from ..memory.layouts import Layouts
from ..memory.shards import fsdp_modules_of, is_sharded, local


def make_msharpness(model: nn.Module | None, over: Any, scheduled: bool) -> MSharpness | None:
    """None where every pass is of the joint batch: ``over`` is "global", or there is one process.

    Args:
        scheduled: whether it is known before the first pass that another one follows.

    Raises:
        ValueError, TypeError: for another string, something that is no group, a model that is not under
            DistributedDataParallel or :func:`sharpkern.replicate` or whose parameters DDP looks for, and a group of
            other processes.
    """
    if over == "global":
        return None
    part: Any = None
    if not isinstance(over, str):
        if not (dist.is_available() and isinstance(over, dist.ProcessGroup)):
            raise TypeError(
                f'm_sharpness should be "global", "rank", "replica" or a process group, but got {type_name(over)}'
            )
        part = over
    elif over not in ("rank", "replica"):
        raise ValueError(f'Invalid m_sharpness: {over!r}, expected "global", "rank", "replica" or a process group')
    model = getattr(model, "_orig_mod", model)
    if over == "replica":
        if (replicas := replicas_of(model)) is None:
            raise ValueError(
                'm_sharpness="replica" leaves the first gradient of a step to each copy of a sharded model: model= has '
                "to be one that was sharded over the processes of a copy, and went through sharpkern.replicate(), but "
                f"got {type_name(model)}"
            )
        return None if replicas.group.size() == 1 else MSharpness(replicas)
    if isinstance(model, nn.Module) and fsdp_modules_of(model):
        raise ValueError(
            f"m_sharpness={over!r} goes with DistributedDataParallel: gradients under fully_shard are summed in shards "
            'over all processes. Shard copies of the model, sharpkern.replicate() them, and take "replica"'
        )
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"m_sharpness leaves the first gradient of a step to each process: model= has to be the model under "
            f"DistributedDataParallel, whose exchange can be left out, but got {type_name(model)}"
        )
    parallel = DataParallel(model)
    if parallel.looks_for_parameters and not scheduled:
        raise ValueError(
            "m_sharpness= and find_unused_parameters=True go with a policy that knows the steps beforehand: after one "
            "without a second pass DistributedDataParallel takes parameters of that step for used in the next one"
        )
    if part is not None:
        ranks = dist.get_process_group_ranks(part)
        if dist.get_rank() not in ranks or not {*ranks} <= {*dist.get_process_group_ranks(parallel.group)}:
            raise ValueError(f"m_sharpness is the group of processes {ranks}: not of this one and others of the model")
        if len(ranks) == 1:
            part = None
    return None if parallel.group.size() == (1 if part is None else part.size()) else MSharpness(parallel, part)


class MSharpness:
    """First passes of one optimizer, and what becomes of their gradients.

    Args:
        copies: of the model.
        part: the processes that share a first gradient; None: each copy has its own.
    """

    def __init__(self, copies: DataParallel | Replicas, part: dist.ProcessGroup | None = None) -> None:
        self.copies, self._part = copies, part
        self._joint_steps = copies.joint_steps
        self.inside = False  # whether the first pass is under way
        self.taken = False  # whether first_pass() was around the pass whose gradients are there
        self.local = False  # whether those are not everybody's
        self.own = False  # whether the gradients that are there are of such a pass
        self._exchanges = 0  # that there were at the end of the first pass
        self._kept: str | None = None  # the flat buffer that is being averaged
        self._rows: list[Tensor] = []  # of each layout: whether a parameter had a gradient, in any process
        self._works: list[Any] = []

    def check(self, params: Iterable[tuple[Tensor, str]]) -> None:
        """Raise TypeError or ValueError for parameters, each with its name, whose gradients are not averaged here."""
        sharded, exchanged = isinstance(self.copies, Replicas), self.copies.parameters
        for p, label in params:
            if is_sharded(p) and not sharded:
                raise TypeError(
                    f"m_sharpness= takes no DTensor, but {label} is one: its gradient is summed in shards, over all "
                    'processes. Shard copies of the model, sharpkern.replicate() them, and take m_sharpness="replica"'
                )
            if sharded and p not in exchanged:
                raise ValueError(f'm_sharpness="replica": {label} is none of the model that was replicated')

    @contextmanager
    def first_pass(self, wanted: bool) -> Iterator[None]:
        """Around forward and backward of the first pass; within itself it does nothing.

        Args:
            wanted: whether another pass may follow; else the gradient is everybody's, as of the model.

        Raises:
            RuntimeError: in torch's Join, and where gradients were exchanged for all that.
        """
        if self.inside:
            yield
            return
        self.copies.check()
        alone = wanted and not self._joint_steps
        self.inside, self.taken, self.local = True, False, alone
        try:
            with self.copies.without_exchange() if alone else nullcontext():
                yield
            self.taken, self._exchanges = True, self.copies.exchanges
        finally:
            self.inside, self.local = False, alone and self.taken
        self._joint_steps = max(0, self._joint_steps - 1)

    def begin(self, layouts: Layouts) -> bool:
        """The gradients become those of the processes that share them. Returns whether they changed.

        Raises:
            RuntimeError: where gradients were exchanged since the first pass.
        """
        if self.local and self.copies.exchanges != self._exchanges:
            raise RuntimeError(EXCHANGED)
        self.own = self.local
        if not (self.local and self._part):
            return False
        self._average(layouts, self._part)
        return True

    def join(self, layouts: Layouts) -> bool:
        """The gradients become everybody's: no other pass follows. Returns whether they changed."""
        if not self.local:
            return False
        self._average(layouts, self.copies.group)
        self.local = self.own = False
        return True

    def mean(self, number: Tensor) -> Tensor:
        """Of a number on the device, over everybody: a collective."""
        everybody = self.copies.everybody
        return everybody.all_reduce(number / everybody.size)

    def any(self, flag: Tensor) -> Tensor:
        """Everybody's largest of a number on the device: a collective."""
        return self.copies.everybody.all_reduce(flag, largest=True)

    def _average(self, layouts: Layouts, group: Any) -> None:
        """One collective a layout."""
        exchanged = self.copies.parameters
        for layout in layouts:
            places = [i for i, p in enumerate(layout.params) if p in exchanged and p.requires_grad]
            if not places:
                continue
            params = [layout.params[i] for i in places]
            missing = [p.grad is None for p in params]
            pieces = [local(torch.zeros_like(p) if p.grad is None else p.grad) for p in params]
            present = torch.tensor(missing, device="cpu").logical_not().to(layout.device, layout.dtype)
            flat = torch.cat([piece.reshape(-1) for piece in pieces] + [present])
            flat /= group.size()
            dist.all_reduce(flat, group=group)
            *means, present = flat.split([piece.numel() for piece in pieces] + [len(params)])
            had = present.tolist() if any(missing) else missing  # waits for the device
            for i, p, piece, mean, anywhere in zip(places, params, pieces, means, had, strict=True):
                mean = mean.view_as(piece)
                if p.grad is not None:
                    piece.copy_(mean)
                elif anywhere:
                    mean = mean.clone(memory_format=torch.preserve_format)
                    p.grad = mean if layout.shards is None else layout.shards.wrapped(i, mean)

    # A first gradient, or a direction, that goes into the step at home.

    def keep(self, layouts: Layouts, name: str, first: Callable[[torch.device], Tensor]) -> None:
        """Begin to average a flat buffer that this process moved along: behind the next pass.

        Args:
            first: its squared norm on a device; where it is not finite nobody moved, and the average is not, either.
        """
        self._kept = name
        exchanged = self.copies.parameters
        for layout in layouts:
            for p, label in zip(layout.params, layout.names, strict=True):
                if p not in exchanged:
                    raise RuntimeError(
                        f"m_sharpness: {label} is none of the parameters whose gradients are exchanged, and "
                        "this optimizer averages what goes along the first gradient"
                    )
            buffer, having = layout.buffer(name), layout.table.has_gradient()
            share = (first(layout.device).sum() * 0 + 1) / self.copies.group.size()
            for i, had in enumerate(having):
                if not had:
                    layout.view(name, i).zero_()
            buffer *= share.to(buffer.dtype)
            rows = torch.tensor(having, device=layout.device if self.copies.may_miss else "cpu").int()
            self._rows.append(rows)
            for part in (buffer, rows) if self.copies.may_miss else (buffer,):
                self._works.append(dist.all_reduce(part, group=self.copies.group, async_op=True))

    def settle(self, layouts: Layouts) -> bool:
        """The kept buffer is everybody's mean, and stands for the gradients that are there. Returns whether there is
        one."""
        if self._kept is None:
            return False
        self.wait()
        for layout, rows in zip(layouts, self._rows, strict=True):
            having = [count > 0 for count in rows.tolist()]
            if not self.copies.may_miss:  # what one process had no first gradient of is zero there
                having = [had or p.grad is not None for had, p in zip(having, layout.params, strict=True)]
            layout.keep_rows(having)
            layout.follow(self._kept, having)
        self._kept, self._rows = None, []
        return True

    def end(self) -> None:
        """No step is open."""
        self.wait()
        if not self.inside:
            self.taken = self.local = self.own = False
        self._kept, self._rows = None, []

    def wait(self) -> None:
        """Nothing is being averaged."""
        works, self._works = self._works, []
        for work in works:
            work.wait()
