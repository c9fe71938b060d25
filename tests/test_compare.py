"""The demo, examples/compare.py: a tiny run of everything, wrong input, and its two measures of flatness."""

from __future__ import annotations

import gzip
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

for package in ("scipy", "sklearn", "matplotlib", "rich"):
    pytest.importorskip(package)

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ("final_accuracy", "best_accuracy", "sharpness", "hessian_eigenvalue", "step_ms", "optimizer_ms")
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.fixture(scope="module")
def compare() -> Iterator[ModuleType]:
    """The script as a module: starting Python for every wrong argument would take most of the time."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import compare
    finally:
        sys.path.pop(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine threads wait for each other longer than such small steps take
    yield compare
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
    assert all(math.isfinite(row[key]) for row in record["rows"] for key in NUMBERS)
    assert all(0 < row["optimizer_ms"] < row["step_ms"] for row in record["rows"])
    assert len(record["runs"]) == len(record["rows"]) * seeds
    assert all(len(run["train_loss"]) == len(run["test_accuracy"]) == epochs for run in record["runs"])
    assert {"torch", "sharpkern", "python"} <= record["versions"].keys()
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    return record


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "compare.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "80", "OMP_NUM_THREADS": "1"},
    )


def test_script(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    done = script("--seeds", "1", "--epochs", "1", "--noise", "0", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("SGD", "SAM", "ASAM", "0 %", "compare.png"))
    assert "…" not in done.stdout  # rich cuts what does not fit
    record = check_record(out, [0], ["SGD", "SAM", "ASAM"], epochs=1, seeds=1)
    assert all(row["final_accuracy"] > 50 for row in record["rows"])


def test_script_error() -> None:
    done = script("--seeds", "0")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: argument --seeds: '0' is not a whole number from 1 up\n"


def test_fashion_mnist(compare: ModuleType, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", fashion_files())
    out = tmp_path / "out"
    options = ["--dataset", "fashion-mnist", "--data-dir", str(folder), "--train-size", "16", "--epochs", "1"]
    options += ["--seeds", "2", "--optimizers", "ASAM,sgd", "--noise", "12.5", "--out", str(out)]
    assert compare.main(options) == 0
    record = check_record(out, [12.5], ["ASAM", "SGD"], epochs=1, seeds=2)
    assert record["settings"]["train_examples"] == 16


def test_noise_is_independent_of_the_minibatches(compare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong labels are spread over the first epoch."""
    data = compare.load_data("digits", None, None, torch.device("cpu"))
    data.train_x[:, 0, 0, 0] = torch.arange(len(data.train_y))  # which example this is
    noisy = compare.with_noise(data.train_y, 40, seed=0)
    seen = []

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, timer: object) -> Tensor:
        chosen = x[:, 0, 0, 0].long()
        assert torch.equal(y, noisy[chosen])
        optimizer.step()  # without gradients; the schedule warns of a missing step
        seen.append((y != data.train_y[chosen]).float().mean().item())
        return torch.zeros(())

    monkeypatch.setattr(compare, "train_step", step)
    monkeypatch.setattr(compare, "StepTimer", lambda device: SimpleNamespace(steps=[0.0], optimizer=[0.0]))
    monkeypatch.setattr(compare, "largest_eigenvalue", lambda *_: 0.0)
    compare.train(data, compare.RECIPES["digits"], 1, 40, "SGD", seed=0, tick=lambda: None)
    assert len(seen) == 1257 // 64
    assert 0.1 < min(seen) < 0.4 < max(seen) < 0.7


def test_same_again(compare: ModuleType) -> None:
    data = compare.load_data("digits", None, 128, torch.device("cpu"))
    first, second = (
        compare.train(data, compare.RECIPES["digits"], 2, 40, "SAM", seed=3, tick=lambda: None) for _ in range(2)
    )
    assert first.train_loss == second.train_loss
    assert first.test_accuracy == second.test_accuracy


def test_default_sizes(compare: ModuleType) -> None:
    data = compare.load_data("digits", None, None, torch.device("cpu"))
    assert data.train_x.shape == (1257, 1, 8, 8)
    assert data.test_x.shape == (540, 1, 8, 8)
    assert data.test_y.bincount().min() >= 50  # stratified


@pytest.mark.parametrize("percent", [0, 40, 100])
def test_noise(compare: ModuleType, percent: float) -> None:
    labels = torch.arange(5000) % 10
    noisy = compare.with_noise(labels, percent, seed=1)
    assert (noisy != labels).sum() == 50 * percent
    assert noisy.min() == 0
    assert noisy.max() == 9
    assert torch.equal(noisy, compare.with_noise(labels, percent, seed=1))
    if percent:
        assert not torch.equal(noisy, compare.with_noise(labels, percent, seed=2))
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


def check_error(capsys: pytest.CaptureFixture[str], compare: ModuleType, arguments: list[str], culprit: str) -> None:
    try:
        code = compare.main(arguments)
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
def test_bad_argument(
    capsys: pytest.CaptureFixture[str], compare: ModuleType, tmp_path: Path, arguments: list[str], culprit: str
) -> None:
    folder, file = write(tmp_path / "data", fashion_files()), tmp_path / "file"
    file.touch()
    filled = [a.format(dir=folder, file=file) for a in arguments]
    if "--out" not in filled:
        filled += ["--out", str(tmp_path / "out")]
    check_error(capsys, compare, filled, culprit.format(file=file))


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
    compare: ModuleType,
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
    check_error(capsys, compare, arguments, culprit)


def test_missing_package(tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError('no rich', name='rich')\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.path.append({str(ROOT / 'examples')!r}); "
    done = subprocess.run([sys.executable, "-c", code + "import compare"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "error: this example needs rich: pip install rich\n"


def tiny() -> tuple[nn.Module, Tensor, Tensor]:
    """A model with 4 * 5 + 5 + 5 + 5 * 3 + 3 = 48 weights in double precision, with batch norm that has seen data."""
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


def test_largest_eigenvalue(compare: ModuleType) -> None:
    model, x, y = tiny()
    loss, w = flat_loss(model, x, y)
    dense = torch.autograd.functional.hessian(loss, w).numpy()
    assert compare.largest_eigenvalue(model, x, y) == pytest.approx(np.linalg.eigvalsh(dense)[-1], rel=1e-4)


def test_sharpness(compare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "CHUNK", 7)
    model, x, y = tiny()
    before = [t.clone() for t in model.state_dict().values()]
    loss, w = flat_loss(model, x, y)
    gradient = torch.func.grad(loss)(w)
    expected = loss(w + 0.3 * gradient / gradient.norm()) - loss(w)
    assert compare.sharpness(model, x, y, rho=0.3) == pytest.approx(expected.item(), rel=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_optimizer_that_wants_one_gradient(compare: ModuleType) -> None:
    """Some algorithms look twice only now and then: first_step says so."""

    class Plain(torch.optim.SGD):
        def first_step(self, zero_grad: bool) -> bool:
            return False

        def second_step(self, zero_grad: bool) -> None:
            self.step()
            self.zero_grad()

    model, x, y = tiny()
    twin, _, _ = tiny()
    for m, kind in ((model, Plain), (twin, torch.optim.SGD)):
        timer = compare.StepTimer(torch.device("cpu"))
        compare.train_step(m, kind(m.parameters(), lr=0.1), x, y, timer)
        assert len(timer.steps) == len(timer.optimizer) == 1
        assert 0 < timer.optimizer[0] < timer.steps[0]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
