"""The comparison study: resumed runs, what trials pick, tables, what a run counts, wrong input, flatness."""

from __future__ import annotations

import gzip
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.policy import Bernoulli

for package in ("scipy", "sklearn", "matplotlib", "rich"):
    pytest.importorskip(package)

import matplotlib.pyplot as plt  # noqa: E402
from scipy import stats  # noqa: E402

from experiments import __main__ as command  # noqa: E402
from experiments import flatness, runner, tables, training  # noqa: E402
from experiments.data import Failure, augmented, hold_out, load_data, with_noise  # noqa: E402
from experiments.models import MODELS  # noqa: E402
from experiments.study import STUDIES, Job, Run, Study, from_settings, make_optimizer, read_study  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PICTURES = {"compare.png", "adaptive.png", "salr.png", "slice.png"}
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")

# A study of a second: three trials each, five kinds of final runs.
SETTINGS: dict[str, Any] = {
    "dataset": "digits",
    "model": "mlp-64-256-256-10-bn",
    "train_size": 128,
    "held_out": 28,
    "augment": False,
    "pretrain": None,
    "batch_size": 32,
    "base": {"name": "SGD", "momentum": 0.9, "weight_decay": 5e-4},
    "warmup_epochs": 1,
    "hessian_examples": 20,
    "epochs": 2,
    "noise": [0, 40],
    "seeds": 2,
    "trial_seeds": 1,
    "optimizers": {
        "SGD": {"lr": [0.05], "epochs": [1, 2, 4]},
        "SAM": {"lr": [0.05], "rho": [0.1, 0.5, 2]},
        "AESAM": {"lr": [0.05], "rho": [0.1, 0.5, 2]},
    },
}
DEFAULTS: dict[str, Any] = {  # two trials of every class with a picture or a count of its own
    "optimizers": {
        "SGD": {"lr": [0.05], "epochs": [1, 2]},
        **{
            name: {"lr": [0.05, 0.1], "rho": [0.5]} for name in ("SAM", "ASAM", "SSSAM", "AESAM", "ESAM", "MomentumSAM")
        },
        **{name: {"lr": [0.05, 0.1], "rho": [0.5], "alpha": [0.2]} for name in ("LookSAM", "AELookSAM")},
        "SALR": {"lr": [0.05, 0.1]},
    },
    "noise": [0],
    "seeds": 1,
    "epochs": 1,
}


