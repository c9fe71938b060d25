"""What a benchmark asks of the machine it runs on: a GPU, or the CPU that stands in for one in a dry run."""

from __future__ import annotations

import math
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Function = Callable[[], object]


def time_once(function: Function) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class Cpu:
    """The CPU: nothing is asynchronous, so its clock is the host's, and a graph is the function itself."""

    torch_device = torch.device("cpu")
    cache_bytes = 0
    # Calls of a function before it is captured.
    WARM_UP = 3

    def synchronize(self) -> None:
        """Wait for everything that was launched."""

    def elapsed(self, function: Function, calls: int) -> float:
        """Seconds a call, of calls that follow one another: the host's or the device's, whichever is slower."""
        return time_once(lambda: [function() for _ in range(calls)]) / calls

    def queued(self, function: Function, calls: int) -> float:
        """Seconds a call on the device alone: all calls wait in its queue before the first one starts."""
        return self.elapsed(function, calls)

    def enqueue(self, function: Function) -> float:
        """Seconds until one call returns to the host, on an idle device."""
        self.synchronize()
        return time_once(function)

    def capture(self, function: Function) -> Function:
        """A replay of ``function``, which was called ``WARM_UP`` times before."""
        for _ in range(self.WARM_UP):
            function()
        return function

    def held_bytes(self) -> int:
        """Memory that tensors take now; 0 where nothing counts it."""
        return 0

    def peak_bytes(self, function: Function) -> int:
        """The most memory that tensors took during a call; 0 where nothing counts it."""
        function()
        return 0

    def release(self) -> None:
        """Give memory that nothing uses back to the device."""

    @property
    def name(self) -> str:
        return platform.processor() or platform.machine()

    def versions(self) -> dict[str, str | None]:
        """Versions of what runs the device."""
        return {}


@dataclass
class Replay:
    """A CUDA graph, and what was captured: its tensors have to live as long as the graph."""

    graph: torch.cuda.CUDAGraph
    captured: Function

    def __call__(self) -> None:
        self.graph.replay()


class Gpu(Cpu):
    """The current CUDA device, timed by its events."""

    torch_device = torch.device("cuda")

    # Cycles that a queue is held up for: from about a tenth of a millisecond to half a second.
    _cycles = 200_000
    _most_cycles = 1_000_000_000

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.cache_bytes = properties.L2_cache_size
        self._name = properties.name

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def elapsed(self, function: Function, calls: int) -> float:
        return self._between_events(function, calls, 0)[0]

    def queued(self, function: Function, calls: int) -> float:
        while True:
            seconds, late = self._between_events(function, calls, self._cycles)
            if not late:
                return seconds
            if self._cycles >= self._most_cycles:
                raise RuntimeError("the device did not wait for the host: what is timed waits for the device itself")
            self._cycles *= 2

    def _between_events(self, function: Function, calls: int, cycles: int) -> tuple[float, bool]:
        """Seconds a call, and whether the device started before the host had launched everything."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if cycles:
            torch.cuda._sleep(cycles)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        late = start.query()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls, late

    def enqueue(self, function: Function) -> float:
        seconds = super().enqueue(function)
        self.synchronize()
        return seconds

    def capture(self, function: Function) -> Function:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            super().capture(function)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return Replay(graph, function)

    def held_bytes(self) -> int:
        return torch.cuda.memory_allocated()

    def peak_bytes(self, function: Function) -> int:
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        function()
        self.synchronize()
        return torch.cuda.max_memory_allocated()

    def release(self) -> None:
        torch.cuda.empty_cache()

    @property
    def name(self) -> str:
        return self._name

    def versions(self) -> dict[str, str | None]:
        return {"cuda": torch.version.cuda, "driver": _driver_version()}


def _driver_version() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.split("\n")[0].strip() or None


def calls_for(seconds: float, region: float, most: int) -> int:
    """How many calls of ``seconds`` each make a region long enough to be timed."""
    return max(1, min(most, math.ceil(region / max(seconds, 1e-9))))
