"""The pictures of a study, of its file alone: one column or row a noise level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from .flatness import SLICE_POINTS, SLICE_RADIUS
from .study import BASES
from .tables import Row, half_width

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure


def noise_levels(rows: Sequence[Row]) -> dict[float, str]:
    """What the noise levels are called."""
    return {r.noise: f"{r.noise:g} % of the training labels wrong" if r.noise else "clean labels" for r in rows}


def traces(rows: Sequence[Row]) -> dict[tuple[float, str], dict[str, np.ndarray]]:
    """Of seed 0, by noise level and name."""
    return {
        (row.noise, row.label): {key: np.array(values, dtype=float) for key, values in row.runs[0].trace.items()}
        for row in rows
        if 0 in row.runs
    }


def colors(rows: Sequence[Row]) -> dict[str, Any]:
    """The same in every picture: the base optimizer in blacks and grays, the others in order."""
    labels = list(dict.fromkeys(row.label for row in rows))
    others = [label for label in labels if not label.startswith(BASES)]
    grays = dict(zip([label for label in labels if label not in others], ("0", "0.35", "0.55", "0.7"), strict=False))
    return grays | {label: plt.get_cmap("tab20")((2 * i % 20) + (i >= 10)) for i, label in enumerate(others)}


def canvas(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, np.ndarray]:
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained", **options)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return figure, axes


def plot_curves(rows: Sequence[Row]) -> Figure:
    """Test accuracy over the budget: in epochs, and in gradient evaluations."""
    levels, color = noise_levels(rows), colors(rows)
    figure, axes = canvas(len(levels), 2, 11, 1.2 + 4 * len(levels), sharex="col", sharey="row")
    for line, (noise, level) in enumerate(levels.items()):
        shown = []
        for row in (row for row in rows if row.noise == noise):
            accuracies = np.array([run.accuracy[: row.epochs] for run in row.runs.values()])
            mean = accuracies.mean(0)
            spread = half_width(accuracies[:, -1].tolist()) if len(accuracies) > 1 else 0.0
            epochs = np.arange(1, row.epochs + 1)
            for axis, spent in zip(axes[line], (epochs, row.spent), strict=True):
                axis.plot(spent, mean, color=color[row.label], linewidth=1.3, label=row.label)
                axis.errorbar(spent[-1], mean[-1], spread, fmt="o", color=color[row.label], markersize=5, capsize=3)
            # The first epochs may be far below: they would flatten the differences that matter.
            settled = len(mean) // 5
            shown += [*mean[settled:], mean[-1] - spread, mean[-1] + spread]
        low, high = np.percentile(shown, 2), min(max(shown), 100.0)
        margin = 0.05 * (high - low) + 0.1
        axes[line][0].set_ylim(low - margin, high + margin)
        axes[line][0].set_ylabel(f"test accuracy (%)\n{level}")
    axes[-1][1].set_xscale("log")  # the dearest optimizer takes many times what the cheapest does
    for axis, label in zip(axes[-1], ("epochs", "gradients, in those of an epoch of one a step"), strict=True):
        axis.set_xlabel(f"{label} (dot: the end)")
    handles = dict(pair for axis in axes[:, 0] for pair in zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def plot_adaptive(rows: Sequence[Row]) -> Figure:
    """AE-SAM: the squared norm of the gradient, its threshold, and the steps that took a second pass."""
    levels, traced = noise_levels(rows), traces(rows)
    names = [name for name in ("AESAM", "AELookSAM") if any((noise, name) in traced for noise in levels)]
    figure, axes = canvas(len(names), len(levels), 0.5 + 5.5 * len(levels), 1 + 3.5 * len(names), sharex=True)
    for row, name in enumerate(names):
        for column, (noise, level) in enumerate(levels.items()):
            if (noise, name) not in traced:
                continue
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


def plot_salr(rows: Sequence[Row]) -> Figure:
    """SALR: the sharpness it measures above, what it makes of the learning rate below."""
    traced = {noise: trace for (noise, label), trace in traces(rows).items() if label == "SALR"}
    levels = {noise: level for noise, level in noise_levels(rows).items() if noise in traced}
    figure, axes = canvas(2, len(levels), 0.5 + 5.5 * len(levels), 6.5, sharex=True, sharey="row")
    for column, (noise, level) in enumerate(levels.items()):
        trace = traced[noise]
        steps = np.arange(1, len(trace["lr"]) + 1)
        axes[0][column].plot(steps, trace["sharpness"], color="C0", linewidth=0.8)
        axes[0][column].set_title(level, fontsize="medium")
        axes[1][column].plot(
            steps, trace["lr"] * trace["lr_scale"], color="C0", linewidth=0.8, label="SALR's learning rate"
        )
        axes[1][column].plot(steps, trace["lr"], color="k", linewidth=1, label="the schedule's")
        axes[1][column].set_xlabel("step")
    axes[0][0].set_ylabel("sharpness on the step's batch (nats)")
    axes[0][0].set_yscale("log")  # it falls by orders of magnitude; what is recorded is positive
    axes[1][0].set_ylabel("learning rate")
    axes[1][-1].legend()
    return figure


def plot_slice(rows: Sequence[Row]) -> Figure:
    """Training loss around the end points of the base optimizer and of SAM, along the Hessian's top eigenvector."""
    levels = noise_levels(rows)
    t = np.linspace(-SLICE_RADIUS, SLICE_RADIUS, SLICE_POINTS)
    figure, axes = canvas(1, len(levels), 0.5 + 5.5 * len(levels), 4.5)
    for row in (row for row in rows if row.label in (*BASES, "SAM")):
        axis = axes[0][list(levels).index(row.noise)]
        color = f"C{int(row.label == 'SAM')}"
        if losses := [run.slice_loss for run in row.runs.values() if run.slice_loss]:
            axis.plot(t, np.transpose(losses), color=color, linewidth=0.7, alpha=0.4)
            axis.plot(t, np.mean(losses, axis=0), color=color, linewidth=2, label=row.label)
    for axis, level in zip(axes[0], levels.values(), strict=True):
        axis.set_title(level, fontsize="medium")
        axis.set_xlabel("distance along the top eigenvector")
    axes[0][0].set_ylabel("training loss (nats)")
    axes[0][0].legend()
    return figure


