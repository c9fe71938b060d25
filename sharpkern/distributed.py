"""Several processes, each with data of its own: copies of a model, whole or in shards, whose gradients are averaged."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checks import type_name
from .memory.shards import groups_of, is_sharded, local


class DataParallel:
    """A model under DistributedDataParallel: every process has a copy.

    What :class:`Replicas` has, too: ``group``, the processes that average their gradients element by element;
    ``size``, how many processes there are; ``parameters``, those whose gradients are averaged; ``may_miss``, whether
    passes leave parameters out, other ones in each copy, and ``looks_for_parameters``, whether in any pass;
    ``joint_steps``, how many of the first steps are exchanged whatever is wanted.
    """

    def __init__(self, model: nn.parallel.DistributedDataParallel) -> None:
        self._model, self.group = model, model.process_group
        self.size: int = self.group.size()
        self.looks_for_parameters = model.find_unused_parameters
        self.may_miss = model.find_unused_parameters or model.static_graph
        self.joint_steps = 2 if model.static_graph else 0  # torch asserts that

    @cached_property
    def parameters(self) -> set[Tensor]:
        ignored = set(self._model.parameters_to_ignore)
        return {p for name, p in self._model.module.named_parameters() if name not in ignored}

    def all_reduce(self, numbers: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        """In place, over all processes."""
        dist.all_reduce(numbers, op, group=self.group)

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
                raise RuntimeError(
                    "m_sharpness: gradients of the first pass were exchanged, because the exchange was turned on "
                    "within it, or the forward pass was not within first_pass()"
                )

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

    def __init__(self, mesh: Any, parameters: set[Tensor]) -> None:
        self.group = mesh.get_group(0)
        self.size: int = mesh.size()
        self.parameters = parameters
        self._groups, self._copies, self._exchanges = groups_of(mesh), mesh.size(0), True

    def all_reduce(self, numbers: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        """In place, over all processes."""
        for group in self._groups:
            dist.all_reduce(numbers, op, group=group)

    @contextmanager
    def without_exchange(self) -> Iterator[None]:
        """Around a backward."""
        self._exchanges = False
        try:
            yield
        finally:
            self._exchanges = True

    def check(self) -> None:
        """Nothing to say."""

    def average(self, shards: Tensor) -> None:
        """FSDP's all-reduce hook: gradients that were summed over the shards of this copy."""
        if self._exchanges:
            shards /= self._copies
            dist.all_reduce(shards, group=self.group)


_replicas: WeakKeyDictionary[nn.Module, Replicas] = WeakKeyDictionary()


def replicate(model: nn.Module, mesh: Any) -> nn.Module:
    """Average the gradients of a model under ``torch.distributed.fsdp.fully_shard`` over copies of it.

    That is what ``fully_shard`` does over a mesh of two dimensions; here the exchange between the copies can be left
    out of a pass, which ``m_sharpness="replica"`` needs. The copies start with the weights and buffers of the first
    one. The modules' ``set_all_reduce_hook`` is taken.

    Args:
        model: sharded over the dimensions of ``mesh`` after the first one, and all of its parameters are.
        mesh: a ``DeviceMesh`` whose first dimension is that of the copies.

    Returns:
        The model. Give it to the optimizer, too: ``model=``.

    Raises:
        ValueError: for a mesh of one dimension, and for parameters that lie otherwise. Nothing changed.
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
    fsdp: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    modules: list[Any] = [m for m in model.modules() if isinstance(m, fsdp)] if isinstance(model, nn.Module) else []
    if not modules:
        raise TypeError(f"model should be under torch.distributed.fsdp.fully_shard, but got {type_name(model)}")
    for module in modules:
        module.reshard()
    mine = mesh.mesh[here[0]].flatten().tolist()
    params: list[tuple[str, Any]] = list(model.named_parameters())
    for name, p in params:
        if not is_sharded(p) or sorted(p.device_mesh.mesh.flatten().tolist()) != sorted(mine):
            raise ValueError(
                f"replicate(): {name} {f'lies on {p.device_mesh}' if is_sharded(p) else 'is no DTensor'}, but should "
                f"lie on the processes {mine} of this copy: fully_shard over the other dimensions of the mesh"
            )
        if p.is_meta:
            raise ValueError(f"replicate(): {name} has no memory yet: to_empty() and initialize the model before")
    found = Replicas(mesh, {p for _, p in params})
    with torch.no_grad():
        for t in (*(p for _, p in params), *model.buffers()):
            dist.broadcast(local(t), group_src=0, group=found.group)
    for module in modules:
        module.set_all_reduce_hook(found.average)
    _replicas[model] = found
    return model


def replicas_of(model: nn.Module | None) -> Replicas | None:
    """Of a model that went through :func:`replicate`."""
    return None if model is None else _replicas.get(model)


def copies_of(model: nn.Module | None) -> DataParallel | Replicas | None:
    """How the gradients of a model, compiled or not, are averaged over processes; None where it does not tell of more
    than one."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        found: DataParallel | Replicas | None = DataParallel(model)
    else:
        found = replicas_of(model)
    return found if found is not None and found.size > 1 else None


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
