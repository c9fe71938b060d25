"""Both passes of the optimizer, on gradients that are there already: ours against every other contender.

Rounds alternate: one step of ours, untimed by pytest-benchmark but by us, then one step of the contender. Their
ratio so holds on a machine whose speed changes from minute to minute. The row of "ours" is ours against a second
instance of itself: how far its ratio is from one is the noise of the run.
"""

from __future__ import annotations

import statistics
from functools import lru_cache

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .baselines import BASES, RHO, Algorithm, Base, TwoStep, Unavailable
from .conftest import Settings, settings_of
from .contenders import CONTENDERS, OURS
from .measure import Copy, Problem, WrongValues, host_us, rounds_for, step, time_once
from .shapes import Shape, count

Row = tuple[str, Algorithm, Base, str]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    rows = [
        (shape, algorithm, base, contender)
        for shape in settings_of(metafunc.config).shapes
        for algorithm in RHO
        for base in BASES
        for contender in CONTENDERS
    ]
    metafunc.parametrize("row", rows, ids=["-".join(row).replace(", ", "_").replace(" ", "_") for row in rows])


# The contenders of a row run one after the other, so that one problem at a time has to be kept.
@lru_cache(maxsize=1)
def _problem(shapes: tuple[Shape, ...], algorithm: Algorithm, base: Base) -> Problem:
    return Problem(shapes, algorithm, base)


def _skip_slow(row: Row, quick: bool) -> None:
    """What would make a run take more than minutes is left out, and said so."""
    name, algorithm, base, contender = row
    if name == "gpt2_small" and base != "adamw":
        pytest.skip("GPT-2 small is timed with AdamW only (with SGD: --every)")
    if CONTENDERS[contender].slow_start and (quick or name == "gpt2_small" or (algorithm, base) != ("sam", "sgd")):
        pytest.skip("torch.compile takes a minute or more a row: timed for SAM with SGD only (all rows: --every)")


def _checked(problem: Problem, contender: str) -> TwoStep:
    try:
        return problem.build(contender)
    except Unavailable as reason:
        pytest.skip(str(reason))
    except WrongValues as reason:
        pytest.fail(f"not timed: {reason}", pytrace=False)


def test_step(benchmark: BenchmarkFixture, row: Row, settings: Settings, copier: Copy) -> None:
    name, algorithm, base, contender = row
    shapes = settings.shapes[name]
    if not settings.every:
        _skip_slow(row, settings.quick)
    problem = _problem(tuple(shapes), algorithm, base)
    subject, ours = _checked(problem, contender), _checked(problem, OURS)

    copy_rate = copier.bandwidth()
    times: list[float] = []
    rounds = rounds_for(time_once(lambda: (step(ours), step(subject))), settings.budget, settings.rounds)
    benchmark.pedantic(
        step,
        args=(subject,),
        setup=lambda: times.append(time_once(lambda: step(ours))),
        rounds=rounds,
        warmup_rounds=1,
    )
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median
    ours_seconds = statistics.median(times[-rounds:])
    size = CONTENDERS[contender].bytes_per_param(algorithm, base)
    rate = None if size is None else size * count(shapes) / seconds
    benchmark.extra_info.update(
        kind="step",
        shape=name,
        tensors=len(shapes),
        params=count(shapes),
        algorithm=algorithm,
        base=base,
        contender=contender,
        bytes_per_param=size,
        gb_per_s=None if rate is None else rate / 1e9,
        copy_gb_per_s=copy_rate / 1e9,
        copy_share=None if rate is None else rate / copy_rate,
        host_us=host_us(contender, shapes, algorithm, base, settings.budget / 10),
        ours_ms=1e3 * ours_seconds,
        ratio=seconds / ours_seconds,
    )
