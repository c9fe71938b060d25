"""``python -m bench``: run the benchmarks, write the JSON, print the tables."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from functools import partial
from pathlib import Path

import torch

from . import render
from .measure import Cpu, Gpu, Run
from .ops import kernels
from .plans import plan
from .steps import iterations, kinds, steps

RESULTS = Path(__file__).parent / "results"
NO_MEANING = "DRY RUN on the CPU: the numbers mean nothing."
# In this order: a run that is stopped loses the last ones.
SECTIONS = {"kernels": kernels, "steps": steps, "iteration": iterations, "kinds": kinds}


def _out(args: argparse.Namespace, name: str) -> Path | None:
    if args.out is None:
        if args.dry_run:
            return None
        stem = "quick" if args.quick else args.device if args.device == "cpu" else name.lower()
        args.out = RESULTS / f"{re.sub('[^a-z0-9]+', '-', stem)}.json"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return args.out


def main() -> int:
    """Rows that failed are in the JSON, and make this return 1."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--every", action="store_true", help="torch.compile and GPT-2 in every row: many minutes more")
    parser.add_argument("--shapes", default="", help="comma-separated, such as resnet50,small400; default: all")
    parser.add_argument("--sections", default="", help=f"comma-separated, of {','.join(SECTIONS)}; default: all")
    parser.add_argument("--only", default="", help="rows whose name has this regular expression: 'resnet50 sam sgd'")
    parser.add_argument("--out", type=Path, help="default: cpu.json, quick.json or the GPU's name in bench/results/")
    parser.add_argument("--quick", action="store_true", help="on the CPU in tiny sizes: numbers without meaning")
    parser.add_argument(
        "--dry-run", action="store_true", help="what --device cuda does, on the CPU in tiny sizes; no default --out"
    )
    args = parser.parse_args()
    cuda = args.device == "cuda"
    if args.dry_run and not cuda:
        parser.error("--dry-run goes with --device cuda")
    if args.quick and cuda:
        parser.error("--quick goes with --device cpu; --dry-run is its like")
    sections = [name for name in args.sections.split(",") if name] or list(SECTIONS)
    if unknown := set(sections) - SECTIONS.keys():
        parser.error(f"--sections: no {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if cuda and not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --dry-run runs the same code on the CPU")
    try:
        chosen = plan(cuda, args.dry_run or args.quick, args.shapes, args.every)
    except ValueError as error:
        parser.error(str(error))

    if args.quick or args.dry_run:
        torch.set_num_threads(1)  # threads that wait for each other on a busy machine make minutes of seconds
    machine = Gpu() if cuda and not args.dry_run else Cpu()
    words = ["python -m bench", *(["--device cuda"] if cuda else [])]
    words += [f"--{flag}" for flag in ("quick", "dry-run", "every") if getattr(args, flag.replace("-", "_"))]
    words += [
        f"--{name} {shlex.quote(value)}" for name in ("sections", "shapes", "only") if (value := getattr(args, name))
    ]
    out, say = _out(args, machine.describe()[0]), partial(print, file=sys.stderr, flush=True)
    run = Run(chosen, machine, args.dry_run, args.every, args.only, " ".join(words), out, say)
    if args.dry_run:
        print(NO_MEANING, flush=True)
    for section in sections:
        run.measure(SECTIONS[section](run))
    run.save()  # failures after the last row, too
    print(render.render(run.results()))
    if args.dry_run:
        print(NO_MEANING)
    return int(bool(run.failed))


if __name__ == "__main__":
    sys.exit(main())
