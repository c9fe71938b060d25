"""A study: the settings of a file, the runs that they ask for, and what the trials among these pick."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import sharpkern as sk

from .data import CLASSES, Failure
from .models import IMAGES, MODELS

STUDIES = Path(__file__).with_name("studies")
FIRST_TRIAL_SEED = 10_000  # trials and final runs share none

Arguments = tuple[tuple[str, Any], ...]  # sorted by name; hashable


class Job(NamedTuple):
    """What a run is of, and known by."""

    # "trial": trained without the held-out examples and measured on these; "final": on the test part;
    # "pretraining": of the weights that the others start from.
    stage: str
    noise: float  # percent of the labels
    optimizer: str
    arguments: Arguments
    seed: int

    @property
    def epochs(self) -> int:
        return dict(self.arguments)["epochs"]


@dataclass
class Run:
    """What came of a job. Curves have one value an epoch."""

    job: Job
    steps: int = 0
    ended: str = ""  # date and time, UTC
    train_loss: list[float | None] = field(default_factory=list)  # None: not finite
    accuracy: list[float] = field(default_factory=list)  # percent
    evaluations: list[float] = field(default_factory=list)  # of the gradient, so far
    # Of the training steps so far, nothing else; of the clock on a GPU, else of the processor.
    seconds: list[float] = field(default_factory=list)
    weights: str = ""  # the digest of those that a pretraining ended at
    second_pass_share: float = 0.0  # percent of the steps
    sharpness: float | None = None
    hessian_eigenvalue: float | None = None  # the largest
    hessian_trace: float | None = None
    trace: dict[str, list[float | None]] = field(default_factory=dict)  # one value a step
    slice_loss: list[float] = field(default_factory=list)  # along the eigenvector

    def line(self) -> str:
        """As JSON."""
        results = asdict(self)
        del results["job"]
        job = {**self.job._asdict(), "arguments": dict(self.job.arguments)}
        return json.dumps({**job, **results}, allow_nan=False) + "\n"

    @classmethod
    def read(cls, record: dict[str, Any]) -> Run:
        stage, noise, optimizer, arguments, seed = (record.pop(name) for name in Job._fields)
        return cls(Job(stage, noise, optimizer, tuple(sorted(arguments.items())), seed), **record)


class Contender(NamedTuple):
    """A row of the tables: an optimizer with the arguments that did best on the held-out examples.

    The base optimizer is there four times: with the others' epochs, with twice as many, as picked, and stopped early.
    """

    label: str
    optimizer: str
    epochs: int | None = None  # of the trials to pick from; None: all
    stops: bool = False  # after the epoch that was best in the trials, wherever the schedule is then


@dataclass(frozen=True)
class Study:
    """Settings, as they stand in the file. Wrong ones are a Failure."""

    dataset: str
    model: str
    train_size: int | None  # None: all
    held_out: int  # of these, where arguments are picked
    augment: bool  # images are shifted and mirrored at random
    pretrain: dict[str, Any] | None  # on the clean images of the first ``classes``: ``epochs``, ``lr``; None: not
    batch_size: int
    base: dict[str, Any]  # ``name`` of the base optimizer in torch.optim, and its arguments but lr
    warmup_epochs: int
    hessian_examples: int | None  # the first of the training part, None: all; the graph of their loss stays in memory
    epochs: int  # of every optimizer whose grid has none
    noise: list[float]  # percents of wrong labels
    seeds: int
    trial_seeds: int
    optimizers: dict[str, dict[str, list[Any]]]  # the grid of each: argument, values

    def __post_init__(self) -> None:
        check(
            self.dataset in IMAGES.values(),
            f"dataset {self.dataset!r}: there are {', '.join(dict.fromkeys(IMAGES.values()))}",
        )
        check(self.model in list(MODELS), f"model {self.model!r}: there are {', '.join(MODELS)}")
        check(IMAGES[self.model] == self.dataset, f"model {self.model!r} is not for {self.dataset}")
        check(isinstance(self.augment, bool), f"augment {self.augment!r} is neither true nor false")
        check_pretraining(self.pretrain)
        for name, least in LEAST.items():
            value = getattr(self, name)
            optional = value is None and name in ("train_size", "hessian_examples")
            whole = isinstance(value, int) and not isinstance(value, bool)
            check(optional or (whole and value >= least), f"{name} {value!r} is not a whole number from {least} up")
        base = self.base.get("name") if isinstance(self.base, dict) else None
        check(base in BASES, f"base {self.base!r} has no name; there are {', '.join(BASES)}")
        check("lr" not in self.base, "base has an lr, which is a matter of the grids")
        levels = self.noise if isinstance(self.noise, list) else []
        right = levels and all(is_number(level) and 0 <= level <= 100 for level in levels)
        check(right and len(set(levels)) == len(levels), f"noise {self.noise!r} is no list of percentages")
        check(isinstance(self.optimizers, dict) and self.optimizers, "optimizers: there are none")
        for name, grid in self.optimizers.items():
            known = name == base or class_of(name) is not None
            check(known and name != "NudgedSGD", f"optimizer {name!r} is unknown")  # which has no base optimizer
            check(isinstance(grid, dict), f"{name}: its grid is no object of lists")
            for argument, values in grid.items():
                check(isinstance(values, list) and values, f"{name}: {argument} {values!r} is no list of values")
                check(argument not in GIVEN and argument not in self.base, f"{name}: {argument} is not of the grid's")
                check(all(is_number(v) or isinstance(v, (bool, str)) for v in values), f"{name}: {argument} {values!r}")
            check("lr" in grid, f"{name}: its grid has no lr")
        for name in self.optimizers:
            trials = self.trials(name)
            check(len(set(trials)) == len(trials), f"{name}: its grid names one trial twice")
            for arguments in trials:
                epochs, least = dict(arguments)["epochs"], max(1, self.warmup_epochs)
                right = type(epochs) is int and epochs >= least
                check(right, f"{name}: epochs {epochs!r} is no whole number from {least} up")
                try:
                    make_optimizer(self, name, nn.Linear(2, 2), arguments, steps=2, seed=0)
                except (TypeError, ValueError) as e:
                    raise Failure(f"{name} with {show(arguments)}: {' '.join(str(e).split())}") from None
        if base in self.optimizers:
            epochs = self.optimizers[base].get("epochs", [self.epochs])
            check(
                {self.epochs, 2 * self.epochs} <= set(epochs),
                f"{base}: epochs {epochs} without {self.epochs} and {2 * self.epochs}, the equal budgets",
            )
        counts = {name: len(self.trials(name)) for name in self.optimizers}
        first = next(iter(counts))
        for name, count in counts.items():
            check(
                count == counts[first], f"{name} has {count} trials, {first} {counts[first]}: give all the same number"
            )

    @property
    def first_class(self) -> int:
        """The classes below it are those of the pretraining."""
        return self.pretrain["classes"] if self.pretrain else 0

    @property
    def pretraining_job(self) -> Job:
        arguments = {name: self.pretrain[name] for name in ("epochs", "lr")}
        return Job("pretraining", 0, self.base["name"], tuple(sorted(arguments.items())), 0)

    def trials(self, optimizer: str) -> list[Arguments]:
        """The product of its grid."""
        grid = {"epochs": [self.epochs], **self.optimizers[optimizer]}
        names = sorted(grid)
        return [tuple(zip(names, values, strict=True)) for values in itertools.product(*(grid[name] for name in names))]

    def trial_jobs(self) -> list[Job]:
        """The seeds change last: a busy spell of the machine hits all optimizers alike."""
        return [
            Job("trial", noise, optimizer, arguments, FIRST_TRIAL_SEED + seed)
            for seed in range(self.trial_seeds)
            for noise in self.noise
            for optimizer in self.optimizers
            for arguments in self.trials(optimizer)
        ]

    @property
    def rivals(self) -> list[Contender]:
        """The base optimizer with the others' epochs, with as many gradients as SAM, as picked, and stopped early."""
        name = self.base["name"]
        return [
            Contender(name, name, self.epochs),
            Contender(f"{name}, 2x epochs", name, 2 * self.epochs),
            Contender(f"{name}, picked", name),
            Contender(f"{name}, stopped", name, stops=True),
        ]

    def contenders(self) -> Iterator[Contender]:
        for name in self.optimizers:
            yield from self.rivals if name == self.base["name"] else (Contender(name, name),)

    def held_out_curves(self, runs: Mapping[Job, Run], noise: float, optimizer: str) -> dict[Arguments, list[float]]:
        """Of the trials whose seeds are all there: the mean after each epoch."""
        found = {}
        for arguments in self.trials(optimizer):
            jobs = [
                Job("trial", noise, optimizer, arguments, FIRST_TRIAL_SEED + seed) for seed in range(self.trial_seeds)
            ]
            if all(job in runs for job in jobs):
                curves = (runs[job].accuracy for job in jobs)
                found[arguments] = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        return found

    def pick(self, runs: Mapping[Job, Run], noise: float, contender: Contender) -> tuple[Arguments, int] | None:
        """The arguments with the best held-out accuracy, the first of equals, and the epochs to go; None before all
        trials are there."""
        curves = self.held_out_curves(runs, noise, contender.optimizer)
        if len(curves) < len(self.trials(contender.optimizer)):
            return None
        ends = [
            (curve[epochs - 1], epochs, arguments)
            for arguments, curve in curves.items()
            if contender.epochs in (None, len(curve))
            for epochs in (range(1, len(curve) + 1) if contender.stops else (len(curve),))
        ]
        _, epochs, arguments = max(ends, key=lambda end: end[0])
        return arguments, epochs

    def final_jobs(self, runs: Mapping[Job, Run]) -> list[Job]:
        """Once all trials are there. What two rows share is there once."""
        picked = [
            (noise, contender.optimizer, found[0])
            for noise in self.noise
            for contender in self.contenders()
            if (found := self.pick(runs, noise, contender)) is not None
        ]
        return list(dict.fromkeys(Job("final", *what, seed) for seed in range(self.seeds) for what in picked))


