"""The benchmarks: what they compare is equal, what they render is complete. No timing decides anything."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import sharpkern as sk
from bench import family, gpu, models, render
from bench.__main__ import main
from bench.baselines import BASES, RHO, Algorithm, Base, Foreach, Unavailable
from bench.contenders import CONTENDERS, GPU_CONTENDERS, Contender
from bench.device import Cpu, Function, Gpu, Replay
from bench.gpu import kernels, profile, steps
from bench.measure import Problem, WrongValues, step
from bench.shapes import CPU, GPU, SHAPES, count, tiny
from sharpkern.ops.backend import current_backend

ROOT = Path(__file__).resolve().parents[1]
TOTALS = {
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "vit_s16": 22_050_664,
    "vit_b16": 86_567_656,
    "gpt2_small": 124_439_808,
}
EAGER = [name for name, contender in CONTENDERS.items() if not contender.slow_start]


@pytest.mark.parametrize("name", TOTALS)
def test_totals_are_those_of_the_models(name: str) -> None:
    assert count(SHAPES[name]()) == TOTALS[name]


def test_small_tensors() -> None:
    shapes = SHAPES["small400"]()
    assert len(shapes) == 400
    assert {count([shape]) for shape in shapes} == {300, 400}


def test_vit_tensors() -> None:
    assert len(SHAPES["vit_b16"]()) == len(SHAPES["vit_s16"]()) == 152


@pytest.mark.parametrize("name", ["resnet50", "vit_b16"])
def test_models_have_the_shapes(name: str) -> None:
    with torch.device("meta"):
        model = getattr(models, name)()
        assert model(torch.empty(2, 3, 224, 224)).size() == (2, 1000)
    assert [tuple(p.size()) for p in model.parameters()] == SHAPES[name]()


def test_what_runs_by_default() -> None:
    assert CPU == ("small400", "resnet18", "vit_s16", "resnet50", "gpt2_small")
    plan = gpu.full()
    assert tuple(plan.steps) == GPU == ("resnet50", "vit_b16", "gpt2_small", "small400")
    sizes = [(count(shapes), dtype) for _, shapes, dtype in plan.kernels]
    millions = [1_000_000, 5_000_000, 25_000_000, TOTALS["resnet50"], 100_000_000, 500_000_000]
    assert sizes[:6] == [(size, torch.float32) for size in millions]
    assert sizes[6:] == [(25_000_000, torch.bfloat16), (100_000_000, torch.bfloat16)]
    assert list(gpu.full("vit_s16").steps) == ["vit_s16"]
    with pytest.raises(ValueError, match="no vit; there are"):
        gpu.full("vit")


class ForeachOnDevice(Foreach):
    """As on a GPU: the scale is a tensor."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.on_host = False


ALL = {**{name: CONTENDERS[name] for name in EAGER}, "foreach, fused base": GPU_CONTENDERS["foreach, fused base"]}
ALL["foreach, scale on the device"] = Contender(ForeachOnDevice, {}, {})


@pytest.mark.parametrize("algorithm", RHO)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("contender", ALL)
def test_contenders_agree_in_float64(contender: str, algorithm: Algorithm, base: Base) -> None:
    problem = Problem(tiny(), algorithm, base, dtype=torch.float64)
    results = []
    for name in ("loop", contender):
        leaves = problem.leaves()
        try:
            optimizer = ALL[name].make(leaves, algorithm, base)
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


