"""Fixtures of every test: both backends, and no luck with uninitialised memory."""

from __future__ import annotations

import os
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
