"""The benchmarks: what they compare is equal, what they render is complete. No timing decides anything."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import sharpkern as sk
from bench import host, memory, ops, render, steps
from bench.__main__ import SECTIONS, main
from bench.baselines import BASES, RHO, Unavailable
from bench.contenders import CONTENDERS, KINDS
from bench.measure import Case, Machine, Run, WrongValues
from bench.models import MODELS, TINY, count, shapes_of
from bench.plans import Plan
from bench.steps import Problem

ROOT = Path(__file__).resolve().parents[1]
TOTALS = {"resnet18": (11_689_512, 62), "resnet50": (25_557_032, 161), "vit_s16": (22_050_664, 152),
          "vit_b16": (86_567_656, 152), "gpt2_small": (124_439_808, 148), "small400": (140_000, 400)}  # fmt: skip
EAGER = [name for name, contender in CONTENDERS.items() if not contender.slow_start]
COMBINATIONS = [(algorithm, base) for algorithm in RHO for base in BASES]


def test_shapes_are_those_of_the_models() -> None:
    assert {name: (count(shapes_of(name)), len(shapes_of(name))) for name in TOTALS} == TOTALS
    assert TOTALS.keys() == {*Plan(cuda=False).steps, *Plan(cuda=True).steps}
    with torch.device("meta"):
        for name in ("resnet50", "vit_b16"):
            assert MODELS[name]()(torch.empty(2, 3, 224, 224)).size() == (2, 1000)


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("name", [*EAGER, "foreach, scale on the device"])
def test_contenders_agree_in_float64(name: str, combination: tuple[Any, Any]) -> None:
    problem = Problem(TINY, *combination, Machine(), torch.float64)
    try:
        step, leaves = problem.make(name.removesuffix(", scale on the device"))
    except Unavailable as reason:
        pytest.skip(str(reason))
    if "device" in name:
        step.args[0].on_host = False  # type: ignore[attr-defined]
    for _ in range(3):
        step()
    for loop, other, start in zip(problem.after(3), leaves, problem.weights, strict=True):
        assert not torch.equal(loop, start)
        # pytorch_optimizer sums its norm in float32.
        torch.testing.assert_close(other.detach(), loop, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_take_the_step_that_they_are_named_for(kind: str) -> None:
    step, _ = Problem(TINY, "sam", "sgd", Machine()).build_kind(kind)
    optimizer, (closure,), calls = step.func.__self__, step.args, []  # type: ignore[attr-defined]
    optimizer.step(lambda: (calls.append(1), closure())[1])
    two = "second pass" in kind or "refresh" in kind
    assert len(calls) == (11 if kind == "SALR, measuring" else 2 if two else 1)


def test_wrong_values_are_not_timed() -> None:
    problem = Problem(TINY, "sam", "sgd", Machine())
    problem.build("ours")
    with mock.patch.object(Machine, "capture", return_value=int), pytest.raises(WrongValues, match="CUDA graph"):
        problem.build("ours", graph=True)
    problem.reference[3].add_(1e-3)
    with pytest.raises(WrongValues, match=r"ours: tensor 3 is off by 0\.001"):
        problem.build("ours")


def test_bytes() -> None:
    sizes = [[kernel.bytes_per_param(dtype) for kernel in ops.KERNELS.values()] for dtype in (torch.float, torch.half)]
    assert sizes[0] == [4, 8, 16, 16, 8, 20, 28, 4, 12, 4, 4, 16, 8, 12, 24, 32, 32, 40, 20, 12]
    assert sizes[1] == [2, 4, 8, 8, 4, 14, 22, 2, 6, 2, 2, 8, 4, 8, 18, 26, 28, 34, 10, 10]
    ours, unchecked = ([CONTENDERS[name].bytes_per_param(*c) for c in COMBINATIONS] for name in EAGER[:2])
    assert (ours, unchecked) == ([44, 52, 48, 56], [40, 48, 44, 52])
    assert CONTENDERS["foreach"].bytes_per_param("sam", "sgd", "cuda") == 84
    # A step is the sum of its ops, the check of the last gradient among them; SALR's measurement copies the gradient.
    of = dict(zip(ops.KERNELS, sizes[0], strict=True))
    look = 4 + of["ascend, gradient kept"] + of["dots"] + of["project"]
    salr = 9 * 4 + of["ascend"] + 8 + 9 * of["ascend, in place"] + 2 * of["restore"]
    without_rule = [0, 4, 4, 8 + of["ascend"], look, 4 + 4, look, 4 + 4, 4, salr]
    for base, rule in (("sgd", "sgd"), ("adamw", "adam")):
        assert 8 + of["ascend"] + of[rule] == CONTENDERS["ours"].bytes_per_param("sam", base)
        kinds = [kind for kind in KINDS.values() if base in kind.bases]
        nudged = [of["nudge_dots"] + of["nudge_sgd"] - of[rule]] * (base == "sgd")
        assert [kind.bytes_per_param(base) - of[rule] for kind in kinds] == without_rule + nudged


@pytest.mark.parametrize("name", ops.KERNELS)
def test_a_kernel_that_does_nothing_is_not_timed(name: str) -> None:
    layout = ops.Layout(TINY, torch.float32, torch.device("cpu"))
    bind, bound = layout.bind, []

    def lazy(*args: Any) -> Any:
        bound.append(bind(*args))
        return bound[0] if len(bound) == 1 else (lambda: None, bound[0][1])  # the first one is the reference's

    for t in bind(ops.KERNELS[name].op, ops.KERNELS[name].without)[1]:
        t.add_(0.5)
    with mock.patch.object(layout, "bind", lazy), pytest.raises(WrongValues, match=name):
        ops.check(name, layout, sk.available_backends()[0])


def test_timed_kernels_stay_finite() -> None:
    layout = ops.Layout([(1000,)], torch.float32, torch.device("cpu"))
    for kernel in ops.KERNELS.values():
        call, written = layout.bind(kernel.op, kernel.without)
        for _ in range(200):
            call()
        assert all(t.isfinite().all() for t in written)


def run_of(cuda: bool, **changed: Any) -> Run:
    """A run of tiny sizes on one backend: Triton's interpreter takes a minute."""
    with mock.patch.object(sk, "available_backends", return_value=sk.available_backends()[:1]):
        return Run(Plan(cuda, tiny=True), Machine(), dry=cuda, **changed)


