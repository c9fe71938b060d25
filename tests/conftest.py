"""Fixtures of every test: both backends, and no luck with uninitialised memory. And the two tiers.

``make test`` takes the first tier, minutes: every kind of check at least once. Every op on the CPU's kernels; every
optimizer with every kind of base rule through the contract (tests/contract), its trajectories on the reference, too;
one trajectory an op set in Triton's interpreter; some of all that through the emulated CUDA kernels.
``make check`` takes everything: what is marked ``slow``, here or where it stands, is the same on more layouts, dtypes,
rules and backends, or a whole command that others take in pieces.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import emulation
import pytest
import remote
import torch

# Triton's kernels run in the interpreter where there is no device for them. Read when they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms want it
    torch.backends.cudnn.allow_tf32 = False  # two nets that should agree would not, to float32's precision
# The suite on another device: SHARPKERN_TEST_DEVICE=cuda.
if "SHARPKERN_TEST_DEVICE" in os.environ:
    torch.set_default_device(os.environ["SHARPKERN_TEST_DEVICE"])

import sharpkern as sk

# The suite on the CPU as if it were a device: with kernels that take the table as a device has it.
if "SHARPKERN_TEST_REMOTE" in os.environ:
    remote.pretend(pytest.MonkeyPatch())

# The CUDA kernels, run on the CPU, in place of the CPU's own: see test_cuda_emulated.py.
if "SHARPKERN_EMULATED" in os.environ:
    emulation.load(os.environ["SHARPKERN_EMULATED"])


# Beside what is marked where it stands. In Triton's interpreter a block costs milliseconds.
SLOW = {
    "test_ops.py": r"(many|unaligned|lengths)-.*triton|test_norm_meets_what_is_not_finite.*triton|test_options.*triton"
    r"|test_skip.*(float64|bfloat16|float16).*triton|number_of_threads.*reference|big_buffers.*bfloat16",
    "test_device.py": r"test_steps_of_every_kind|test_a_decision_is_all_that_is_read\[(sssam|looksam)",
    "test_bench.py": r"test_quick_run|test_command_line\b|test_gpu_check",
    "test_experiments.py": r"test_killed|test_whole_command|test_resumed\[(40|1000000)\]",
    "test_kernels.py": r"test_report|test_a_bad_cuda_file",
    "test_package.py": r"test_triton_on_the_cpu_is|test_without_the_extension_a_device",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if re.search(SLOW.get(item.path.name, "$^"), item.name) or _is_slow(item):
            item.add_marker(pytest.mark.slow)
    # Single tests that take minutes come first: no process is left alone with them at the end.
    items.sort(key=lambda item: item.path.name != "test_cuda_emulated.py")


def _is_slow(item: pytest.Item) -> bool:
    """Of a class that is brief, or like another one (methods.py)."""
    from methods import BASES, Method, is_slow  # imports the package

    given = item.callspec.params if hasattr(item, "callspec") else {}
    method, base = given.get("method"), given.get("base")
    return isinstance(method, Method) and is_slow(method, base if base in BASES else None)


@pytest.fixture(autouse=True)
def nan_filled_empty() -> Iterator[None]:
    """Every ``torch.empty`` holds NaN: what is read before it is written shows."""
    # Some of torch's own CUDA kernels are not deterministic: that is not under test.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=sk.available_backends(torch.get_default_device()))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that runs here, in charge for the test."""
    with sk.use_backend(request.param):
        yield request.param