@dataclass(frozen=True)
class Picture:
    file: str
    plot: Callable[[Sequence[Row]], Figure]
    title: str
    needs: tuple[tuple[str, ...], ...] = ()  # of each of these one optimizer at least, with seed 0


PICTURES = (
    Picture(
        "compare.png",
        plot_curves,
        "Test accuracy over the budget: mean over the seeds, at the end with its 95 % interval",
    ),
    Picture("adaptive.png", plot_adaptive, "When AE-SAM takes a second pass: seed 0", (("AESAM", "AELookSAM"),)),
    Picture("salr.png", plot_salr, "SALR's sharpness and learning rate: seed 0", (("SALR",),)),
    Picture(
        "slice.png",
        plot_slice,
        "Training loss along the Hessian's top eigenvector: every seed, and their mean",
        (BASES, ("SAM",)),
    ),
)


def draw(rows: Sequence[Row], title: str, folder: Path) -> tuple[list[str], list[str]]:
    """Write the pictures there are runs for. Returns their names, and a line for each one left out."""
    labels = {row.label for row in rows if 0 in row.runs}
    written, left_out = [], []
    for picture in PICTURES:
        path = folder / picture.file
        if not rows or not all(labels.intersection(alternatives) for alternatives in picture.needs):
            needed = " and ".join(" or ".join(alternatives) for alternatives in picture.needs) or "a final run"
            left_out.append(f"left out {picture.file}: it needs {needed}")
            path.unlink(missing_ok=True)  # one of an earlier run would pass for this one's
            continue
        figure = picture.plot(rows)
        figure.suptitle(f"{picture.title}\n{title}", fontsize="medium")
        figure.savefig(path, dpi=150)
        plt.close(figure)
        written.append(picture.file)
    return written, left_out