@pytest.fixture(scope="module", params=[False, True], ids=["cpu", "dry"])
def run(request: pytest.FixtureRequest) -> Run:
    run = run_of(request.param)
    for section in SECTIONS.values():
        run.measure(section(run))
    return run


def test_a_run_has_every_row(run: Run) -> None:
    assert (run.failed, run.left_out[0][:14]) == ([], "torch.compile:")
    assert json.loads(json.dumps(run.results(), allow_nan=False)) == run.results()
    for row in run.rows:
        assert 0 < row["min_ms"] <= row["ms"] <= row["max_ms"] * (row["rounds"] == 2)
        if size := row["bytes_per_param"]:
            assert row["gb_per_s"] == pytest.approx(size * row["params"] / row["ms"] / 1e6)
            assert row["copy_share"] == pytest.approx(row["gb_per_s"] / row["copy_gb_per_s"])

    def found(kind: str, *keys: str) -> list[tuple[str, ...]]:
        return [tuple(row[key] for key in keys) for row in run.rows if row["kind"] == kind]

    tables = [(label, str(dtype).removeprefix("torch.")) for label, _, dtype in run.plan.kernels]
    assert found("kernel", "method", "shape", "dtype") == [(op, *t) for t in tables for op in ops.KERNELS]
    eager = [(*c, name) for c in COMBINATIONS for name in EAGER if c[0] == "sam" or "pytorch" not in name]
    assert found("step", "method", "base", "contender") == eager
    graphs = [c for c in eager if c[2] in ("ours", "ours, no check") or c[1:] == ("sgd", "foreach")]
    assert found("graph", "method", "base", "contender") == (graphs if run.cuda else [])
    assert all(row["host_us"] > 0 and row["beside_ms"]["ours"] > 0 for row in run.rows if row["kind"] == "step")
    assert found("kind", "base", "method") == [
        (base, name) for base in BASES for name, kind in KINDS.items() if base in kind.bases
    ]
    models = [(model, training.base) for model, training in run.plan.iterations.items()]
    trained = [(*model, name, True) for model in models for name in ("ours", *run.plan.others)]
    assert found("iteration", "shape", "base", "contender", "finite") == trained


def test_results_that_are_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.render", "missing.json"])
    with pytest.raises(SystemExit):
        render.main()
    assert "error: missing.json: [Errno 2]" in capsys.readouterr().err


def test_a_run_renders(run: Run) -> None:
    table, results = render.render(run.results()), copy.deepcopy(run.results())
    starts = ["| adam | 3k, bfloat16 | 22 | ", "| sgd | tiny, float32, 7 tensors | 20 | "]
    starts += ["| tiny (2k), AdamW | LookSAM, in between | 36 | ", "| tiny (2k, 7 tensors) | ASAM + AdamW | "]
    found = [sum(line.startswith(start) for line in table.splitlines()) for start in starts]
    assert found == [1, 1, 1, 3 if run.cuda else 1]
    for block in table.split("\n\n"):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block
    if run.cuda:
        with pytest.raises(ValueError, match="numbers mean nothing"):
            render.pages(results)
        results["environment"]["dry_run"] = False
    pages = render.pages(results)
    begin, end, tables = pages[render.PAGE]
    assert (begin, tables) == ((render.GPU_BEGIN if run.cuda else render.BEGIN), render.render(results))
    assert pages.keys() == {render.PAGE, *([] if run.cuda else [render.README])}
    once = render.insert(f"above\n{begin}\nold\n{end}\nbelow\n", begin, end, table)
    assert once == f"above\n{begin}\n{table}\n{end}\nbelow\n" == render.insert(once, begin, end, table)


