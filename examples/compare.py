"""Compare the family with SGD: accuracy with clean and noisy labels, flatness of the minimum, what a step costs.

    python examples/compare.py
    python examples/compare.py --optimizers sgd,sam,aesam --seeds 5
    python examples/compare.py --dataset fashion-mnist --data-dir DIR \\
        --train-size 10000 --epochs 8 --noise 0 --threads 1

The first one takes 3 minutes, the last one, with a convolutional net, about 25.

Every optimizer gets the same data, initial weights, wrong labels, order of minibatches, learning rate and
schedule; only the seed changes these. Nothing is tuned on the test set (see RECIPES for the radii), and the accuracy
that counts is that of the last epoch. Besides the table there are pictures: accuracy against time and against
gradient evaluations, when AE-SAM looks twice, how SALR moves the learning rate, and the loss around SGD's and SAM's
end points.
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
from matplotlib.figure import Figure

CLASSES = 10
SHARPNESS_RHO = 0.05  # the same ball for everyone, whatever radius the optimizer trained with
CHUNK = 500  # examples a pass when the whole set is wanted; more do not fit a CPU's caches


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
    rho: dict[str, float]  # of SAM and of ASAM; the others of the family take SAM's
    threads: int | None  # None: torch's default
    hessian_examples: int | None  # the first of the training set, None: all; the graph of their loss stays in memory
    slice_radius: float  # how far the loss is followed along the eigenvector, in units of the weights

    def steps(self, examples: int, epochs: int) -> int:
        """Steps of a training on so many examples: batch norm does badly on a short last batch, it is left out."""
        return epochs * (examples // min(self.batch_size, examples))


SGD_OPTIONS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}

RECIPES = {
    # Radii: of 0.05, 0.1, 0.2, 0.5, 0.7, 1, 1.5 for SAM and 0.5, 1, 2, 4, 6, 8, 12 for ASAM those with the best
    # accuracy under 40 % noise that cost none on clean labels, on 357 images held out of the training set, three
    # other seeds. The papers' defaults are for larger nets; on this one they change little.
    # One thread: the matrices are too small to share, and threads that wait for each other take longer.
    "digits": Recipe(
        mlp,
        50,
        64,
        SGD_OPTIONS,
        rho={"SAM": 0.7, "ASAM": 6.0},
        threads=1,
        hessian_examples=None,
        slice_radius=0.5,
    ),
    # The papers' defaults.
    "fashion-mnist": Recipe(
        convnet,
        15,
        128,
        SGD_OPTIONS,
        rho={"SAM": 0.05, "ASAM": 0.5},
        threads=None,
        hessian_examples=500,
        slice_radius=0.5,
    ),
}

# Optimizers: what each takes besides the base optimizer, given the recipe, the number of steps and the seed.
# Radii apart these are the papers' values, which are the defaults, too.

Options = Callable[[Recipe, int, int], dict[str, Any]]

OPTIMIZERS: dict[str, Options] = {
    "SGD": lambda recipe, steps, seed: {},
    "SAM": lambda recipe, steps, seed: {"rho": recipe.rho["SAM"]},
    "ASAM": lambda recipe, steps, seed: {"rho": recipe.rho["ASAM"], "eta": 0.01},
    "SSSAM": lambda recipe, steps, seed: {"rho": recipe.rho["SAM"], "p": 0.5, "seed": seed},
    "AESAM": lambda recipe, steps, seed: {"rho": recipe.rho["SAM"], "total_steps": steps},
    # alpha = 0.7 suits vision transformers. The reused direction is added to the gradient, at alpha times its length:
    # with SGD on nets as small as these that is much, and 0.2 is steadier.
    "LookSAM": lambda recipe, steps, seed: {"rho": recipe.rho["SAM"], "k": 5, "alpha": 0.2},
    "AELookSAM": lambda recipe, steps, seed: {"rho": recipe.rho["SAM"], "total_steps": steps, "alpha": 0.2},
    "SALR": lambda recipe, steps, seed: {"n_ascent": 5, "n_descent": 5, "step_size": 0.002, "every": 2},
}


def make_optimizer(name: str, model: nn.Module, recipe: Recipe, steps: int, seed: int) -> torch.optim.Optimizer:
    if name == "SGD":
        return torch.optim.SGD(model.parameters(), **recipe.sgd)
    # With names: ASAM scales the tensors that are called weight.
    return getattr(sk, name)(
        model.named_parameters(),
        torch.optim.SGD,
        model=model,
        **OPTIMIZERS[name](recipe, steps, seed),
        **recipe.sgd,
    )


# Training.


class Meter:
    """Counts steps and gradient evaluations, and takes the time of steps and of the optimizer's part in them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.steps = 0
        self.evaluations = 0  # a forward and a backward pass each
        self.seconds = 0.0
        self.optimizer_seconds = 0.0

    def _now(self) -> float:
        # A GPU works on after the call returns: without waiting, one part would be billed for another.
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def step(self) -> Iterator[None]:
        begin = self._now()
        yield
        seconds = self._now() - begin
        self.steps += 1
        self.seconds += seconds
        self.optimizer_seconds += seconds

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Within a step: what the optimizer calls, but is not its own work."""
        begin = self._now()
        yield
        self.evaluations += 1
        self.optimizer_seconds -= self._now() - begin


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, meter: Meter) -> Tensor:
    """One step on a minibatch. Returns the loss of its first pass."""

    def closure() -> Tensor:
        with meter.evaluation():
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss.detach()

    with meter.step():
        optimizer.zero_grad()  # torch's optimizers do not do it before they call the closure
        return optimizer.step(closure)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of the examples that the model gets right, in evaluation mode."""
    model.eval()
    right = sum((model(a).argmax(1) == b).sum() for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True))
    return 100.0 * float(right) / len(y)


