"""Compare SGD, SAM and ASAM: accuracy with clean and noisy labels, flatness of the minimum, cost of a step.

    python examples/compare.py
    python examples/compare.py --dataset fashion-mnist --data-dir DIR --device cuda --seeds 3

Every optimizer gets the same data, initial weights, wrong labels, order of minibatches, learning rate and
schedule; only the seed changes these. Nothing is tuned on the test set (see RECIPES for the radii), and the accuracy
that counts is that of the last epoch.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import platform
import statistics
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

try:
    import matplotlib
    import numpy as np
    import rich.box
    import torch
    import torch.nn.functional as F
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
    from scipy.sparse.linalg import LinearOperator, eigsh
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torch import Tensor, nn

    import sharpkern as sk
except ModuleNotFoundError as missing:
    _package = (missing.name or "").partition(".")[0]
    _install = {"sklearn": "scikit-learn", "sharpkern": "."}.get(_package, _package)
    print(f"error: this example needs {_package}: pip install {_install}", file=sys.stderr)
    raise SystemExit(2) from None

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CLASSES = 10
SHARPNESS_RHO = 0.05  # the same ball for everyone, whatever radius the optimizer trained with
CHUNK = 2000  # examples a forward pass when the whole set is wanted


class Failure(Exception):
    """Why there is no comparison, in one line: mostly something the user gave that cannot be used."""


# Data.


@dataclass
class Data:
    """A data set, in memory and on the device."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits() -> Data:
    """The 8x8 digits that come with scikit-learn: 1257 to train on, 540 to test, always the same ones."""
    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images.astype(np.float32).reshape(-1, 1, 8, 8), labels, test_size=540, stratify=labels, random_state=0
    )
    return Data(*(torch.from_numpy(a) for a in (train_x, train_y, test_x, test_y)))


def read_idx(folder: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """The bytes of ``folder/name`` or ``folder/name.gz``, an IDX file of n items of a given shape."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise Failure(f"--data-dir {folder}: there is no {name} and no {name}.gz")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as e:
        raise Failure(f"{path} cannot be read: {e}") from None
    # Two zeros, the type (8 is unsigned byte), the number of dimensions, then their sizes in big-endian order.
    header = 4 + 4 * (1 + len(shape))
    if len(raw) < header or raw[:4] != bytes((0, 0, 8, 1 + len(shape))):
        raise Failure(f"{path} is not an IDX file of bytes in {1 + len(shape)} dimensions")
    sizes = struct.unpack(f">{1 + len(shape)}I", raw[4:header])
    if sizes[1:] != shape or sizes[0] == 0:
        raise Failure(f"{path} holds items of shape {sizes[1:]}, {sizes[0]} of them; expected shape {shape}")
    if len(raw) - header != math.prod(sizes):
        raise Failure(f"{path} holds {len(raw) - header} bytes of data; its header says {math.prod(sizes)}")
    return torch.frombuffer(bytearray(raw[header:]), dtype=torch.uint8).reshape(sizes)


def fashion_mnist(folder: Path) -> Data:
    """Fashion-MNIST, or anything else in the same four files."""
    if not folder.is_dir():
        raise Failure(f"--data-dir {folder}: there is no such folder")
    tensors = []
    for part in ("train", "t10k"):
        images = read_idx(folder, f"{part}-images-idx3-ubyte", (28, 28))
        labels = read_idx(folder, f"{part}-labels-idx1-ubyte", ())
        if len(images) != len(labels):
            raise Failure(f"--data-dir {folder}: {len(images)} {part} images, but {len(labels)} {part} labels")
        if int(labels.max()) >= CLASSES:
            raise Failure(f"--data-dir {folder}: a {part} label is {int(labels.max())}; the largest allowed is 9")
        tensors += [images.float().unsqueeze(1), labels.long()]
    return Data(*tensors)


def load_data(dataset: str, folder: Path | None, train_size: int | None, device: torch.device) -> Data:
    """The data set, cut to ``train_size``, standardized and moved to the device."""
    data = digits() if folder is None else fashion_mnist(folder)
    available = len(data.train_y)
    if train_size is not None:
        if train_size > available:
            raise Failure(f"--train-size {train_size}: {dataset} has {available} training examples")
        chosen = torch.randperm(available, generator=torch.Generator().manual_seed(0))[:train_size]
        data.train_x, data.train_y = data.train_x[chosen], data.train_y[chosen]
    mean, std = data.train_x.mean(), data.train_x.std().clamp_min(1e-6)
    return Data(
        ((data.train_x - mean) / std).to(device),
        data.train_y.to(device),
        ((data.test_x - mean) / std).to(device),
        data.test_y.to(device),
    )


def with_noise(labels: Tensor, percent: float, seed: int) -> Tensor:
    """Symmetric noise: this share of the labels, drawn at random, becomes another class, all equally likely."""
    # Seeds of its own: the same draw as that of the minibatches would bring all wrong labels first.
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    count = round(len(labels) * percent / 100)
    wrong = torch.randperm(len(labels), generator=generator)[:count].to(labels.device)
    shift = torch.randint(1, CLASSES, (count,), generator=generator).to(labels.device)
    noisy = labels.clone()
    noisy[wrong] = (labels[wrong] + shift) % CLASSES
    return noisy


# Models.


def mlp() -> nn.Module:
    """For 8x8 images."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 256, bias=False),
        nn.BatchNorm1d(256),
        nn.ReLU(),
        nn.Linear(256, 256, bias=False),
        nn.BatchNorm1d(256),
        nn.ReLU(),
        nn.Linear(256, CLASSES),
    )