def test_kernels_below_the_bar() -> None:
    """Those that move 400 MB or more are held to 92 % of a copy; of the others the time beyond their bytes counts."""

    def row(method: str, params: float, share: float, ms: float) -> dict[str, Any]:
        labels = {"contender": "cpp", "method": method, "shape": "x", "dtype": "float32"}
        return {**labels, "params": params, "bytes_per_param": 4, "copy_share": share, "ms": ms}

    rows = [
        row("norm", 1e8, 0.92, 1),
        row("dots", 1e8, 0.5, 1),
        row("norm_p", 9e7, 0.4, 0.01),
        row("mix", 1e3, 0.1, 0.02),
    ]
    assert render._bar(rows) == [
        "cpp: 1 of 2 kernels that move 400 MB or more reach 92% of a copy; below: dots x float32 50.0%. "
        "The 2 others take 12.0 us, the median, longer than their bytes.",
        "",
    ]


def test_the_pages_show_the_run_that_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """README and docs are as ``python -m bench.render RESULTS --write`` leaves them, of the CPU's and the GPU's."""
    results, gpu = (ROOT / "bench" / "results" / f"{name}.json" for name in ("cpu", "nvidia-h100-80gb-hbm3"))
    copies = [tmp_path / page.name for page in (render.PAGE, render.README)]
    texts = [page.read_text(encoding="utf-8") for page in (render.PAGE, render.README)]
    for copied, text in zip(copies, texts, strict=True):
        copied.write_text(text.replace("| ResNet-50 ", "| ResNet-51 "), encoding="utf-8")
    monkeypatch.setattr(render, "PAGE", copies[0])
    monkeypatch.setattr(render, "README", copies[1])
    for run in (results, gpu):
        monkeypatch.setattr(sys, "argv", ["render", str(run), "--write"])
        render.main()
    assert [copied.read_text(encoding="utf-8") for copied in copies] == texts
    # Five rows: every size once, with the first base that was timed there.
    rows = [
        line
        for line in render.summary(json.loads(results.read_text(encoding="utf-8"))).splitlines()
        if "| SAM +" in line
    ]
    assert [row.split(" (")[0].strip("| ") for row in rows] == [
        "400 small tensors",
        "ResNet-18",
        "ViT-S/16",
        "ResNet-50",
        "GPT-2 small",
    ]


def test_failing_contenders_cost_their_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    fails = mock.Mock(side_effect=RuntimeError("no kernel\nand more"))
    for name, make in {"loop": fails, "foreach": mock.Mock()}.items():
        monkeypatch.setitem(CONTENDERS, name, dataclasses.replace(CONTENDERS[name], make=make))
    run = run_of(True, only="^(step|graph) tiny sam sgd")
    run.measure(steps.steps(run))
    assert [what.partition(" tensor")[0] for what in run.failed] == [
        "step, tiny, sam, sgd, loop: RuntimeError: no kernel",
        "step, tiny, sam, sgd, foreach: WrongValues: foreach:",
        "graph, tiny, sam, sgd, foreach: WrongValues: foreach, CUDA graph:",
    ]
    (loop,) = [row for row in run.rows if row["contender"] == "loop, fused base"]
    run.rows[:] = [{**loop, "beside_ms": {}}]
    assert f"| - | - | - | {loop['ms']:.2f} ms |" in render.render(run.results())


def test_sides_take_turns() -> None:
    run, order = run_of(True), []
    sides = {name: (partial(order.append, name), None) for name in "abc"}
    clock = mock.patch.object(Machine, "clock", lambda self, function, only: lambda calls: (function(), 1.0)[1])
    with clock, mock.patch.object(Run, "copy_rate", return_value=1.0):
        run.measure([Case({"kind": "x"}, 1, 4, lambda: (sides["a"], {k: sides[k] for k in "bc"}, {}))])
    assert "".join(order) == "aabbcc" + "abc" + "cba"
    assert run.rows[0]["beside_ms"] == {"b": 1e3, "c": 1e3}


