"""Options of the benchmarks, and what is added to and left out of pytest-benchmark's JSON."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from .measure import Copy, environment
from .shapes import CPU, SHAPES, Shape, chosen, tiny


@dataclass(frozen=True)
class Settings:
    """What one run measures.

    Args:
        shapes: the rows' shapes by name.
        every: time the rows that are left out for their minutes, too.
        budget: seconds for the rounds of one measurement.
        rounds: at least so many.
    """

    quick: bool
    shapes: dict[str, list[Shape]]
    every: bool
    budget: float
    rounds: int


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sharpkern")
    group.addoption("--quick", action="store_true", help="tiny shapes and few rounds: does it run at all")
    group.addoption("--shapes", default="", help=f"comma-separated, of {', '.join(SHAPES)}; default: {', '.join(CPU)}")
    group.addoption("--every", action="store_true", help="leave no row out for its minutes")


def settings_of(config: pytest.Config) -> Settings:
    """The options of a run.

    Raises:
        pytest.UsageError: for shapes that are not there.
    """
    try:
        shapes = chosen(config.getoption("--shapes"), CPU)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    every = bool(config.getoption("--every"))
    if config.getoption("--quick"):
        return Settings(True, {"tiny": tiny()}, every, budget=0.01, rounds=3)
    return Settings(False, shapes, every, budget=0.7, rounds=4)


def _command(config: pytest.Config) -> str:
    """The command to repeat the run, without paths."""
    words = ["python -m bench", *(f"--{flag}" for flag in ("quick", "every") if config.getoption(f"--{flag}"))]
    if config.getoption("--shapes"):
        words.append(f"--shapes {config.getoption('--shapes')}")
    return " ".join(words)


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Iterator[Settings]:
    settings = settings_of(request.config)
    threads = torch.get_num_threads()
    if settings.quick:
        # Threads that wait for each other on a busy machine would make the seconds minutes.
        torch.set_num_threads(1)
    yield settings
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def copier(settings: Settings) -> Copy:
    """The plain copy that every row measures anew: a machine's bandwidth may change during a run."""
    return Copy(1_000_000) if settings.quick else Copy()


@pytest.fixture(autouse=True)
def _collect_garbage() -> Iterator[None]:
    """Optimizers sit in reference cycles: without this, those of the last test would still hold gigabytes."""
    gc.collect()
    yield
    gc.collect()


_left_out: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason not in _left_out:
            _left_out.append(reason)


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    """Nothing: the commit is in ``environment``, and pytest-benchmark's would name the directory."""
    return {}


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # the host's name is nobody's business
    cpu = machine_info.get("cpu") or {}
    machine_info["cpu"] = {key: cpu[key] for key in ("brand_raw", "arch", "count") if key in cpu}
    machine_info["threads"] = torch.get_num_threads()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)  # every single round: of no use to anyone
    cpu = output_json["machine_info"]["cpu"].get("brand_raw")
    output_json["environment"] = {**environment(_command(config), cpu, ["pytorch_optimizer"]), "left_out": _left_out}
