"""A training that is killed goes on from its last checkpoint, to the same bits.

With SIGKILL, in a process of its own: no handler runs, no file is closed. This file is that process's program, too.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from methods import METHODS
from models import assert_same_bits, batches, make_closure, make_net, weights
from torch import Tensor

STEPS, EVERY = 12, 3  # a checkpoint after every third step
Report = Callable[[str], None]


def train(method: str, base: str, file: Path, report: Report) -> tuple[int, dict[str, Tensor]]:
    """Train, from the checkpoint where there is one. Returns the first step and what there is at the end.

    Args:
        report: is told of every moment: ``pass 8.1``, ``stepped 8``, ``saving 9``.
    """
    torch.manual_seed(0)
    model, order = make_net(torch.float32), torch.Generator().manual_seed(1)
    opt = METHODS[method].make(model.named_parameters(), base, STEPS, model=model)
    data, first = batches(5, torch.float32), 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
        torch.set_rng_state(saved["noise"])
        order.set_state(saved["order"])
        first = saved["step"]
    for t in range(first, STEPS):
        x, y = data[int(torch.randint(len(data), (), generator=order))]
        closure, calls = make_closure(model, (x + 0.1 * torch.randn(x.shape), y)), 0

        def evaluate(closure: Any = closure, t: int = t) -> Tensor:
            nonlocal calls
            loss = closure()
            report(f"pass {t}.{calls}")
            calls += 1
            return loss

        opt.step(evaluate)
        report(f"stepped {t}")
        if (t + 1) % EVERY == 0:
            states = {"model": model.state_dict(), "opt": opt.state_dict()}
            save({**states, "noise": torch.get_rng_state(), "order": order.get_state(), "step": t + 1}, file, report)
    return first, {**weights(model), **dict(model.named_buffers()), **opt.stats}


def save(state: dict[str, Any], file: Path, report: Report) -> None:
    """In one piece or not at all."""
    memory = io.BytesIO()
    torch.save(state, memory)
    written = memory.getvalue()
    with open(file.with_suffix(".new"), "wb") as new:
        new.write(written[: len(written) // 2])
        new.flush()
        report(f"saving {state['step']}")
        new.write(written[len(written) // 2 :])
        new.flush()
        os.fsync(new.fileno())
    os.replace(file.with_suffix(".new"), file)


def start(method: str, base: str, folder: Path, stop_at: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, __file__, method, base, str(folder), str(torch.get_num_threads()), stop_at]
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("method", "base", "moment"),
    [
        ("sam", "adamw", "pass 8.1"),  # its weights are away
        ("looksam", "momentum", "saving 9"),  # half of a file is written
        pytest.param("aesam", "adam", "stepped 8", marks=pytest.mark.slow),  # and not yet saved
        pytest.param("salr", "momentum", "pass 8.1", marks=pytest.mark.slow),  # in a branch
        pytest.param("salr", "wrapped", "saving 9", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed(method: str, base: str, moment: str, tmp_path: Path) -> None:
    with start(method, base, tmp_path, moment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{moment}\n"  # and waits there
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert (tmp_path / "checkpoint.new").exists() == moment.startswith("saving")
    with start(method, base, tmp_path) as process:
        assert process.wait() == 0
    end = torch.load(tmp_path / "end", weights_only=True)
    assert end["first"] == 6
    first, straight = train(method, base, tmp_path / "none", lambda moment: None)
    assert first == 0
    assert_same_bits(end["values"], straight)


if __name__ == "__main__":
    name, rule, place, threads, stop = sys.argv[1:]
    torch.set_num_threads(int(threads))

    def wait_there(moment: str) -> None:
        if moment == stop:
            print(moment, flush=True)
            sys.stdin.read()

    began, values = train(name, rule, Path(place) / "checkpoint", wait_there)
    torch.save({"first": began, "values": values}, Path(place) / "end")