def convnet() -> nn.Module:
    """For 28x28 images."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, CLASSES),
    )


@dataclass(frozen=True)
class Recipe:
    """How a data set is trained on, by every optimizer alike."""

    model: Callable[[], nn.Module]
    epochs: int
    batch_size: int
    sgd: dict[str, float]
    rho: dict[str, float]
    threads: int | None  # None: torch's default
    hessian_examples: int  # the first of the training set; the graph of their loss is kept in memory


SGD_OPTIONS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}

RECIPES = {
    # Radii: of 0.05, 0.1, 0.2, 0.5, 0.7, 1, 1.5 for SAM and 0.5, 1, 2, 4, 6, 8, 12 for ASAM those with the best
    # accuracy under 40 % noise that cost none on clean labels, on 357 images held out of the training set, three
    # other seeds. The papers' defaults are for larger nets; on this one they change little.
    # One thread: the matrices are too small to share, and threads that wait for each other take longer.
    "digits": Recipe(mlp, 50, 64, SGD_OPTIONS, rho={"SAM": 0.7, "ASAM": 6.0}, threads=1, hessian_examples=2000),
    # The papers' defaults.
    "fashion-mnist": Recipe(
        convnet, 15, 128, SGD_OPTIONS, rho={"SAM": 0.05, "ASAM": 0.5}, threads=None, hessian_examples=500
    ),
}

# Optimizers. A factory gets the model and the recipe.

Factory = Callable[[nn.Module, Recipe], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Factory] = {
    "SGD": lambda model, recipe: torch.optim.SGD(model.parameters(), **recipe.sgd),
    "SAM": lambda model, recipe: sk.SAM(
        model.parameters(), torch.optim.SGD, rho=recipe.rho["SAM"], model=model, **recipe.sgd
    ),
    # ASAM scales the tensors that are called weight: it has to know the names.
    "ASAM": lambda model, recipe: sk.ASAM(
        model.named_parameters(), torch.optim.SGD, rho=recipe.rho["ASAM"], eta=0.01, model=model, **recipe.sgd
    ),
}


# Training.


class StepTimer:
    """Milliseconds of every step, and of the optimizer's part of it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.steps: list[float] = []
        self.optimizer: list[float] = []

    def _now(self) -> float:
        # A GPU works on after the call returns: without waiting, one part would be billed for another.
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() * 1e3

    @contextmanager
    def step(self) -> Iterator[None]:
        self.optimizer.append(0.0)
        begin = self._now()
        yield
        self.steps.append(self._now() - begin)

    @contextmanager
    def optimizing(self) -> Iterator[None]:
        begin = self._now()
        yield
        self.optimizer[-1] += self._now() - begin


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, timer: StepTimer) -> Tensor:
    """One step on a minibatch, by hand so that the optimizer's part can be timed. Returns the first pass's loss."""

    def forward_backward() -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    with timer.step():
        loss = forward_backward()
        if hasattr(optimizer, "first_step"):
            with timer.optimizing():
                # False from an optimizer that wants no second gradient this time; this one is kept then.
                again = optimizer.first_step(zero_grad=True)
            if again:
                forward_backward()
            with timer.optimizing():
                optimizer.second_step(zero_grad=True)
        else:
            with timer.optimizing():
                optimizer.step()
                optimizer.zero_grad()
    return loss


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of the examples that the model gets right, in evaluation mode."""
    model.eval()
    right = sum((model(a).argmax(1) == b).sum() for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True))
    return 100.0 * float(right) / len(y)


@dataclass
class Run:
    """One training and what came of it. Curves have one value an epoch."""

    noise: float
    optimizer: str
    seed: int
    train_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    final_accuracy: float = math.nan
    best_accuracy: float = math.nan
    sharpness: float = math.nan
    hessian_eigenvalue: float = math.nan
    step_ms: float = math.nan
    optimizer_ms: float = math.nan


def train(
    data: Data, recipe: Recipe, epochs: int, noise: float, optimizer_name: str, seed: int, tick: Callable[[], None]
) -> Run:
    """Train a fresh model and measure it. Optimizers with the same seed and noise get the same of everything."""
    run = Run(noise, optimizer_name, seed)
    x, y = data.train_x, with_noise(data.train_y, noise, seed)
    torch.manual_seed(seed)
    model = recipe.model().to(x.device)
    optimizer = OPTIMIZERS[optimizer_name](model, recipe)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    shuffle = torch.Generator().manual_seed(seed)
    batch_size = min(recipe.batch_size, len(y))
    timer = StepTimer(x.device)
    for _ in range(epochs):
        model.train()
        batches = torch.randperm(len(y), generator=shuffle).to(x.device).split(batch_size)
        # Batch norm does badly on a short last batch.
        full = (batch for batch in batches if len(batch) == batch_size)
        losses = [train_step(model, optimizer, x[batch], y[batch], timer) for batch in full]
        schedule.step()
        run.train_loss.append(float(torch.stack(losses).mean()))
        if not math.isfinite(run.train_loss[-1]):
            raise Failure(f"{optimizer_name} diverged with seed {seed} and {noise:g} % label noise")
        run.test_accuracy.append(accuracy(model, data.test_x, data.test_y))
        tick()
    run.final_accuracy = run.test_accuracy[-1]
    run.best_accuracy = max(run.test_accuracy)
    run.sharpness = sharpness(model, x, y)
    run.hessian_eigenvalue = largest_eigenvalue(model, x[: recipe.hessian_examples], y[: recipe.hessian_examples])
    run.step_ms = statistics.median(timer.steps)
    run.optimizer_ms = statistics.median(timer.optimizer)
    return run


# Flatness. Both measures are taken with batch norm in evaluation mode: the loss is a function of the weights alone.


def mean_loss(model: nn.Module, x: Tensor, y: Tensor, backward: bool = False) -> float:
    """Mean loss over all examples; with ``backward`` its gradient is added to that of the parameters."""
    total = 0.0
    with torch.set_grad_enabled(backward):
        for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            loss = F.cross_entropy(model(a), b, reduction="sum") / len(y)
            if backward:
                loss.backward()
            total += loss.item()
    return total


def sharpness(model: nn.Module, x: Tensor, y: Tensor, rho: float = SHARPNESS_RHO) -> float:
    """L(w + rho g / |g|) - L(w), where L is the mean loss over all examples and g its gradient at w."""
    model.eval()
    model.zero_grad()
    loss = mean_loss(model, x, y, backward=True)
    params = [p for p in model.parameters() if p.grad is not None]
    weights = [p.detach().clone() for p in params]
    grads = [p.grad for p in params]
    norm = torch.nn.utils.get_total_norm(grads)
    with torch.no_grad():
        torch._foreach_add_(params, torch._foreach_mul(grads, rho / (norm.item() + 1e-12)))
        perturbed = mean_loss(model, x, y)
        torch._foreach_copy_(params, weights)
    model.zero_grad()
    return perturbed - loss


def largest_eigenvalue(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Largest eigenvalue of the Hessian of the mean loss, by Lanczos on products with the Hessian."""
    model.eval()
    params = list(model.parameters())
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), params, create_graph=True)
    gradient = torch.cat([g.reshape(-1) for g in grads])

    def product(vector: np.ndarray) -> np.ndarray:
        v = torch.from_numpy(vector.reshape(-1)).to(gradient)
        columns = torch.autograd.grad(gradient, params, grad_outputs=v, retain_graph=True)
        return torch.cat([c.reshape(-1) for c in columns]).double().cpu().numpy()

    n = gradient.numel()
    start = np.random.default_rng(0).standard_normal(n)
    hessian = LinearOperator((n, n), matvec=product, dtype=np.float64)
    # The model is float32: digits beyond the tolerance would be noise.
    return float(eigsh(hessian, k=1, which="LA", v0=start, tol=1e-4, return_eigenvectors=False)[0])


