"""Every kind of step of AE-SAM, LookSAM and SALR against a loop over parameters, and against the base rule's step.

Rounds alternate between the three, as in ``bench_optimizer.py``.
"""

from __future__ import annotations

import statistics

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .baselines import BASES, Base
from .conftest import Settings, settings_of
from .family import BARE, KINDS, Step
from .measure import Copy, WrongValues, compare, rounds_for, time_once
from .shapes import Shape, count

# What is timed without the minutes of all shapes: one bound by the host, two by memory.
SHAPES = ("tiny", "small400", "resnet18", "resnet50")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings = settings_of(metafunc.config)
    shapes = [name for name in settings.shapes if settings.every or name in SHAPES]
    rows = [(shape, base, kind) for shape in shapes for base in BASES for kind in KINDS]
    metafunc.parametrize("row", rows, ids=["-".join(row).replace(", ", "_").replace(" ", "_") for row in rows])


def _leaves(shapes: list[Shape]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    leaves = []
    for shape in shapes:
        leaf = torch.randn(shape, generator=generator).mul_(0.05).requires_grad_()
        leaf.grad = torch.randn(shape, generator=generator).mul_(0.01)
        leaves.append(leaf)
    return leaves


def _checked(shapes: list[Shape], base: Base, kind: str) -> tuple[Step, Step]:
    """(ours, the naive one), after steps that led to the same weights."""
    chosen = KINDS[kind]
    ours, theirs = _leaves(shapes), _leaves(shapes)
    step, naive = chosen.ours(ours, base), chosen.naive(theirs, base)
    for _ in range(2):
        step()
        naive()
    try:
        compare([p.detach() for p in ours], [p.detach() for p in theirs], kind)
    except WrongValues as reason:
        pytest.fail(f"not timed: {reason}", pytrace=False)
    return step, naive


def test_kind(benchmark: BenchmarkFixture, row: tuple[str, Base, str], settings: Settings, copier: Copy) -> None:
    name, base, kind = row
    shapes = settings.shapes[name]
    ours, naive = _checked(shapes, base, kind)
    bare, _ = _checked(shapes, base, BARE)

    copy_rate = copier.bandwidth()
    others: dict[str, list[float]] = {"naive": [], "bare": []}

    def setup() -> None:
        turn = [("naive", naive), ("bare", bare)]
        for who, step in turn[:: -1 if len(others["bare"]) % 2 else 1]:
            others[who].append(time_once(step))

    rounds = rounds_for(time_once(lambda: (ours(), naive(), bare())), settings.budget, settings.rounds)
    benchmark.pedantic(ours, setup=setup, rounds=rounds, warmup_rounds=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median
    size = KINDS[kind].bytes_per_param(base)
    rate = size * count(shapes) / seconds
    medians = {who: statistics.median(times[-rounds:]) for who, times in others.items()}
    benchmark.extra_info.update(
        kind="family",
        shape=name,
        tensors=len(shapes),
        params=count(shapes),
        base=base,
        step=kind,
        bytes_per_param=size,
        gb_per_s=rate / 1e9,
        copy_gb_per_s=copy_rate / 1e9,
        copy_share=rate / copy_rate,
        naive_ratio=medians["naive"] / seconds,
        bare_ratio=seconds / medians["bare"],
    )
