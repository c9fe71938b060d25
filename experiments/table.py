"""The runs as a table: mean and standard deviation over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import rich.box
from rich.table import Table

from .training import Run

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