# Results.

MEASURES = ("final_accuracy", "best_accuracy", "sharpness", "hessian_eigenvalue", "step_ms", "optimizer_ms")


def summarize(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row for every noise level and optimizer: mean and sample standard deviation over the seeds."""
    groups: dict[tuple[float, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.noise, run.optimizer), []).append(run)
    rows = []
    for (noise, optimizer), group in groups.items():
        row: dict[str, Any] = {"noise": noise, "optimizer": optimizer, "seeds": len(group)}
        for measure in MEASURES:
            values = [getattr(run, measure) for run in group]
            row[measure] = statistics.fmean(values)
            row[f"{measure}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
        # Another program may take the processor for a while: the median seed is less impressed than the mean.
        for measure in ("step_ms", "optimizer_ms"):
            row[measure] = statistics.median(getattr(run, measure) for run in group)
        rows.append(row)
    return rows


def make_table(rows: Sequence[dict[str, Any]], title: str, caption: str) -> Table:
    """The rows for reading; narrow enough for 80 columns."""
    table = Table(title=title, caption=caption, box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    for heading in ("label\nnoise", "\noptimizer"):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "test accuracy\nat the end, %",
        "best\nepoch",
        "\nsharpness",
        "Hessian\nlargest",
        "ms a\nstep",
        "of these\noptimizer",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        spread = f" ± {row['final_accuracy_std']:.2f}" if row["seeds"] > 1 else ""
        table.add_row(
            f"{row['noise']:g} %",
            row["optimizer"],
            f"{row['final_accuracy']:.2f}{spread}",
            f"{row['best_accuracy']:.2f}",
            f"{row['sharpness']:#.3g}",
            f"{row['hessian_eigenvalue']:#.3g}",
            f"{row['step_ms']:.2f}",
            f"{row['optimizer_ms']:.2f}",
            end_section=i + 1 < len(rows) and rows[i + 1]["noise"] != row["noise"],
        )
    return table


def plot(runs: Sequence[Run], title: str, path: Path) -> None:
    """Test accuracy above, training loss below, one column a noise level; mean and spread over the seeds."""
    levels = list(dict.fromkeys(run.noise for run in runs))
    names = list(dict.fromkeys(run.optimizer for run in runs))
    panels = (("test_accuracy", "test accuracy (%)"), ("train_loss", "training loss (nats)"))
    figure, axes = plt.subplots(2, len(levels), figsize=(1.5 + 4.5 * len(levels), 7), sharex=True, squeeze=False)
    for column, noise in enumerate(levels):
        for row, (measure, label) in enumerate(panels):
            axis = axes[row][column]
            shown = []
            for i, name in enumerate(names):
                curves = np.array([getattr(r, measure) for r in runs if r.noise == noise and r.optimizer == name])
                epochs = np.arange(1, curves.shape[1] + 1)
                mean = curves.mean(0)
                std = curves.std(0, ddof=1) if len(curves) > 1 else np.zeros_like(mean)
                axis.plot(epochs, mean, color=f"C{i}", label=name, marker="o" if len(epochs) == 1 else None)
                axis.fill_between(epochs, mean - std, mean + std, color=f"C{i}", alpha=0.2, linewidth=0)
                settled = epochs > len(epochs) // 15
                shown += [*(mean - std)[settled], *(mean + std)]
            if measure == "test_accuracy":
                axis.set_title(f"{noise:g} % of the training labels wrong" if noise else "clean labels")
                # The first epochs may be far below: they would flatten the differences that matter.
                low, high = min(shown), min(max(shown), 100.0)
                margin = 0.05 * (high - low) + 0.1
                axis.set_ylim(low - margin, high + margin)
            else:
                axis.set_xlabel("epoch")
                axis.set_ylim(bottom=0)
            if column == 0:
                axis.set_ylabel(label)
            axis.grid(alpha=0.3)
    axes[0][0].legend(loc="lower right")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


# Command line.


class Parser(argparse.ArgumentParser):
    """Errors take one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}\n")


