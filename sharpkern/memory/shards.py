"""Sharded parameters: of a DTensor kernels see the local tensor, and processes sum what each of them has measured.

A DTensor's local tensor is this process's shard of it, which may be empty, or all of it where it is replicated.
``torch.distributed.tensor`` is not imported here: where a DTensor is, somebody imported it.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)  # of these it is known at once


def is_sharded(t: object) -> bool:
    """Whether it is a DTensor."""
    if type(t) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return isinstance(t, getattr(module, "DTensor", ()))


def local(t: Any) -> Tensor:
    """What this process has of a tensor: all of it, or of a DTensor its local tensor."""
    if not is_sharded(t):
        return t  # type: ignore[no-any-return]
    found = t._local_tensor
    return found if isinstance(found, nn.Parameter) or type(found) is Tensor else found.wait()  # a collective's result


# The mesh and the placements of a DTensor; None: a plain tensor.
Placing = tuple[Any, tuple[Any, ...]] | None


def placing(p: Any) -> Placing:
    """The mesh of a DTensor and how it lies there; None of any other tensor. Equal on every process."""
    return (p.device_mesh, tuple(p.placements)) if is_sharded(p) else None


def check_supported(p: Any, label: str) -> None:
    """Raise TypeError for a parameter that is a part of one, in another way than a DTensor's shard is."""
    if getattr(p, "_fsdp_flattened", False) or getattr(p, "_is_flat_param", False):
        raise TypeError(
            f"{label} belongs to FullyShardedDataParallel (FSDP1), which has other tensors in its place during a pass: "
            "shard the model with torch.distributed.fsdp.fully_shard before the optimizer is made"
        )
    if not is_sharded(p):
        if type(p).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            # Its elements are not where its address says.
            cls = type(p)
            raise TypeError(
                f"{label} is a {cls.__module__}.{cls.__qualname__}: tensor subclasses other than DTensor are not "
                "supported"
            )
        return
    if any(placement.is_partial() for placement in p.placements):
        raise TypeError(f"{label} has placements {tuple(p.placements)}: a parameter is sharded or replicated")
    inner = type(p._local_tensor)
    if inner.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(f"{label} has shards of type {inner.__module__}.{inner.__qualname__}, which is not supported")


class Shards:
    """How the DTensors of one layout lie.

    Args:
        params: of one mesh and the same placements.
    """

    def __init__(self, params: Sequence[Any]) -> None:
        self._params = params
        self._mesh, self._placements = params[0].device_mesh, tuple(params[0].placements)
        # Modules that keep the whole of these parameters in between passes, if told to.
        self._modules = [weakref.ref(module) for module, _ in _fsdp_modules(set(map(id, params)))]

    def local(self) -> list[Tensor]:
        """Each parameter's local tensor: another one after the module was moved or loaded."""
        return [local(p) for p in self._params]

    def gradients(self, names: Sequence[str]) -> list[Tensor | None]:
        """What this process has of each gradient, placed as its parameter is.

        Raises:
            RuntimeError: for a gradient that is no DTensor; ``names`` are those of the parameters.
        """
        found: list[Tensor | None] = []
        for name, p in zip(names, self._params, strict=True):
            grad = p.grad
            if grad is not None:
                if not is_sharded(grad):
                    raise RuntimeError(f"the gradient of {name} is no DTensor, unlike the parameter")
                if tuple(grad.placements) != self._placements:
                    p.grad = grad = grad.redistribute(self._mesh, self._placements)
                grad = local(grad)
            found.append(grad)
        return found

    def wrapped(self, i: int, shard: Tensor) -> Tensor:
        """The DTensor like parameter i whose local tensor this is."""
        p = self._params[i]
        cls = sys.modules["torch.distributed.tensor"].DTensor
        wrapped: Tensor = cls.from_local(
            shard, self._mesh, self._placements, run_check=False, shape=p.size(), stride=p.stride()
        )
        return wrapped

    def shard_of(self, value: Any) -> Tensor:
        """This process's shard of a value of a parameter's shape: of a DTensor, or of a tensor that is whole."""
        module = sys.modules["torch.distributed.tensor"]
        if is_sharded(value):
            if value.device_mesh == self._mesh:
                return local(value.redistribute(self._mesh, self._placements))
            value = value.full_tensor()
        cut = module.distribute_tensor(
            value.to(self._params[0].device), self._mesh, self._placements, src_data_rank=None
        )
        return local(cut)

    def written(self, params: Sequence[Any]) -> None:
        """Weights of these parameters changed: tell autograd, and modules that keep them whole."""
        torch.autograd.graph.increment_version([*params, *map(local, params)])
        self.reshard()

    def reshard(self) -> None:
        """Have modules that keep these parameters whole between passes collect them anew."""
        for module in self._modules:
            if (alive := module()) is not None:
                alive.reshard()


class Processes:
    """Some of them, which reduce numbers.

    Args:
        groups: that reduce over them one after the other.
        device_type: where these reduce; None: anywhere.
    """

    def __init__(self, groups: Sequence[Any], size: int, device_type: str | None = None) -> None:
        self._groups, self.size, self._device_type = groups, size, device_type

    def all_reduce(self, numbers: Tensor, largest: bool = False) -> Tensor:
        """The sum over all of them, or the largest; the same bits on each. ``numbers`` may be overwritten."""
        there = numbers if self._device_type in (None, numbers.device.type) else numbers.to(self._device_type)
        for group in self._groups:
            dist.all_reduce(there, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=group)
        return there.to(numbers.device)


