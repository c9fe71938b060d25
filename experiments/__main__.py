"""Compare the family with SGD at equal cost: accuracy with clean and wrong labels, flatness, what a step costs.

    python -m experiments                                             # digits, in some minutes
    python -m experiments fashion-mnist-mlp --data-dir DIR            # in some hours
    python -m experiments fashion-mnist-mlp --data-dir DIR --optimizers sgd,sam --noise 40 --seeds 2
    python -m experiments fashion-mnist-mlp --render

A study is a file of settings, experiments/studies/*.json or your own. Trials on a held-out part of the training set
pick each optimizer's arguments, as many trials for each; these are then trained on all of the training part, with
every seed, and the accuracy that counts is that of the last epoch on the test part. Every optimizer gets the same
data, initial weights, wrong labels, order of minibatches and schedule; only the seed changes these.

Each run is kept in OUT/runs.jsonl as it ends. The command can be stopped at any time; given again it goes on, with
other --optimizers, --noise or --seeds too. Tables and pictures are made of that file alone.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

try:
    import torch
    from rich.console import Console

    from . import runner, tables
    from .data import Failure
    from .pictures import draw
    from .study import STUDIES, Study, from_settings, read_study
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


def percentages(text: str) -> list[float]:
    """Numbers with commas between."""
    try:
        levels = [float(part) for part in text.split(",")]
    except ValueError:
        levels = [math.nan]
    if any(math.isnan(level) for level in levels):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of percentages")
    return levels


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
    names = ", ".join(sorted(path.stem for path in STUDIES.glob("*.json")))
    parser.add_argument(
        "study", nargs="?", default="digits", help=f"{names}, or the path of a file; default: digits", metavar="STUDY"
    )
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="folder of Fashion-MNIST's four files, .gz or not")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: results/ and the study's name")
    parser.add_argument("--render", action="store_true", help="train nothing: tables and pictures of what OUT has")
    parser.add_argument("--device", type=usable_device, default="cpu", help="cpu, cuda, cuda:0, ...; default: cpu")
    parser.add_argument("--processes", type=positive, metavar="N", help="default: one a core, and one on a GPU")
    parser.add_argument("--optimizers", type=lambda text: text.split(","), metavar="NAMES", help="these only, for now")
    parser.add_argument("--noise", type=percentages, metavar="PERCENT", help="these levels only, for now")
    parser.add_argument("--seeds", type=positive, metavar="N", help="the first N only, for now")
    return parser


def part_of(study: Study, options: argparse.Namespace) -> Study:
    """What of the study is asked for."""
    chosen: dict[str, Any] = {}
    if options.optimizers is not None:
        known = {name.lower(): name for name in study.optimizers}
        wanted = [text.strip().lower() for text in options.optimizers]
        for name in wanted:
            if name not in known:
                raise Failure(f"--optimizers: {name!r} is not of the study; there are {', '.join(known)}")
        chosen["optimizers"] = {name: study.optimizers[name] for name in study.optimizers if name.lower() in wanted}
    for level in options.noise or ():
        if level not in study.noise:
            raise Failure(f"--noise: {level:g} is not of the study; there are {', '.join(map(str, study.noise))}")
    if options.noise is not None:
        chosen["noise"] = [level for level in study.noise if level in options.noise]
    if options.seeds is not None:
        if options.seeds > study.seeds:
            raise Failure(f"--seeds {options.seeds}: the study has {study.seeds}")
        chosen["seeds"] = options.seeds
    return replace(study, **chosen)


def run(options: argparse.Namespace) -> None:
    path = Path(options.study)
    path = path if path.suffix == ".json" else STUDIES / f"{options.study}.json"
    if not path.is_file():
        names = ", ".join(sorted(known.stem for known in STUDIES.glob("*.json")))
        raise Failure(f"there is no study {options.study!r}: there are {names}, and files that end in .json")
    study = read_study(path)
    part = part_of(study, options)
    if study.dataset == "digits" and options.data_dir is not None:
        raise Failure("--data-dir: digits come with scikit-learn")
    if study.dataset != "digits" and options.data_dir is None and not options.render:
        raise Failure(f"{path.stem} needs --data-dir, the folder of its four files")
    out = options.out or Path("results") / path.stem
    if not options.render:
        processes = options.processes or (1 if options.device.type == "cuda" else len(os.sched_getaffinity(0)))
        runner.finish(study, part, out / "runs.jsonl", options.data_dir, options.device, processes)
    render(out, path.stem, study)


def render(out: Path, name: str, asked: Study) -> None:
    """Print and write what the file has, which is of the study that was asked for."""
    path = out / "runs.jsonl"
    if not path.is_file():
        raise Failure(f"--render: there is no {path}")
    headers, runs = runner.read(path)
    if not headers:
        raise Failure(f"{path} is empty")
    study = from_settings(headers[0]["settings"])
    if (study.dataset, study.model) != (asked.dataset, asked.model):
        raise Failure(f"{path} has runs of {study.model} on {study.dataset}: it is not of {name}")
    rows = tables.make_rows(study, runs)
    made = [tables.accuracy_table(rows), tables.difference_table(study, rows), tables.price_table(study, rows)]
    trials = tables.trial_table(study, runs)
    commits = dict.fromkeys(header.get("commit", "") for header in reversed(headers))
    text = "\n".join(table.markdown() for table in (*made, trials))
    (out / "tables.md").write_text(f"# {name}\n\nCommit: {', '.join(commits)}.\n\n{text}", encoding="utf-8")
    written, left_out = draw(rows, f"{name}, seeds: {max((len(row.runs) for row in rows), default=0)}", out)
    for table in made:
        Console().print(table.rich())
    print(f"in {out}: {', '.join(['runs.jsonl', 'tables.md', *written])}")
    for line in left_out:
        print(line)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 2 for wrong input."""
    options = make_parser().parse_args(argv)
    try:
        run(options)
    except Failure as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except OSError as e:  # a file or folder that the user named
        if e.filename is None:
            raise
        print(f"error: {e.filename}: {e.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