# What is kept of ``stats`` after each step, for the pictures.
TRACED = {
    "AESAM": ("grad_norm", "threshold", "second_passes"),
    "AELookSAM": ("grad_norm", "threshold", "second_passes"),
    "SALR": ("sharpness", "lr_scale"),
}
SLICED = ("SGD", "SAM")
SLICE_POINTS = 41


@dataclass
class Run:
    """One training and what came of it. Curves have one value an epoch."""

    noise: float
    optimizer: str
    seed: int
    train_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of the training steps so far, nothing else
    evaluations: list[int] = field(default_factory=list)  # of the gradient, so far
    final_accuracy: float = math.nan
    best_accuracy: float = math.nan
    sharpness: float = math.nan
    hessian_eigenvalue: float = math.nan
    second_pass_share: float = math.nan
    evaluations_per_step: float = math.nan
    epoch_seconds: float = math.nan
    step_ms: float = math.nan
    optimizer_ms: float = math.nan
    trace: dict[str, list[float | None]] = field(default_factory=dict)  # one value a step
    slice_loss: list[float] = field(default_factory=list)  # along the eigenvector


def train(
    data: Data, recipe: Recipe, epochs: int, noise: float, optimizer_name: str, seed: int, tick: Callable[[], None]
) -> Run:
    """Train a fresh model and measure it. Optimizers with the same seed and noise get the same of everything."""
    run = Run(noise, optimizer_name, seed)
    x, y = data.train_x, with_noise(data.train_y, noise, seed)
    torch.manual_seed(seed)
    model = recipe.model().to(x.device)
    optimizer = make_optimizer(optimizer_name, model, recipe, recipe.steps(len(y), epochs), seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    shuffle = torch.Generator().manual_seed(seed)
    batch_size = min(recipe.batch_size, len(y))
    meter = Meter(x.device)
    traced = TRACED.get(optimizer_name, ()) if seed == 0 else ()  # the pictures show one run
    for _ in range(epochs):
        model.train()
        batches = torch.randperm(len(y), generator=shuffle).to(x.device).split(batch_size)
        losses = []
        for batch in batches[: len(y) // batch_size]:  # the full ones
            losses.append(train_step(model, optimizer, x[batch], y[batch], meter))
            if traced:
                record_step(run.trace, optimizer, traced)
        schedule.step()
        run.train_loss.append(float(torch.stack(losses).mean()))
        if not math.isfinite(run.train_loss[-1]):
            raise Failure(f"{optimizer_name} diverged with seed {seed} and {noise:g} % label noise")
        run.test_accuracy.append(accuracy(model, data.test_x, data.test_y))
        run.seconds.append(meter.seconds)
        run.evaluations.append(meter.evaluations)
        tick()
    run.final_accuracy = run.test_accuracy[-1]
    run.best_accuracy = max(run.test_accuracy)
    run.sharpness = sharpness(model, x, y)
    curved = x[: recipe.hessian_examples], y[: recipe.hessian_examples]
    run.hessian_eigenvalue, direction = largest_eigenpair(model, *curved)
    if optimizer_name in SLICED:
        run.slice_loss = loss_slice(model, *curved, direction, recipe.slice_radius)
    second_passes = float(optimizer.stats["second_passes"]) if optimizer_name != "SGD" else 0.0
    run.second_pass_share = 100.0 * second_passes / meter.steps
    run.evaluations_per_step = meter.evaluations / meter.steps
    # Means: steps of one optimizer differ in what they do.
    run.epoch_seconds = meter.seconds / epochs
    run.step_ms = 1e3 * meter.seconds / meter.steps
    run.optimizer_ms = 1e3 * meter.optimizer_seconds / meter.steps
    return run


def record_step(trace: dict[str, list[float | None]], optimizer: torch.optim.Optimizer, keys: Sequence[str]) -> None:
    """Append a step's statistics and learning rate to the trace."""
    stats = optimizer.stats
    values = {"lr": float(optimizer.param_groups[0]["lr"]), **{key: float(stats[key]) for key in keys}}
    for key, value in values.items():
        # What a picture shows, not all of a double's digits; JSON has no NaN, which is what nothing measured yet is.
        trace.setdefault(key, []).append(float(f"{value:.6g}") if math.isfinite(value) else None)


# Flatness. It is measured with batch norm in evaluation mode: the loss is a function of the weights alone.


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


def largest_eigenpair(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """Largest eigenvalue of the Hessian of the mean loss and its eigenvector, of length 1, by Lanczos."""
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
    values, vectors = eigsh(hessian, k=1, which="LA", v0=start, tol=1e-4)
    return float(values[0]), torch.from_numpy(vectors[:, 0]).to(gradient)


@torch.no_grad()
def loss_slice(model: nn.Module, x: Tensor, y: Tensor, direction: Tensor, radius: float) -> list[float]:
    """Mean loss at w + t * direction for SLICE_POINTS values of t from -radius to radius, in evaluation mode."""
    model.eval()
    params = list(model.parameters())
    weights = nn.utils.parameters_to_vector(params)
    losses = []
    for t in np.linspace(-radius, radius, SLICE_POINTS):
        nn.utils.vector_to_parameters(weights + t * direction, params)
        losses.append(mean_loss(model, x, y))
    nn.utils.vector_to_parameters(weights, params)
    # An eigenvector has no sign: the steeper side is on the right, so that runs can be compared.
    return losses if losses[0] <= losses[-1] else losses[::-1]


# Results.

TIMES = ("epoch_seconds", "step_ms", "optimizer_ms")
MEASURES = (
    "final_accuracy",
    "best_accuracy",
    "sharpness",
    "hessian_eigenvalue",
    "second_pass_share",
    "evaluations_per_step",
    *TIMES,
)


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
        for measure in TIMES:
            row[measure] = statistics.median(getattr(run, measure) for run in group)
        rows.append(row)
    sgd = {row["noise"]: row["epoch_seconds"] for row in rows if row["optimizer"] == "SGD"}
    for row in rows:
        row["relative_time"] = row["epoch_seconds"] / sgd[row["noise"]] if sgd else None
    return rows


def make_table(rows: Sequence[dict[str, Any]], title: str, caption: str) -> Table:
    """The rows for reading; narrow enough for 80 columns."""
    table = Table(title=title, caption=caption, box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    for heading in ("label\nnoise", "\noptimizer"):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "test\naccuracy, %",
        "second\npasses",
        "grads\na step",
        "time\n/ SGD",
        "\nsharpness",
        "Hessian\nlargest",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        spread = f" ± {row['final_accuracy_std']:.2f}" if row["seeds"] > 1 else ""
        table.add_row(
            f"{row['noise']:g} %",
            row["optimizer"],
            f"{row['final_accuracy']:.2f}{spread}",
            f"{row['second_pass_share']:.0f} %",
            f"{row['evaluations_per_step']:.2f}",
            "-" if row["relative_time"] is None else f"{row['relative_time']:.2f}",
            f"{row['sharpness']:#.3g}",
            f"{row['hessian_eigenvalue']:#.3g}",
            end_section=i + 1 < len(rows) and rows[i + 1]["noise"] != row["noise"],
        )
    return table


# Pictures. Each gets the runs, and the recipe with which they were made; there is one column or row a noise level.

# The same in every picture; without C7, which is gray.
COLORS = dict(zip(OPTIMIZERS, ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C9"), strict=True))


def noise_levels(runs: Sequence[Run]) -> dict[float, str]:
    """What the noise levels are called."""
    return {r.noise: f"{r.noise:g} % of the training labels wrong" if r.noise else "clean labels" for r in runs}


def trace_arrays(run: Run) -> dict[str, np.ndarray]:
    return {key: np.array(values, dtype=float) for key, values in run.trace.items()}


def canvas(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, np.ndarray]:
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained", **options)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return figure, axes


def plot_curves(runs: Sequence[Run], recipe: Recipe) -> Figure:
    """Test accuracy against the time spent on it, and against gradient evaluations."""
    levels = noise_levels(runs)
    names = [name for name in OPTIMIZERS if any(run.optimizer == name for run in runs)]
    figure, axes = canvas(len(levels), 2, 11, 0.8 + 4 * len(levels), sharex="col", sharey="row")
    for row, (noise, level) in enumerate(levels.items()):
        shown = []
        for name in names:
            group = [run for run in runs if run.noise == noise and run.optimizer == name]
            accuracies = np.array([run.test_accuracy for run in group])
            mean = accuracies.mean(0)
            std = accuracies.std(0, ddof=1) if len(group) > 1 else np.zeros_like(mean)
            for axis, measure in zip(axes[row], ("seconds", "evaluations"), strict=True):
                spent = np.mean([getattr(run, measure) for run in group], axis=0)
                axis.plot(spent, mean, color=COLORS[name], linewidth=1.3, label=name)
                axis.plot(spent[-1], mean[-1], "o", color=COLORS[name], markersize=5)
                axis.fill_between(spent, mean - std, mean + std, color=COLORS[name], alpha=0.12, linewidth=0)
            # The first epochs may be far below: they would flatten the differences that matter.
            settled = len(mean) // 10
            shown += [*(mean - std)[settled:], *(mean + std)[settled:]]
        low, high = min(shown), min(max(shown), 100.0)
        margin = 0.05 * (high - low) + 0.1
        axes[row][0].set_ylim(low - margin, high + margin)
        axes[row][0].set_ylabel(f"test accuracy (%)\n{level}")
    for axis, label in zip(axes[-1], ("seconds of training", "gradient evaluations"), strict=True):
        axis.set_xscale("log")  # the dearest optimizer takes many times what the cheapest does
        axis.set_xlabel(f"{label} (dot: the end)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    return figure


def plot_adaptive(runs: Sequence[Run], recipe: Recipe) -> Figure:
    """AE-SAM: the squared norm of the gradient, its threshold, and the steps that took a second pass."""
    levels = noise_levels(runs)
    traced = {(run.noise, run.optimizer): trace_arrays(run) for run in runs if run.trace}
    names = [name for name in ("AESAM", "AELookSAM") if (runs[0].noise, name) in traced]
    figure, axes = canvas(len(names), len(levels), 0.5 + 5.5 * len(levels), 1 + 3.5 * len(names), sharex=True)
    for row, name in enumerate(names):
        for column, (noise, level) in enumerate(levels.items()):
            axis, trace = axes[row][column], traced[noise, name]
            squares, threshold = np.square(trace["grad_norm"]), trace["threshold"]
            fired = np.diff(trace["second_passes"], prepend=0) > 0
            steps = np.arange(1, len(fired) + 1)
            axis.plot(steps[~fired], squares[~fired], ".", color="0.6", markersize=3, label="one pass")
            axis.plot(steps[fired], squares[fired], ".", color="C3", markersize=4, label="two passes")
            axis.plot(steps, threshold, color="k", linewidth=0.8, label="threshold")
            axis.set_yscale("log")
            # A threshold may be next to nothing, or negative; the gradients are what the picture is of.
            axis.set_ylim(np.percentile(squares, 0.5) / 3, squares.max() * 2)
            axis.set_title(f"{name}, {level}: {100 * fired.mean():.0f} % take two", fontsize="medium")
            if column == 0:
                axis.set_ylabel("squared gradient norm")
            if row == len(names) - 1:
                axis.set_xlabel("step")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, markerscale=3
    )
    return figure


def plot_salr(runs: Sequence[Run], recipe: Recipe) -> Figure:
    """SALR: the sharpness it measures above, what it makes of the learning rate below."""
    levels = noise_levels(runs)
    traced = {run.noise: trace_arrays(run) for run in runs if run.optimizer == "SALR" and run.trace}
    figure, axes = canvas(2, len(levels), 0.5 + 5.5 * len(levels), 6.5, sharex=True, sharey="row")
    for column, (noise, level) in enumerate(levels.items()):
        trace = traced[noise]
        steps = np.arange(1, len(trace["lr"]) + 1)
        axes[0][column].plot(steps, trace["sharpness"], color=COLORS["SALR"], linewidth=0.8)
        axes[0][column].set_title(level, fontsize="medium")
        axes[1][column].plot(
            steps, trace["lr"] * trace["lr_scale"], color=COLORS["SALR"], linewidth=0.8, label="SALR's learning rate"
        )
        axes[1][column].plot(steps, trace["lr"], color="k", linewidth=1, label="the schedule's")
        axes[1][column].set_xlabel("step")
    axes[0][0].set_ylabel("sharpness on the step's batch (nats)")
    axes[0][0].set_yscale("log")  # it falls by orders of magnitude; what is recorded is positive
    axes[1][0].set_ylabel("learning rate")
    axes[1][-1].legend()
    return figure


def plot_slice(runs: Sequence[Run], recipe: Recipe) -> Figure:
    """Training loss around the end points of SGD and SAM, along the Hessian's top eigenvector: every seed, the mean."""
    levels = noise_levels(runs)
    t = np.linspace(-recipe.slice_radius, recipe.slice_radius, SLICE_POINTS)
    figure, axes = canvas(1, len(levels), 0.5 + 5.5 * len(levels), 4.5)
    for axis, (noise, level) in zip(axes[0], levels.items(), strict=True):
        for name in SLICED:
            losses = np.array([run.slice_loss for run in runs if run.noise == noise and run.optimizer == name])
            axis.plot(t, losses.T, color=COLORS[name], linewidth=0.7, alpha=0.4)
            axis.plot(t, losses.mean(0), color=COLORS[name], linewidth=2, label=name)
        axis.set_title(level, fontsize="medium")
        axis.set_xlabel("distance along the top eigenvector")
    part = f", first {recipe.hessian_examples} images" if recipe.hessian_examples else ""
    axes[0][0].set_ylabel(f"training loss{part} (nats)")
    axes[0][0].legend()
    return figure


@dataclass(frozen=True)
class Picture:
    file: str
    plot: Callable[[Sequence[Run], Recipe], Figure]
    title: str
    needs: tuple[tuple[str, ...], ...] = ()  # of each of these one optimizer at least


PICTURES = (
    Picture("compare.png", plot_curves, "Test accuracy and its price: mean and standard deviation over the seeds"),
    Picture("adaptive.png", plot_adaptive, "When AE-SAM takes a second pass: seed 0", (("AESAM", "AELookSAM"),)),
    Picture("salr.png", plot_salr, "SALR's sharpness and learning rate: seed 0", (("SALR",),)),
    Picture(
        "slice.png",
        plot_slice,
        "Training loss along the Hessian's top eigenvector: every seed, and their mean",
        tuple((name,) for name in SLICED),
    ),
)


def draw(runs: Sequence[Run], recipe: Recipe, title: str, folder: Path) -> tuple[list[str], list[str]]:
    """Write the pictures there are runs for. Returns their names, and a line for each one left out."""
    names = {run.optimizer for run in runs}
    written, left_out = [], []
    for picture in PICTURES:
        path = folder / picture.file
        if not all(names.intersection(alternatives) for alternatives in picture.needs):
            needed = " and ".join(" or ".join(alternatives) for alternatives in picture.needs)
            left_out.append(f"left out {picture.file}: it needs {needed}")
            path.unlink(missing_ok=True)  # one of an earlier run would pass for this one's
            continue
        figure = picture.plot(runs, recipe)
        figure.suptitle(f"{picture.title}\n{title}", fontsize="medium")
        figure.savefig(path, dpi=150)
        plt.close(figure)
        written.append(picture.file)
    return written, left_out


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
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="runs of each kind; default: 3")
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
    curved = len(data.train_y[: recipe.hessian_examples])
    part = f" (its first {curved} images for the latter)" if curved < len(data.train_y) else ""
    caption = (
        f"{recipe.model.__name__} of {weights} weights, {options.epochs} epochs, seeds: {options.seeds}, "
        f"device {options.device}; {seconds:.0f} s in all.\n"
        "Accuracy: at the end of the training; mean and standard deviation over the seeds. Grads: gradient "
        "evaluations, a forward and a backward pass each. Time: of an epoch's steps, median over the seeds.\n"
        f"Radius {recipe.rho['SAM']:g}, of ASAM {recipe.rho['ASAM']:g}. "
        f"Sharpness: L(w + rho g/|g|) - L(w), rho = {SHARPNESS_RHO}. It and the Hessian's largest eigenvalue are of "
        f"the loss on the training set{part}, with the labels trained on, batch norm in evaluation mode; means."
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
            "options_of_seed_0": {
                name: OPTIMIZERS[name](recipe, recipe.steps(len(data.train_y), options.epochs), 0)
                for name in options.optimizers
            },
            "schedule": "cosine to 0, once an epoch",
            "sharpness_rho": SHARPNESS_RHO,
            "hessian_examples": curved,
            "slice_radius": recipe.slice_radius,
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
    seeds = f"{options.seeds} seeds" if options.seeds > 1 else "one seed"
    try:
        (options.out / "compare.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        written, left_out = draw(runs, recipe, f"{title}, {seeds}", options.out)
    except OSError as e:
        raise Failure(f"{e.filename} cannot be written: {e.strerror}") from None
    print(f"wrote to {options.out}: {', '.join(['compare.json', *written])}")
    for line in left_out:
        print(line)


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