def test_bytes_of_kernels() -> None:
    def sizes(dtype: torch.dtype) -> dict[str, int]:
        return {op: kernel.bytes_per_param(dtype) for op, kernel in kernels.KERNELS.items()}

    ops = ("norm", "norm_scaled", "ascend", "ascend_scaled", "restore", "sgd", "adam", "norm_ema", "ascend, in place",
           "dots", "project", "sgd, mixed", "adam, mixed", "ascend, gradient kept")  # fmt: skip
    assert sizes(torch.float32) == dict(zip(ops, (4, 8, 16, 16, 8, 20, 28, 4, 12, 8, 12, 24, 32, 20), strict=True))
    assert sizes(torch.bfloat16) == dict(zip(ops, (2, 4, 8, 8, 4, 14, 22, 2, 6, 4, 8, 18, 26, 10), strict=True))
    assert sizes(torch.float64) == dict(zip(ops, (8, 16, 32, 32, 16, 40, 56, 8, 24, 16, 24, 48, 64, 40), strict=True))
    # A SAM step is the sum of its ops, the check of the last gradient among them.
    of = sizes(torch.float32)
    for base, rule in (("sgd", "sgd"), ("adamw", "adam")):
        assert 2 * of["norm"] + of["ascend"] + of[rule] == CONTENDERS["ours"].bytes_per_param("sam", base)
        # So are the other kinds of step.
        size = {name: kind.bytes_per_param(base) for name, kind in family.KINDS.items()}
        assert size == {
            "base step alone": of[rule],
            "AE-SAM, plain": of["norm_ema"] + of[rule],
            "AE-SAM, second pass": of["norm_ema"] + of["ascend"] + of["norm"] + of[rule],
            "LookSAM, refresh": of["norm"] + of["ascend, gradient kept"] + of["dots"] + of["project"] + of[rule],
            "LookSAM, in between": of["norm"] + of[f"{rule}, mixed"],
            "SALR, measuring": 9 * of["norm"]
            + of["ascend"]
            + 8
            + 9 * of["ascend, in place"]
            + 2 * of["restore"]
            + of[rule],
        }


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
    out = tmp_path / "quick.json"
    command = [sys.executable, "-m", "bench", "--quick", "--out", str(out)]
    # pytest-benchmark does not measure in a worker of pytest-xdist, nor in what looks like one.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    text = out.read_text(encoding="utf-8")
    results = json.loads(text)
    assert {"device", "versions", "commit", "date", "command", "left_out"} <= results["environment"].keys()
    assert str(ROOT) not in text
    assert str(tmp_path) not in text
    assert "node" not in results["machine_info"]
    steps = [b["extra_info"] for b in results["benchmarks"] if b["extra_info"]["kind"] == "step"]
    assert {(s["algorithm"], s["base"]) for s in steps if s["contender"] == "ours"} == {
        (algorithm, base) for algorithm in RHO for base in BASES
    }
    kinds = [b["extra_info"] for b in results["benchmarks"] if b["extra_info"]["kind"] == "family"]
    assert [(k["step"], k["base"]) for k in kinds] == [(kind, base) for base in BASES for kind in family.KINDS]
    assert all(k["naive_ratio"] > 0 and k["bare_ratio"] > 0 for k in kinds)
    readme = tmp_path / "README.md"
    readme.write_text(f"{render.BEGIN}\n{render.END}\n", encoding="utf-8")
    subprocess.run(
        [sys.executable, "-m", "bench.render", str(out), "--readme", str(readme)], cwd=ROOT, check=True, timeout=60
    )
    assert "| tiny (2k, 7 tensors) | SAM + SGD-m |" in readme.read_text(encoding="utf-8")
    assert "| tiny (2k), AdamW | LookSAM, in between | 36 |" in readme.read_text(encoding="utf-8")


# On a GPU, and what stands in for one.


def dry_run(**changed: Any) -> gpu.Run:
    """A run of tiny sizes on one backend."""
    run = gpu.Run(dataclasses.replace(gpu.dry(), **changed), Cpu(), say=lambda line: None)
    run.environment["backends"] = run.backends = run.backends[:1]
    return run


def infos(run: gpu.Run, kind: str) -> list[dict[str, Any]]:
    return [row["extra_info"] for row in run.rows if row["extra_info"]["kind"] == kind]


@pytest.fixture(scope="module")
def dry() -> gpu.Run:
    run = dry_run()
    for section in gpu.SECTIONS.values():
        section(run)
    return run


