"""SharpnessMonitor: what it records is so, it changes nothing, and what was recorded stays.

This file is the program of a process that is killed, too.
"""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_same_bits, batches, make_net, state_of, train
from torch import nn
from torch.nn.functional import cross_entropy

import sharpkern as sk

pytest.importorskip("scipy")

from sharpkern.analysis import SharpnessMonitor, sharpness, top_eigenvalues

DATA = batches(3)
STEPS = 6


def adaptive(model: nn.Module) -> Any:
    return sk.AESAM(model.parameters(), lr=0.1, rho=0.05, total_steps=STEPS, lambda_start=3.0, lambda_end=0.0)


def watched(model: nn.Module, opt: Any, **more: Any) -> SharpnessMonitor:
    return SharpnessMonitor(
        opt=opt, model=model, loss_fn=cross_entropy, **{"batches": DATA, "every": 2, "k": 2, **more}
    )


def test_a_record_has_what_is_so_and_the_training_does_not_notice() -> None:
    model, alone = make_net(), make_net()
    opt, other = adaptive(model), adaptive(alone)
    monitor, fired = watched(model, opt, metrics=lambda: {"accuracy": 0.5}), []
    for t, batch in enumerate(batches(STEPS, size=6)):
        before = int(other.stats["second_passes"])
        train(model, opt, [batch])
        train(alone, other, [batch])
        fired.append(int(other.stats["second_passes"]) - before)
        if t % 2:
            record = monitor.records[-1]
            stats = {name: float(value) for name, value in other.stats.items()}
            assert record["step"] == t + 1
            assert record["second_pass"] == fired[-1]
            assert record["second_pass_share"] == sum(fired) / len(fired)
            assert [record[name] for name in ("grad_norm", "threshold", "ema_mean")] == [
                stats[name] for name in ("grad_norm", "threshold", "ema_mean")
            ]
            pairs = top_eigenvalues(alone, cross_entropy, DATA, 2)
            assert record["eigenvalues"] == pairs.values.tolist()
            assert record["sharpness"] == sharpness(alone, cross_entropy, DATA, 0.05)
            assert record["accuracy"] == 0.5
    assert 0 < sum(fired) < STEPS
    assert [record["step"] for record in monitor.records] == [2, 4, 6]
    assert_same_bits(dict(model.state_dict()), dict(alone.state_dict()))
    assert_same_bits(state_of(opt), state_of(other))


def test_before_the_first_step_nothing_is_measured() -> None:
    model = make_net()
    opt = adaptive(model)
    monitor = SharpnessMonitor(opt=opt, every=1)
    assert set(monitor.record()) == {"step"}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    elements = sum(p.numel() for p in model.parameters())
    assert monitor.record()["grad_norm"] == pytest.approx(math.sqrt(elements))
    opt.first_step()
    opt.second_step()
    assert monitor.records[-1].keys() >= {"grad_norm", "ema_mean", "ema_var", "second_pass_share"}
    monitor.close()


@pytest.mark.parametrize("every", [1, 3])
def test_decisions(every: int) -> None:
    """Of the very step that is recorded, however often that is."""
    model = make_net()
    opt = sk.SAM(model.parameters(), lr=0.1, policy=sk.policy.Every(2))
    monitor = SharpnessMonitor(opt=opt, every=every)
    train(model, opt, batches(STEPS))
    assert [r["second_pass"] for r in monitor.records] == [step % 2 for step in range(every, STEPS + 1, every)]


