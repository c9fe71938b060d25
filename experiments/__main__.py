"""Compare the family with SGD: accuracy with clean and noisy labels, flatness of the minimum, what a step costs.

    python -m experiments
    python -m experiments --optimizers sgd,sam,aesam --seeds 5
    python -m experiments --dataset fashion-mnist --data-dir DIR \\
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
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

try:
    import torch
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    import sharpkern as sk

    from .data import Failure, load_data
    from .flatness import SHARPNESS_RHO
    from .pictures import draw
    from .recipes import OPTIMIZERS, RECIPES
    from .table import make_table, summarize
    from .training import train
except ModuleNotFoundError as missing:
    _package = (missing.name or "").partition(".")[0]
    _install = {"sklearn": "scikit-learn", "sharpkern": "."}.get(_package, _package)
    print(f"error: the study needs {_package}: pip install {_install}", file=sys.stderr)
    raise SystemExit(2) from None


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
    parser = Parser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