def test_dry_run_has_every_row(dry: gpu.Run) -> None:
    assert dry.failed == []
    assert dry.left_out == ["torch.compile is left out of a dry run (all rows: --every)"]
    for row in dry.rows:
        assert {"device", "versions", "commit", "copy_gb_per_s", "ratio"} <= row["extra_info"].keys()
        assert 0 < row["stats"]["min"] <= row["stats"]["median"] <= row["stats"]["max"]
        assert row["stats"]["rounds"] == dry.plan.rounds
    assert json.loads(json.dumps(dry.results(), allow_nan=False)) == dry.results()

    tables = [(label, str(dtype).removeprefix("torch.")) for label, _, dtype in dry.plan.kernels]
    found = infos(dry, "kernel")
    assert [(k["op"], k["shape"], k["dtype"]) for k in found] == [(op, *t) for t in tables for op in kernels.KERNELS]
    for k in found:
        assert k["bytes_per_param"] == kernels.KERNELS[k["op"]].bytes_per_param(getattr(torch, k["dtype"]))
        assert k["gb_per_s"] == pytest.approx(k["bytes_per_param"] * k["params"] / k["us"] / 1e3)
        assert k["copy_share"] == pytest.approx(k["gb_per_s"] / k["copy_gb_per_s"])

    combinations = [(algorithm, base) for algorithm in RHO for base in BASES]
    eager = [name for name, contender in GPU_CONTENDERS.items() if not contender.slow_start]
    found = infos(dry, "step")
    assert [(s["algorithm"], s["base"], s["contender"]) for s in found] == [
        (*combination, name) for combination in combinations for name in eager
    ]
    for s in found:
        size = GPU_CONTENDERS[s["contender"]].bytes_per_param(s["algorithm"], s["base"])
        assert s["bytes_per_param"] == size
        assert s["host_us"] > 0
        assert s["ratio"] > 0
    # Adam's bias corrections are the host's numbers in the foreach form: a graph would repeat the first ones.
    assert [(s["algorithm"], s["base"], s["contender"]) for s in infos(dry, "graph")] == [
        (algorithm, base, name)
        for algorithm, base in combinations
        for name in ["ours", "ours, no check", *(["foreach"] if base == "sgd" else [])]
    ]
    assert [(i["model"], i["base"], i["contender"]) for i in infos(dry, "iteration")] == [
        (name, base, contender)
        for name, base in (("resnet50", "sgd"), ("vit_b16", "adamw"))
        for contender in ("ours", "loop", "foreach, fused base")
    ]
    assert all(i["finite"] and i["plain_ms"] > 0 and i["peak_gib"] == 0 for i in infos(dry, "iteration"))


def test_dry_run_renders(dry: gpu.Run) -> None:
    table = render.render(dry.results())
    assert table.startswith("Dry run on a CPU: these numbers mean nothing.")
    for start in (
        "| adam | 3k, bfloat16 | 22 | ",
        "| sgd | tiny, float32, 7 tensors | 20 | ",
        "| tiny (2k, 7 tensors) | ASAM + AdamW | ",
        "| ResNet-50 (36k), batch 2, SGD-m | foreach, fused base | ",
        "| ViT-B/16 (33k), batch 2, AdamW | ours | ",
    ):
        assert sum(line.startswith(start) for line in table.splitlines()) == (3 if "ASAM" in start else 1), start
    assert "host, us | ours, no check | loop | loop, fused base | foreach | foreach, fused base |" in table
    assert "Left out: torch.compile is left out of a dry run" in table
    for block in table.split("\n\n"):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_gpu_tables_have_markers_of_their_own(dry: gpu.Run, results: dict[str, Any]) -> None:
    measured = dry.results()
    with pytest.raises(ValueError, match="numbers mean nothing"):
        render.markers(measured)
    measured["environment"] = {**measured["environment"], "dry_run": False}
    assert render.markers(results) == (render.BEGIN, render.END)
    both = f"{render.BEGIN}\ncpu\n{render.END}\n{render.GPU_BEGIN}\nan old table\n{render.GPU_END}\n"
    inserted = render.insert(both, render.render(measured), *render.markers(measured))
    assert "an old table" not in inserted
    assert inserted.startswith(f"{render.BEGIN}\ncpu\n{render.END}\n")
    assert "Dry run" not in inserted


def test_render_without_ours_on_a_gpu(dry: gpu.Run) -> None:
    partial = copy.deepcopy(dry.results())
    partial["benchmarks"] = [row for row in partial["benchmarks"] if row["extra_info"].get("contender") == "loop"]
    for row in partial["benchmarks"]:
        row["extra_info"]["ratio"] = 1.0 if row["extra_info"]["kind"] == "iteration" else None
    assert "| - | - | - |" in render.render(partial)


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(buffers: kernels.Buffers) -> None:
        kernels.KERNELS["restore"].call(buffers)
        if current_backend() != "reference":
            buffers.params[0][5] += 1e-3

    wrong = dataclasses.replace(kernels.KERNELS["restore"], call=call)
    monkeypatch.setattr(kernels, "KERNELS", {"wrong": wrong, "restore": kernels.KERNELS["restore"]})
    run = dry_run(kernels=gpu.dry().kernels[:1])
    if run.backends == ["reference"]:
        pytest.skip("nothing to compare with the reference")
    kernels.run_kernels(run)
    assert [info["op"] for info in infos(run, "kernel")] == ["restore"]
    (failure,) = run.failed
    assert failure.startswith("wrong, 3k float32, ")
    assert "not timed: WrongValues: wrong: tensor 0 is off by 0.001" in failure
    assert failure in render.render(run.results())