def test_salr_and_optimizers_of_torch() -> None:
    model = make_net()
    opt = sk.SALR(model.parameters(), lr=0.1, every=1)
    with SharpnessMonitor(opt=opt, every=1) as monitor:
        train(model, opt, DATA)
    assert [r["lr_scale"] for r in monitor.records][-1] == float(opt.stats["lr_scale"]) != 1
    assert monitor.records[-1]["salr_sharpness"] == float(opt.stats["sharpness"])
    train(model, opt, DATA)
    assert len(monitor.records) == len(DATA)  # it was closed

    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = watched(model, sgd, every=1, rho=0)
    train(model, sgd, DATA[:1])
    (record,) = monitor.records
    assert set(record) == {"step", "loss", "eigenvalues", "grad_norm"}
    expected = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert record["grad_norm"] == pytest.approx(expected, rel=1e-12)

    alone = SharpnessMonitor(model=model, loss_fn=cross_entropy, batches=DATA, every=2, k=0)
    assert alone.step() is None
    assert alone.step() == alone.records[0]
    assert set(alone.records[0]) == {"step", "loss", "sharpness", "grad_norm"}


def test_metrics_have_names_of_their_own() -> None:
    model = make_net()
    monitor = SharpnessMonitor(opt=adaptive(model), metrics=lambda: {"step": 9, "loss": 1.0})
    with pytest.raises(ValueError, match="returns step, which"):
        monitor.record()


def test_files(tmp_path: Path) -> None:
    model = make_net()
    opt = adaptive(model)
    monitor = watched(model, opt, path=tmp_path / "new" / "run")
    monitor.record()  # before the first step
    train(model, opt, batches(4))
    lines = [json.loads(line) for line in (tmp_path / "new" / "run.jsonl").read_text().splitlines()]
    assert lines == monitor.records
    assert [line["step"] for line in lines] == [0, 2, 4]
    with (tmp_path / "new" / "run.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, record in zip(rows, monitor.records, strict=True):
        assert float(row["eigenvalue_1"]) == record["eigenvalues"][0]
        assert float(row["eigenvalue_2"]) == record["eigenvalues"][1]
        assert row["threshold"] == str(record.get("threshold", ""))
    # Of another run nothing is overwritten.
    with pytest.raises(FileExistsError, match="resume=True"):
        watched(model, opt, path=tmp_path / "new" / "run")


def test_the_loader_of_the_training_that_is_in_the_middle_of_it() -> None:
    """Also where workers stay: torch has them for one pass at a time."""
    ends = []
    for recorded in (False, True):
        model = make_net(torch.float32)
        opt = adaptive(model)
        x, y = (torch.cat(parts) for parts in zip(*batches(STEPS, torch.float32, size=2), strict=True))
        data = torch.utils.data.TensorDataset(x, y)
        generator = torch.Generator().manual_seed(1)
        loader = torch.utils.data.DataLoader(
            data, 4, shuffle=True, generator=generator, num_workers=1, persistent_workers=True
        )
        monitor = watched(model, opt, batches=loader, k=0, every=4 if recorded else 100)
        for _ in range(2):
            train(model, opt, loader)
        assert len(monitor.records) == recorded
        ends.append({**model.state_dict(), **state_of(opt)})
    assert_same_bits(ends[0], ends[1])


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 2, 1]])
def test_resume(order: list[int], tmp_path: Path) -> None:
    """From a checkpoint that is older than the last record, whatever is loaded first."""
    straight = make_net()
    opt = adaptive(straight)
    expected = watched(straight, opt)
    train(straight, opt, batches(STEPS))

    model = make_net()
    opt = adaptive(model)
    monitor = watched(model, opt, path=tmp_path / "run")
    train(model, opt, batches(STEPS)[:3])
    saved = model.state_dict(), opt.state_dict(), monitor.state_dict()
    saved = torch.load(_stored(saved, tmp_path / "checkpoint"), weights_only=True)
    train(model, opt, batches(STEPS)[3:4])  # recorded, but lost
    monitor.close()

    model = make_net(seed=1)
    opt = adaptive(model)
    monitor = watched(model, opt, path=tmp_path / "run", resume=True)
    for i in order:
        (model, opt, monitor)[i].load_state_dict(saved[i])
    assert [r["step"] for r in monitor.records] == [2]
    train(model, opt, batches(STEPS)[3:])
    assert monitor.records == expected.records
    assert [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()] == expected.records


