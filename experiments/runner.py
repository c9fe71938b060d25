"""Runs what is left of a study: a process a core, each run kept in a file as it ends."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import pickle
import platform
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import sharpkern as sk

from .data import Data, Failure, digest_of, hold_out, load_data
from .study import ADAPTIVE, BASES, OF_RUNS, Job, Run, Study
from .training import make_model, train

# How many gradients a step takes, for the time that is left; those of the other classes are about 2.
GRADIENTS = dict.fromkeys((*BASES, "MomentumSAM"), 1) | {"LookSAM": 1.2, "AELookSAM": 1.2, "SSSAM": 1.5, "AESAM": 1.5}


def read(path: Path) -> tuple[list[dict[str, Any]], dict[Job, Run]]:
    """The headers of a file, the last one first, and its runs. A last line that was cut is not looked at.

    A header says with which settings, versions and machine the runs after it were made.
    """
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    records = [parse(line, f"{path}, line {number}") for number, line in enumerate(whole.splitlines(), 1)]
    headers = [record for record in records if isinstance(record, dict)][::-1]
    runs = {record.job: record for record in records if isinstance(record, Run)}
    if runs and not headers:
        raise Failure(f"{path} does not say with which settings its runs were made")
    return headers, runs


def parse(line: bytes, place: str) -> dict[str, Any] | Run:
    """A header or a run."""
    try:
        record = json.loads(line)
        return record if "settings" in record else Run.read(record)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Failure(f"{place} is no run of a study") from None


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file, for appending whole lines to, by one process at a time. A last line that was cut is cut off."""
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure(f"{path} is being written by another process") from None
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        yield file


def append(file: IO[bytes], line: str) -> None:
    file.write(line.encode())
    file.flush()
    os.fsync(file.fileno())


# What else all runs of a file share, and what it is called.
SHARED = {"examples": "examples", "kind": "kinds of device"}


