"""``python -m bench``: run the benchmarks under pytest-benchmark, write the JSON, print the table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from . import render

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: under a minute, numbers without meaning")
    parser.add_argument("--every", action="store_true", help="torch.compile and GPT-2 in every row: many minutes more")
    parser.add_argument("--shapes", default="", help="comma-separated, such as resnet50,small400; default: all")
    parser.add_argument("--out", type=Path, help="default: bench/results/cpu.json, quick.json with --quick")
    args = parser.parse_args()
    out = args.out or HERE / "results" / ("quick.json" if args.quick else "cpu.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    options = [f"--{flag}" for flag in ("quick", "every") if getattr(args, flag)]
    if args.shapes:
        options.append(f"--shapes={args.shapes}")
    code = pytest.main([str(HERE), "-c", str(HERE / "pytest.ini"), "-q", f"--benchmark-json={out}", *options])
    if code == pytest.ExitCode.OK:
        print(render.render(render.load(out)))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
