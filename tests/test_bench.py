"""The benchmarks: what they compare is equal, what they render is complete. No timing decides anything."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import render
from bench.baselines import BASES, RHO, Algorithm, Base, Unavailable
from bench.contenders import CONTENDERS
from bench.measure import Problem, WrongValues, step
from bench.shapes import SHAPES, count, tiny

TOTALS = {"resnet18": 11_689_512, "resnet50": 25_557_032, "vit_s16": 22_050_664, "gpt2_small": 124_439_808}
EAGER = [name for name, contender in CONTENDERS.items() if not contender.slow_start]


@pytest.mark.parametrize("name", TOTALS)
def test_totals_are_those_of_the_models(name: str) -> None:
    assert count(SHAPES[name]()) == TOTALS[name]


def test_small_tensors() -> None:
    shapes = SHAPES["small400"]()
    assert len(shapes) == 400
    assert {count([shape]) for shape in shapes} == {300, 400}


@pytest.mark.parametrize("algorithm", RHO)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("contender", EAGER)
def test_contenders_agree_in_float64(contender: str, algorithm: Algorithm, base: Base) -> None:
    problem = Problem(tiny(), algorithm, base, dtype=torch.float64)
    results = []
    for name in ("loop", contender):
        leaves = problem.leaves()
        try:
            optimizer = CONTENDERS[name].make(leaves, algorithm, base)
        except Unavailable as reason:
            pytest.skip(str(reason))
        for _ in range(3):
            step(optimizer)
        results.append([leaf.detach() for leaf in leaves])
    for loop, other, start in zip(*results, problem.weights, strict=True):
        assert not torch.equal(loop, start)
        # pytorch_optimizer sums its norm in float32.
        torch.testing.assert_close(other, loop, rtol=1e-6, atol=1e-9)


def test_wrong_values_are_not_timed() -> None:
    problem = Problem(tiny(), "sam", "sgd")
    problem.build("ours")
    problem.reference[3].add_(1e-3)
    with pytest.raises(WrongValues, match=r"ours: tensor 3 is off by 0\.001"):
        problem.build("ours")


def test_bytes() -> None:
    def size(contender: str, algorithm: Algorithm, base: Base) -> int | None:
        return CONTENDERS[contender].bytes_per_param(algorithm, base)

    assert [size("ours", a, b) for a in RHO for b in BASES] == [44, 52, 48, 56]
    assert [size("ours, no check", a, b) for a in RHO for b in BASES] == [40, 48, 44, 52]
    assert size("pytorch_optimizer", "asam", "sgd") is None


def _info(contender: str, ratio: float, size: int | None = 44) -> dict[str, Any]:
    rate = None if size is None else 12.5
    return {
        "kind": "step",
        "shape": "resnet50",
        "tensors": 161,
        "params": 25_557_032,
        "algorithm": "sam",
        "base": "sgd",
        "contender": contender,
        "bytes_per_param": size,
        "gb_per_s": rate,
        "copy_gb_per_s": 14.0,
        "copy_share": None if rate is None else rate / 14.0,
        "host_us": 120.0,
        "ours_ms": 90.0,
        "ratio": ratio,
    }


@pytest.fixture
def results() -> dict[str, Any]:
    rows = [_info("ours", 1.01), _info("loop", 3.21), _info("foreach", 0.87, None)]
    rows.append({"kind": "iteration", "model": "convnet", "batch": 8, "params": 11_000_000, "contender": "ours"})
    rows[-1].update(plain_ms=100.0, ratio=1.044)
    return {
        "benchmarks": [{"stats": {"median": 0.09 * row["ratio"]}, "extra_info": row} for row in rows],
        "environment": {
            "device": "A CPU",
            "cores": 2,
            "threads": 2,
            "versions": {"python": "3.11", "torch": "2.13", "pytorch_optimizer": None},
            "commit": "unknown",
            "date": "2026-01-01 00:00 UTC",
            "command": "python -m bench",
            "left_out": ["pytorch_optimizer is not installed"],
        },
    }


def test_render_keeps_losing_rows(results: dict[str, Any]) -> None:
    table = render.render(results)
    row = next(line for line in table.splitlines() if line.startswith("| ResNet-50"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "ResNet-50 (25.6M, 161 tensors)",
        "SAM + SGD-m",
        "90.90",
        "12.5 (89%)",
        "120",
        "3.21",
        "0.87",
    ]
    assert "Ours against itself: 1.01 to 1.01." in table
    assert "| convnet (11.0M), batch 8 | ours | 94.0 | 100.0 | 1.044 |" in table
    assert "A CPU, 2 cores, 2 threads; python 3.11, torch 2.13, pytorch_optimizer missing; commit unknown" in table
    assert "Left out: pytorch_optimizer is not installed." in table


def test_render_without_ours_shows_the_rest(results: dict[str, Any]) -> None:
    partial = copy.deepcopy(results)
    del partial["benchmarks"][0]
    assert "| - | - | - | 3.21 | 0.87 |" in render.render(partial)


def test_insert_is_idempotent(results: dict[str, Any]) -> None:
    table = render.render(results)
    readme = f"above\n\n{render.BEGIN}\nold\n{render.END}\n\nbelow\n"
    once = render.insert(readme, table)
    assert once == render.insert(once, table)
    assert once.startswith("above\n\n")
    assert once.endswith("\n\nbelow\n")
    assert "old" not in once
    with pytest.raises(ValueError, match="no markers"):
        render.insert("nothing here", table)


def test_quick_run_writes_what_render_reads(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    root = Path(__file__).resolve().parents[1]
    out = tmp_path / "quick.json"
    command = [sys.executable, "-m", "bench", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    text = out.read_text(encoding="utf-8")
    results = json.loads(text)
    assert {"device", "versions", "commit", "date", "command", "left_out"} <= results["environment"].keys()
    assert str(root) not in text
    assert str(tmp_path) not in text
    assert "node" not in results["machine_info"]
    steps = [b["extra_info"] for b in results["benchmarks"] if b["extra_info"]["kind"] == "step"]
    assert {(s["algorithm"], s["base"]) for s in steps if s["contender"] == "ours"} == {
        (algorithm, base) for algorithm in RHO for base in BASES
    }
    readme = tmp_path / "README.md"
    readme.write_text(f"{render.BEGIN}\n{render.END}\n", encoding="utf-8")
    subprocess.run(
        [sys.executable, "-m", "bench.render", str(out), "--readme", str(readme)], cwd=root, check=True, timeout=60
    )
    assert "| tiny (2k, 7 tensors) | SAM + SGD-m |" in readme.read_text(encoding="utf-8")
