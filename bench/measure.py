"""How a contender is measured: on shared weights and gradients, after its values were checked."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .baselines import Algorithm, Base, Loop, TwoStep
from .contenders import CONTENDERS
from .shapes import Shape

COPY_ELEMENTS = 25_600_000


class WrongValues(Exception):
    """A contender that does not compute what the others do, and so must not be timed."""


def step(optimizer: TwoStep) -> None:
    """What is timed: both passes, on the gradients that lie there."""
    optimizer.first_step()
    optimizer.second_step()


class Problem:
    """Weights and gradients of one set of shapes, and where two steps of an algorithm must lead.

    Gradients are shared by all contenders, which only read them; every contender gets weights of its own.
    """

    def __init__(
        self, shapes: Sequence[Shape], algorithm: Algorithm, base: Base, dtype: torch.dtype = torch.float32
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.algorithm: Algorithm = algorithm
        self.base: Base = base
        self.weights = [torch.randn(shape, generator=generator, dtype=dtype).mul_(0.05) for shape in shapes]
        self.grads = [torch.randn(shape, generator=generator, dtype=dtype).mul_(0.01) for shape in shapes]

    def leaves(self) -> list[Tensor]:
        """Parameters for one contender."""
        leaves = [w.clone().requires_grad_() for w in self.weights]
        for leaf, grad in zip(leaves, self.grads, strict=True):
            leaf.grad = grad
        return leaves

    @cached_property
    def reference(self) -> list[Tensor]:
        """The weights after two steps of the plain loop."""
        leaves = self.leaves()
        plain = Loop(leaves, self.algorithm, self.base)
        step(plain)
        step(plain)
        return [leaf.detach() for leaf in leaves]

    def build(self, contender: str) -> TwoStep:
        """A contender that took two steps and came out where the plain loop does.

        Raises:
            WrongValues: when it came out somewhere else.
            Unavailable: when it cannot run here.
        """
        leaves = self.leaves()
        optimizer = CONTENDERS[contender].make(leaves, self.algorithm, self.base)
        step(optimizer)
        step(optimizer)
        for i, (leaf, expected) in enumerate(zip(leaves, self.reference, strict=True)):
            if not torch.allclose(leaf.detach(), expected, rtol=1e-4, atol=1e-6):
                off = float((leaf.detach() - expected).abs().max())
                raise WrongValues(f"{contender}: tensor {i} is off by {off:.3g} after two steps")
        return optimizer


def time_once(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def rounds_for(seconds: float, budget: float, least: int) -> int:
    """How many rounds of ``seconds`` each fit into ``budget``."""
    return max(least, min(300, int(budget / max(seconds, 1e-9))))


def host_us(contender: str, shapes: Sequence[Shape], algorithm: Algorithm, base: Base, budget: float) -> float | None:
    """Microseconds of a step on as many tensors of one element each: the work around the kernels.

    None where building it takes minutes (it would have to be compiled again).
    """
    if CONTENDERS[contender].slow_start:
        return None
    ones = Problem([(1,) * len(shape) for shape in shapes], algorithm, base)
    optimizer = CONTENDERS[contender].make(ones.leaves(), algorithm, base)
    step(optimizer)
    rounds = rounds_for(time_once(lambda: step(optimizer)), budget, 5)
    return 1e6 * statistics.median(time_once(lambda: step(optimizer)) for _ in range(rounds))


class Copy:
    """``dst.copy_(src)``, 8 bytes a float32 element: what memory gives to one plain pass."""

    def __init__(self, elements: int = COPY_ELEMENTS) -> None:
        self.src, self.dst = torch.ones(elements), torch.zeros(elements)

    def bandwidth(self) -> float:
        """Bytes a second: the median after warm-up."""
        for _ in range(2):
            self.dst.copy_(self.src)
        seconds = statistics.median(time_once(lambda: self.dst.copy_(self.src)) for _ in range(7))
        return 8 * self.src.numel() / seconds


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def environment(command: str, cpu: str | None) -> dict[str, Any]:
    """Where, when and with what a run was made; no host name and no path."""
    commit = _git("rev-parse", "HEAD") or "unknown"
    if commit != "unknown" and _git("status", "--porcelain", "--untracked-files=no"):
        commit += " with changes"
    return {
        "device": cpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pytorch_optimizer": _version("pytorch_optimizer"),
        },
        "commit": commit,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
    }
