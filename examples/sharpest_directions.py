"""The sharpest directions of the loss, over a training with SGD and with a nudge along them.

    python -m examples.sharpest_directions
    python -m examples.sharpest_directions --data-dir DIR --train-size 5000 --device cuda

After Jastrzebski et al. 2019, "On the Relation Between the Sharpest Directions of DNN Loss and the SGD Step Length"
(https://arxiv.org/abs/1807.05031), on the digits that come with scikit-learn, or on a part of Fashion-MNIST from any
folder with its four files; some minutes on a CPU. It asks, with several seeds each:

a) How do the largest eigenvalues of the Hessian move under SGD, with another learning rate, with another batch size?
b) Does a step of SGD along the sharpest direction go down, or past the valley's bottom and up?
c) What do runs differ in that shrink or stretch every step along the sharpest directions (NudgedSGD)?

Pictures and a JSON of all numbers go to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sharpkern as sk
from experiments.data import CLASSES, Data, load_data
from sharpkern.analysis import frobenius_norm, loss_along, sgd_step_along, top_eigenvalues

DIRECTIONS = 5  # that are nudged along
TOLERANCE = 0.01  # of the eigenpairs: their values are far more exact
STRETCHES = (0.0, 0.5, 1.0, 2.0)  # of the step of SGD along the sharpest direction
NUDGES = (0.01, 0.1, 1.0, 10.0)
VALIDATION = 250  # training examples that are held out


class SimpleCNN(nn.Sequential):
    """Two convolutions, two dense layers; no normalisation: the loss is a function of the weights and the batch."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(size // 4),
            nn.Flatten(),
            nn.Linear(2 * width * 16, 64),
            nn.ReLU(),
            nn.Linear(64, CLASSES),
        )


def in_batches(x: Tensor, y: Tensor, size: int = 500) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """(mean loss, accuracy in percent)."""
    outputs = torch.cat([model(a) for a, _ in in_batches(x, y)])
    return float(cross_entropy(outputs, y)), 100 * float((outputs.argmax(1) == y).float().mean())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    batch_size: int,
    epochs: int,
    seed: int,
    before_epoch: Callable[[int], None],
) -> None:
    """``before_epoch`` is called once more after the last one."""
    shuffle = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        before_epoch(epoch)
        for batch in torch.randperm(len(data.train_y), generator=shuffle).to(data.train_y.device).split(batch_size):
            optimizer.zero_grad()
            cross_entropy(model(data.train_x[batch]), data.train_y[batch]).backward()
            optimizer.step()
    before_epoch(epochs)


class Study:
    """What all runs share."""

    def __init__(self, arguments: argparse.Namespace, data: Data, tick: Callable[[], None]) -> None:
        self.lr, self.batch_size, self.epochs = arguments.lr, arguments.batch_size, arguments.epochs
        self.width, self.tick = arguments.width, tick
        held = slice(0, VALIDATION)
        self.validation = data.train_x[held], data.train_y[held]
        self.data = Data(data.train_x[VALIDATION:], data.train_y[VALIDATION:], data.test_x, data.test_y)
        # The loss that curvature is measured of: some of the training examples.
        self.part = self.data.train_x[: arguments.hessian_examples], self.data.train_y[: arguments.hessian_examples]
        self.curved = in_batches(*self.part)

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return SimpleCNN(self.width, self.data.train_x.size(-1)).to(self.data.train_x.device)

    def of_sgd(self, lr: float, batch_size: int, seed: int) -> dict[str, Any]:
        """Eigenvalues, and the loss along the step of SGD in the sharpest direction, before every epoch and at the
        end."""
        model = self.model(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        run: dict[str, Any] = {"lr": lr, "batch_size": batch_size, "seed": seed, "eigenvalues": [], "along": []}

        def before_epoch(epoch: int) -> None:
            pairs = top_eigenvalues(model, cross_entropy, self.curved, DIRECTIONS, tol=TOLERANCE)
            minibatches = in_batches(*self.part, batch_size)
            step = sgd_step_along(model, cross_entropy, minibatches, pairs.vectors[0], lr)
            losses = loss_along(model, cross_entropy, self.curved, step, STRETCHES)
            run["eigenvalues"].append(pairs.values.tolist())
            run["along"].append(losses.tolist())
            self.tick()

        train(model, optimizer, self.data, batch_size, self.epochs, seed, before_epoch)
        run["test_loss"], run["test_accuracy"] = evaluate(model, self.data.test_x, self.data.test_y)
        return run

    def of_nudge(self, nudge: float | None, lr: float, seed: int) -> dict[str, Any]:
        """What a training with a nudge ends at; None: SGD."""
        model = self.model(seed)
        start = nn.utils.parameters_to_vector(model.parameters()).detach()
        optimizer: torch.optim.Optimizer
        if nudge is None:
            optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        else:
            optimizer = sk.NudgedSGD(model.parameters(), lr=lr, nudge=nudge, k=DIRECTIONS)
        run: dict[str, Any] = {"nudge": nudge, "lr": lr, "seed": seed, "eigenvalues": [], "frobenius": []}
        run |= {"validation_loss": [], "validation_accuracy": []}

        def before_epoch(epoch: int) -> None:
            # Twice as many as are used: some of the largest in magnitude may be negative.
            pairs = top_eigenvalues(model, cross_entropy, self.curved, 2 * DIRECTIONS, tol=TOLERANCE)
            if isinstance(optimizer, sk.NudgedSGD) and epoch < self.epochs:
                optimizer.refresh(pairs)
            run["eigenvalues"].append(pairs.values[:DIRECTIONS].tolist())
            run["frobenius"].append(float(frobenius_norm(model, cross_entropy, self.curved, samples=20).value))
            loss, accuracy = evaluate(model, *self.validation)
            run["validation_loss"].append(loss)
            run["validation_accuracy"].append(accuracy)
            self.tick()

        train(model, optimizer, self.data, self.batch_size, self.epochs, seed, before_epoch)
        best = max(range(1, self.epochs + 1), key=run["validation_accuracy"].__getitem__)
        end = nn.utils.parameters_to_vector(model.parameters()).detach()
        run |= {"frobenius_best": run["frobenius"][best], "frobenius_end": run["frobenius"][-1], "best_epoch": best}
        run["test_loss"], run["test_accuracy"] = evaluate(model, self.data.test_x, self.data.test_y)
        run["train_loss"], _ = evaluate(model, self.data.train_x, self.data.train_y)
        run["distance"] = float((end - start).norm())
        return run


# What comes of it.


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values) if len(values) > 1 else 0:.{digits}f}"


