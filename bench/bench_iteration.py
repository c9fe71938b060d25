"""A whole SAM iteration against two plain forward and backward passes of the same model.

One would be the optimizer for free. Rounds alternate, as in ``bench_optimizer.py``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn import functional as F

from .conftest import Settings
from .contenders import CONTENDERS, OURS
from .measure import rounds_for, time_once
from .models import convnet, transformer


def _images(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))


def _tokens(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randint(1000, (batch, 64)), torch.randint(1000, (batch * 64,))


# Model, data, width and batch, the same for --quick.
MODELS: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], tuple[Tensor, Tensor]], tuple[int, ...]]] = {
    "convnet": (convnet, _images, (64, 8, 4, 2)),
    "transformer": (transformer, _tokens, (256, 4, 32, 1)),
}


@pytest.mark.parametrize("contender", [OURS, "loop"])
@pytest.mark.parametrize("name", MODELS)
def test_iteration(benchmark: BenchmarkFixture, name: str, contender: str, settings: Settings) -> None:
    torch.manual_seed(0)
    make, data, (width, batch, quick_width, quick_batch) = MODELS[name]
    model = make(quick_width if settings.quick else width)
    inputs, targets = data(quick_batch if settings.quick else batch)
    params = list(model.parameters())
    optimizer = CONTENDERS[contender].make(params, "sam", "sgd")

    def evaluate() -> None:
        model.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()

    def plain() -> None:
        evaluate()
        evaluate()

    def sam() -> None:
        evaluate()
        optimizer.first_step()
        evaluate()
        optimizer.second_step()

    sam()
    times: list[float] = []
    rounds = rounds_for(time_once(lambda: (plain(), sam())), 4 * settings.budget, settings.rounds)
    benchmark.pedantic(sam, setup=lambda: times.append(time_once(plain)), rounds=rounds, warmup_rounds=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    plain_seconds = statistics.median(times[-rounds:])
    benchmark.extra_info.update(
        kind="iteration",
        model=name,
        batch=len(inputs),
        params=sum(p.numel() for p in params),
        contender=contender,
        plain_ms=1e3 * plain_seconds,
        ratio=benchmark.stats.stats.median / plain_seconds,
    )
