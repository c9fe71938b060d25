"""m-sharpness: the first gradient of a step is that of one process's part of the batch, or of a few processes'.

What a process measures of its own gradient moves its own weights only. Whatever decides, or goes into weights and state
at home, is reduced over all processes first, so that it has the same bits on each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checks import type_name
from ..distributed import parallel_model
from ..memory.layouts import Layouts


def make_msharpness(model: nn.Module | None, over: Any, scheduled: bool) -> MSharpness | None:
    """None where every pass is of the joint batch: ``over`` is "global", or there is one process.

    Args:
        scheduled: whether it is known before the first pass that another one follows.

    Raises:
        ValueError, TypeError: for another string, something that is no group, a model that is not under
            DistributedDataParallel or whose parameters it looks for, and a group of other processes.
    """
    if isinstance(over, str):
        if over not in ("global", "rank"):
            raise ValueError(f'Invalid m_sharpness: {over!r}, expected "global", "rank" or a process group')
        if over == "global":
            return None
    elif not (dist.is_available() and isinstance(over, dist.ProcessGroup)):
        raise TypeError(f'm_sharpness should be "global", "rank" or a process group, but got {type_name(over)}')
    parallel = parallel_model(model)
    if parallel is None:
        raise ValueError(
            f"m_sharpness leaves the first gradient of a step to each process: model= has to be the model under "
            f"DistributedDataParallel, whose exchange can be left out, but got {type_name(model)}"
        )
    if parallel.find_unused_parameters and not scheduled:
        raise ValueError(
            "m_sharpness= and find_unused_parameters=True go with a policy that knows the steps beforehand: after one "
            "without a second pass DistributedDataParallel takes parameters of that step for used in the next one"
        )
    everybody = parallel.process_group
    part = None if isinstance(over, str) else over
    if part is not None:
        ranks = dist.get_process_group_ranks(part)
        if dist.get_rank() not in ranks or not {*ranks} <= {*dist.get_process_group_ranks(everybody)}:
            raise ValueError(f"m_sharpness is the group of processes {ranks}: not of this one and others of the model")
        if len(ranks) == 1:
            part = None
    if everybody.size() == (1 if part is None else part.size()):
        return None
    return MSharpness(parallel, part)


class MSharpness:
    """First passes of one optimizer, and what becomes of their gradients.

    Args:
        model: under DistributedDataParallel.
        part: the processes that share a first gradient; None: each has its own.
    """

    def __init__(self, model: nn.parallel.DistributedDataParallel, part: dist.ProcessGroup | None) -> None:
        self.everybody: Any = model.process_group
        self._model, self._part = model, part
        ignored = set(model.parameters_to_ignore)
        self._exchanged = {p for name, p in model.module.named_parameters() if name not in ignored}
        # Whether passes leave parameters out, other ones in each process.
        self.looks_for_parameters = model.find_unused_parameters
        self.may_miss = model.find_unused_parameters or model.static_graph
        # torch asserts that a static graph is synchronised at first.
        self._synchronised_steps = 2 if model.static_graph else 0
        self.inside = False  # whether the first pass is under way
        self.taken = False  # whether first_pass() was around the pass whose gradients are there
        self.local = False  # whether those are not everybody's
        self._kept: str | None = None  # the flat buffer that is being averaged
        self._rows: list[Tensor] = []  # of each layout: whether a parameter had a gradient, in any process
        self._works: list[Any] = []

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
        if self._model._join_config.enable:
            raise RuntimeError(
                "m_sharpness= in torch's Join: a process whose data have ended takes no part in the collectives of a "
                "step. Leave out the surplus batches, or take the joint gradient"
            )
        alone = wanted and not self._synchronised_steps
        self.inside, self.taken, self.local = True, False, alone
        try:
            with self._model.no_sync() if alone else nullcontext():
                yield
                # The second one tells of the last forward.
                if alone and (self._model.require_backward_grad_sync or self._model.require_forward_param_sync):
                    raise RuntimeError(
                        "m_sharpness: gradients of the first pass were exchanged, because the exchange was turned on "
                        "within it, or the forward pass was not within first_pass()"
                    )
            self.taken = True
        finally:
            self.inside, self.local = False, alone and self.taken
        self._synchronised_steps = max(0, self._synchronised_steps - 1)

    def begin(self, layouts: Layouts) -> bool:
        """The gradients become those of the processes that share them. Returns whether they changed."""
        if not (self.local and self._part):
            return False
        self._average(layouts, self._part)
        return True

    def join(self, layouts: Layouts) -> bool:
        """The gradients become everybody's: no other pass follows. Returns whether they changed."""
        if not self.local:
            return False
        self._average(layouts, self.everybody)
        self.local = False
        return True

    def mean(self, number: Tensor) -> Tensor:
        """Of a number on the device, over everybody: a collective."""
        mean: Tensor = number / self.everybody.size()
        dist.all_reduce(mean, group=self.everybody)
        return mean

    def any(self, flag: Tensor) -> None:
        """A number on the device becomes everybody's largest: a collective."""
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.everybody)

    def _average(self, layouts: Layouts, group: Any) -> None:
        """One collective a layout."""
        for layout in layouts:
            params = [p for p in layout.params if p in self._exchanged and p.requires_grad]
            if not params:
                continue
            missing = [p.grad is None for p in params]
            pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            present = torch.tensor(missing, device="cpu").logical_not().to(layout.device, layout.dtype)
            flat = torch.cat([piece.reshape(-1) for piece in pieces] + [present])
            flat /= group.size()
            dist.all_reduce(flat, group=group)
            *means, present = flat.split([p.numel() for p in params] + [len(params)])
            had = present.tolist() if any(missing) else missing  # waits for the device
            for p, mean, anywhere in zip(params, means, had, strict=True):
                if p.grad is not None:
                    p.grad.copy_(mean.view_as(p))
                elif anywhere:
                    p.grad = mean.view_as(p).clone(memory_format=torch.preserve_format)

    # A first gradient, or a direction, that goes into the step at home.

    def keep(self, layouts: Layouts, name: str, first: Callable[[torch.device], Tensor]) -> None:
        """Begin to average a flat buffer that this process moved along: behind the next pass.

        Args:
            first: its squared norm on a device; where it is not finite nobody moved, and the average is not, either.
        """
        self._kept = name
        for layout in layouts:
            for p, label in zip(layout.params, layout.names, strict=True):
                if p not in self._exchanged:
                    raise RuntimeError(
                        f"m_sharpness: {label} is none of the parameters that DistributedDataParallel exchanges, and "
                        "this optimizer averages what goes along the first gradient"
                    )
            buffer, having = layout.buffer(name), layout.table.has_gradient()
            share = (first(layout.device).sum() * 0 + 1) / self.everybody.size()
            for i, had in enumerate(having):
                if not had:
                    layout.view(name, i).zero_()
            buffer *= share.to(buffer.dtype)
            rows = torch.tensor(having, device=layout.device if self.may_miss else "cpu").int()
            self._rows.append(rows)
            for part in (buffer, rows) if self.may_miss else (buffer,):
                self._works.append(dist.all_reduce(part, group=self.everybody, async_op=True))

    def settle(self, layouts: Layouts) -> bool:
        """The kept buffer is everybody's mean, and stands for the gradients that are there. Returns whether there is
        one."""
        if self._kept is None:
            return False
        self.wait()
        for layout, rows in zip(layouts, self._rows, strict=True):
            having = [count > 0 for count in rows.tolist()]
            layout.keep_rows(having)
            layout.follow(self._kept, having)
        self._kept, self._rows = None, []
        return True

    def end(self) -> None:
        """No step is open."""
        self.wait()
        if not self.inside:
            self.taken = self.local = False
        self._kept, self._rows = None, []

    def wait(self) -> None:
        """Nothing is being averaged."""
        works, self._works = self._works, []
        for work in works:
            work.wait()
