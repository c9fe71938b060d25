"""The example of the sharpest directions: a tiny run of all of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

for package in ("scipy", "sklearn", "matplotlib", "rich"):
    pytest.importorskip(package)

from examples.sharpest_directions import NUDGES, STRETCHES, main  # noqa: E402


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
