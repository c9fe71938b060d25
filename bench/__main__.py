"""``python -m bench``: run the benchmarks, write the JSON, print the tables."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

import torch

from . import render
from .measure import Machine, Run
from .ops import kernels
from .plans import Plan
from .steps import iterations, kinds, steps

RESULTS = Path(__file__).parent / "results"
# In this order: a run that is stopped loses the last ones.
SECTIONS = {"kernels": kernels, "steps": steps, "iteration": iterations, "kinds": kinds}


def main() -> int:
    """Rows that failed are in the JSON, and make this return 1."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--every", action="store_true", help="torch.compile and GPT-2 in every row: many minutes more")
    add("--shapes", default="", help="comma-separated, such as resnet50,small400; default: all")
    add("--sections", default="", help=f"comma-separated, of {','.join(SECTIONS)}; default: all")
    add("--only", default="", help="rows whose name has this regular expression, such as 'resnet50 sam sgd'")
    add("--out", type=Path, help="default: cpu.json or the GPU's name in bench/results/; --dry-run writes none")
    add("--quick", action="store_true", help="on the CPU in tiny sizes, quick.json: numbers without meaning")
    add("--dry-run", action="store_true", help="what --device cuda does, on the CPU in tiny sizes")
    args = parser.parse_args()
    cuda, tiny = args.device == "cuda", args.quick or args.dry_run
    if tiny and args.dry_run != cuda:
        parser.error("--quick goes with --device cpu, --dry-run goes with --device cuda")
    sections = [name for name in args.sections.split(",") if name] or list(SECTIONS)
    if unknown := set(sections) - SECTIONS.keys():
        parser.error(f"--sections: no {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if cuda and not tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --dry-run runs the same code on the CPU")
    try:
        plan = Plan(cuda, tiny, args.shapes, args.every)
    except ValueError as error:
        parser.error(str(error))

    if tiny:
        torch.set_num_threads(1)  # threads that wait for each other on a busy machine make minutes of seconds
    machine = Machine(cuda and not tiny)
    if args.out is None and not args.dry_run:
        name = machine.describe()[0].lower() if cuda else "quick" if tiny else "cpu"
        args.out = RESULTS / f"{re.sub('[^a-z0-9]+', '-', name)}.json"
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    words = ["python -m bench", *["--device cuda"] * cuda, *["--quick"] * args.quick, *["--dry-run"] * args.dry_run]
    words += ["--every"] * args.every
    words += [f"--{name} {shlex.quote(x)}" for name in ("sections", "shapes", "only") if (x := getattr(args, name))]
    run = Run(plan, machine, args.dry_run, args.only, " ".join(words), args.out)
    for section in sections:
        run.measure(SECTIONS[section](run))
    run.save()  # failures after the last row, too
    print(render.render(run.results()))
    return int(bool(run.failed))


if __name__ == "__main__":
    sys.exit(main())
