"""``python -m bench.host``: the host's time of a SAM step by hand on many tensors of one element, for each way to find
them, beside one step of torch's fused SGD and the loop.

Microseconds of CPU time of one thread, which other work on the machine disturbs less; median of rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import nn

import sharpkern as sk
from sharpkern.ops import scan

from .baselines import Loop

OPTIONS = {"lr": 1e-3, "momentum": 0.9}


def microseconds(function: Callable[[], object], calls: int = 100, rounds: int = 7) -> float:
    for _ in range(calls):
        function()
    times = []
    for _ in range(rounds):
        start = time.thread_time_ns()
        for _ in range(calls):
            function()
        times.append((time.thread_time_ns() - start) / calls / 1e3)
    return statistics.median(times)


def parameters(count: int) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.ones(1)) for _ in range(count)]
    for p in params:
        p.grad = torch.ones(1)
    return params


def ours(count: int, path: str) -> float | None:
    """None where tensors cannot be found in that way."""
    lacking = {"aten": {}, "dlpack": {"_aten": None}, "op": {"_aten": None, "_EXCHANGE": None}}[path]
    with mock.patch.multiple(scan, **lacking) if lacking else mock.MagicMock():
        if scan.path() != path:
            return None
        opt = sk.SAM(parameters(count), torch.optim.SGD, **OPTIONS)

        def step() -> None:
            opt.first_step()
            opt.second_step()

        return microseconds(step)


def main() -> None:
    torch.set_num_threads(1)
    print("| tensors | aten | dlpack | op | one step of SGD(fused=True) | loop |\n|---:|---:|---:|---:|---:|---:|")
    for count in (1, 161, 400):
        found = [ours(count, path) for path in ("aten", "dlpack", "op")]
        found.append(microseconds(torch.optim.SGD(parameters(count), fused=True, **OPTIONS).step))
        loop = Loop(parameters(count), "sam", "sgd")
        found.append(microseconds(lambda loop=loop: (loop.first_step(), loop.second_step()), calls=20, rounds=3))
        print(f"| {count} | {' | '.join('-' if us is None else f'{us:.0f}' for us in found)} |", flush=True)


if __name__ == "__main__":
    main()