BASES = ("SGD", "AdamW")
ADAPTIVE = "Adaptive "  # before the name of a class: with AE-SAM's policy, of default arguments

# Arguments that a run gives an optimizer, so that a grid does not.
GIVEN = ("model", "params", "policy", "seed", "total_steps")

# Settings that are whole numbers, and the smallest that makes sense. Batch norm needs two examples.
LEAST = {
    "train_size": 4,
    "held_out": 1,
    "batch_size": 2,
    "warmup_epochs": 0,
    "hessian_examples": 1,
    "epochs": 1,
    "seeds": 1,
    "trial_seeds": 1,
}
# What may grow or shrink between two calls that share a file: runs have these in their job. The rest is of all of them.
OF_RUNS = ("epochs", "noise", "seeds", "trial_seeds", "optimizers")


def check(right: Any, message: str) -> None:
    if not right:
        raise Failure(message)


def check_pretraining(pretrain: Any) -> None:
    if pretrain is None:
        return
    check(
        isinstance(pretrain, dict) and pretrain.keys() == {"classes", "epochs", "lr"},
        f"pretrain {pretrain!r} has not classes, epochs and lr alone",
    )
    whole = all(type(pretrain[name]) is int and pretrain[name] >= 1 for name in ("classes", "epochs"))
    check(
        whole and pretrain["classes"] < CLASSES - 1 and is_number(pretrain["lr"]),
        f"pretrain {pretrain!r}: classes is from 1 to {CLASSES - 2}, epochs from 1 up, lr a number",
    )


