"""Several processes, each with data of its own: copies of a model, whole or in shards, whose gradients are averaged."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checks import type_name
from .memory.shards import (
    Processes,
    Scope,
    fsdp_modules_of,
    has_all_reduce_hook,
    is_sharded,
    local,
    note_copies,
    processes_of,
)

EXCHANGED = (
    "m_sharpness: gradients of the first pass were exchanged, because the exchange was turned on within it, or the "
    "forward pass was not within first_pass()"
)


class DataParallel:
    """A model under DistributedDataParallel: every process has a copy.

    What :class:`Replicas` has, too: ``group``, the processes that average their gradients element by element;
    ``everybody``, all processes; ``parameters``, those whose gradients are averaged; ``may_miss``, whether passes leave
    parameters out, other ones in each copy, and ``looks_for_parameters``, whether in any pass; ``joint_steps``, how
    many of the first steps are exchanged whatever is wanted; ``exchanges``, how often gradients were, where that is
    seen.
    """

    exchanges = 0

    def __init__(self, model: nn.parallel.DistributedDataParallel) -> None:
        self._model, self.group = model, model.process_group
        self.everybody = Processes([self.group], self.group.size())
        self.looks_for_parameters = model.find_unused_parameters
        self.may_miss = model.find_unused_parameters or model.static_graph
        self.joint_steps = 2 if model.static_graph else 0  # torch asserts that
        ignored = set(model.parameters_to_ignore)
        self.parameters = {p for name, p in model.module.named_parameters() if name not in ignored}

    @contextmanager
    def without_exchange(self) -> Iterator[None]:
        """Around forward and backward.

        Raises:
            RuntimeError: where gradients were exchanged for all that.
        """
        with self._model.no_sync():
            yield
            # The second one tells of the last forward.
            if self._model.require_backward_grad_sync or self._model.require_forward_param_sync:
                raise RuntimeError(EXCHANGED)

    def check(self) -> None:
        """Raise RuntimeError in torch's Join."""
        if self._model._join_config.enable:
            raise RuntimeError(
                "m_sharpness= in torch's Join: a process whose data have ended takes no part in the collectives of a "
                "step. Leave out the surplus batches, or take the joint gradient"
            )


class Replicas:
    """Copies of a sharded model, whose gradients are averaged by hooks of its modules."""

    looks_for_parameters = may_miss = False
    joint_steps = 0

    def __init__(self, model: nn.Module, mesh: Any) -> None:
        self._model, self.mesh, self.group = weakref.ref(model), mesh, mesh.get_group(0)
        self.everybody = processes_of(mesh)
        self.exchanges = 0
        self._calls = 0
        self._wanted = True  # whether gradients are exchanged

    @property
    def parameters(self) -> set[Tensor]:
        model = self._model()
        return set() if model is None else set(model.parameters())

    @contextmanager
    def without_exchange(self) -> Iterator[None]:
        """Around a backward.

        Raises:
            RuntimeError: where gradients were exchanged for all that, or are there and the hooks did not see them.
        """
        wanted, self._wanted, calls, exchanges = self._wanted, False, self._calls, self.exchanges
        try:
            yield
        finally:
            self._wanted = wanted
        if self.exchanges != exchanges:
            raise RuntimeError(EXCHANGED)
        if self._calls == calls and any(p.grad is not None for p in self.parameters):
            raise RuntimeError(
                "m_sharpness: gradients of the first pass did not go through the hooks of sharpkern.replicate(): their "
                "backward was not within first_pass(), or the modules got another all-reduce hook since"
            )

    def check(self) -> None:
        """Nothing to say."""

    def average(self, shards: Tensor) -> None:
        """FSDP's all-reduce hook: gradients that were summed over the shards of this copy, on the stream in use."""
        self._calls += 1
        if self._wanted:
            self.exchanges += 1
            shards /= self.group.size()
            dist.all_reduce(shards, group=self.group)
        if shards.device.type != "cpu":
            # Their memory belongs to the stream of the reduction, which goes on meanwhile.
            shards.record_stream(torch.accelerator.current_stream(shards.device))


_replicas: weakref.WeakKeyDictionary[nn.Module, Replicas] = weakref.WeakKeyDictionary()


