"""Fixtures of every test: both backends, and no luck with uninitialised memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import sharpkern as sk


@pytest.fixture(autouse=True)
def nan_filled_empty() -> Iterator[None]:
    """Every ``torch.empty`` holds NaN: what is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=sk.available_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that runs here, in charge for the test."""
    with sk.use_backend(request.param):
        yield request.param