def class_of(name: str) -> type[torch.optim.Optimizer] | None:
    """Of the package, with or without ``ADAPTIVE`` before its name."""
    name = name.removeprefix(ADAPTIVE)
    found = getattr(sk, name) if name in sk.__all__ else None
    return found if inspect.isclass(found) and issubclass(found, torch.optim.Optimizer) else None


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def from_settings(settings: Any) -> Study:
    check(isinstance(settings, dict), "the settings are no JSON object")
    names = {f.name for f in fields(Study)}
    for name in settings:
        check(name in names, f"{name!r} is no setting; there are {', '.join(sorted(names))}")
    missing = sorted(names - settings.keys())
    check(not missing, f"settings are missing: {', '.join(missing)}")
    return Study(**settings)


def read_study(path: Path) -> Study:
    try:
        return from_settings(json.loads(path.read_text(encoding="utf-8")))
    except OSError as e:
        raise Failure(f"{path} cannot be read: {e.strerror}") from None
    except ValueError as e:
        raise Failure(f"{path} is not JSON: {e}") from None
    except Failure as e:
        raise Failure(f"{path}: {e}") from None


def show(arguments: Arguments) -> str:
    """For reading, without the epochs."""
    return ", ".join(f"{name}={value}" for name, value in arguments if name != "epochs")


def make_optimizer(
    study: Study, name: str, model: nn.Module, arguments: Arguments, steps: int, seed: int
) -> torch.optim.Optimizer:
    """With the trial's arguments; a class that asks for the number of steps, or for a seed, gets these too."""
    options = {key: value for key, value in arguments if key != "epochs"}
    options |= {key: value for key, value in study.base.items() if key != "name"}
    base = getattr(torch.optim, study.base["name"])
    if name == study.base["name"]:
        return base(model.parameters(), **options)
    cls = class_of(name)
    asked = inspect.signature(cls).parameters
    options |= {key: value for key, value in (("total_steps", steps), ("seed", seed)) if key in asked}
    if name.startswith(ADAPTIVE):
        options["policy"] = sk.policy.Adaptive(steps)
    # With names: ASAM scales the tensors that are called weight.
    return cls(model.named_parameters(), base, model=model, **options)
