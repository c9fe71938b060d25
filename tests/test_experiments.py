"""The comparison study: a tiny run of everything, what it counts, wrong input, its measures of flatness."""

from __future__ import annotations

import gzip
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharpkern.policy import Bernoulli

for package in ("scipy", "sklearn", "matplotlib", "rich"):
    pytest.importorskip(package)

import matplotlib.pyplot as plt  # noqa: E402

from experiments import flatness, training  # noqa: E402
from experiments.__main__ import main  # noqa: E402
from experiments.data import load_data, with_noise  # noqa: E402
from experiments.recipes import RECIPES  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
FAMILY = ["SGD", "SAM", "ASAM", "SSSAM", "AESAM", "LookSAM", "AELookSAM", "SALR"]
PICTURES = {"compare.png", "adaptive.png", "salr.png", "slice.png"}
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine threads wait for each other longer than such small steps take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def idx(array: np.ndarray, magic: bytes | None = None) -> bytes:
    """An IDX file of bytes."""
    magic = bytes((0, 0, 8, array.ndim)) if magic is None else magic
    return magic + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()


def fashion_files(train: int = 70, test: int = 30) -> dict[str, bytes]:
    """The four files, by name, one of them compressed."""
    rng = np.random.default_rng(0)
    files = {}
    for part, count in (("train", train), ("t10k", test)):
        files[f"{part}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (count, 28, 28)))
        files[f"{part}-labels-idx1-ubyte"] = idx(rng.integers(0, 10, (count,)))
    files["train-images-idx3-ubyte.gz"] = gzip.compress(files.pop("train-images-idx3-ubyte"))
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def check_record(out: Path, noise: list[float], optimizers: list[str], epochs: int, seeds: int) -> dict:
    record = json.loads((out / "compare.json").read_text())
    assert [(r["noise"], r["optimizer"]) for r in record["rows"]] == [(n, o) for n in noise for o in optimizers]
    assert all(math.isfinite(v) for row in record["rows"] for v in row.values() if isinstance(v, float))
    assert all(0 < row["optimizer_ms"] < row["step_ms"] for row in record["rows"])
    assert len(record["runs"]) == len(record["rows"]) * seeds
    for run in record["runs"]:
        curves = [run[curve] for curve in ("train_loss", "test_accuracy", "seconds", "evaluations")]
        assert all(len(curve) == epochs for curve in curves)
        assert all(sorted(set(curve)) == curve for curve in curves[2:])
    assert {"torch", "sharpkern", "python"} <= record["versions"].keys()
    return record


def check_pictures(out: Path, names: set[str]) -> None:
    """These and no others are there, of a decent size, and with something in every quarter."""
    assert {path.name for path in out.glob("*.png")} == names
    for name in names:
        pixels = plt.imread(out / name)[..., :3]
        height, width, _ = pixels.shape
        assert height > 500
        assert width > 800
        for rows in (slice(None, height // 2), slice(height // 2, None)):
            for columns in (slice(None, width // 2), slice(width // 2, None)):
                assert (pixels[rows, columns].min(-1) < 0.8).mean() > 0.002, name


def script(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command, from the root of the tree."""
    return subprocess.run(
        [sys.executable, "-m", "experiments", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1", **variables},
    )


def test_script(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    done = script("--seeds", "1", "--epochs", "2", "--noise", "0", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in (*FAMILY, "0 %", *PICTURES))
    assert "…" not in done.stdout  # rich cuts what does not fit
    assert "left out" not in done.stdout
    record = check_record(out, [0], FAMILY, epochs=2, seeds=1)
    assert all(row["final_accuracy"] > 50 for row in record["rows"])
    assert record["rows"][0]["relative_time"] == 1
    check_pictures(out, PICTURES)


SUBSETS = [
    (["SAM", "SGD"], {"compare.png", "slice.png"}),
    (["LookSAM"], {"compare.png"}),
    (["AELookSAM", "SALR"], {"compare.png", "adaptive.png", "salr.png"}),
]


@pytest.mark.parametrize(("optimizers", "pictures"), SUBSETS)
def test_subset(capsys: pytest.CaptureFixture[str], tmp_path: Path, optimizers: list[str], pictures: set[str]) -> None:
    (tmp_path / "salr.png").touch()  # of another run
    options = ["--seeds", "2", "--epochs", "1", "--noise", "0,40", "--train-size", "128", "--out", str(tmp_path)]
    assert main([*options, "--optimizers", ",".join(optimizers).lower()]) == 0
    record = check_record(tmp_path, [0, 40], optimizers, epochs=1, seeds=2)
    assert all((row["relative_time"] is None) == ("SGD" not in optimizers) for row in record["rows"])
    check_pictures(tmp_path, pictures)
    said = capsys.readouterr().out
    assert all((f"left out {name}: it needs " in said) == (name not in pictures) for name in PICTURES)


def test_script_error() -> None:
    done = script("--seeds", "0")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: argument --seeds: '0' is not a whole number from 1 up\n"


def test_fashion_mnist(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", fashion_files())
    out = tmp_path / "out"
    options = ["--dataset", "fashion-mnist", "--data-dir", str(folder), "--train-size", "16", "--epochs", "1"]
    options += ["--seeds", "2", "--optimizers", "ASAM,sgd", "--noise", "12.5", "--out", str(out)]
    assert main(options) == 0
    record = check_record(out, [12.5], ["ASAM", "SGD"], epochs=1, seeds=2)
    assert record["settings"]["train_examples"] == 16


def test_noise_is_independent_of_the_minibatches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong labels are spread over the first epoch."""
    data = load_data("digits", None, None, torch.device("cpu"))
    data.train_x[:, 0, 0, 0] = torch.arange(len(data.train_y))  # which example this is
    noisy = with_noise(data.train_y, 40, seed=0)
    seen = []

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, meter: Any) -> Tensor:
        meter.steps += 1
        chosen = x[:, 0, 0, 0].long()
        assert torch.equal(y, noisy[chosen])
        optimizer.step()  # without gradients; the schedule warns of a missing step
        seen.append((y != data.train_y[chosen]).float().mean().item())
        return torch.zeros(())

    monkeypatch.setattr(training, "train_step", step)
    monkeypatch.setattr(training, "largest_eigenpair", lambda *_: (0.0, None))
    monkeypatch.setattr(training, "loss_slice", lambda *_: [])
    training.train(data, RECIPES["digits"], 1, 40, "SGD", seed=0, tick=lambda: None)
    assert len(seen) == 1257 // 64
    assert 0.1 < min(seen) < 0.4 < max(seen) < 0.7


@pytest.mark.parametrize("name", FAMILY)
def test_same_again(name: str) -> None:
    data = load_data("digits", None, 128, torch.device("cpu"))
    first, second = (training.train(data, RECIPES["digits"], 2, 40, name, seed=3, tick=lambda: None) for _ in range(2))
    assert first.train_loss == second.train_loss
    assert first.test_accuracy == second.test_accuracy
    assert first.evaluations == second.evaluations


def test_default_sizes() -> None:
    data = load_data("digits", None, None, torch.device("cpu"))
    assert data.train_x.shape == (1257, 1, 8, 8)
    assert data.test_x.shape == (540, 1, 8, 8)
    assert data.test_y.bincount().min() >= 50  # stratified


@pytest.mark.parametrize("percent", [0, 40, 100])
def test_noise(percent: float) -> None:
    labels = torch.arange(5000) % 10
    noisy = with_noise(labels, percent, seed=1)
    assert (noisy != labels).sum() == 50 * percent
    assert noisy.min() == 0
    assert noisy.max() == 9
    assert torch.equal(noisy, with_noise(labels, percent, seed=1))
    if percent:
        assert not torch.equal(noisy, with_noise(labels, percent, seed=2))
        shifts = ((noisy - labels) % 10).bincount(minlength=10)[1:]
        assert shifts.min() > 0.8 * shifts.sum() / 9


# Wrong input: the arguments and what the one line has to name. {dir} is a good folder, {file} a file.
BAD_ARGUMENTS = [
    (["--seeds", "0"], "--seeds"),
    (["--seeds", "two"], "'two'"),
    (["--epochs", "-1"], "--epochs"),
    (["--epochs", "1.5"], "'1.5'"),
    (["--optimizers", "sgd,adamw"], "'adamw'"),
    (["--optimizers", "sgd,,sam"], "''"),
    (["--optimizers", "sam,SAM"], "'sam,SAM'"),
    (["--noise", "0,140"], "'140'"),
    (["--noise", "nan"], "'nan'"),
    (["--noise", "some"], "'some'"),
    (["--noise", "40,40.0"], "'40,40.0'"),
    (["--dataset", "imagenet"], "'imagenet'"),
    (["--device", "gpu"], "'gpu'"),
    (["--device", "meta"], "'meta'"),
    (["--device", "cuda:99"], "'cuda:99'"),
    pytest.param(["--device", "cuda"], "'cuda'", marks=NO_CUDA),
    (["--train-size", "1"], "--train-size"),
    (["--train-size", "5000"], "5000"),
    (["--unknown"], "--unknown"),
    (["--data-dir", "{dir}"], "--data-dir"),
    (["--dataset", "fashion-mnist"], "--data-dir"),
    (["--dataset", "fashion-mnist", "--data-dir", "/no/such/folder"], "/no/such/folder"),
    (["--dataset", "fashion-mnist", "--data-dir", "{file}"], "{file}"),
    (["--dataset", "fashion-mnist", "--data-dir", "{dir}", "--train-size", "71"], "71"),
    (["--out", "{file}"], "{file}"),
    (["--out", "{file}/below"], "{file}"),
]


def check_error(capsys: pytest.CaptureFixture[str], arguments: list[str], culprit: str) -> None:
    try:
        code = main(arguments)
    except SystemExit as e:
        code = e.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    assert culprit in captured.err


@pytest.mark.parametrize(("arguments", "culprit"), BAD_ARGUMENTS)
def test_bad_argument(capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], culprit: str) -> None:
    folder, file = write(tmp_path / "data", fashion_files()), tmp_path / "file"
    file.touch()
    filled = [a.format(dir=folder, file=file) for a in arguments]
    if "--out" not in filled:
        filled += ["--out", str(tmp_path / "out")]
    check_error(capsys, filled, culprit.format(file=file))


IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
ZEROS = np.zeros((30, 28, 28))

# A folder with one wrong file: its name, its content (None: not there), what the line has to say.
BAD_FILES = [
    (IMAGES, None, IMAGES),
    (IMAGES, b"", IMAGES),
    (IMAGES, idx(ZEROS, magic=b"\0\0\x0d\3"), IMAGES),
    (IMAGES, idx(np.zeros(30)), IMAGES),
    (IMAGES, idx(ZEROS)[:-1], IMAGES),
    (IMAGES, idx(ZEROS) + b"\0", IMAGES),
    (IMAGES, idx(np.zeros((30, 32, 32))), "(32, 32)"),
    (IMAGES, idx(np.zeros((0, 28, 28))), IMAGES),
    (IMAGES, idx(np.zeros((29, 28, 28))), "29 t10k images, but 30 t10k labels"),
    (LABELS, idx(np.full(30, 10)), "a t10k label is 10"),
    (LABELS, idx(np.zeros(30), magic=b"PK\3\4"), LABELS),
    ("train-images-idx3-ubyte.gz", b"not compressed", "train-images-idx3-ubyte.gz"),
    ("train-images-idx3-ubyte.gz", gzip.compress(idx(ZEROS))[:-9], "train-images-idx3-ubyte.gz"),
]


@pytest.mark.parametrize(("name", "content", "culprit"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_file(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str,
    content: bytes | None,
    culprit: str,
) -> None:
    files = fashion_files()
    if content is None:
        del files[name]
    else:
        files[name] = content
    folder = write(tmp_path / "data", files)
    arguments = ["--dataset", "fashion-mnist", "--data-dir", str(folder), "--out", str(tmp_path / "out")]
    check_error(capsys, arguments, culprit)


def test_missing_package(tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError('no rich', name='rich')\n")
    done = script(PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == "error: the study needs rich: pip install rich\n"


def tiny() -> tuple[nn.Module, Tensor, Tensor]:
    """A model of 53 weights in double precision, with batch norm that has seen data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.randint(0, 3, (40,))
    model(x)
    return model, x, y


def flat_loss(model: nn.Module, x: Tensor, y: Tensor):
    """The loss as a function of one vector of all weights, in evaluation mode; and that vector."""
    shapes = [(name, p.shape, p.numel()) for name, p in model.named_parameters()]

    def loss(w: Tensor) -> Tensor:
        parts = w.split([n for _, _, n in shapes])
        weights = {name: part.view(shape) for (name, shape, _), part in zip(shapes, parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model.eval(), weights, (x,)), y)

    return loss, torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_largest_eigenpair() -> None:
    model, x, y = tiny()
    loss, w = flat_loss(model, x, y)
    dense = torch.autograd.functional.hessian(loss, w)
    value, vector = flatness.largest_eigenpair(model, x, y)
    assert value == pytest.approx(np.linalg.eigvalsh(dense.numpy())[-1], rel=1e-4)
    assert vector.norm().item() == pytest.approx(1)
    assert (dense @ vector - value * vector).norm() < 1e-2 * value


def test_loss_slice() -> None:
    model, x, y = tiny()
    before = [t.clone() for t in model.state_dict().values()]
    loss, w = flat_loss(model, x, y)
    direction = F.normalize(torch.randn(len(w), dtype=torch.float64), dim=0)
    got = flatness.loss_slice(model, x, y, direction, radius=0.5)
    expected = [loss(w + t * direction).item() for t in np.linspace(-0.5, 0.5, len(got))]
    assert got == pytest.approx(expected if expected[0] < expected[-1] else expected[::-1], rel=1e-9)
    assert got == pytest.approx(flatness.loss_slice(model, x, y, -direction, radius=0.5), rel=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


def test_sharpness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flatness, "CHUNK", 7)
    model, x, y = tiny()
    before = [t.clone() for t in model.state_dict().values()]
    loss, w = flat_loss(model, x, y)
    gradient = torch.func.grad(loss)(w)
    expected = loss(w + 0.3 * gradient / gradient.norm()) - loss(w)
    assert flatness.sharpness(model, x, y, rho=0.3) == pytest.approx(expected.item(), rel=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())


# How many second passes there are, and how many gradients of other kinds, in so many steps.
COUNTS = {
    "SGD": lambda steps: (0, steps),
    "SAM": lambda steps: (steps, steps),
    "ASAM": lambda steps: (steps, steps),
    "SSSAM": lambda steps: (sum(map(Bernoulli(p=0.5, seed=0).second_pass, range(steps))), steps),
    "AESAM": lambda steps: (None, steps),
    "LookSAM": lambda steps: (math.ceil(steps / 5), steps),
    "AELookSAM": lambda steps: (None, steps),
    # Every other step measures: 5 gradients up and 5 down, besides the one it steps with.
    "SALR": lambda steps: (0, steps + 10 * math.ceil(steps / 2)),
}


@pytest.mark.parametrize("name", FAMILY)
def test_counts(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Counted is what reached the model, forward and backward, and what the optimizer says of itself."""
    forward, backward = [], []
    recipe = RECIPES["digits"]

    def watched() -> nn.Module:
        model = recipe.model()
        model.register_forward_hook(lambda module, *_: forward.append(0) if module.training else None)
        next(model.parameters()).register_post_accumulate_grad_hook(
            lambda _: backward.append(0) if model.training else None
        )
        return model

    data = load_data("digits", None, 5 * 64 + 9, torch.device("cpu"))
    steps = 3 * 5
    run = training.train(data, replace(recipe, model=watched), 3, 0, name, seed=0, tick=lambda: None)
    second, other = COUNTS[name](steps)
    if second is None:  # from what is drawn in the picture
        trace = run.trace
        fired = [n * n >= threshold for n, threshold in zip(trace["grad_norm"], trace["threshold"], strict=True)]
        second = sum(fired)
        assert 0 < second < steps
        assert np.diff(trace["second_passes"], prepend=0).tolist() == fired
    assert len(forward) == len(backward) == run.evaluations[-1] == second + other
    assert run.evaluations_per_step == (second + other) / steps
    assert run.second_pass_share == pytest.approx(100 * second / steps)
    assert run.step_ms * steps == pytest.approx(1e3 * run.seconds[-1])
    assert run.epoch_seconds * 3 == pytest.approx(run.seconds[-1])


def test_salr_trace() -> None:
    """lr_scale is the sharpness over the median of those so far, one measurement every second step."""
    data = load_data("digits", None, 5 * 64, torch.device("cpu"))
    trace = training.train(data, RECIPES["digits"], 2, 0, "SALR", seed=0, tick=lambda: None).trace
    measured = trace["sharpness"][::2]
    assert trace["sharpness"][1::2] == measured
    expected = [s / np.median(measured[: i + 1]) for i, s in enumerate(measured)]
    assert trace["lr_scale"][::2] == pytest.approx(expected, rel=1e-4)
    assert trace["lr"] == pytest.approx([0.05] * 5 + [0.025] * 5)


def test_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations are part of a step and not of the optimizer's time."""
    now = iter([10.0, 11.0, 13.0, 13.5, 16.5, 17.0])
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(now))
    meter = training.Meter(torch.device("cpu"))
    with meter.step():
        for _ in range(2):
            with meter.evaluation():
                pass
    assert (meter.steps, meter.evaluations, meter.seconds, meter.optimizer_seconds) == (1, 2, 7.0, 2.0)