@pytest.mark.parametrize("op", kernels.KERNELS)
def test_a_kernel_that_does_nothing_is_not_timed(op: str) -> None:
    """The check sees every op's work: its results differ from what was there before."""
    run = dry_run()
    if run.backends == ["reference"]:
        pytest.skip("nothing to compare with the reference")
    kernel = kernels.KERNELS[op]
    lazy = dataclasses.replace(kernel, call=lambda b: kernel.call(b) if current_backend() == "reference" else None)
    buffers = kernels.Buffers(tiny(), torch.float32, torch.Generator().manual_seed(0))
    for name in kernel.writes:
        for t in buffers.changed(name):
            t.add_(0.5)
    with pytest.raises(WrongValues, match=op):
        kernels.check(lazy, buffers, run.backends[0], op)


def test_timed_kernels_stay_finite() -> None:
    buffers = kernels.Buffers([(1000,)], torch.float32, torch.Generator().manual_seed(0))
    for kernel in kernels.KERNELS.values():
        for _ in range(200):
            kernel.call(buffers)
    assert all(t.isfinite().all() for t in (*buffers.params, *buffers.flat.buffers.values(), buffers.norms))


def test_failing_contenders_cost_their_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("no kernel\nand more")

    def missing(*args: Any) -> Any:
        raise Unavailable("not here")

    class Idle:
        first_step = second_step = staticmethod(lambda: None)

    makes = {"loop": fails, "loop, fused base": missing, "foreach": lambda *args: Idle()}
    changed = {name: dataclasses.replace(GPU_CONTENDERS[name], make=make) for name, make in makes.items()}
    monkeypatch.setattr(steps, "GPU_CONTENDERS", GPU_CONTENDERS | changed)
    run = dry_run()
    rows = steps.Rows(run, "tiny", "sam", "sgd")
    rows.eager()
    rows.graphs()
    assert [i["contender"] for i in infos(run, "step")] == ["ours", "ours, no check", "foreach, fused base"]
    assert [i["contender"] for i in infos(run, "graph")] == ["ours", "ours, no check"]
    assert run.left_out[0] == "loop, fused base, tiny sam sgd: not here"
    assert run.failed[0] == "loop, tiny sam sgd: RuntimeError: no kernel"
    assert [failure.partition(": tensor")[0] for failure in run.failed[1:]] == [
        "foreach, tiny sam sgd: WrongValues: foreach",
        "foreach, tiny sam sgd, CUDA graph: WrongValues: foreach, CUDA graph",
    ]


def test_a_graph_that_does_nothing_is_not_timed() -> None:
    class Lazy(Cpu):
        def capture(self, function: Function) -> Function:
            super().capture(function)
            return lambda: None

    problem = Problem(tiny(), "sam", "sgd", contenders=GPU_CONTENDERS)
    with pytest.raises(WrongValues, match="ours, CUDA graph: tensor 0 is off by"):
        problem.capture("ours", Lazy())


def test_profiled_program_calls_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    counted = {
        op: dataclasses.replace(kernel, call=lambda b, op=op, kernel=kernel: (called.append(op), kernel.call(b)))
        for op, kernel in kernels.KERNELS.items()
    }
    monkeypatch.setattr(profile, "KERNELS", counted)
    profile.call_all(kernels.Buffers([(100,)], torch.float32, torch.Generator().manual_seed(0)))
    assert called == list(kernels.KERNELS) * len(set(sk.available_backends()) - {"reference"})


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """torch.cuda's functions as mocks that know their signatures."""
    names = ["synchronize", "_sleep", "Event", "Stream", "CUDAGraph", "current_stream", "stream", "graph"]
    names += ["memory_allocated", "reset_peak_memory_stats", "max_memory_allocated", "empty_cache"]
    names += ["get_device_properties", "current_device"]
    mocks = {name: mock.create_autospec(getattr(torch.cuda, name)) for name in names}
    mocks["get_device_properties"].return_value = mock.Mock(L2_cache_size=50 << 20)
    mocks["get_device_properties"].return_value.name = "A GPU"
    mocks["stream"].return_value = mock.MagicMock()
    for name, replacement in mocks.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    return mocks


