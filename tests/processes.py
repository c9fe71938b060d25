"""Several processes of one gloo group on this machine."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist


def run(function: Callable[..., None], folder: Path, *arguments: Any, processes: int = 2) -> None:
    """Call ``function(rank, *arguments)`` in each of them, a thread a process; raise what one of them raises.

    Args:
        function: of a module; it may use the default group.
        folder: where the processes find each other; empty.
    """
    torch.multiprocessing.spawn(_process, (function, str(folder), processes, arguments), nprocs=processes)


def _process(rank: int, function: Callable[..., None], folder: str, processes: int, arguments: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    function(rank, *arguments)
    gc.collect()
    dist.barrier()  # neither leaves while another one still reads
    dist.destroy_process_group()
    # Without the interpreter's finalization: a thread of gloo that lets go of its last tensor meanwhile aborts.
    os._exit(0)
