"""The one loop that measures cases, on a CPU and on a GPU, and the run that collects their rows."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

import sharpkern as sk

from .baselines import Unavailable
from .plans import Plan

Function = Callable[[], object]
Clock = Callable[[int], float]  # seconds a call, over so many calls
Subject = tuple[Function, str | None]  # and the backend that our ops run on in it; None where it has none of them
Prepared = tuple[Subject, dict[str, Subject], dict[str, Any]]  # a case's, those that take turns with it, more columns


class WrongValues(Exception):
    """A contender that does not compute what the others do, and so must not be timed."""


def compare(have: Sequence[Tensor], want: Sequence[Tensor], what: str, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """Raise WrongValues when one of the tensors differs from what is expected."""
    for i, (h, w) in enumerate(zip(have, want, strict=True)):
        if not torch.allclose(h, w, rtol=rtol, atol=atol):
            raise WrongValues(f"{what}: tensor {i} is off by {float((h - w).abs().max()):.3g}")


class Machine:
    """The CPU, which also stands in for a GPU in a dry run, or the current CUDA device."""

    WARM_UP = 3  # calls of a function before it is captured

    def __init__(self, cuda: bool = False) -> None:
        self.cuda = cuda
        self.device = torch.device("cuda" if cuda else "cpu")
        self.synchronize = torch.cuda.synchronize if cuda else lambda: None

    def clock(self, function: Function, device_only: bool = False) -> Clock:
        """Of calls that follow one another: the host's time or the device's, whichever is longer.

        Of the device alone, where that is wanted and there is one: between events around every call, each behind a
        launch that overwrites the L2 cache, so that the host is ahead.
        """
        if device_only and self.cuda:
            from triton.testing import do_bench

            return lambda calls: 1e-3 * do_bench(function, warmup=1, rep=5, return_mode="median")
        timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
        return lambda calls: timer.timeit(calls).mean

    def until_return(self, function: Function, rounds: int) -> float:
        """Seconds until a call returns to the host, on an idle device: the median."""
        times = []
        for _ in range(rounds):
            self.synchronize()
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def capture(self, function: Function) -> Function:
        """A replay of ``function``, which was called ``WARM_UP`` times before; on a CPU the function itself."""
        self.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()) if self.cuda else nullcontext():
            for _ in range(self.WARM_UP):
                function()
        self.synchronize()
        if not self.cuda:
            return function
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        # What was captured has to live as long as the graph.
        return lambda captured=function: graph.replay()  # type: ignore[misc]

    def peak_bytes(self, function: Function) -> int:
        """The most memory that tensors took during a call; 0 where nothing counts it."""
        if not self.cuda:
            return 0
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated()

    def describe(self) -> tuple[str, dict[str, str | None]]:
        """Its name, and the versions of what runs it."""
        if self.cuda:
            driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
            return torch.cuda.get_device_name(), {"cuda": torch.version.cuda, "driver": driver}
        info = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
        return found[1] if found else platform.processor() or platform.machine(), {}


@dataclass(frozen=True)
class Case:
    """One row."""

    labels: Mapping[str, str]  # kind of the row, shape, method, ..., contender
    params: int
    size: int | None  # bytes a parameter, where they are known
    prepare: Callable[[], Prepared]
    device_only: bool = False  # the device's time alone


def on(backend: str | None) -> AbstractContextManager[None]:
    """A block in which our ops run on a backend; nothing is switched for None."""
    return nullcontext() if backend is None else sk.use_backend(backend)


@dataclass
class Run:
    """What was measured so far."""

    plan: Plan
    machine: Machine
    dry: bool = False  # the CPU stands in for a GPU
    only: str = ""  # a regular expression that a row's name has to contain
    command: str = ""
    out: Path | None = None  # where the JSON goes, anew after each row
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    compiling: float = 0.0  # seconds that went into it

    def __post_init__(self) -> None:
        device = self.machine.device
        self.cuda = self.dry or self.machine.cuda  # what is measured, not where
        available = sk.available_backends(device)
        # The one that runs by default first; the reference only where there is nothing else, no interpreter on a CPU.
        self.backends = ([name for name in available if name != "reference"] or available)[: None if self.cuda else 1]
        # Where, when and with what; no host name, no path. A copy of the tree without its history is told its commit.
        commit = _output("git", "rev-parse", "HEAD") or os.environ.get("COMMIT") or "unknown"
        if commit != "unknown" and _output("git", "status", "--porcelain", "--untracked-files=no"):
            commit += " with changes"
        name, versions = self.machine.describe()
        for package in filter(importlib.util.find_spec, ("pytorch_optimizer", "triton")):
            with suppress(importlib.metadata.PackageNotFoundError):  # on the path, but not installed
                versions = {package: importlib.metadata.version(package), **versions}
        self.environment = {
            "device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, **versions},
            "commit": commit, "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "command": self.command, "device_type": "cuda" if self.cuda else "cpu", "dry_run": self.dry,
            "backends": self.backends, "copy_mb": round(4e-6 * self.plan.copy),
        }  # fmt: skip
        self._copied = [torch.empty(self.plan.copy, device=device).uniform_() for _ in range(2)]

    def copy_rate(self, device_only: bool) -> float:
        """Bytes a second of a plain copy, 8 an element, now: a machine's may change during a run."""
        source, target = self._copied
        clock = self.machine.clock(lambda: target.copy_(source), device_only)
        return 8 * self.plan.copy / statistics.median(clock(4) for _ in range(3))

    def measure(self, cases: Iterable[Case]) -> None:
        """Rows of cases that were asked for; one that fails costs its own row."""
        gc.freeze()  # what is there already is not looked through after every case
        for case in cases:
            if re.search(self.only, " ".join(case.labels.values())):
                with self.attempt(*case.labels.values()):
                    self._measure(case)
                gc.collect()  # optimizers sit in reference cycles
                if self.machine.cuda:
                    torch.cuda.empty_cache()
        gc.unfreeze()

    def _measure(self, case: Case) -> None:
        """The median of a subject's rounds, in which it took turns with those beside it.

        Every other round runs backwards, so that no one always follows the same one. The first round touches
        everything, tells how many there is time for, and is dropped.
        """
        subject, beside, info = case.prepare()
        subjects = {"": subject, **beside}
        clocks = {name: self.machine.clock(function, case.device_only) for name, (function, _) in subjects.items()}
        calls: dict[str, int] = {}

        def turn(name: str) -> float:
            with on(subjects[name][1]):
                if name not in calls:
                    region, most = self.plan.region
                    calls[name] = max(1, min(most, round(region / clocks[name](1))))
                return 1e3 * clocks[name](calls[name])

        copy_rate = self.copy_rate(case.device_only)
        start = time.perf_counter()
        for name in subjects:
            turn(name)
        times: dict[str, list[float]] = {name: [] for name in subjects}
        least, most = self.plan.rounds
        rounds = max(least, min(most, int(self.plan.seconds / (time.perf_counter() - start))))
        for i in range(rounds):
            for name in list(subjects)[:: -1 if i % 2 else 1]:
                times[name].append(turn(name))
        own = times[""]
        rate = None if case.size is None else 1e3 * case.size * case.params / statistics.median(own)
        row = {
            **case.labels, "params": case.params, "backend": subject[1],
            "ms": statistics.median(own), "min_ms": min(own), "max_ms": max(own), "rounds": rounds,
            "beside_ms": {name: statistics.median(times[name]) for name in beside},
            "bytes_per_param": case.size, "gb_per_s": None if rate is None else rate / 1e9,
            "copy_gb_per_s": copy_rate / 1e9, "copy_share": None if rate is None else rate / copy_rate,
            **info,
        }  # fmt: skip
        self.rows.append(row)
        print(f"{', '.join(case.labels.values())}: {row['ms']:.4g} ms", file=sys.stderr)
        self.save()

    def results(self) -> dict[str, Any]:
        """What ``bench.render`` reads."""
        notes = {"left_out": list(dict.fromkeys(self.left_out)), "failed": self.failed}
        return {"environment": {**self.environment, **notes}, "rows": self.rows}

    def save(self) -> None:
        if self.out is not None:  # whole, whenever the run is killed
            unfinished = self.out.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(self.results(), indent=1) + "\n", encoding="utf-8")
            unfinished.replace(self.out)

    @contextmanager
    def attempt(self, *labels: str) -> Iterator[None]:
        """A block whose failure is noted and costs the run no more than this block."""
        try:
            yield
        except Unavailable as reason:
            self.left_out.append(str(reason))
        except Exception as error:  # whatever a contender or the device does
            traceback.print_exc()
            message = str(error).strip().partition("\n")[0]
            self.failed.append(f"{', '.join(labels)}: {type(error).__name__}: {message}")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