def test_gpu_clock(cuda: dict[str, Any]) -> None:
    machine, event, calls = Gpu(), cuda["Event"].return_value, []
    event.elapsed_time.return_value = 8.0
    event.query.side_effect = [False, True, False]
    assert machine.name == "A GPU"
    assert machine.cache_bytes == 50 << 20
    assert machine.elapsed(lambda: calls.append(1), 4) == pytest.approx(2e-3)
    assert len(calls) == 4
    assert not cuda["_sleep"].called
    # The device came to its first call before the last one was launched: again, held up for longer.
    assert machine.queued(lambda: calls.append(1), 4) == pytest.approx(2e-3)
    assert len(calls) == 12
    first, second = (call.args[0] for call in cuda["_sleep"].call_args_list)
    assert second == 2 * first
    event.query.side_effect = None
    event.query.return_value = True
    with pytest.raises(RuntimeError, match="did not wait"):
        machine.queued(lambda: None, 1)
    assert machine.enqueue(lambda: None) < 1
    assert {"cuda", "driver"} == machine.versions().keys()


def test_gpu_graph_and_memory(cuda: dict[str, Any]) -> None:
    machine, calls = Gpu(), []
    replay = machine.capture(lambda: calls.append(1))
    assert isinstance(replay, Replay)
    assert len(calls) == machine.WARM_UP + 1
    replay()
    assert len(calls) == machine.WARM_UP + 1
    cuda["CUDAGraph"].return_value.replay.assert_called_once_with()
    cuda["max_memory_allocated"].return_value = 7
    cuda["memory_allocated"].return_value = 3
    assert machine.peak_bytes(lambda: calls.append(1)) == 7
    assert machine.held_bytes() == 3
    cuda["reset_peak_memory_stats"].assert_called_once_with()
    machine.release()


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # One backend: Triton's interpreter takes a minute.
    first = sk.available_backends()[:1]
    monkeypatch.setattr(sk, "available_backends", lambda device="cpu": first)
    before = sorted((ROOT / "bench" / "results").iterdir())
    out = tmp_path / "new" / "dry.json"
    words = ["--device", "cuda", "--dry-run", "--sections", "iteration"]
    for more in ([], ["--out", str(out)]):
        monkeypatch.setattr(sys, "argv", ["bench", *words, *more])
        assert main() == 0
        printed = capsys.readouterr()
        assert printed.out.startswith("DRY RUN on the CPU: the numbers mean nothing.")
        assert printed.out.rstrip().endswith("DRY RUN on the CPU: the numbers mean nothing.")
        assert "iteration-resnet50-loop" in printed.err
        # No results file unless it is asked for.
        assert sorted((ROOT / "bench" / "results").iterdir()) == before
        assert out.exists() == bool(more)
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["environment"]["command"] == f"python -m bench {' '.join(words)}"
    assert {row["extra_info"]["kind"] for row in written["benchmarks"]} == {"iteration"}
    assert str(tmp_path) not in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dry-run"], "go with --device cuda"),
        (["--device", "cuda", "--quick"], "goes with --device cpu"),
        (["--device", "cuda", "--dry-run", "--sections", "kernel"], "--sections: no kernel"),
        (["--device", "cuda"], "no CUDA device here"),
        (["--device", "cuda", "--shapes", "vit"], "--shapes: no vit"),
    ],
)
def test_command_line_errors(
    args: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *args])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "--shapes" in args)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_gpu_check(tmp_path: Path) -> None:
    script = ROOT / "bench" / "gpu_check.sh"

    def check(*steps: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "DRY_RUN": "1", "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
        command = ["bash", str(script), *steps]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

    done = check("versions", "build", "sanitize", "profile")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "0 failed"
    assert f"torch {torch.__version__}" in (tmp_path / "out" / "versions.log").read_text(encoding="utf-8")
    wrong = check("everything")
    assert wrong.returncode == 2
    assert "usage" in wrong.stderr