def by(runs: Sequence[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The runs that differ in their seeds alone, together."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in keys), []).append(run)
    return groups


def table_of(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left")


def table_of_sgd(runs: Sequence[dict[str, Any]]) -> Table:
    table = table_of("a) SGD: the largest eigenvalue", "lr", "batch", "peak", "at epoch", "at the end")
    for (lr, batch_size), group in by(runs, "lr", "batch_size").items():
        largest = [[values[0] for values in run["eigenvalues"]] for run in group]
        peaks = [max(curve) for curve in largest]
        epochs = [curve.index(peak) for curve, peak in zip(largest, peaks, strict=True)]
        ends = [curve[-1] for curve in largest]
        table.add_row(f"{lr:.3g}", str(batch_size), spread(peaks, 1), spread(epochs, 1), spread(ends, 1))
    return table


def table_of_steps(runs: Sequence[dict[str, Any]]) -> Table:
    """In how many epochs, in percent, the loss is higher after such a step than before it."""
    columns = [f"{stretch:g} steps" for stretch in STRETCHES[1:]]
    table = table_of(
        "b) SGD: epochs in which a step along the sharpest direction raises the loss, %", "lr", "batch", *columns
    )
    for (lr, batch_size), group in by(runs, "lr", "batch_size").items():
        shares = [
            [100 * statistics.mean(losses[i] > losses[0] for losses in run["along"]) for run in group]
            for i in range(1, len(STRETCHES))
        ]
        table.add_row(f"{lr:.3g}", str(batch_size), *(spread(share, 0) for share in shares))
    return table


def table_of_nudges(runs: Sequence[dict[str, Any]]) -> Table:
    """Frobenius norms of the Hessian: at the epoch of the best validation accuracy, and at the end."""
    columns = ("nudge", "lr", "norm, best", "norm, end", "test acc., %", "val. loss", "train loss", "distance")
    table = table_of("c) NudgedSGD", *columns)
    for (nudge, lr), group in by(runs, "nudge", "lr").items():
        table.add_row(
            "SGD" if nudge is None else f"{nudge:g}", f"{lr:.3g}",
            spread([run["frobenius_best"] for run in group], 0), spread([run["frobenius_end"] for run in group], 0),
            spread([run["test_accuracy"] for run in group], 1),
            spread([run["validation_loss"][-1] for run in group], 2),
            spread([run["train_loss"] for run in group], 3), spread([run["distance"] for run in group], 1),
        )  # fmt: skip
    return table


def picture_of_eigenvalues(runs: Sequence[dict[str, Any]]) -> Figure:
    """The evolution of the five largest eigenvalues, one panel a learning rate and batch size; a line a seed."""
    groups = by(runs, "lr", "batch_size")
    figure = Figure(figsize=(3.2 * len(groups), 3.4), layout="constrained")
    for axis, ((lr, batch_size), group) in zip(
        figure.subplots(1, len(groups), sharey=True, squeeze=False)[0], groups.items(), strict=True
    ):
        for run in group:
            for i, curve in enumerate(zip(*run["eigenvalues"], strict=True)):
                axis.plot([x if x > 0 else math.nan for x in curve], color=f"C{i}", linewidth=1)
        axis.set(yscale="log", title=f"lr {lr:.3g}, batch {batch_size}", xlabel="epoch")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("largest eigenvalues")
    return figure


def picture_of_steps(runs: Sequence[dict[str, Any]]) -> Figure:
    """The change of the loss along the step of SGD in the sharpest direction, over the training: means over seeds."""
    groups = by(runs, "lr", "batch_size")
    figure = Figure(figsize=(3.2 * len(groups), 3.4), layout="constrained")
    for axis, ((lr, batch_size), group) in zip(
        figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True
    ):
        for i, stretch in list(enumerate(STRETCHES))[1:]:
            curves = [[100 * (losses[i] / losses[0] - 1) for losses in run["along"]] for run in group]
            axis.plot([statistics.mean(x) for x in zip(*curves, strict=True)], label=f"{stretch:g} steps")
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.set(title=f"lr {lr:.3g}, batch {batch_size}", xlabel="epoch")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("change of the loss, %")
    figure.axes[0].legend(frameon=False)
    return figure


def picture_of_nudges(runs: Sequence[dict[str, Any]]) -> Figure:
    """Largest eigenvalue, Frobenius norm, validation accuracy and loss over the training: means over seeds."""
    panels = {
        "largest eigenvalue": lambda run: [values[0] for values in run["eigenvalues"]],
        "Frobenius norm": lambda run: run["frobenius"],
        "validation accuracy, %": lambda run: run["validation_accuracy"],
        "validation loss": lambda run: run["validation_loss"],
    }
    figure = Figure(figsize=(3.6 * len(panels), 3.4), layout="constrained")
    for axis, (title, curve) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for (nudge, lr), group in by(runs, "nudge", "lr").items():
            means = [statistics.mean(x) for x in zip(*map(curve, group), strict=True)]
            axis.plot(means, label=f"SGD, lr {lr:.3g}" if nudge is None else f"nudge {nudge:g}")
        axis.set(title=title, xlabel="epoch", yscale="linear" if "%" in title else "log")
        axis.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.sharpest_directions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST's four files; without: digits")
    parser.add_argument("--train-size", type=int, default=None, help="train on so many examples; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind; default: 3")
    parser.add_argument("--epochs", type=int, default=20, help="default: 20")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate in the middle; default: 0.05")
    parser.add_argument("--batch-size", type=int, default=32, help="batch size in the middle; default: 32")
    parser.add_argument("--width", type=int, default=8, help="channels of the first convolution; default: 8")
    parser.add_argument("--hessian-examples", type=int, default=250, help="curvature is that of their loss")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("results/sharpest-directions"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)  # the matrices are too small to share
    dataset = "digits" if options.data_dir is None else "fashion-mnist"
    data = load_data(dataset, options.data_dir, options.train_size, torch.device(options.device))
    lr, batch_size, begin = options.lr, options.batch_size, time.perf_counter()
    sgd = [(lr / 3, batch_size), (lr, batch_size), (3 * lr, batch_size), (lr, batch_size // 4), (lr, 4 * batch_size)]
    # The paper's comparison: nudges at one learning rate, and SGD with a larger one.
    nudged: list[tuple[float | None, float]] = [*((nudge, lr) for nudge in NUDGES), (None, 3 * lr)]
    seeds = range(options.seeds)
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("trainings", total=(len(sgd) + len(nudged)) * options.seeds * (options.epochs + 1))
        study = Study(options, data, lambda: progress.advance(task))
        of_sgd = [study.of_sgd(*setup, seed) for setup in sgd for seed in seeds]
        of_nudge = [study.of_nudge(*setup, seed) for setup in nudged for seed in seeds]
    for table in (table_of_sgd(of_sgd), table_of_steps(of_sgd), table_of_nudges(of_nudge)):
        console.print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    picture_of_eigenvalues(of_sgd).savefig(options.out / "eigenvalues.png", dpi=120)
    picture_of_steps(of_sgd).savefig(options.out / "steps.png", dpi=120)
    picture_of_nudges(of_nudge).savefig(options.out / "nudges.png", dpi=120)
    record = {
        "command": {name: str(value) for name, value in vars(options).items()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "sharpkern": sk.__version__},
        "seconds": time.perf_counter() - begin,
        "sgd": of_sgd,
        "nudged": of_nudge,
    }
    (options.out / "sharpest_directions.json").write_text(json.dumps(record))
    console.print(f"{time.perf_counter() - begin:.0f} s; pictures and all numbers are in {options.out}")


if __name__ == "__main__":
    main()
