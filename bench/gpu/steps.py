"""Both passes of the optimizer on gradients that are there already, ours against every other contender.

``step`` rows are of steps that follow one another: the time of the device or of the host, whichever is slower.
``graph`` rows are of the same step replayed as a CUDA graph, which leaves the device's. The row of "ours" is ours
against a second instance of itself: how far its ratio is from one is the noise of the run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from functools import partial

from ..baselines import BASES, RHO, Algorithm, Base
from ..contenders import GPU_CONTENDERS, OURS
from ..measure import Problem, host_us, step
from ..shapes import Shape, count
from .run import COPY, Run, Timed

BASELINE = "ours again"


def _subjects(run: Run) -> dict[str, tuple[str, str | None]]:
    """Name in the rows, contender and backend: ours on each, its variants on the default one, the others on none."""
    subjects: dict[str, tuple[str, str | None]] = {name: (OURS, backend) for name, backend in run.ours().items()}
    for contender in GPU_CONTENDERS:
        if contender != OURS:
            subjects[contender] = (contender, run.backends[0] if _is_ours(contender) else None)
    return subjects


def _is_ours(contender: str) -> bool:
    return contender.startswith(OURS)


def _captured(contender: str, base: Base) -> bool:
    """What a graph can hold: the others swap pointers or number their steps on the host."""
    return _is_ours(contender) or (contender == "foreach" and base == "sgd")


class Rows:
    """The rows of one set of shapes, algorithm and base rule."""

    def __init__(self, run: Run, name: str, algorithm: Algorithm, base: Base) -> None:
        self.run = run
        self.label = [name, algorithm, base]
        self.shapes: list[Shape] = run.plan.steps[name]
        self.algorithm: Algorithm = algorithm
        self.base: Base = base
        self.problem = Problem(self.shapes, algorithm, base, device=run.machine.torch_device, contenders=GPU_CONTENDERS)
        self.contenders = _subjects(run)
        self.contenders[BASELINE] = self.contenders[OURS]

    def what(self, name: str) -> str:
        return f"{name}, {' '.join(self.label)}"

    def eager(self) -> None:
        """``step`` rows."""
        functions: dict[str, Timed] = {}
        host: dict[str, float | None] = {}
        for name, (contender, backend) in self.contenders.items():
            if GPU_CONTENDERS[contender].slow_start and not self._may_compile():
                continue
            start = time.perf_counter()
            with self.run.attempt(self.what(name)), self.run.on(backend):
                optimizer = self.problem.build(contender)
                host[name] = host_us(
                    contender,
                    self.shapes,
                    self.algorithm,
                    self.base,
                    budget=0.02,
                    least=self.run.plan.rounds,
                    machine=self.run.machine,
                    contenders=GPU_CONTENDERS,
                )
                functions[name] = Timed(partial(step, optimizer), backend)
            if GPU_CONTENDERS[contender].slow_start:
                self.run.compiling += time.perf_counter() - start
        self._add("step", functions, host)

    def graphs(self) -> None:
        """``graph`` rows."""
        functions: dict[str, Timed] = {}
        host: dict[str, float | None] = {}
        for name, (contender, backend) in self.contenders.items():
            if not _captured(contender, self.base):
                continue
            with self.run.attempt(f"{self.what(name)}, CUDA graph"), self.run.on(backend):
                replay = self.problem.capture(contender, self.run.machine)
                seconds = [self.run.machine.enqueue(replay) for _ in range(self.run.plan.rounds)]
                host[name] = 1e6 * statistics.median(seconds)
                functions[name] = Timed(replay, backend)
        self._add("graph", functions, host)

    def _may_compile(self) -> bool:
        run = self.run
        if run.every:
            return True
        if run.environment["dry_run"]:
            run.leave_out("torch.compile is left out of a dry run (all rows: --every)")
        elif (self.algorithm, self.base) != ("sam", "sgd"):
            run.leave_out("torch.compile is timed for SAM with SGD only (all rows: --every)")
        elif run.compiling > run.plan.compile_seconds:
            run.leave_out(f"torch.compile, {' '.join(self.label)}: too much time went into compiling (--every)")
        else:
            return True
        return False

    def _add(self, kind: str, functions: Mapping[str, Timed], host: Mapping[str, float | None]) -> None:
        run = self.run
        times = run.time(functions)
        ours = statistics.median(times[BASELINE]) if BASELINE in times else None
        params = count(self.shapes)
        for name in functions:
            if name == BASELINE:
                continue
            contender, backend = self.contenders[name]
            size = GPU_CONTENDERS[contender].bytes_per_param(self.algorithm, self.base)
            run.add(
                kind,
                [*self.label, name],
                times[name],
                shape=self.label[0],
                tensors=len(self.shapes),
                params=params,
                algorithm=self.algorithm,
                base=self.base,
                contender=name,
                backend=backend,
                host_us=host[name],
                ours_ms=None if ours is None else 1e3 * ours,
                ratio=None if ours is None else statistics.median(times[name]) / ours,
                **run.rates(size, params, times[name], times[COPY]),
            )


def run_steps(run: Run) -> None:
    """Rows of every shape, algorithm, base rule and contender."""
    for name in run.plan.steps:
        for algorithm in RHO:
            for base in BASES:
                with run.attempt(f"steps, {name} {algorithm} {base}"):
                    rows = Rows(run, name, algorithm, base)
                    rows.eager()
                    run.clean()
                    rows.graphs()
                    del rows
                run.clean()