def positive(text: str) -> int:
    """An integer from 1 up."""
    number = int(text) if text.strip().isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return number


def unique(items: list[Any], text: str) -> list[Any]:
    """The items, when none is there twice."""
    if len(set(items)) < len(items):
        raise argparse.ArgumentTypeError(f"{text!r} names one thing twice")
    return items


def optimizer_names(text: str) -> list[str]:
    """Names of optimizers, in any case, with commas between."""
    known = {name.lower(): name for name in OPTIMIZERS}
    names = [part.strip().lower() for part in text.split(",")]
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is unknown; there are {', '.join(known)}")
    return unique([known[name] for name in names], text)


def percentages(text: str) -> list[float]:
    """Numbers from 0 to 100 with commas between."""
    levels = []
    for part in text.split(","):
        try:
            level = float(part)
        except ValueError:
            level = math.nan
        if not 0 <= level <= 100:
            raise argparse.ArgumentTypeError(f"{part!r} is not a percentage from 0 to 100")
        levels.append(level)
    return unique(levels, text)


def usable_device(text: str) -> torch.device:
    """A processor or GPU that torch has here."""
    try:
        device = torch.device(text)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda devices are supported")
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:  # torch asserts that it was built with CUDA
        reason = (str(e).splitlines() or ["unknown reason"])[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from None
    return device


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=list(RECIPES), default="digits", help="default: digits")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="folder of Fashion-MNIST's four files, .gz or not")
    parser.add_argument("--device", type=usable_device, default="cpu", help="cpu, cuda, cuda:0, ...; default: cpu")
    parser.add_argument("--seeds", type=positive, default=5, metavar="N", help="runs of each kind; default: 5")
    parser.add_argument(
        "--optimizers",
        type=optimizer_names,
        default=list(OPTIMIZERS),
        metavar="NAMES",
        help=f"with commas between; default: {','.join(OPTIMIZERS).lower()}",
    )
    parser.add_argument(
        "--noise",
        type=percentages,
        default=[0.0, 40.0],
        metavar="PERCENT",
        help="shares of wrong training labels, with commas between; default: 0,40",
    )
    epochs = ", ".join(f"{recipe.epochs} on {name}" for name, recipe in RECIPES.items())
    parser.add_argument("--epochs", type=positive, metavar="N", help=f"default: {epochs}")
    parser.add_argument("--train-size", type=positive, metavar="N", help="train on so many examples only")
    parser.add_argument("--threads", type=positive, metavar="N", help="default: 1 on digits, torch's on others")
    parser.add_argument(
        "--out", type=Path, default=Path("results/compare"), metavar="DIR", help="default: results/compare"
    )
    return parser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.dataset == "digits" and options.data_dir is not None:
        parser.error("--data-dir goes with --dataset fashion-mnist: digits come with scikit-learn")
    if options.dataset == "fashion-mnist" and options.data_dir is None:
        parser.error("--dataset fashion-mnist needs --data-dir, the folder of its four files")
    if options.train_size == 1:
        parser.error("--train-size 1: batch norm needs two examples")
    if options.epochs is None:
        options.epochs = RECIPES[options.dataset].epochs
    return options


