"""The tables of a study, of its file alone: accuracy, differences to SGD, price and flatness, trials."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import rich.box
import rich.table
from scipy import stats

from .study import Arguments, Job, Run, Study, show


@dataclass
class Row:
    """A contender at a noise level, and its final runs."""

    noise: float
    label: str
    arguments: Arguments
    epochs: int
    runs: dict[int, Run]  # by seed

    @property
    def is_stopped(self) -> bool:
        return self.epochs < dict(self.arguments)["epochs"]

    @property
    def accuracies(self) -> dict[int, float]:
        """Of the last epoch."""
        return {seed: run.accuracy[self.epochs - 1] for seed, run in self.runs.items()}

    @property
    def spent(self) -> list[float]:
        """Gradients after each epoch, in those of an epoch of one a step: mean over the seeds."""
        return [
            statistics.fmean(run.evaluations[epoch] * run.job.epochs / run.steps for run in self.runs.values())
            for epoch in range(self.epochs)
        ]

    @property
    def gradients(self) -> float:
        return self.spent[-1]

    @property
    def epoch_seconds(self) -> float:
        """The median over the seeds: other programs share caches and memory with it."""
        return statistics.median(run.seconds[self.epochs - 1] / self.epochs for run in self.runs.values())


def make_rows(study: Study, runs: Mapping[Job, Run]) -> list[Row]:
    """Those that have a final run."""
    rows = []
    for noise in study.noise:
        for contender in study.contenders():
            if (picked := study.pick(runs, noise, contender)) is None:
                continue
            jobs = [Job("final", noise, contender.optimizer, picked[0], seed) for seed in range(study.seeds)]
            if found := {job.seed: runs[job] for job in jobs if job in runs}:
                rows.append(Row(noise, contender.label, *picked, found))
    return rows


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of the mean, by Student's t."""
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def interval(values: Sequence[float], sign: str = "") -> str:
    mean = f"{statistics.fmean(values):{sign}.2f}"
    return f"{mean} ± {half_width(values):.2f}" if len(values) > 1 else mean


def mean_of(values: Sequence[float | None]) -> str:
    """Three digits; those of a training that diverged are not there."""
    there = [value for value in values if value is not None]
    return f"{statistics.fmean(there):#.3g}" if there else "-"


@dataclass
class Table:
    """Cells for reading. The first column is the noise level, the first ``left`` columns stand left."""

    title: str
    headings: list[str]
    cells: list[list[str]]
    left: int = 2

    def markdown(self) -> str:
        rule = ["---"] * self.left + ["---:"] * (len(self.headings) - self.left)
        lines = [f"| {' | '.join(cells)} |" for cells in (self.headings, rule, *self.cells)]
        return "\n".join((f"{self.title}\n", *lines, ""))

    def rich(self) -> rich.table.Table:
        table = rich.table.Table(title=self.title, box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i, heading in enumerate(self.headings):
            side = "left" if i < self.left else "right"
            table.add_column(heading, justify=side, vertical="bottom", overflow="fold", no_wrap=i < 2)
        for i, cells in enumerate(self.cells):
            table.add_row(*cells, end_section=i + 1 < len(self.cells) and self.cells[i + 1][0] != cells[0])
        return table


def accuracy_table(rows: Sequence[Row]) -> Table:
    cells = []
    for row in rows:
        values = list(row.accuracies.values())
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        cells.append(
            [
                f"{row.noise:g} %",
                row.label,
                show(row.arguments),
                str(row.epochs),
                f"{row.gradients:.1f}",
                str(len(values)),
                f"{statistics.fmean(values):.2f}{spread}",
                f"± {half_width(values):.2f}" if len(values) > 1 else "-",
            ]
        )
    headings = ["noise", "optimizer", "arguments", "epochs", "gradients", "seeds", "test accuracy, %", "95 %"]
    title = (
        "Test accuracy after the last epoch: mean and standard deviation over the seeds, and the mean's 95 % interval. "
        "Gradients in those of an epoch of one a step."
    )
    return Table(title, headings, cells, left=3)


def difference_table(study: Study, rows: Sequence[Row]) -> Table:
    rivals = [rival.label for rival in study.rivals]
    cells = []
    for row in rows:
        if row.label in rivals:
            continue
        cells.append([f"{row.noise:g} %", row.label])
        for label in rivals:
            rival = next((r.accuracies for r in rows if (r.noise, r.label) == (row.noise, label)), {})
            differences = [value - rival[seed] for seed, value in row.accuracies.items() if seed in rival]
            cells[-1].append(interval(differences, "+") if differences else "-")
    headings = ["noise", "optimizer", *rivals]
    title = (
        f"Test accuracy less that of {rivals[0]} with the same seed, points: mean and 95 % interval. "
        f"{rivals[0]} has as many epochs, twice as many (SAM's gradients), as many as were picked, or is stopped early."
    )
    return Table(title, headings, cells)


def price_table(study: Study, rows: Sequence[Row]) -> Table:
    base = study.base["name"]
    seconds = {row.noise: row.epoch_seconds for row in rows if row.label == base}
    cells = [
        [
            f"{row.noise:g} %",
            row.label,
            f"{statistics.fmean(run.second_pass_share for run in row.runs.values()):.0f} %",
            f"{row.gradients / row.epochs:.2f}",
            f"{row.epoch_seconds / seconds[row.noise]:.2f}" if row.noise in seconds else "-",
            *(
                mean_of([None if row.is_stopped else getattr(run, name) for run in row.runs.values()])
                for name in ("sharpness", "hessian_eigenvalue", "hessian_trace")
            ),
        ]
        for row in rows
    ]
    headings = [
        "noise",
        "optimizer",
        "second passes",
        "gradients a step",
        f"time / {base}",
        "sharpness",
        "eigenvalue",
        "trace",
    ]
    title = (
        "What a step takes, and how flat the end is: L(w + 0.05 g/norm(g)) - L(w), the Hessian's largest "
        "eigenvalue and trace, of the loss trained on. Means over the seeds; of an epoch's time the median."
    )
    return Table(title, headings, cells)


def trial_table(study: Study, runs: Mapping[Job, Run]) -> Table:
    cells = []
    for noise in study.noise:
        for contender in study.contenders():
            if contender.epochs is not None or contender.stops:
                continue  # among the trials of all epochs
            picked = study.pick(runs, noise, contender)
            for arguments, curve in study.held_out_curves(runs, noise, contender.optimizer).items():
                best = max(curve)
                what = [contender.optimizer, show(arguments), str(len(curve)), f"{curve[-1]:.2f}"]
                is_picked = picked is not None and arguments == picked[0]
                cells.append([f"{noise:g} %", *what, f"{best:.2f} ({curve.index(best) + 1})", "picked" * is_picked])
    headings = ["noise", "optimizer", "arguments", "epochs", "held-out accuracy, %", "best (epoch)", ""]
    title = (
        "The trials: accuracy of the held-out examples, whose labels are as wrong as the others, mean over the seeds: "
        "at the end, and after the best epoch."
    )
    return Table(title, headings, cells, left=3)