def test_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    names = "synchronize Stream CUDAGraph stream graph get_device_name reset_peak_memory_stats max_memory_allocated"
    cuda = {name: mock.create_autospec(getattr(torch.cuda, name)) for name in names.split()}
    cuda["stream"].return_value = mock.MagicMock()
    for name, replacement in cuda.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    testing = pytest.importorskip("triton.testing")
    monkeypatch.setattr(testing, "do_bench", mock.create_autospec(testing.do_bench, return_value=2.0))
    machine, calls = Machine(cuda=True), []
    assert machine.clock(lambda: None, device_only=True)(4) == pytest.approx(2e-3)
    machine.capture(lambda: calls.append(1))()
    assert len(calls) == machine.WARM_UP + 1
    cuda["CUDAGraph"].return_value.replay.assert_called_once_with()
    assert machine.peak_bytes(lambda: calls.append(1)) is cuda["max_memory_allocated"].return_value


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    for words in (
        "--quick --only transformer.*loop",
        "--device cuda --dry-run --sections kernels --only 3k.norm.float32",
    ):
        out = tmp_path / words.split()[0] / "results.json"
        monkeypatch.setattr(sys, "argv", ["bench", *words.split(), "--out", str(out)])
        assert main() == 0
        text = out.read_text(encoding="utf-8")
        written, environment = json.loads(text)["rows"], json.loads(text)["environment"]
        assert {row["kind"] for row in written} == {"kernel" if "cuda" in words else "iteration"}
        assert environment["command"].replace("'", "") == f"python -m bench {words}"
        assert not any(str(path) in text for path in (tmp_path, ROOT))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    errors = {"--dry-run": "goes with --device cuda", "--device cuda --quick": "--quick goes with --device cpu"}
    errors |= {"--sections kernel": "no kernel", "--device cuda": "no CUDA device", "--shapes vit": "no vit; there"}
    for words, message in errors.items():
        monkeypatch.setattr(sys, "argv", ["bench", *words.split()])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert message in capsys.readouterr().err


def test_gpu_check(tmp_path: Path) -> None:
    """Every step of it, as far as it goes without a GPU."""
    out = tmp_path / "out"
    env = {**os.environ, "DRY_RUN": "1", "OUT": str(out), "PYTHON": sys.executable, "TRITON_CACHE_DIR": str(tmp_path)}
    env["TRITON_INTERPRET"] = ""  # as on a GPU: Triton compiles there
    script = ["bash", str(ROOT / "bench" / "gpu_check.sh")]
    check = partial(subprocess.run, env=env, capture_output=True, text=True, timeout=500)
    done = check([*script, "build", "smoke", "values", "kernels", "steps", "iteration", "sanitize", "profile"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cpu: " in (out / "build.log").read_text(encoding="utf-8")
    for section in ("kernels", "steps", "iteration"):
        assert json.loads((out / f"gpu-{section}.json").read_text(encoding="utf-8"))["rows"]
    assert "| norm |" in (out / "gpu.md").read_text(encoding="utf-8")
    assert len(list(out.iterdir())) <= 8
    assert check([*script, "everything"]).returncode == 2
    late = check([*script, "build", "smoke"], env={**env, "DEADLINE": "1"})
    assert late.returncode == 1
    assert "no time is left" in late.stdout


def test_a_run_that_is_killed_leaves_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.json"
    run = Run(Plan(False, tiny=True), Machine(), out=out)
    run.rows = [{"ms": 1.0}]
    run.save()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    run.rows.append({"ms": 2.0})
    with pytest.raises(KeyboardInterrupt):
        run.save()
    assert json.loads(out.read_text(encoding="utf-8"))["rows"] == [{"ms": 1.0}]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell of memory")
def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it measures is what is counted elsewhere: a backup, and momentum."""
    monkeypatch.setattr(memory, "COUNT", 12_000_000)  # so many that the system gets them back at once
    options = {"lr": 1e-3, "momentum": 0.9}
    memory.measure(lambda params: sk.SAM(params, torch.optim.SGD, lr=1e-3))
    assert memory.measure(lambda params: torch.optim.SGD(params, **options)) == pytest.approx((4, 4), abs=0.5)
    assert memory.measure(lambda params: sk.SAM(params, torch.optim.SGD, **options)) == pytest.approx((8, 8), abs=0.5)


def test_host(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each way that is there has its column."""
    found: list[str] = []
    monkeypatch.setattr(host, "microseconds", lambda step, **_: (step(), found.append(host.scan.path()), 1.0)[-1])
    host.main()
    ways = ["aten", "dlpack", "op"][["aten", "dlpack", "op"].index(host.scan.path()) :]
    cells = [row.split("|")[2:-1] for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row.count(" 1 ") for row in cells] == [len(ways) + 2] * 3
    assert found == [*ways, host.scan.path(), host.scan.path()] * 3
