"""``python -m bench``: run the benchmarks, write the JSON, print the table."""

from __future__ import annotations

import argparse
import re
import sys
from functools import partial
from pathlib import Path

import torch

from . import render
from .device import Cpu, Gpu
from .gpu import SECTIONS, Plan, Run, dry, full

HERE = Path(__file__).parent
NO_MEANING = "DRY RUN on the CPU: the numbers mean nothing."


def run_on_cpu(args: argparse.Namespace) -> int:
    """Under pytest-benchmark; see ``bench_*.py``."""
    import pytest

    out = args.out or HERE / "results" / ("quick.json" if args.quick else "cpu.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    options = [f"--{flag}" for flag in ("quick", "every") if getattr(args, flag)]
    if args.shapes:
        options.append(f"--shapes={args.shapes}")
    code = pytest.main([str(HERE), "-c", str(HERE / "pytest.ini"), "-q", f"--benchmark-json={out}", *options])
    if code == pytest.ExitCode.OK:
        print(render.render(render.load(out)))
    return int(code)


def run_on_gpu(args: argparse.Namespace, plan: Plan, sections: list[str]) -> int:
    """With the device's own clock; see ``gpu/``. Rows that failed are in the JSON, and make this return 1."""
    machine = Cpu() if args.dry_run else Gpu()
    out = args.out
    if out is None and not args.dry_run:
        out = HERE / "results" / f"{re.sub('[^a-z0-9]+', '-', machine.name.lower())}.json"
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    flags = {"dry-run": args.dry_run, "every": args.every}
    words = ["python -m bench --device cuda", *(f"--{flag}" for flag, given in flags.items() if given)]
    words += [f"--{option} {value}" for option in ("sections", "shapes") if (value := getattr(args, option))]
    run = Run(plan, machine, " ".join(words), args.every, out, partial(print, file=sys.stderr, flush=True))
    if args.dry_run:
        print(NO_MEANING, flush=True)
    for section in sections:
        SECTIONS[section](run)
    run.save()  # failures after the last row, too
    print(render.render(run.results()))
    if args.dry_run:
        print(NO_MEANING)
    return int(bool(run.failed))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--every", action="store_true", help="torch.compile and GPT-2 in every row: many minutes more")
    parser.add_argument("--shapes", default="", help="comma-separated, such as resnet50,small400; default: all")
    parser.add_argument(
        "--out", type=Path, help="default: bench/results/ and cpu.json, quick.json with --quick, the GPU's name"
    )
    cpu = parser.add_argument_group("--device cpu")
    cpu.add_argument("--quick", action="store_true", help="tiny shapes: under a minute, numbers without meaning")
    cuda = parser.add_argument_group("--device cuda")
    cuda.add_argument("--sections", default="", help="comma-separated, of kernels,steps,iteration; default: all")
    cuda.add_argument(
        "--dry-run", action="store_true", help="the same code on the CPU in tiny sizes, no results file without --out"
    )
    args = parser.parse_args()
    if args.device == "cpu":
        if args.sections or args.dry_run:
            parser.error("--sections and --dry-run go with --device cuda")
        return run_on_cpu(args)
    if args.quick:
        parser.error("--quick goes with --device cpu; --dry-run is its like")
    sections = [name for name in args.sections.split(",") if name] or list(SECTIONS)
    if unknown := set(sections) - SECTIONS.keys():
        parser.error(f"--sections: no {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --dry-run runs the same code on the CPU")
    try:
        plan = dry() if args.dry_run else full(args.shapes)
    except ValueError as error:
        parser.error(str(error))
    return run_on_gpu(args, plan, sections)


if __name__ == "__main__":
    sys.exit(main())
