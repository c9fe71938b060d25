"""Batch normalization's running statistics, left alone for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


@contextmanager
def frozen_batch_stats(model: nn.Module) -> Iterator[None]:
    """Within the block, norm layers of ``model`` that track running statistics do not update them.

    Nothing else changes: a layer in training mode normalizes with the batch's statistics, one in evaluation
    mode with the running ones. ``running_mean``, ``running_var`` and ``num_batches_tracked`` come out as they
    went in, to the bit. Nests, and survives exceptions.

    SAM's second pass runs at perturbed weights; its batch statistics are not those of the model.
    """
    flags: list[_NormBase] = []
    swapped: list[tuple[nn.Module, str, Tensor]] = []
    try:
        for module in model.modules():
            if not (isinstance(module, _NormBase) and module.track_running_stats):
                continue
            if isinstance(module, _BatchNorm):
                # Its forward updates only what it tracks; evaluation mode reads the buffers all the same.
                module.track_running_stats = False
                flags.append(module)
            else:
                # Instance norm updates whatever buffers it has: it gets copies to spoil.
                for name in ("running_mean", "running_var", "num_batches_tracked"):
                    buffer = module._buffers.get(name)
                    if buffer is not None:
                        swapped.append((module, name, buffer))
                        module._buffers[name] = buffer.clone()
        yield
    finally:
        for norm in flags:
            norm.track_running_stats = True
        for module, name, buffer in reversed(swapped):
            module._buffers[name] = buffer
