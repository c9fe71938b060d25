"""How a contender is measured: on shared weights and gradients, after its values were checked."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .baselines import Algorithm, Base, Loop, TwoStep
from .contenders import CONTENDERS, Contender
from .device import Cpu, Function, time_once
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
        self,
        shapes: Sequence[Shape],
        algorithm: Algorithm,
        base: Base,
        dtype: torch.dtype = torch.float32,
        device: torch.device = Cpu.torch_device,
        contenders: Mapping[str, Contender] = CONTENDERS,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.algorithm: Algorithm = algorithm
        self.base: Base = base
        self.contenders = contenders
        self.weights, self.grads = (
            [torch.randn(s, generator=generator, dtype=dtype, device=device).mul_(size) for s in shapes]
            for size in (0.05, 0.01)
        )

    def leaves(self) -> list[Tensor]:
        """Parameters for one contender."""
        leaves = [w.clone().requires_grad_() for w in self.weights]
        for leaf, grad in zip(leaves, self.grads, strict=True):
            leaf.grad = grad
        return leaves

    def _after(self, steps: int) -> list[Tensor]:
        """The weights after so many steps of the plain loop."""
        leaves = self.leaves()
        plain = Loop(leaves, self.algorithm, self.base)
        for _ in range(steps):
            step(plain)
        return [leaf.detach() for leaf in leaves]

    @cached_property
    def reference(self) -> list[Tensor]:
        """The weights after two steps of the plain loop."""
        return self._after(2)

    def make(self, contender: str) -> tuple[TwoStep, list[Tensor]]:
        """A contender that did nothing yet, and its parameters."""
        leaves = self.leaves()
        return self.contenders[contender].make(leaves, self.algorithm, self.base), leaves

    def build(self, contender: str) -> TwoStep:
        """A contender that took two steps and came out where the plain loop does.

        Raises:
            WrongValues: when it came out somewhere else.
            Unavailable: when it cannot run here.
        """
        optimizer, leaves = self.make(contender)
        step(optimizer)
        step(optimizer)
        compare([leaf.detach() for leaf in leaves], self.reference, contender)
        return optimizer

    def capture(self, contender: str, machine: Cpu) -> Function:
        """A contender's step as a graph, replayed twice and checked as in ``build``.

        Raises:
            WrongValues: when it came out somewhere else.
        """
        optimizer, leaves = self.make(contender)
        replay = machine.capture(lambda: step(optimizer))
        replay()
        replay()
        expected = self._after(machine.WARM_UP + 2)
        compare([leaf.detach() for leaf in leaves], expected, f"{contender}, CUDA graph")
        return replay


def compare(
    have: Sequence[Tensor], expected: Sequence[Tensor], what: str, rtol: float = 1e-4, atol: float = 1e-6
) -> None:
    """Raise WrongValues when one of the tensors differs from what is expected."""
    for i, (h, e) in enumerate(zip(have, expected, strict=True)):
        if not torch.allclose(h, e, rtol=rtol, atol=atol):
            raise WrongValues(f"{what}: tensor {i} is off by {float((h - e).abs().max()):.3g}")


def interleave(subjects: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each subject measured of itself, in rounds of all of them; every other round runs backwards."""
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for i in range(rounds):
        for name in list(subjects)[:: -1 if i % 2 else 1]:
            times[name].append(subjects[name]())
    return times


def rounds_for(seconds: float, budget: float, least: int) -> int:
    """How many rounds of ``seconds`` each fit into ``budget``."""
    return max(least, min(300, int(budget / max(seconds, 1e-9))))


def host_us(
    contender: str,
    shapes: Sequence[Shape],
    algorithm: Algorithm,
    base: Base,
    budget: float,
    least: int = 5,
    machine: Cpu | None = None,
    contenders: Mapping[str, Contender] = CONTENDERS,
) -> float | None:
    """Microseconds of a step on as many tensors of one element each: the work around the kernels.

    None where building it takes minutes (it would have to be compiled again).
    """
    if contenders[contender].slow_start:
        return None
    machine = machine or Cpu()
    ones = [(1,) * len(shape) for shape in shapes]
    problem = Problem(ones, algorithm, base, device=machine.torch_device, contenders=contenders)
    optimizer, _ = problem.make(contender)
    step(optimizer)
    rounds = rounds_for(machine.enqueue(lambda: step(optimizer)), budget, least)
    return 1e6 * statistics.median(machine.enqueue(lambda: step(optimizer)) for _ in range(rounds))


class Copy:
    """``dst.copy_(src)``, 8 bytes a float32 element: what memory gives to one plain pass."""

    def __init__(self, elements: int = COPY_ELEMENTS, device: torch.device = Cpu.torch_device) -> None:
        self.src, self.dst = (torch.empty(elements, device=device).uniform_() for _ in range(2))
        self.bytes = 8 * elements

    def once(self) -> None:
        self.dst.copy_(self.src)

    def bandwidth(self) -> float:
        """Bytes a second: the median after warm-up."""
        for _ in range(2):
            self.once()
        return self.bytes / statistics.median(time_once(self.once) for _ in range(7))


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


def environment(
    command: str, device: str | None, packages: Sequence[str], versions: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """Where, when and with what a run was made; no host name and no path."""
    # A copy of the tree without its history is told its commit.
    commit = _git("rev-parse", "HEAD") or os.environ.get("COMMIT") or "unknown"
    if commit != "unknown" and _git("status", "--porcelain", "--untracked-files=no"):
        commit += " with changes"
    return {
        "device": device or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{package: _version(package) for package in packages},
            **(versions or {}),
        },
        "commit": commit,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
    }