class Scope:
    """The processes that hold the parameters of an optimizer together.

    Args:
        placings: of every layout. A plain tensor beside DTensors is the same on every process.
        everybody: those of all copies of the parameters, where there are several: what is measured of a gradient that
            copies have in common is summed over them, too, so that it has the same bits in each.

    Raises:
        RuntimeError: for meshes of which none contains the others.
    """

    def __init__(self, placings: Sequence[Placing], everybody: Processes | None = None) -> None:
        self.here = processes_of(_union({placed[0] for placed in placings if placed is not None}))
        self.everybody = everybody or self.here
        # Each layout's sums are counted so many times in the sum over the processes here.
        self._counts = torch.tensor([self.here.size // _pieces(placed) for placed in placings], device="cpu")

    def complete(self, parts: Tensor, largest: bool = False, joint: bool = True) -> Tensor:
        """Of sums whose parts were measured here, ``[sums, layouts]``, the parts that all processes measured.

        Args:
            joint: whether they are of what all copies have in common.
        """
        processes = self.everybody if joint else self.here
        counts = self._counts * (processes.size // self.here.size)
        return processes.all_reduce(parts.clone() if largest else parts / counts.to(parts), largest)


def scope_of(placings: Sequence[Placing], everybody: Processes | None = None) -> Scope | None:
    """The processes that hold parameters which lie so; None where each process has them by itself."""
    if everybody is None and all(placed is None or placed[0].size() == 1 for placed in placings):
        return None
    return Scope(placings, everybody)


# The processes of all copies of a sharded model, whose gradients are averaged.
_copies: weakref.WeakKeyDictionary[nn.Module, Processes] = weakref.WeakKeyDictionary()


def note_copies(model: nn.Module, everybody: Processes) -> None:
    """The processes here hold one of several copies of a model."""
    _copies[model] = everybody


def holders_of(p: Tensor) -> Processes | None:
    """The processes of all copies of a parameter; None where there is one copy."""
    found = (everybody for model, everybody in list(_copies.items()) if any(p is q for q in model.parameters()))
    return next(found, None)


def _pieces(placed: Placing) -> int:
    """How many processes hold something else."""
    if placed is None:
        return 1
    mesh, placements = placed
    return math.prod(mesh.size(i) for i, placement in enumerate(placements) if not placement.is_replicate())


def _ranks(mesh: Any) -> set[int]:
    return set(mesh.mesh.flatten().tolist())


def _union(meshes: set[Any]) -> Any:
    """The mesh that contains the others."""
    widest = max(meshes, key=lambda mesh: mesh.size())
    if not all(_ranks(mesh) <= _ranks(widest) for mesh in meshes):
        raise RuntimeError(
            f"the parameters lie on meshes of which none contains the others: {sorted(map(str, meshes))}. Make an "
            "optimizer for each, or one mesh whose dimensions they are"
        )
    return widest


def processes_of(mesh: Any) -> Processes:
    """All of a mesh."""
    return Processes(_groups(mesh), mesh.size(), mesh.device_type)


def _groups(mesh: Any) -> list[Any]:
    """Groups that reduce over a mesh one after the other: a single one where there is, or may be, one of all of it."""
    if mesh.ndim == 1:
        return [mesh.get_group()]
    if mesh.size() == dist.get_world_size():
        return [dist.group.WORLD]
    if mesh.mesh_dim_names:
        return [mesh._flatten().get_group()]  # made once, and kept with the mesh
    return list(mesh.get_all_groups())


# Modules under fully_shard.


def _fsdp_modules(ids: set[int] | None = None) -> Iterator[tuple[Any, list[Tensor]]]:
    """Modules with the DTensors that they shard: all, or those that have one of these ids."""
    fsdp: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    known = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", {})
    for module in list(known) if fsdp is not None else ():
        if isinstance(module, fsdp):
            params = [each.sharded_param for group in _param_groups(module) for each in group.fsdp_params]
            if ids is None or not ids.isdisjoint(map(id, params)):
                yield module, params


def fsdp_modules_of(model: nn.Module) -> list[Any]:
    """Those of a model."""
    fsdp: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return [module for module in model.modules() if isinstance(module, fsdp)]


def has_all_reduce_hook(module: Any) -> bool:
    """Whether a module under fully_shard has one."""
    return any(getattr(group, "_all_reduce_hook", None) is not None for group in _param_groups(module))


def _param_groups(module: Any) -> list[Any]:
    """What a module under fully_shard knows of its parameters; torch 2.13 has several of these."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def left_behind(params: Iterable[Tensor], model: nn.Module | None) -> bool:
    """Whether these, which have no gradient, are parameters that a model had before it was sharded: DTensors stand in
    their place since then. Without a model: as far as their shapes tell."""
    mine = [p for p in params if not is_sharded(p)]
    if model is not None:
        theirs = list(model.parameters())
        here, shapes = set(map(id, theirs)), {p.size() for p in theirs if is_sharded(p)}
        return any(id(p) not in here and p.size() in shapes for p in mine)
    sharded = Counter(p.size() for _, params in _fsdp_modules() for p in params)
    return bool(mine) and Counter(p.size() for p in mine) <= sharded
