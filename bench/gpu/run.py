"""One run: what it measures, on what, and the rows it has so far."""

from __future__ import annotations

import gc
import json
import statistics
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sharpkern as sk

from .. import models
from ..baselines import Base, Unavailable
from ..contenders import OURS
from ..device import Cpu, Function, Gpu, calls_for
from ..measure import Copy, environment, interleave
from ..shapes import GPU, Shape, chosen, tiny

# The copy among the functions that are timed.
COPY = "copy"


@dataclass(frozen=True)
class Timed:
    """A function, and the backend that our ops run on in it; None where it has none of them."""

    function: Function
    backend: str | None = None


@dataclass(frozen=True)
class Model:
    """A model of the whole iteration: how it is made, its optimizer, its batch of square images."""

    make: Callable[[], nn.Module]
    base: Base
    batch: int
    size: int
    channels_last: bool = False


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Args:
        kernels: label, shapes and dtype of the parameters that the ops run on.
        steps: shapes that whole steps run on, by name.
        models: models of the whole iteration, by name.
        copy: float32 elements of the copy that is timed beside everything.
        rounds: of every measurement.
        region: seconds that one timed region takes at least.
        most: calls in one region at most.
        compile_seconds: no further contender is compiled once so much time went into it.
    """

    kernels: list[tuple[str, list[Shape], torch.dtype]]
    steps: dict[str, list[Shape]]
    models: dict[str, Model]
    copy: int
    rounds: int
    region: float
    most: int
    compile_seconds: float


def _one(millions: int) -> tuple[str, list[Shape]]:
    return f"{millions}M", [(millions * 1_000_000,)]


def full(shapes: str = "") -> Plan:
    """The plan for a GPU.

    Raises:
        ValueError: for shapes that are not there.
    """
    sizes = [_one(millions) for millions in (1, 5, 25, 100, 500)]
    sizes.insert(3, ("resnet50", chosen("resnet50", ())["resnet50"]))
    kernels = [(label, size, torch.float32) for label, size in sizes]
    kernels += [(label, size, torch.bfloat16) for label, size in sizes if label in ("25M", "100M")]
    return Plan(
        kernels=kernels,
        steps=chosen(shapes, GPU),
        models={
            "resnet50": Model(models.resnet50, "sgd", 64, 224, channels_last=True),
            "vit_b16": Model(models.vit_b16, "adamw", 64, 224),
        },
        copy=128_000_000,
        rounds=9,
        region=1e-3,
        most=50,
        compile_seconds=90.0,
    )


def dry() -> Plan:
    """The same in sizes that the Triton interpreter gets through in seconds."""
    return Plan(
        kernels=[("3k", [(3000,)], torch.float32), ("tiny", tiny(), torch.float32), ("3k", [(3000,)], torch.bfloat16)],
        steps={"tiny": tiny()},
        models={
            "resnet50": Model(lambda: models.resnet50(4, (1, 1)), "sgd", 2, 32, channels_last=True),
            "vit_b16": Model(lambda: models.vit_b16(16, 1, 32), "adamw", 2, 32),
        },
        copy=100_000,
        rounds=2,
        region=0.0,
        most=1,
        compile_seconds=90.0,
    )


@dataclass
class Run:
    """What the sections of a run share.

    Args:
        every: compile every row and spend what time it takes.
        out: where the JSON goes, anew after each row; None: nowhere.
        say: told about each row.
    """

    plan: Plan
    machine: Cpu
    command: str = ""
    every: bool = False
    out: Path | None = None
    say: Callable[[str], object] = print
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    # Seconds that went into compiling.
    compiling: float = 0.0

    def __post_init__(self) -> None:
        available = sk.available_backends(self.machine.torch_device)
        # The one that runs by default first; the reference only where there is nothing else.
        self.backends = [name for name in available if name != "reference"] or available
        self.environment: dict[str, Any] = {
            **environment(self.command, self.machine.name, ["triton"], self.machine.versions()),
            "device_type": "cuda",
            "dry_run": not isinstance(self.machine, Gpu),
            "backends": self.backends,
            "copy_mb": round(4 * self.plan.copy / 1e6),
        }
        self.copier = Copy(self.plan.copy, self.machine.torch_device)

    def ours(self) -> dict[str, str]:
        """What ours is called in the rows, and its backend: plain ``ours`` runs on the default one."""
        return {f"{OURS}, {backend}" if i else OURS: backend for i, backend in enumerate(self.backends)}

    def on(self, backend: str | None) -> AbstractContextManager[None]:
        """A block in which our ops run on a backend; nothing is switched for None."""
        return nullcontext() if backend is None else sk.use_backend(backend)

    def time(self, functions: Mapping[str, Timed], queued: bool = False) -> dict[str, list[float]]:
        """Seconds a call of each function in interleaved rounds; those of a plain copy are under ``COPY``.

        Args:
            queued: the device's time alone, without what it waits for the host.
        """
        clock = self.machine.queued if queued else self.machine.elapsed
        subjects = {name: self._subject(timed, clock) for name, timed in functions.items()}
        subjects[COPY] = self._subject(Timed(self.copier.once), clock)
        return interleave(subjects, self.plan.rounds)

    def _subject(self, timed: Timed, clock: Callable[[Function, int], float]) -> Callable[[], float]:
        def measure(calls: int) -> float:
            with self.on(timed.backend):
                timed.function()  # what a switch of backends leaves to be done
                return clock(timed.function, calls)

        calls = calls_for(measure(1), self.plan.region, self.plan.most)
        return lambda: measure(calls)

    def rates(self, size: int | None, params: int, times: list[float], copies: list[float]) -> dict[str, float | None]:
        """Columns of a row whose function moved ``size`` bytes a parameter, where that is known."""
        copy_rate = self.copier.bytes / statistics.median(copies)
        rate = None if size is None else size * params / statistics.median(times)
        return {
            "bytes_per_param": size,
            "gb_per_s": None if rate is None else rate / 1e9,
            "copy_gb_per_s": copy_rate / 1e9,
            "copy_share": None if rate is None else rate / copy_rate,
        }

    def add(self, kind: str, labels: Sequence[str], times: list[float], **info: Any) -> None:
        """A row, in the form of pytest-benchmark's."""
        name = "-".join([kind, *labels]).replace(", ", "_").replace(" ", "_")
        stats = {"median": statistics.median(times), "min": min(times), "max": max(times), "rounds": len(times)}
        origin = {key: self.environment[key] for key in ("device", "versions", "commit")}
        self.rows.append({"name": name, "stats": stats, "extra_info": {"kind": kind, **info, **origin}})
        self.say(f"{name}: {1e3 * stats['median']:.4g} ms")
        self.save()

    def save(self) -> None:
        """Write the JSON, where it is wanted."""
        if self.out is not None:
            self.out.write_text(json.dumps(self.results(), indent=1) + "\n", encoding="utf-8")

    def results(self) -> dict[str, Any]:
        """What ``bench.render`` reads."""
        environment = {**self.environment, "left_out": self.left_out, "failed": self.failed}
        return {"benchmarks": self.rows, "environment": environment}

    def leave_out(self, reason: str) -> None:
        if reason not in self.left_out:
            self.left_out.append(reason)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """A block whose failure is noted and costs the run no more than this block."""
        try:
            yield
        except Unavailable as reason:
            self.leave_out(f"{what}: {reason}")
        except Exception as error:  # whatever a contender or the device does
            traceback.print_exc()
            self.failed.append(f"{what}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            self.say(f"FAILED {self.failed[-1]}")

    def clean(self) -> None:
        """Give back what the last measurement held: optimizers sit in reference cycles."""
        gc.collect()
        self.machine.release()
