"""Benchmarks on a GPU, timed by the device's own events in interleaved rounds; a dry run of them on a CPU."""

from .iteration import run_iterations
from .kernels import run_kernels
from .run import Plan, Run, dry, full
from .steps import run_steps

SECTIONS = {"kernels": run_kernels, "steps": run_steps, "iteration": run_iterations}

__all__ = ["SECTIONS", "Plan", "Run", "dry", "full"]
