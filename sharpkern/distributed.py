"""Several processes, each with a copy of the model and data of its own."""

from __future__ import annotations

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