def settings_file(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.json"
    path.write_text(json.dumps({**SETTINGS, **changes}))
    return path


def study_of(**changes: Any) -> Study:
    return from_settings(json.loads(json.dumps({**SETTINGS, **changes})))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine threads wait for each other longer than such small steps take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def idx(array: np.ndarray, magic: bytes | None = None) -> bytes:
    """An IDX file of bytes."""
    magic = bytes((0, 0, 8, array.ndim)) if magic is None else magic
    return magic + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()


def fashion_files(train: int = 70, test: int = 30, seed: int = 0) -> dict[str, bytes]:
    """The four files, by name, one of them compressed."""
    rng = np.random.default_rng(seed)
    files = {}
    for part, count in (("train", train), ("t10k", test)):
        files[f"{part}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (count, 28, 28)))
        files[f"{part}-labels-idx1-ubyte"] = idx(rng.integers(0, 10, (count,)))
    files["train-images-idx3-ubyte.gz"] = gzip.compress(files.pop("train-images-idx3-ubyte"))
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


def compared(out: Path) -> list[str]:
    """The lines in an order of their own, without times and dates."""
    return sorted(
        json.dumps({k: v for k, v in line.items() if k not in ("seconds", "ended")}, sort_keys=True)
        for line in lines_of(out)
    )


def check_pictures(out: Path, names: set[str]) -> None:
    """These and no others are there, of a decent size, and with something in every quarter."""
    assert {path.name for path in out.glob("*.png")} == names
    for name in names:
        pixels = plt.imread(out / name)[..., :3]
        height, width, _ = pixels.shape
        assert height > 500
        assert width > 800
        for rows in (slice(None, height // 2), slice(height // 2, None)):
            for columns in (slice(None, width // 2), slice(width // 2, None)):
                assert (pixels[rows, columns].min(-1) < 0.8).mean() > 0.002, name


def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    """The command, from the root of the tree."""
    return subprocess.Popen(
        [sys.executable, "-m", "experiments", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1", **variables},
    )


def script(*arguments: str, **variables: str) -> tuple[int, str, str]:
    process = start(*arguments, **variables)
    said, complained = process.communicate(timeout=120)
    return process.returncode, said, complained


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that was never interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    assert command.main([str(settings_file(folder)), "--out", str(folder), "--processes", "1"]) == 0
    return folder


def test_killed_study_goes_on(finished: Path, tmp_path: Path) -> None:
    """SIGKILL of the first process, twice, with two others at work; a run that was kept is not run again."""
    arguments = [str(settings_file(tmp_path)), "--out", str(tmp_path), "--processes", "2"]
    path, kept = tmp_path / "runs.jsonl", []
    for count in (4, 14):
        process = start(*arguments)
        while not path.exists() or path.read_bytes().count(b"\n") < count:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)  # the others have its outputs: they end, too
        kept += path.read_bytes().splitlines(keepends=True)[len(kept) :]
        kept = [line for line in kept if line.endswith(b"\n")]
    assert len(kept) < len(lines_of(finished))
    code, said, complained = script(*arguments)
    assert code == 0, complained
    assert compared(tmp_path) == compared(finished)
    assert path.read_bytes().splitlines(keepends=True)[: len(kept)] == kept
    assert all(text in said for text in ("SGD, picked", "AESAM", "tables.md", "compare.png"))
    assert "…" not in said  # rich cuts what does not fit
    assert (tmp_path / "tables.md").read_text().count("|") == (finished / "tables.md").read_text().count("|")


@pytest.mark.parametrize("cut", [1, 40, 10**6])
def test_resumed(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    """An interruption in the trials and one in the final runs; of the last line so many bytes are lost."""
    trained: Counter[Job] = Counter()
    left = 5

    def train(data: Any, study: Study, job: Job, tick: Callable[[], None]) -> Run:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        trained[job] += 1
        return training.train(data, study, job, tick)

    monkeypatch.setattr(runner, "train", train)
    monkeypatch.setattr(command, "render", lambda *_: None)
    arguments = [str(settings_file(tmp_path)), "--out", str(tmp_path), "--processes", "1"]
    path = tmp_path / "runs.jsonl"
    for left in (5, 20, 10**6):
        code = command.main(arguments)
        assert code == (0 if left else 130)
        if not left:
            content = path.read_bytes()
            last = content[:-1].rfind(b"\n") + 1
            path.write_bytes(content[: max(last, len(content) - cut)])
    assert compared(tmp_path) == compared(finished)
    assert sum(trained.values()) == len(lines_of(finished)) - 1 + 2  # the header is none; two lines were cut
    assert max(trained.values()) == 2
    command.main(arguments)
    assert sum(trained.values()) == len(lines_of(finished)) + 1


def test_no_run_twice(finished: Path) -> None:
    header, *runs = lines_of(finished)
    known = [json.dumps([run[name] for name in Job._fields], sort_keys=True) for run in runs]
    assert len(set(known)) == len(known)
    assert {"commit", "versions", "device", "examples"} <= header.keys()
    assert header["settings"] == SETTINGS
    trials = Counter((run["noise"], run["optimizer"]) for run in runs if run["stage"] == "trial")
    assert trials == {(noise, name): 3 for noise in (0, 40) for name in SETTINGS["optimizers"]}
    for run in runs:
        epochs = run["arguments"]["epochs"]
        assert all(len(run[curve]) == epochs for curve in ("train_loss", "accuracy", "evaluations", "seconds"))
        assert all(sorted(set(run[curve])) == run[curve] for curve in ("evaluations", "seconds"))
        assert (run["sharpness"] is None) == (run["hessian_eigenvalue"] is None) == (run["stage"] == "trial")


@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.9999])
def test_a_cut_line_is_all_that_is_lost(finished: Path, tmp_path: Path, place: float) -> None:
    content = (finished / "runs.jsonl").read_bytes()
    path = tmp_path / "runs.jsonl"
    path.write_bytes(content[: int(place * len(content))])
    whole = path.read_bytes().count(b"\n")
    headers, runs = runner.read(path)
    assert len(headers) + len(runs) == whole
    with runner.opened(path) as file:
        runner.append(file, "{}\n")
    assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[:whole]) + b"{}\n"


def test_render_needs_the_file_alone(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("finish", "load_data", "train"):
        monkeypatch.delattr(runner, name)
    (tmp_path / "runs.jsonl").write_bytes((finished / "runs.jsonl").read_bytes())
    (tmp_path / "salr.png").touch()  # of another run
    assert command.main(["digits", "--out", str(tmp_path), "--render"]) == 0
    said = capsys.readouterr().out
    assert all((f"left out {name}: it needs " in said) == (name == "salr.png") for name in PICTURES)
    check_pictures(tmp_path, PICTURES - {"salr.png"})
    written = (tmp_path / "tables.md").read_text().splitlines()[1:]
    assert written == (finished / "tables.md").read_text().splitlines()[1:]
    assert sum(line.endswith("| picked |") for line in written) == 6
    (tmp_path / "runs.jsonl").write_text(json.dumps({"settings": SETTINGS}) + "\n")  # stopped before a run ended
    assert command.main(["--out", str(tmp_path), "--render"]) == 0


@pytest.mark.parametrize(
    "kept", sorted((ROOT / "experiments" / "results").glob("*/runs.jsonl")), ids=lambda p: p.parent.name
)
def test_kept_runs(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables beside a file of runs are of that file, and the pages show the accuracies and differences of these."""
    monkeypatch.setattr(command, "draw", lambda *_: ([], []))
    (tmp_path / "runs.jsonl").write_bytes(kept.read_bytes())
    command.render(tmp_path, kept.parent.name, command.read_study(STUDIES / f"{kept.parent.name}.json"))
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert text == kept.with_name("tables.md").read_text(encoding="utf-8")
    shown = text.split("\n\nWhat a step takes")[0].splitlines()
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in shown if line.startswith("| ")]
    assert len(rows) > 10
    assert [line for line in rows if line not in page] == []


def test_pieces(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts of a study, one after the other, are the whole; a change of what all runs share is refused."""
    monkeypatch.setattr(command, "render", lambda *_: None)
    arguments = [str(settings_file(tmp_path)), "--out", str(tmp_path), "--processes", "1"]
    pieces = (["--optimizers", "sgd,SAM", "--noise", "40"], ["--noise", "40", "--seeds", "1"], ["--noise", "0"], [])
    lines = []
    for piece in pieces:
        assert command.main([*arguments, *piece]) == 0
        lines.append(len(lines_of(tmp_path)))
    assert lines == sorted(lines)
    assert lines[0] < lines[1] < lines[2] < lines[3] == len(lines_of(finished))
    assert compared(tmp_path) == compared(finished)
    settings_file(tmp_path, batch_size=16)
    before = (tmp_path / "runs.jsonl").read_bytes()
    capsys.readouterr()
    check_error(capsys, arguments, "batch_size 32, not 16")
    assert (tmp_path / "runs.jsonl").read_bytes() == before
    settings_file(tmp_path, noise=[40], seeds=1)  # less: nothing is left to run, and the file says what is asked for
    monkeypatch.delattr(runner, "train")
    assert command.main(arguments) == 0
    assert lines_of(tmp_path)[-1]["settings"]["noise"] == [40]


def test_one_process_writes(tmp_path: Path) -> None:
    with runner.opened(tmp_path / "runs.jsonl"), pytest.raises(Failure, match="is being written"):  # noqa: SIM117
        with runner.opened(tmp_path / "runs.jsonl"):
            pass


def made_up(study: Study, accuracy: Callable[[Job], float]) -> dict[Job, Run]:
    """Runs that took no training."""
    runs: dict[Job, Run] = {}
    for jobs in (study.trial_jobs, lambda: study.final_jobs(runs)):
        for job in jobs():
            curve = [accuracy(job)] * job.epochs
            runs[job] = Run(job, 10 * job.epochs, accuracy=curve, evaluations=curve, seconds=curve)
    return runs


def test_picks() -> None:
    """By the mean over the trials' seeds, the first of equals; SGD has four rows, and rows share their runs."""
    study = study_of(trial_seeds=2, noise=[40])

    def accuracy(job: Job) -> float:
        arguments = dict(job.arguments)
        value = (
            {1: 70, 2: 50, 4: 60}[job.epochs] if job.optimizer == "SGD" else {0.1: 50, 0.5: 60, 2: 60}[arguments["rho"]]
        )
        return value + (15 if arguments.get("rho") == 0.1 and job.seed % 2 else 0)

    runs = made_up(study, accuracy)
    rows = tables.make_rows(study, runs)
    assert [(row.label, row.epochs, dict(row.arguments).get("rho")) for row in rows] == [
        ("SGD", 2, None),
        ("SGD, 2x epochs", 4, None),
        ("SGD, picked", 1, None),
        ("SGD, stopped", 1, None),
        ("SAM", 2, 0.5),
        ("AESAM", 2, 0.5),
    ]
    shared = made_up(study, lambda job: job.epochs)  # the longest is picked
    finals = [job for job in shared if job.stage == "final"]
    assert len(finals) == len(set(finals)) == 4 * study.seeds
    assert len(tables.make_rows(study, shared)) == 6
    del runs[next(iter(runs))]  # a trial of SGD is missing: nothing of it is picked
    assert {row.label for row in tables.make_rows(study, runs)} == {"SAM", "AESAM"}


def test_stopped_early() -> None:
    """After the epoch that was best in the trials, whichever has it: accuracy, gradients and time are of that epoch."""
    study = study_of(trial_seeds=2, noise=[40])
    runs = made_up(study, lambda job: 50.0)
    for job, run in list(runs.items()):
        if job.optimizer == "SGD" and job.epochs == 4:
            run.accuracy = [50.0, 56.0 + job.seed % 2, 54.0, 52.0]
            run.evaluations, run.seconds = [10.0, 20.0, 30.0, 40.0], [1.0, 4.0, 9.0, 16.0]
            run.sharpness = 1.0
    curves = {
        "accuracy": [70.0, 80.0, 75.0, 60.0],
        "evaluations": [10.0, 20.0, 30.0, 40.0],
        "seconds": [1.0, 4.0, 9.0, 16.0],
    }
    for job in study.final_jobs(runs):  # the one that is stopped is not among the others
        runs.setdefault(job, Run(job, 40, **curves))
    rows = {row.label: row for row in tables.make_rows(study, runs)}
    stopped = rows["SGD, stopped"]
    assert (stopped.epochs, dict(stopped.arguments)["epochs"], stopped.is_stopped) == (2, 4, True)
    assert stopped.gradients == 2
    assert stopped.epoch_seconds == 2
    ends = {job.seed: run.accuracy[1] for job, run in runs.items() if job.stage == "final" and job.epochs == 4}
    assert stopped.accuracies == ends
    cells = {cells[1]: cells for cells in tables.price_table(study, list(rows.values())).cells}
    assert cells["SGD, stopped"][-3:] == ["-"] * 3  # these are of the end
    trials = {tuple(cells[1:4]): cells[4:] for cells in tables.trial_table(study, runs).cells}
    assert trials["SGD", "lr=0.05", "4"] == ["52.00", "56.50 (2)", "picked"]


def test_intervals() -> None:
    study = study_of(seeds=5, noise=[0])
    noise = np.random.default_rng(0).normal(size=(2, 5))

    def accuracy(job: Job) -> float:
        return 50.0 if job.stage == "trial" else 80 + float(noise[int(job.optimizer == "SAM"), job.seed])

    rows = {row.label: row for row in tables.make_rows(study, made_up(study, accuracy))}
    expected = stats.ttest_1samp(80 + noise[1], 0).confidence_interval(0.95)
    cells = {cells[1]: cells for cells in tables.accuracy_table(list(rows.values())).cells}
    assert cells["SAM"][-1] == f"± {(expected.high - expected.low) / 2:.2f}"
    assert cells["SAM"][-2] == f"{(80 + noise[1]).mean():.2f} ± {noise[1].std(ddof=1):.2f}"
    pairs = noise[1] - noise[0]
    expected = stats.ttest_1samp(pairs, 0).confidence_interval(0.95)
    cells = {cells[1]: cells for cells in tables.difference_table(study, list(rows.values())).cells}
    assert cells["SAM"][2] == f"{pairs.mean():+.2f} ± {(expected.high - expected.low) / 2:.2f}"
    assert cells["AESAM"][2] == "+0.00 ± 0.00"


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.json")), ids=lambda path: path.stem)
def test_studies(path: Path) -> None:
    """As many trials for each; SGD's epochs among them, with the others' and twice as many, and fewer."""
    study = read_study(path)
    assert len(set(Counter((job.noise, job.optimizer) for job in study.trial_jobs()).values())) == 1
    base = study.base["name"]
    assert {study.epochs, 2 * study.epochs} < set(study.optimizers[base]["epochs"])
    assert min(study.optimizers[base]["epochs"]) < study.epochs / 2
    assert all("epochs" not in grid for name, grid in study.optimizers.items() if name != base)
    assert study.seeds >= 3


BAD_SETTINGS = [
    ({"batchsize": 3}, "'batchsize' is no setting"),
    ({"noise": None, "seeds": "3"}, "seeds '3'"),
    ({"seeds": True}, "seeds True"),
    ({"batch_size": 1}, "batch_size 1"),
    ({"train_size": 1.5}, "train_size 1.5"),
    ({"base": {"momentum": 0.9}}, "has no name"),
    ({"base": {"name": "SGD", "momentum": "0.9"}}, "SGD with"),
    ({"augment": 1}, "augment 1"),
    ({"pretrain": {"classes": 5}}, "pretrain {'classes': 5}"),
    ({"pretrain": {"classes": 9, "epochs": 1, "lr": 0.1}}, "classes is from 1 to 8"),
    ({"dataset": "imagenet"}, "'imagenet'"),
    ({"model": ["mlp"]}, "['mlp']"),
    ({"model": "mlp-784-512-256-10"}, "is not for digits"),
    ({"noise": []}, "noise []"),
    ({"noise": [0, 140]}, "140"),
    ({"noise": [40, 40.0]}, "noise [40, 40.0]"),
    ({"optimizers": {}}, "optimizers"),
    ({"optimizers": {"Sam": {"lr": [0.1]}}}, "'Sam' is unknown"),
    ({"optimizers": {"Adaptive SGD": {"lr": [0.1]}}}, "'Adaptive SGD' is unknown"),
    ({"optimizers": {"Adaptive AESAM": {"lr": [0.1]}}}, "Adaptive AESAM with"),
    ({"optimizers": {"policy": {"lr": [0.1]}}}, "'policy' is unknown"),
    ({"optimizers": {"SAM": [0.1]}}, "SAM: its grid"),
    ({"optimizers": {"SAM": {"lr": 0.1}}}, "SAM: lr 0.1 is no list"),
    ({"optimizers": {"SAM": {"lr": [[0.1]]}}}, "SAM: lr [[0.1]]"),
    ({"optimizers": {"SAM": {"rho": [0.1]}}}, "SAM: its grid has no lr"),
    ({"optimizers": {"SAM": {"lr": [0.1], "rho": [-1]}}}, "SAM with lr=0.1, rho=-1: Invalid rho"),
    ({"optimizers": {"SAM": {"lr": [0.1], "alpha": [1]}}}, "SAM with alpha=1, lr=0.1: "),
    ({"optimizers": {"SAM": {"lr": [0.1, 0.1]}}}, "SAM: its grid names one trial twice"),
    ({"optimizers": {"SAM": {"lr": [0.1], "epochs": [0]}}}, "SAM: epochs 0"),
    ({"optimizers": {"SAM": {"lr": [0.1], "epochs": [True]}}}, "SAM: epochs True"),
    ({"optimizers": {"SAM": {"lr": [0.1], "epochs": [2]}}, "warmup_epochs": 3}, "SAM: epochs 2"),
    ({"optimizers": {"SAM": {"lr": [math.inf]}}}, "SAM: lr [inf]"),
    ({"optimizers": {"SAM": {"lr": [0.1], "momentum": [0, 0.5]}}}, "SAM: momentum is not of the grid's"),
    ({"optimizers": {"AESAM": {"lr": [0.1], "total_steps": [9, 99]}}}, "AESAM: total_steps is not of the grid's"),
    ({"base": {"name": "SGD", "lr": 5}}, "base has an lr"),
    ({"optimizers": {"SGD": {"lr": [0.1], "epochs": [1, 2]}}}, "SGD: epochs [1, 2] without 2 and 4"),
    ({"optimizers": {"SAM": {"lr": [0.1]}, "ASAM": {"lr": [0.1, 0.2]}}}, "ASAM has 2 trials, SAM 1"),
    ({"held_out": 127}, "held_out 127"),
    ({"train_size": 5000}, "5000"),
]


@pytest.mark.parametrize(("changes", "culprit"), BAD_SETTINGS, ids=range(len(BAD_SETTINGS)))
def test_bad_settings(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: dict[str, Any], culprit: str
) -> None:
    check_error(capsys, [str(settings_file(tmp_path, **changes)), "--out", str(tmp_path)], culprit)


def test_a_failed_start_leaves_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_error(capsys, ["fashion-mnist-mlp", "--data-dir", str(tmp_path), "--out", str(out)], str(tmp_path))
    assert not out.exists()


def test_runs_of_another_study_are_not_rendered(capsys: pytest.CaptureFixture[str], finished: Path) -> None:
    before = (finished / "tables.md").read_text()
    check_error(capsys, ["fashion-mnist-mlp", "--render", "--out", str(finished)], "it is not of fashion-mnist-mlp")
    assert (finished / "tables.md").read_text() == before


@pytest.mark.parametrize(
    ("content", "culprit"),
    [("{", "is not JSON"), ("[]", "no JSON object"), ('{"noise": [0]}', "are missing: augment")],
)
def test_bad_settings_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, culprit: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    check_error(capsys, [str(path)], culprit)


@pytest.mark.parametrize("content", ["nonsense\n", "{}\n", "3\n", '{"stage": "final"}\n'])
def test_bad_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str) -> None:
    (tmp_path / "runs.jsonl").write_text(content)
    for extra in ([], ["--render"]):
        check_error(
            capsys, [str(settings_file(tmp_path)), "--out", str(tmp_path), *extra], "runs.jsonl, line 1 is no run"
        )


def test_a_file_of_runs_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").mkdir()
    check_error(capsys, [str(settings_file(tmp_path)), "--out", str(tmp_path)], "runs.jsonl")


def test_whole_command(tmp_path: Path) -> None:
    """Every kind of picture and count, in two processes."""
    out = tmp_path / "new" / "out"
    code, said, complained = script(str(settings_file(tmp_path, **DEFAULTS)), "--out", str(out), "--processes", "2")
    assert code == 0, complained
    assert all(name in said for name in (*DEFAULTS["optimizers"], *PICTURES))
    assert "…" not in said
    assert "left out" not in said
    check_pictures(out, PICTURES)


def test_script_error() -> None:
    assert script("--seeds", "0") == (2, "", "error: argument --seeds: '0' is not a whole number from 1 up\n")


def test_fashion_mnist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "data", fashion_files())
    changes = {
        "dataset": "fashion-mnist",
        "model": "mlp-784-512-256-10",
        "train_size": 40,
        "held_out": 8,
        "noise": [12.5],
    }
    settings = settings_file(tmp_path, **changes, epochs=1, optimizers={"ASAM": {"lr": [0.05], "rho": [0.5]}})
    out = tmp_path / "out"
    arguments = [str(settings), "--out", str(out), "--processes", "1", "--data-dir"]
    assert command.main([*arguments, str(folder)]) == 0
    assert [run["stage"] for run in lines_of(out)[1:]] == ["trial", "final", "final"]
    # Runs of other examples, or of another kind of device, do not go into the same file.
    other = write(tmp_path / "other", fashion_files(seed=1))
    before = (out / "runs.jsonl").read_bytes()
    capsys.readouterr()
    check_error(capsys, [*arguments, str(other)], "other examples")
    (out / "runs.jsonl").write_bytes(before.replace(b'"kind": "cpu"', b'"kind": "cuda"'))
    check_error(capsys, [*arguments, str(folder)], "other kinds of device")
    (out / "runs.jsonl").write_bytes(before)
    assert (out / "runs.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["convnet-16-32-64-bn", "transformer-64-2"])
def test_models_of_images(name: str) -> None:
    """A score a class; each image has its own, but where a batch has statistics."""
    torch.manual_seed(0)
    model, images = MODELS[name]().eval(), torch.randn(3, 1, 28, 28)
    scores = model(images)
    assert scores.shape == (3, 10)
    assert torch.allclose(model(images[1:2]), scores[1:2], atol=1e-5)
    assert len(set(scores.flatten().tolist())) == 30


def test_augmented() -> None:
    """Each image is moved on its own, by up to two pixels either way, with black behind; half of them are mirrored."""
    image = torch.rand(1, 5, 7)
    images = image.expand(2000, 1, 5, 7)
    padded = F.pad(image, (2, 2, 2, 2), value=float(image.min()))
    expected = {
        (down, right, mirrored): found.flip(2) if mirrored else found
        for mirrored in (False, True)
        for down in range(5)
        for right in range(5)
        for found in [padded[:, down : down + 5, right : right + 7]]
    }
    found = augmented(images, torch.Generator().manual_seed(1))
    kinds = Counter(next(kind for kind, one in expected.items() if torch.equal(one, x)) for x in found)
    assert kinds.keys() == expected.keys()
    assert max(kinds.values()) < 3 * min(kinds.values())
    assert torch.equal(found, augmented(images, torch.Generator().manual_seed(1)))


def test_augmented_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All optimizers get the same images; none measures on such ones."""
    seen: dict[str, list[Tensor]] = {"SGD": [], "SAM": []}

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
        seen["SGD" if type(optimizer) is torch.optim.SGD else "SAM"].append(x)
        return train_step(model, optimizer, x, y)

    train_step = training.train_step
    monkeypatch.setattr(training, "train_step", step)
    data = load_data("digits", None, 128, torch.device("cpu"))
    measured = []
    monkeypatch.setattr(training, "accuracy", lambda model, x, y: measured.append(x) or 50.0)
    monkeypatch.setattr(training, "sharpness", lambda model, x, y: measured.append(x) or 0.0)
    study = study_of(augment=True, train_size=128)
    for name, arguments in {"SGD": {"lr": 0.05}, "SAM": {"lr": 0.05, "rho": 0.1}}.items():
        job = Job("final", 0, name, tuple({"epochs": 2, **arguments}.items()), 4)
        training.train(data, study, job, tick=lambda: None)
    assert [x is data.test_x or x is data.train_x for x in measured] == [True] * 2 * (study.epochs + 1)
    plain = {tuple(image.flatten().tolist()) for image in data.train_x}
    for images, same in zip(seen["SGD"], seen["SAM"], strict=True):
        assert torch.equal(images, same)
        moved = sum(tuple(image.flatten().tolist()) not in plain for image in images)
        assert moved > len(images) / 2


def test_classes_of_the_pretraining() -> None:
    """It has those below, the study the others, both standardized alike; wrong labels are among the study's own."""
    device = torch.device("cpu")
    whole, ours, theirs = (load_data("digits", None, None, device, *options) for options in ((), (4,), (4, True)))
    assert ours.train_y.unique().tolist() == ours.test_y.unique().tolist() == [4, 5, 6, 7, 8, 9]
    assert theirs.train_y.unique().tolist() == theirs.test_y.unique().tolist() == [0, 1, 2, 3]
    assert len(ours.train_y) + len(theirs.train_y) == len(whole.train_y)
    assert ours.train_x.mean().item() == pytest.approx(0, abs=1e-5)
    raw = whole.train_x[whole.train_y < 4]
    scale = (raw[0] - raw[1]).norm() / (theirs.train_x[0] - theirs.train_x[1]).norm()
    assert scale.item() == pytest.approx((raw[2] - raw[3]).norm() / (theirs.train_x[2] - theirs.train_x[3]).norm())
    assert theirs.train_x.mean().abs() > 1e-3  # by the others' mean, not its own
    noisy = with_noise(ours.train_y, 40, 1, ours.first_class)
    assert noisy.unique().tolist() == [4, 5, 6, 7, 8, 9]
    assert (noisy != ours.train_y).sum() == round(0.4 * len(noisy))
    assert hold_out(ours, 10, 0).first_class == 4


def test_fine_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights are pretrained once, and every training starts from them, its last layer aside."""
    grids = {"SGD": {"lr": [0.05], "epochs": [1, 2]}}
    changes = {"pretrain": {"classes": 4, "epochs": 3, "lr": 0.1}, "epochs": 1, "optimizers": grids, "noise": [40]}
    settings = settings_file(tmp_path, **changes)
    arguments = [str(settings), "--out", str(tmp_path), "--processes", "1"]
    assert command.main(arguments) == 0
    _, first, *others = lines_of(tmp_path)
    assert (first["stage"], first["noise"], first["arguments"]) == ("pretraining", 0, {"epochs": 3, "lr": 0.1})
    assert first["accuracy"][-1] > 80
    assert {run["stage"] for run in others} == {"trial", "final"}
    weights, before = tmp_path / "pretrained.pt", compared(tmp_path)
    kept, content = (tmp_path / "runs.jsonl").read_bytes(), weights.read_bytes()
    capsys.readouterr()
    for damage in (lambda: None, weights.unlink):  # what is lost is made again
        damage()
        assert command.main(arguments) == 0
        assert (tmp_path / "runs.jsonl").read_bytes() == kept
        capsys.readouterr()
    state = torch.load(weights, weights_only=True)
    state["1.weight"][0, 0] += 1
    torch.save(state, weights)
    check_error(capsys, arguments, "has not the weights that the runs of")
    weights.write_bytes(content[:-100])
    check_error(capsys, arguments, "cannot be read")
    assert (tmp_path / "runs.jsonl").read_bytes() == kept
    # Weights without their run, after a kill, or of another study: they are not trusted.
    (tmp_path / "runs.jsonl").write_text("")
    assert command.main([*arguments[:-1], "2"]) == 0  # and two processes load them
    assert compared(tmp_path) == before
    study, device = read_study(settings), torch.device("cpu")
    data = runner.load_start(study, None, device, tmp_path / "pretrained.pt")
    kept, one, other = data.weights, *(training.make_model(study, data, seed).state_dict() for seed in (1, 2))
    assert [name for name in kept if not torch.equal(kept[name], one[name])] == ["7.weight", "7.bias"]
    assert not torch.equal(one["7.weight"], other["7.weight"])


def test_base_and_policies() -> None:
    """Every class steps with the base of the study; ``Adaptive`` before its name is the policy of AESAM."""
    study = study_of(
        base={"name": "AdamW", "weight_decay": 0.3},
        optimizers={
            "AdamW": {"lr": [0.01], "epochs": [2, 4]},
            **{n: {"lr": [0.01, 0.1]} for n in ("SAM", "Adaptive ASAM")},
        },
    )
    model = training.MODELS[study.model]()
    base, sam, adaptive = (
        make_optimizer(study, name, model, study.trials(name)[0], 10, 0) for name in study.optimizers
    )
    assert type(base) is torch.optim.AdamW
    assert sam.param_groups[0]["betas"] == (0.9, 0.999)
    for optimizer in (base, sam, adaptive):
        assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.01, 0.3)] * len(
            optimizer.param_groups
        )
    assert isinstance(adaptive, sk.ASAM)
    assert adaptive.policy == sk.policy.Adaptive(10)
    assert [contender.label for contender in study.contenders()] == [
        "AdamW", "AdamW, 2x epochs", "AdamW, picked", "AdamW, stopped", "SAM", "Adaptive ASAM",
    ]  # fmt: skip


def test_held_out_labels_are_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial knows the training part only; a final run has all of it, and the true labels of the test part."""
    study = study_of(train_size=None, held_out=257, epochs=1)
    data = load_data("digits", None, None, torch.device("cpu"))
    data.train_x[:, 0, 0, 0] = torch.arange(len(data.train_y))  # which example this is
    trained, measured = [], []

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
        trained.append((x[:, 0, 0, 0].long(), y))
        optimizer.step()  # without gradients; the schedule warns of a missing step
        return torch.zeros(()), 1.0

    monkeypatch.setattr(training, "train_step", step)
    monkeypatch.setattr(training, "accuracy", lambda model, x, y: measured.append((x, y)) or 50.0)
    monkeypatch.setattr(training, "sharpness", lambda *_: 0.0)
    monkeypatch.setattr(training, "largest_eigenpair", lambda *_: (0.0, None))
    monkeypatch.setattr(training, "hessian_trace", lambda *_: 0.0)
    monkeypatch.setattr(training, "loss_slice", lambda *_: [])
    arguments = (("epochs", 1), ("lr", 0.05))
    training.train(data, study, Job("trial", 40, "SGD", arguments, 7), tick=lambda: None)
    chosen, labels = (torch.cat(parts) for parts in zip(*trained, strict=True))
    held_x, held_y = measured.pop()
    held = held_x[:, 0, 0, 0].long()
    assert len(held) == 257
    assert not set(held.tolist()) & set(chosen.tolist())
    assert len(set(chosen.tolist())) == len(chosen) == 1000 // 32 * 32
    assert (held_y != data.train_y[held]).sum() == round(0.4 * 257)
    assert (labels != data.train_y[chosen]).float().mean() == pytest.approx(0.4, abs=0.02)
    # Wrong labels are spread over the first epoch.
    shares = [(y != data.train_y[which]).float().mean().item() for which, y in trained]
    assert 0.1 < min(shares) < 0.4 < max(shares) < 0.7

    trained.clear()
    training.train(data, study, Job("final", 40, "SGD", arguments, 7), tick=lambda: None)
    x, y = measured.pop()
    assert torch.equal(y, data.test_y)
    assert x is data.test_x
    noisy = with_noise(data.train_y, 40, seed=7)
    assert all(torch.equal(y, noisy[which]) for which, y in trained)
    assert len(trained) == 1257 // 32


def test_hold_out() -> None:
    data = load_data("digits", None, None, torch.device("cpu"))
    parts = hold_out(data, 100, seed=1)
    assert (len(parts.train_y), len(parts.test_y)) == (1157, 100)
    assert torch.equal(
        torch.cat([parts.train_x, parts.test_x]).flatten(1).sum(1).sort().values,
        data.train_x.flatten(1).sum(1).sort().values,
    )
    assert torch.equal(parts.test_x, hold_out(data, 100, seed=1).test_x)
    assert not torch.equal(parts.test_x, hold_out(data, 100, seed=2).test_x)


def test_schedule() -> None:
    factors = [training.schedule(step, 12, 4) for step in range(12)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1]
    assert factors[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * t / 8)) for t in range(8)])


def job_of(name: str, study: Study, stage: str = "final", noise: float = 40, seed: int = 0) -> Job:
    return Job(stage, noise, name, study.trials(name)[0], seed)


FAMILY = list(DEFAULTS["optimizers"])


@pytest.mark.parametrize("name", FAMILY)
def test_same_again(name: str) -> None:
    study = study_of(**DEFAULTS)
    data = load_data("digits", None, 128, torch.device("cpu"))
    first, second = (training.train(data, study, job_of(name, study, seed=3), tick=lambda: None) for _ in range(2))
    assert first.train_loss == second.train_loss
    assert first.accuracy == second.accuracy
    assert first.evaluations == second.evaluations
    assert Run.read(json.loads(first.line())) == first


def test_a_training_that_diverges_is_a_run() -> None:
    """A bad one."""
    study = study_of(optimizers={"SGD": {"lr": [1e9], "epochs": [2, 4]}})
    data = load_data("digits", None, 128, torch.device("cpu"))
    run = training.train(data, study, job_of("SGD", study), tick=lambda: None)
    assert run.train_loss[-1] is None
    assert run.accuracy[-1] < 30
    assert run.sharpness is run.hessian_eigenvalue is None
    assert Run.read(json.loads(run.line())) == run


def test_default_sizes() -> None:
    data = load_data("digits", None, None, torch.device("cpu"))
    assert data.train_x.shape == (1257, 1, 8, 8)
    assert data.test_x.shape == (540, 1, 8, 8)
    assert data.test_y.bincount().min() >= 50  # stratified


@pytest.mark.parametrize("percent", [0, 40, 100])
def test_noise(percent: float) -> None:
    labels = torch.arange(5000) % 10
    noisy = with_noise(labels, percent, seed=1)
    assert (noisy != labels).sum() == 50 * percent
    assert noisy.min() == 0
    assert noisy.max() == 9
    assert torch.equal(noisy, with_noise(labels, percent, seed=1))
    if percent:
        assert not torch.equal(noisy, with_noise(labels, percent, seed=2))
        shifts = ((noisy - labels) % 10).bincount(minlength=10)[1:]
        assert shifts.min() > 0.8 * shifts.sum() / 9


# Wrong input: the arguments and what the one line has to name. {dir} is a good folder, {file} a file.
BAD_ARGUMENTS = [
    (["--seeds", "0"], "--seeds"),
    (["--seeds", "two"], "'two'"),
    (["--seeds", "50"], "--seeds 50"),
    (["--processes", "1.5"], "'1.5'"),
    (["--optimizers", "sgd,adamw"], "'adamw'"),
    (["--optimizers", "sgd,,sam"], "''"),
    (["--noise", "0,14"], "14"),
    (["--noise", "nan"], "'nan'"),
    (["--noise", "some"], "'some'"),
    (["imagenet"], "'imagenet'"),
    (["/no/such/study.json"], "/no/such/study.json"),
    (["--device", "gpu"], "'gpu'"),
    (["--device", "meta"], "'meta'"),
    (["--device", "cuda:99"], "'cuda:99'"),
    pytest.param(["--device", "cuda"], "'cuda'", marks=NO_CUDA),
    (["--unknown"], "--unknown"),
    (["--render"], "--render"),
    (["--data-dir", "{dir}"], "--data-dir"),
    (["fashion-mnist-mlp"], "--data-dir"),
    (["fashion-mnist-mlp", "--data-dir", "/no/such/folder"], "/no/such/folder"),
    (["fashion-mnist-mlp", "--data-dir", "{file}"], "{file}"),
    (["fashion-mnist-mlp", "--data-dir", "{dir}"], "20000"),
    (["--out", "{file}"], "{file}"),
    (["--out", "{file}/below"], "{file}"),
]


def check_error(capsys: pytest.CaptureFixture[str], arguments: list[str], culprit: str) -> None:
    try:
        code = command.main(arguments)
    except SystemExit as e:
        code = e.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    assert culprit in captured.err


@pytest.mark.parametrize(("arguments", "culprit"), BAD_ARGUMENTS)
def test_bad_argument(capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], culprit: str) -> None:
    folder, file = write(tmp_path / "data", fashion_files()), tmp_path / "file"
    file.touch()
    filled = [a.format(dir=folder, file=file) for a in arguments]
    if "--out" not in filled:
        filled += ["--out", str(tmp_path / "out")]
    check_error(capsys, filled, culprit.format(file=file))


IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
ZEROS = np.zeros((30, 28, 28))

# A folder with one wrong file: its name, its content (None: not there), what the line has to say.
BAD_FILES = [
    (IMAGES, None, IMAGES),
    (IMAGES, b"", IMAGES),
    (IMAGES, idx(ZEROS, magic=b"\0\0\x0d\3"), IMAGES),
    (IMAGES, idx(np.zeros(30)), IMAGES),
    (IMAGES, idx(ZEROS)[:-1], IMAGES),
    (IMAGES, idx(ZEROS) + b"\0", IMAGES),
    (IMAGES, idx(np.zeros((30, 32, 32))), "(32, 32)"),
    (IMAGES, idx(np.zeros((0, 28, 28))), IMAGES),
    (IMAGES, idx(np.zeros((29, 28, 28))), "29 t10k images, but 30 t10k labels"),
    (LABELS, idx(np.full(30, 10)), "a t10k label is 10"),
    (LABELS, idx(np.zeros(30), magic=b"PK\3\4"), LABELS),
    ("train-images-idx3-ubyte.gz", b"not compressed", "train-images-idx3-ubyte.gz"),
    ("train-images-idx3-ubyte.gz", gzip.compress(idx(ZEROS))[:-9], "train-images-idx3-ubyte.gz"),
]


@pytest.mark.parametrize(("name", "content", "culprit"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_file(tmp_path: Path, name: str, content: bytes | None, culprit: str) -> None:
    files = fashion_files()
    if content is None:
        del files[name]
    else:
        files[name] = content
    with pytest.raises(Failure) as raised:
        load_data("fashion-mnist", write(tmp_path / "data", files), None, torch.device("cpu"))
    assert culprit in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_package(tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError('no rich', name='rich')\n")
    assert script(PYTHONPATH=str(tmp_path)) == (2, "", "error: the study needs rich: pip install rich\n")


def tiny() -> tuple[nn.Module, Tensor, Tensor]:
    """A model of 53 weights in double precision, with batch norm that has seen data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.randint(0, 3, (40,))
    model(x)
    return model, x, y


def flat_loss(model: nn.Module, x: Tensor, y: Tensor):
    """The loss as a function of one vector of all weights, in evaluation mode; and that vector."""
    shapes = [(name, p.shape, p.numel()) for name, p in model.named_parameters()]

    def loss(w: Tensor) -> Tensor:
        parts = w.split([n for _, _, n in shapes])
        weights = {name: part.view(shape) for (name, shape, _), part in zip(shapes, parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model.eval(), weights, (x,)), y)

    return loss, torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_largest_eigenpair() -> None:
    model, x, y = tiny()
    loss, w = flat_loss(model, x, y)
    dense = torch.autograd.functional.hessian(loss, w)
    value, vector = flatness.largest_eigenpair(model, x, y)
    assert value == pytest.approx(np.linalg.eigvalsh(dense.numpy())[-1], rel=1e-4)
    assert vector.norm().item() == pytest.approx(1)
    assert (dense @ vector - value * vector).norm() < 1e-2 * value


def test_hessian_trace() -> None:
    model, x, y = tiny()
    loss, w = flat_loss(model, x, y)
    dense = torch.autograd.functional.hessian(loss, w)
    assert flatness.hessian_trace(model, x, y) == pytest.approx(dense.trace().item(), rel=0.1)


def test_loss_slice() -> None:
    model, x, y = tiny()
    before = [t.clone() for t in model.state_dict().values()]
    loss, w = flat_loss(model, x, y)
    direction = F.normalize(torch.randn(len(w), dtype=torch.float64), dim=0)
    got = flatness.loss_slice(model, x, y, direction, radius=0.5)
    expected = [loss(w + t * direction).item() for t in np.linspace(-0.5, 0.5, len(got))]
    assert got == pytest.approx(expected if expected[0] < expected[-1] else expected[::-1], rel=1e-9)
    assert got == pytest.approx(flatness.loss_slice(model, x, y, -direction, radius=0.5), rel=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


def test_sharpness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flatness, "CHUNK", 7)
    model, x, y = tiny()
    before = [t.clone() for t in model.state_dict().values()]
    loss, w = flat_loss(model, x, y)
    gradient = torch.func.grad(loss)(w)
    expected = loss(w + 0.3 * gradient / gradient.norm()) - loss(w)
    assert flatness.sharpness(model, x, y, rho=0.3) == pytest.approx(expected.item(), rel=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())


# How many second passes there are, and how many gradients of other kinds, in so many steps.
COUNTS = {
    "SGD": lambda steps: (0, steps),
    "SAM": lambda steps: (steps, steps),
    "ASAM": lambda steps: (steps, steps),
    "SSSAM": lambda steps: (sum(map(Bernoulli(p=0.5, seed=0).second_pass, range(steps))), steps),
    "AESAM": lambda steps: (None, steps),
    "LookSAM": lambda steps: (math.ceil(steps / 5), steps),
    "AELookSAM": lambda steps: (None, steps),
    "MomentumSAM": lambda steps: (0, steps),
    **{name: lambda steps: (steps, steps) for name in ("GSAM", "WSAM", "StableSAM", "FriendlySAM", "VaSSO")},
    # Every other step measures: 5 gradients up and 5 down, besides the one it steps with.
    "SALR": lambda steps: (0, steps + 10 * math.ceil(steps / 2)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Counted is what reached the model, forward and backward, and what the optimizer says of itself."""
    forward, backward = [], []
    grids = {name: DEFAULTS["optimizers"].get(name, {"lr": [0.05]}) | ({"epochs": [3, 6]} if name == "SGD" else {})}
    study = study_of(epochs=3, batch_size=64, optimizers=grids)
    model_of = training.MODELS[study.model]

    def watched() -> nn.Module:
        model = model_of()
        model.register_forward_hook(lambda module, *_: forward.append(0) if module.training else None)
        next(model.parameters()).register_post_accumulate_grad_hook(
            lambda _: backward.append(0) if model.training else None
        )
        return model

    monkeypatch.setitem(training.MODELS, study.model, watched)
    data = load_data("digits", None, 5 * 64 + 9, torch.device("cpu"))
    steps = 3 * 5
    run = training.train(data, study, job_of(name, study, noise=0), tick=lambda: None)
    second, other = COUNTS[name](steps)
    if second is None:  # from what is drawn in the picture
        trace = run.trace
        fired = [n * n >= threshold for n, threshold in zip(trace["grad_norm"], trace["threshold"], strict=True)]
        second = sum(fired)
        assert 0 < second < steps
        assert np.diff(trace["second_passes"], prepend=0).tolist() == fired
    assert run.steps == steps
    assert len(forward) == len(backward) == run.evaluations[-1] == second + other
    assert run.second_pass_share == pytest.approx(100 * second / steps)


def test_time_that_is_left() -> None:
    """In gradients: of the trials, and of final runs that are not known yet the dearest."""
    grids = {
        "SGD": {"lr": [0.1], "epochs": [1, 2, 4]},
        **{n: {"lr": [1, 2, 3]} for n in ("SAM", "LookSAM", "Adaptive ASAM")},
    }
    grids["SALR"] = {"lr": [0.1], "every": [2, 5, 10]}
    study = study_of(optimizers=grids, noise=[0, 40], seeds=3)
    costs = Counter()
    for job in study.trial_jobs():
        costs[job.optimizer] += runner.cost(job) / len(study.noise)
    assert costs == pytest.approx({"SGD": 7, "SAM": 12, "LookSAM": 7.2, "Adaptive ASAM": 9, "SALR": 2 * (6 + 3 + 2)})
    # SGD of as many epochs, of twice as many, and twice of most: picked, and stopped.
    assert runner.expected_cost(study) == pytest.approx(2 * 3 * (2 + 4 + 4 + 4 + 4 + 2.4 + 3 + 12))


def test_samples_that_esam_counts() -> None:
    """A whole batch, one without gradients, half of one."""
    study = study_of(optimizers={"ESAM": {"lr": [0.05], "beta": [1], "gamma": [0.5]}})
    model = training.MODELS[study.model]()
    optimizer = make_optimizer(study, "ESAM", model, study.trials("ESAM")[0], 10, 0)
    _, evaluations = training.train_step(model, optimizer, torch.randn(32, 1, 8, 8), torch.arange(32) % 10)
    assert evaluations == pytest.approx(1 + training.FORWARD + 0.5)


def test_salr_trace() -> None:
    """lr_scale is the sharpness over the median of those so far, one measurement every second step."""
    study = study_of(optimizers={"SALR": {"lr": [0.05]}}, batch_size=64, epochs=2)
    data = load_data("digits", None, 5 * 64, torch.device("cpu"))
    trace = training.train(data, study, job_of("SALR", study, noise=0), tick=lambda: None).trace
    measured = trace["sharpness"][::2]
    assert trace["sharpness"][1::2] == measured
    expected = [s / np.median(measured[: i + 1]) for i, s in enumerate(measured)]
    assert trace["lr_scale"][::2] == pytest.approx(expected, rel=1e-4)
    assert trace["lr"] == pytest.approx([0.05 * training.schedule(step, 10, 5) for step in range(10)], rel=1e-5)