def header(study: Study, device: torch.device, data: Data) -> dict[str, Any]:
    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
        except OSError:  # there is no git here
            return ""
        return done.stdout.strip()

    cpu = next((line for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    return {
        "settings": asdict(study),
        "commit": git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain") else ""),
        "versions": {"sharpkern": sk.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "examples": data.digest,
        "kind": device.type,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu.partition(": ")[2] or cpu,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def finish(
    study: Study, part: Study, path: Path, folder: Path | None, device: torch.device, processes: int
) -> dict[Job, Run]:
    """Run what the file lacks of ``part``: the trials first, then what they pick. Returns all runs of the file.

    Args:
        study: the whole study, which the file is of.
        part: the same one with fewer optimizers, noise levels or seeds.
        path: the file; it need not be there.
        folder: of the data, where they do not come with a package.
    """
    data = load_part(study, folder, device)
    hold_out(data, study.held_out, 0)  # whether there are enough
    path.parent.mkdir(parents=True, exist_ok=True)
    with opened(path) as file:
        headers, runs = read(path)
        mine = header(study, device, data)
        for name, called in SHARED.items() if headers else ():
            if headers[0].get(name, mine[name]) != mine[name]:
                raise Failure(f"{path} has runs with other {called}: name another --out")
        for name, value in mine["settings"].items() if headers else ():
            before = headers[0]["settings"].get(name)
            if name not in OF_RUNS and before != value:
                raise Failure(f"{path} has runs with {name} {before}, not {value}: name another --out")
        load = (study, folder, device, path.with_name("pretrained.pt"))
        if not headers or headers[0] != mine:
            append(file, json.dumps(mine) + "\n")
        if study.pretrain:
            kept = runs.get(study.pretraining_job)
            if kept is None or not load[-1].exists():
                run = pretrain(*load)
                if kept is None:
                    append(file, run.line())
                    runs[run.job] = kept = run
            data = load_start(*load)
            if digest_of(data.weights.values()) != kept.weights:
                raise Failure(f"{load[-1]} has not the weights that the runs of {path} start from")
        columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("left"))
        bar = Progress(
            TextColumn("{task.description:20}"),
            *columns,
            console=Console(stderr=True),
            speed_estimate_period=3600,  # seconds: a single run may take minutes
        )
        with bar, workers(processes, study, data, load) as do:
            task = bar.add_task("")

            def tick(job: Job) -> None:
                bar.advance(task, cost(job) / job.epochs)

            for stage, jobs_of in (("trials", Study.trial_jobs), ("final runs", lambda part: part.final_jobs(runs))):
                jobs = [job for job in jobs_of(part) if job not in runs]
                later = expected_cost(part) if jobs and stage == "trials" else 0.0
                bar.update(task, total=bar.tasks[0].completed + sum(map(cost, jobs)) + later)
                for number, run in enumerate(do(jobs, tick), 1):
                    append(file, run.line())
                    runs[run.job] = run
                    bar.update(task, description=f"{number} of {len(jobs)} {stage}")
    return runs


def load_part(study: Study, folder: Path | None, device: torch.device, pretraining: bool = False) -> Data:
    return load_data(study.dataset, folder, study.train_size, device, study.first_class, pretraining)


def load_start(study: Study, folder: Path | None, device: torch.device, weights: Path) -> Data:
    """The data, with the weights that every training starts from."""
    data = load_part(study, folder, device)
    if study.pretrain:
        try:
            data.weights = torch.load(weights, map_location=device, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
            raise Failure(f"{weights} cannot be read: {' '.join(str(e).split())[:100]}") from None
    return data


def pretrain(study: Study, folder: Path | None, device: torch.device, weights: Path) -> Run:
    """Train the weights that the others start from, and keep them in a file."""
    torch.set_num_threads(1)  # as in all others: the bits depend on it
    data, job = load_part(study, folder, device, pretraining=True), study.pretraining_job
    model = make_model(study, data, job.seed)
    run = train(data, study, job, lambda: None, model)
    run.weights = digest_of(model.state_dict().values())
    whole = weights.with_suffix(".tmp")
    torch.save(model.state_dict(), whole)
    whole.replace(weights)
    return run


def cost(job: Job) -> float:
    """Gradients, in those of an epoch."""
    if job.optimizer == "SALR":
        return job.epochs * (1 + 10 / dict(job.arguments).get("every", 2))
    return job.epochs * GRADIENTS.get(job.optimizer, 1.5 if job.optimizer.startswith(ADAPTIVE) else 2)


def expected_cost(study: Study) -> float:
    """Of the final runs, while it is not known what the trials will pick."""
    total = 0.0
    for contender in study.contenders():
        trials = [Job("final", 0, contender.optimizer, arguments, 0) for arguments in study.trials(contender.optimizer)]
        total += max(cost(job) for job in trials if contender.epochs in (None, job.epochs))
    return len(study.noise) * study.seeds * total


Tick = Callable[[Job], None]
Do = Callable[[Sequence[Job], Tick], Iterator[Run]]


@contextmanager
def workers(processes: int, study: Study, data: Data, load: tuple[Any, ...]) -> Iterator[Do]:
    """What runs jobs, and gives their runs in the order in which they end: this process, or several others."""
    if processes == 1:
        torch.set_num_threads(1)
        yield lambda jobs, tick: (train(data, study, job, lambda job=job: tick(job)) for job in jobs)
        return
    # Not forked: the threads of this process, and a GPU, would not survive that.
    context = multiprocessing.get_context("spawn")
    connections, started = [], []
    try:
        for _ in range(processes):
            here, there = context.Pipe()
            started.append(context.Process(target=work, args=(there, study, load), daemon=True))
            started[-1].start()
            there.close()  # with the process, its end is gone: reading ours says so
            connections.append(here)
        yield lambda jobs, tick: distribute(jobs, connections, tick)
    finally:
        for process in started:
            process.kill()


def distribute(jobs: Sequence[Job], connections: Sequence[Connection], tick: Tick) -> Iterator[Run]:
    """Give each process a job as soon as it is idle."""
    left, idle, busy = list(reversed(jobs)), list(connections), {}
    while left or busy:
        while left and idle:
            connection = idle.pop()
            busy[connection] = left.pop()
            connection.send(busy[connection])
        for connection in wait(list(busy)):
            try:
                answer = connection.recv()
            except EOFError:
                raise Failure(
                    f"a process ended in the middle of {busy[connection]}; the runs before are kept"
                ) from None
            if answer is None:  # an epoch is over
                tick(busy[connection])
                continue
            del busy[connection]
            idle.append(connection)
            yield answer


def work(connection: Connection, study: Study, load: tuple[Any, ...]) -> None:
    """The other processes: a job in, nothing for each epoch and the run out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    data = load_start(*load)
    while True:
        job = connection.recv()
        connection.send(train(data, study, job, lambda: connection.send(None)))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