def compare(options: argparse.Namespace) -> None:
    """Load, train, print and write."""
    begin = time.perf_counter()
    try:  # before the training, not after it
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise Failure(f"--out {options.out} cannot be created: {e.strerror}") from None
    data = load_data(options.dataset, options.data_dir, options.train_size, options.device)
    recipe = RECIPES[options.dataset]
    if threads := options.threads or recipe.threads:
        torch.set_num_threads(threads)

    # Seeds in the outer loop, optimizers in the inner: a busy spell of the machine hits all of them alike.
    plan = [
        (noise, name, seed) for seed in range(options.seeds) for noise in options.noise for name in options.optimizers
    ]
    runs = []
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("epochs"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description:24}"), *columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(plan) * options.epochs)
        for noise, name, seed in plan:
            progress.update(task, description=f"seed {seed}, noise {noise:g} %, {name}")
            runs.append(train(data, recipe, options.epochs, noise, name, seed, tick=lambda: progress.advance(task)))
    runs.sort(key=lambda run: options.noise.index(run.noise))  # stable: within a level the order stays

    rows = summarize(runs)
    seconds = time.perf_counter() - begin
    weights = sum(p.numel() for p in recipe.model().parameters())
    title = f"{options.dataset}: {len(data.train_y)} training and {len(data.test_y)} test images"
    curved = min(recipe.hessian_examples, len(data.train_y))
    part = f" (its first {curved} images for the latter)" if curved < len(data.train_y) else ""
    caption = (
        f"{recipe.model.__name__} of {weights} weights, {options.epochs} epochs, seeds: {options.seeds}, "
        f"device {options.device}; {seconds:.0f} s in all.\n"
        "Accuracy: mean and standard deviation over the seeds; the best epoch is picked by the test set.\n"
        f"Radius of SAM {recipe.rho['SAM']:g}, of ASAM {recipe.rho['ASAM']:g}. "
        f"Sharpness: L(w + rho g/|g|) - L(w), rho = {SHARPNESS_RHO}. It and the Hessian's largest eigenvalue are of "
        f"the loss on the training set{part}, with the labels trained on, batch norm in evaluation mode; means.\n"
        "Times: medians over the steps, then over the seeds."
    )
    Console().print(make_table(rows, title, caption))

    record = {
        "settings": {
            "dataset": options.dataset,
            "device": str(options.device),
            "device_name": torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else None,
            "threads": torch.get_num_threads(),
            "seeds": options.seeds,
            "optimizers": options.optimizers,
            "noise_percent": options.noise,
            "epochs": options.epochs,
            "batch_size": recipe.batch_size,
            "train_examples": len(data.train_y),
            "test_examples": len(data.test_y),
            "model": recipe.model.__name__,
            "weights": weights,
            "sgd": recipe.sgd,
            "rho": recipe.rho,
            "schedule": "cosine to 0, once an epoch",
            "sharpness_rho": SHARPNESS_RHO,
            "hessian_examples": curved,
        },
        "versions": {
            "sharpkern": sk.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "build": sk.build_info(),
        "seconds": seconds,
        "rows": rows,
        "runs": [asdict(run) for run in runs],
    }
    spread = f"mean and standard deviation of {options.seeds} seeds" if options.seeds > 1 else "one seed"
    try:
        (options.out / "compare.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        plot(runs, f"{title}; {spread}", options.out / "compare.png")
    except OSError as e:
        raise Failure(f"{e.filename} cannot be written: {e.strerror}") from None
    print(f"wrote {options.out / 'compare.png'} and {options.out / 'compare.json'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 2 for wrong input."""
    options = parse_arguments(argv)
    try:
        compare(options)
    except Failure as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