def _stored(state: Any, path: Path) -> Path:
    torch.save(state, path)
    return path


def killed(path: str) -> None:
    """The process: killed after four steps."""
    model = make_net()
    opt = adaptive(model)
    SharpnessMonitor(opt=opt, every=1, path=path)
    for t, batch in enumerate(batches(STEPS, size=6)):
        if t == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        train(model, opt, [batch])


def test_a_killed_run_keeps_what_was_recorded(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, __file__, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, timeout=120, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    model = make_net()
    monitor = SharpnessMonitor(opt=adaptive(model), every=1, path=tmp_path / "run", resume=True)
    assert [r["step"] for r in monitor.records] == [1, 2, 3, 4]
    assert monitor.steps == 4
    # Of a line that was cut, as by a full disk, the others are kept.
    with (tmp_path / "run.jsonl").open("a") as file:
        file.write('{"step": 5, "gr')
    monitor = SharpnessMonitor(opt=adaptive(model), every=1, path=tmp_path / "run", resume=True)
    assert monitor.steps == 4


def test_a_training_that_diverges_is_recorded_to_its_end() -> None:
    model = make_net()
    opt = sk.SAM(model.parameters(), lr=0.1)
    monitor = watched(model, opt, every=1)
    with torch.no_grad():
        model.out.weight.fill_(math.inf)
    train(model, opt, DATA[:1])
    assert set(monitor.records[0]) == {"step", "skipped_steps", "second_pass", "second_pass_share"}
    json.dumps(monitor.records, allow_nan=False)


def test_figure(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    model = make_net()
    opt = adaptive(model)
    monitor = watched(model, opt, every=1, k=12)
    with pytest.raises(ValueError, match="no record"):
        monitor.plot()
    train(model, opt, DATA)
    assert any(
        value < 0 for record in monitor.records for value in record["eigenvalues"]
    )  # what a log has no place for
    (axis,) = monitor.plot(tmp_path / "run.png").axes
    assert axis.get_yscale() == "log"
    for i, line in enumerate(axis.get_lines()):
        shown = [(r["step"], r["eigenvalues"][i]) for r in monitor.records if r["eigenvalues"][i] > 0]
        assert [tuple(point) for point in line.get_xydata()] == shown
    assert matplotlib.image.imread(tmp_path / "run.png").std() > 0


class Writer:
    """What torch.utils.tensorboard.SummaryWriter has."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag, step] = value

    def flush(self) -> None:
        self.flushed = len(self.scalars)


def test_tensorboard(tmp_path: Path) -> None:
    writer, model = Writer(), make_net()
    opt = adaptive(model)
    monitor = watched(model, opt, every=1, tensorboard=writer)
    train(model, opt, DATA[:2])
    assert writer.scalars["sharpness/eigenvalue_2", 2] == monitor.records[1]["eigenvalues"][1]
    assert writer.flushed == len(writer.scalars)
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="tensorboard"):
            watched(model, opt, tensorboard=tmp_path)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (dict(opt=None, model=None, loss_fn=None, batches=None), TypeError, "needs opt="),
        (dict(batches=None), TypeError, "give all or none"),
        (dict(every=0), ValueError, "Invalid every: 0"),
        (dict(k=-1), ValueError, "Invalid k: -1"),
        (dict(rho=-0.1), ValueError, "Invalid rho: -0.1"),
        (dict(batches=iter(DATA)), TypeError, "again and again"),
        (dict(eigen_mode=True), TypeError, "eigen_mode"),
        (dict(opt=make_net()), TypeError, "opt should be a torch.optim.Optimizer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments(more: dict[str, Any], error: type[Exception], message: str) -> None:
    model = make_net()
    opt = adaptive(model)
    with pytest.raises(error, match=message):
        SharpnessMonitor(**{**dict(opt=opt, model=model, loss_fn=cross_entropy, batches=DATA), **more})
    train(model, opt, DATA[:1])  # and no hook of it is left behind


if __name__ == "__main__":
    killed(sys.argv[1])
