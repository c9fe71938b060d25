"""The pictures: of the runs and the recipe that they were made with, one column or row a noise level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from .flatness import SLICE_POINTS
from .recipes import OPTIMIZERS, Recipe
from .training import SLICED, Run

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

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
