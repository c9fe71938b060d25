"""Several processes, each with a copy of the model and data of its own."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch.distributed as dist
from torch import nn


def parallel_model(model: nn.Module | None) -> nn.parallel.DistributedDataParallel | None:
    """A model under DistributedDataParallel, compiled or not; None for another one."""
    model = getattr(model, "_orig_mod", model)
    return model if isinstance(model, nn.parallel.DistributedDataParallel) else None


def group_of(model: nn.Module | None) -> Any:
    """The process group over which a model under DistributedDataParallel averages its gradients; None for another
    model, and for one process."""
    parallel = parallel_model(model)
    if parallel is None:
        return None
    group = parallel.process_group
    return group if group.size() > 1 else None


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