def replicate(model: nn.Module, mesh: Any) -> nn.Module:
    """Average the gradients of a model under ``torch.distributed.fsdp.fully_shard`` over copies of it.

    That is what ``fully_shard`` does over a mesh of copies and shards; here the exchange between the copies can be left
    out of a pass, which ``m_sharpness="replica"`` needs. The copies start with the weights and buffers of the first
    one, and every pass has to go through the same parameters in each. The all-reduce hooks of the modules are taken. A
    factor that ``set_gradient_divide_factor`` sets is one copy's: gradients are averaged over copies all the same.

    Args:
        model: sharded over dimensions of ``mesh`` after the first one, and all of its parameters are.
        mesh: a ``DeviceMesh`` whose first dimension is that of the copies.

    Returns:
        The model, which ``model=`` of the optimizer takes.

    Raises:
        ValueError: for a mesh of one dimension, for parameters that lie otherwise, and for modules that have such
            hooks. Nothing changed.
        TypeError: for what is no mesh or no module under ``fully_shard``.

    Example::

        mesh = dist.init_device_mesh("cuda", (2, 4), mesh_dim_names=("copies", "shards"))
        for layer in (*model.layers, model):
            fully_shard(layer, mesh=mesh["shards"])
        sk.replicate(model, mesh)
        opt = sk.SAM(model.parameters(), torch.optim.AdamW, lr=1e-3, model=model, m_sharpness="replica")
    """
    cls: Any = getattr(dist, "DeviceMesh", ())
    if not isinstance(mesh, cls):
        raise TypeError(f"mesh should be a DeviceMesh, but got {type_name(mesh)}")
    if mesh.ndim < 2 or (here := mesh.get_coordinate()) is None:
        raise ValueError(f"mesh should have a dimension of copies and others of shards, and this process: got {mesh}")
    inner = getattr(model, "_orig_mod", model)
    modules = fsdp_modules_of(inner) if isinstance(inner, nn.Module) else []
    if not modules:
        raise TypeError(f"model should be under torch.distributed.fsdp.fully_shard, but got {type_name(model)}")
    known = _replicas.get(inner)
    if known is not None and known.mesh == mesh:
        return model
    for module in modules:
        module.reshard()
    mine = mesh.mesh[here[0]].flatten().tolist()
    params: list[tuple[str, Any]] = list(inner.named_parameters())
    for name, p in params:
        if not is_sharded(p) or not {*p.device_mesh.mesh.flatten().tolist()} <= {*mine}:
            raise ValueError(
                f"replicate(): {name} {f'lies on {p.device_mesh}' if is_sharded(p) else 'is no DTensor'}, but should "
                f"lie on the processes {mine} of this copy: fully_shard over the other dimensions of the mesh"
            )
        if p.is_meta:
            raise ValueError(f"replicate(): {name} has no memory yet: to_empty() and initialize the model before")
    if any(map(has_all_reduce_hook, modules)):
        raise ValueError("replicate(): a module has an all-reduce hook, the user's or that of another replicate()")
    found = Replicas(inner, mesh)
    start = [once for t in (*(p for _, p in params), *inner.buffers()) if (once := _once(local(t))).numel()]
    for t in start:
        _send_first(t, found.group)
    for module in modules:
        module.set_all_reduce_hook(found.average)
    _replicas[inner] = found
    note_copies(inner, found.everybody)
    return model


def _once(t: Tensor) -> Tensor:
    """A tensor without the dimensions along which it repeats itself."""
    for d, (size, stride) in enumerate(zip(t.size(), t.stride(), strict=True)):
        if stride == 0 and size > 1:
            t = t.narrow(d, 0, 1)
    return t


def _send_first(t: Tensor, group: Any) -> None:
    """The first process's of a group to the others, of any dtype and any strides."""
    dense = t.detach().contiguous()
    dist.broadcast(dense.reshape(-1).view(torch.uint8), group_src=0, group=group)
    if dense.data_ptr() != t.data_ptr():
        with torch.no_grad():
            t.copy_(dense)


def replicas_of(model: nn.Module | None) -> Replicas | None:
    """Of a model that went through :func:`replicate`."""
    return None if model is None else _replicas.get(model)


def everybody_of(model: nn.Module | None, scope: Scope | None) -> Processes | None:
    """The processes that average their gradients, as far as a model, compiled or not, or the scope of its parameters
    tells; None where that is one."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        group = model.process_group
        return Processes([group], group.size()) if group.size() > 1 else None
    return None if scope is None else scope.everybody


def processes() -> int:
    """How many there are, as far as torch.distributed knows."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# Where torch shards the state of an optimizer over the processes.
_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"


def is_zero(cls: type) -> bool:
    """Whether a class of optimizers is ZeroRedundancyOptimizer, or one of its kind."""
    return any(base.__module__ == _ZERO for base in cls.__mro__)


def refuse_within_zero(owner: str) -> None:
    """Raise TypeError where a ZeroRedundancyOptimizer is just making its own optimizer."""
    frame = inspect.currentframe() if _ZERO in sys.modules else None
    while frame is not None:
        if frame.f_globals.get("__name__") == _ZERO:
            raise TypeError(
                f"ZeroRedundancyOptimizer cannot shard {owner}: each process would perturb its own parameters only, by "
                f"the norm of these. Shard the model with torch.distributed.fsdp.fully_shard, or give {owner} "
                "ZeroRedundancyOptimizer as its base_optimizer"
            )
        frame = frame.f_back
