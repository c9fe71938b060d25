"""Which steps take the second pass: the policies alone, and what an adaptive one adds to a step."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from methods import TRIGGERED, Method, over
from models import batches, make_closure, make_net, train

import sharpkern as sk
from sharpkern.policy import Adaptive, Always, Bernoulli, Every, Statistics

DEVICE = torch.get_default_device()

# Draws.


def draws(policy: Any, n: int) -> list[bool]:
    return [policy.second_pass(t) for t in range(n)]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_of_second_passes(p: float) -> None:
    for seed in range(3):
        share = sum(draws(Bernoulli(p, seed), 20_000)) / 20_000
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 20_000)


def test_neighbouring_steps_and_seeds_are_independent() -> None:
    a, b = draws(Bernoulli(0.5, 0), 20_000), draws(Bernoulli(0.5, 1), 20_000)
    for x, y in ((a, b), (a[1:], a[:-1]), (a[2:], a[:-2])):
        agree = sum(u == v for u, v in zip(x, y, strict=False)) / len(y)
        assert abs(agree - 0.5) < 4 * 0.5 / math.sqrt(20_000)


def test_the_bounds_are_certain() -> None:
    assert not any(draws(Bernoulli(0.0, 0), 5000))
    assert all(draws(Bernoulli(1.0, 0), 5000))
    assert all(draws(Always(), 10))


def test_a_schedule() -> None:
    cosine = Bernoulli(lambda t: 0.5 + 0.5 * math.cos(math.pi * t / 20_000), 0)
    quarters = [sum(draws(cosine, 20_000)[i : i + 5000]) / 5000 for i in range(0, 20_000, 5000)]
    expected = [0.5 + 2 / math.pi * (math.sin((i + 1) * math.pi / 4) - math.sin(i * math.pi / 4)) for i in range(4)]
    assert quarters == pytest.approx(expected, abs=0.03)
    assert draws(Bernoulli(lambda t: float(t % 3 == 0), 5), 6) == [True, False, False] * 2


def test_every_process_draws_the_same() -> None:
    code = "from sharpkern.policy import Bernoulli; print([int(Bernoulli(0.3, 42).second_pass(t)) for t in range(64)])"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert seen.strip() == str([int(d) for d in draws(Bernoulli(0.3, 42), 64)])


def test_every() -> None:
    assert [Every(3).second_pass(t) for t in range(7)] == [True, False, False, True, False, False, True]
    assert all(Every(1).second_pass(t) for t in range(5))


# AE-SAM's trigger.


def shares(policy: Adaptive) -> list[float]:
    """Of second passes in each quarter, for independent squared norms from Normal(10, 1)."""
    steps = policy.total_steps
    draws = np.random.default_rng(0).normal(10.0, 1.0, steps).tolist()
    state, fired = Statistics(), []
    for t, n in enumerate(draws):
        state, second = policy.update(state, t, n)
        fired.append(second)
    return [sum(fired[i : i + steps // 4]) / (steps // 4) for i in range(0, steps, steps // 4)]


def test_share_of_second_passes_of_ae_sam() -> None:
    quarters = shares(Adaptive(200_000, 1.0, -1.0, 0.9))
    assert quarters == pytest.approx([0.24, 0.41, 0.59, 0.76], abs=0.03)
    assert sum(quarters) / 4 == pytest.approx(0.5, abs=0.02)


def test_share_of_second_passes_of_ae_looksam() -> None:
    quarters = shares(Adaptive(200_000, 2.0, 0.0, 0.9))
    assert quarters == pytest.approx([0.03, 0.11, 0.24, 0.41], abs=0.03)
    assert sum(quarters) / 4 == pytest.approx(0.2, abs=0.02)


def test_a_spike_fires_and_nothing_infinite_counts() -> None:
    policy = Adaptive(10, 1.0, -1.0, 0.9)
    state = Statistics(10.0, 1.0, 11.0)
    assert policy.update(state, 0, 1000.0)[1]
    for n in (math.inf, math.nan, 1e200):  # the last one's variance overflows
        assert policy.update(state, 0, n) == (state, False)
    assert policy.coefficient(0) == 1.0
    assert policy.coefficient(5) == 0.0
    assert policy.coefficient(10) == policy.coefficient(99) == -1.0
    assert Adaptive(4, math.inf, math.inf, 0.9).coefficient(2) == math.inf


# In a step.


# Triton's interpreter has the op's own tests.
@pytest.mark.parametrize("backend_name", [name for name in sk.available_backends(DEVICE) if name != "triton"])
@over(TRIGGERED)
def test_the_statistics_are_those_of_the_policy(method: Method, backend_name: str) -> None:
    with sk.use_backend(backend_name):
        follow(method)


def follow(method: Method) -> None:
    model = make_net()
    opt = method.make(model.named_parameters(), "momentum", 6)
    policy = Adaptive(6, method.options["lambda_start"], method.options["lambda_end"], 0.9)
    state, seen = Statistics(), 0
    for t, batch in enumerate(batches(6)):
        opt.step(make_closure(model, batch))
        stats = opt.stats
        state, fired = policy.update(state, t, float(stats["grad_norm"]) ** 2)
        for name, value in zip(("ema_mean", "ema_var", "threshold"), state, strict=True):
            assert float(stats[name]) == pytest.approx(value, rel=1e-12)
        assert (int(stats["second_passes"]) > seen) == fired
        seen = int(stats["second_passes"])


@pytest.mark.parametrize("sign", [-1, 1])
@over(TRIGGERED)
def test_an_infinite_threshold(method: Method, sign: int) -> None:
    model = make_net(torch.float32)
    bound = {"lambda_start": sign * math.inf, "lambda_end": sign * math.inf}
    opt = method.make(model.named_parameters(), "momentum", **bound)
    train(model, opt, batches(5, torch.float32))
    assert float(opt.stats["threshold"]) == sign * math.inf
    assert int(opt.stats["second_passes"]) == (5 if sign < 0 else 0)


@over(TRIGGERED)
def test_training_past_total_steps_warns_once(method: Method) -> None:
    model = make_net(torch.float32)
    opt = method.make(model.named_parameters(), "momentum", 3)
    data = batches(6, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, opt, data[:3])
    with pytest.warns(UserWarning, match="total_steps=3") as seen:
        train(model, opt, data[3:])
    assert len(seen) == 1
