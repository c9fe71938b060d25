"""The examples: a tiny run of each, of all of it."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("scipy", "sklearn", "matplotlib", "rich"):
    pytest.importorskip(package)

from examples import noisy_labels, track_sharpness  # noqa: E402
from examples.sharpest_directions import NUDGES, STRETCHES, main  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def test_sharpest_directions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new"
    tiny = {
        "seeds": 1,
        "epochs": 1,
        "width": 2,
        "hessian-examples": 60,
        "train-size": 330,
        "batch-size": 20,
        "out": out,
    }
    main([f"--{name}={value}" for name, value in {**tiny, "out": out}.items()])
    record = json.loads((out / "sharpest_directions.json").read_text())
    assert [(run["lr"], run["batch_size"]) for run in record["sgd"]] == [
        (0.05 / 3, 20), (0.05, 20), (0.15000000000000002, 20), (0.05, 5), (0.05, 80)
    ]  # fmt: skip
    assert [run["nudge"] for run in record["nudged"]] == [*NUDGES, None]
    for run in record["sgd"]:
        assert [len(values) for values in run["eigenvalues"]] == [5, 5]
        assert all(values == sorted(values, reverse=True) for values in run["eigenvalues"])
        assert [len(losses) for losses in run["along"]] == [len(STRETCHES)] * 2
        assert all(math.isfinite(loss) for losses in run["along"] for loss in losses)
    # From one start: until the first directions are nudged along all are the same.
    assert len({tuple(run["eigenvalues"][0]) for run in record["nudged"]}) == 1
    distances = [run["distance"] for run in record["nudged"]]
    assert len(set(distances)) == len(distances)
    assert all(run["frobenius_end"] == run["frobenius"][-1] > 0 for run in record["nudged"])
    assert {path.name for path in out.glob("*.png")} == {"eigenvalues.png", "steps.png", "nudges.png"}
    said = capsys.readouterr().out
    assert all(title in said for title in ("a) SGD", "b) SGD", "c) NudgedSGD"))


def test_noisy_labels(capsys: pytest.CaptureFixture[str]) -> None:
    noisy_labels.main(["--train-size=600", "--noise=10", "--epochs=3", "--seeds=1", "--rho=0.3"])
    rows = re.findall(r"^(\w+) +([\d.]+) % +([\d.]+) % \( *([\d.]+)\) +([\d.]+)$", capsys.readouterr().out, re.M)
    assert [row[0] for row in rows] == ["SGD", "SAM", "AESAM"]
    assert all(float(accuracy) > 70 for row in rows for accuracy in row[1:3])
    sgd, sam, aesam = (float(row[4]) for row in rows)
    assert (sgd, sam) == (3, 6)
    assert 3 < aesam < 6


def test_track_sharpness(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    track_sharpness.main([f"--out={tmp_path}", "--train-size=600", "--epochs=2", "--every=12"])
    with (tmp_path / "aesam.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in table] == ["0", "12", "24"]
    assert float(table[-1]["loss"]) < float(table[0]["loss"])
    # The page has a row for each column.
    page = (ROOT / "docs" / "tutorials" / "track_sharpness.md").read_text(encoding="utf-8")
    described = [name for row in re.findall(r"^\| (`.*?) \|", page, re.M) for name in re.findall(r"`(\w+)`", row)]
    assert sorted(described) == sorted(table[0])
    assert {path.name for path in tmp_path.glob("*.png")} == {"sgd.png", "sam.png", "aesam.png"}
    assert capsys.readouterr().out.count("\n    24 ") == 3


@pytest.mark.slow  # importing its packages takes seconds
@pytest.mark.parametrize("optimizer", ["AESAM", "AdamW"])
def test_finetune_transformer(optimizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("accelerate", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    from examples import finetune_transformer

    finetune_transformer.main([f"--optimizer={optimizer}", "--images=200", "--epochs=4", "--pretraining-epochs=3"])
    out = capsys.readouterr().out
    accuracy = re.match(rf"{optimizer}: ([\d.]+) % of 696 test images after 40 steps\n", out)
    assert accuracy is not None, out
    assert float(accuracy[1]) > 35  # a fifth is what guessing gets
    assert ("second pass" in out) == (optimizer == "AESAM")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_m_sharpness() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, "-m", "examples.m_sharpness", "--epochs=2"],
        cwd=ROOT, capture_output=True, text=True, timeout=240, env=variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"^(\w+) *: test accuracy ([\d.]+)%, norms ([\d.]+), ([\d.]+), the same weights$", done.stdout, re.M
    )
    assert [row[0] for row in rows] == ["global", "rank"]
    assert all(float(row[1]) > 60 for row in rows)
    assert [row[2] == row[3] for row in rows] == [True, False]
