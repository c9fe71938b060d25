"""What only a GPU can show. Skipped, and counted as skipped, where there is none.

The value tests of the other files run here on CUDA as a whole, each file in a process of its own whose default
device it is (SHARPKERN_TEST_DEVICE, see conftest.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from methods import BY_HAND, METHODS, TRIGGERED, Method, over
from models import assert_same_bits, weights
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.ops import schema

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}),
    "adamw": (AdamW, {"lr": 1e-2}),
}
HERE = Path(__file__).parent
# What is launched; gather is the host's.
OPS = {f"sharpkern::{name}" for name in schema.SCHEMAS if name != "gather"}
CONTRACT = sorted(f"contract/{path.name}" for path in (HERE / "contract").glob("test_*.py"))


@pytest.fixture(params=["cpp", "triton"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in sk.available_backends("cuda"):
        pytest.skip(f"no {request.param} for CUDA here")
    with sk.use_backend(request.param):
        yield request.param


every_base = pytest.mark.parametrize("base", BASES)
# Two passes in every step: a graph repeats it. By hand: gradients need no forward pass.
every_method = over(m for m in BY_HAND if m.always)
every_member = over(BY_HAND)


def make(method: Method, base: str, device: str = "cuda", **more: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 130), nn.Tanh(), nn.Linear(130, 65), nn.Tanh(), nn.Linear(65, 4)).to(device)
    rule, options = BASES[base]
    named = list(model.named_parameters())
    groups = [{"params": named[:3]}, {"params": named[3:], "rho": 0.2, "weight_decay": 0.02}]
    return model, method.make(groups, rule, **options, **more)


def data(steps: int, device: str = "cuda") -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator("cpu").manual_seed(3)
    return [
        (
            torch.randn(16, 33, generator=generator).to(device),
            torch.randint(0, 4, (16,), generator=generator).to(device),
        )
        for _ in range(steps)
    ]


def closure_on(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


# Values.


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("file", ["test_ops.py", "test_memory.py", "test_arguments.py", "test_policy.py", *CONTRACT])
def test_values_on_cuda(file: str, backend: str) -> None:
    """Ops and flat layers take each backend themselves; the contract is held with either."""
    if backend not in sk.available_backends("cuda"):
        pytest.skip(f"no {backend} for CUDA here")
    if backend != "cpp" and file in ("test_ops.py", "test_memory.py", "test_policy.py"):
        pytest.skip("runs every backend by itself")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    done = subprocess.run(
        command,
        cwd=HERE.parent,
        env={**os.environ, "SHARPKERN_TEST_DEVICE": "cuda", "SHARPKERN_BACKEND": backend},
        capture_output=True,
        text=True,
        timeout=900,
    )
    print(done.stdout[-300:])
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-3000:]


@every_base
@every_member
def test_backends_agree(method: Method, base: str) -> None:
    ends = []
    for name in sk.available_backends("cuda"):
        with sk.use_backend(name):
            model, opt = make(method, base)
            for x, y in data(10):
                opt.step(closure_on(model, x, y))
            ends.append(weights(model))
    for other in ends[1:]:
        for name, w in ends[0].items():
            torch.testing.assert_close(other[name], w, rtol=1e-4, atol=1e-6)


@every_base
@every_member
def test_the_same_bits_on_every_run(method: Method, base: str, kernels: str) -> None:
    ends = []
    for _ in range(3):
        model, opt = make(method, base)
        for x, y in data(10):
            opt.step(closure_on(model, x, y))
        ends.append(weights(model))
    assert_same_bits(ends[0], ends[1])
    assert_same_bits(ends[0], ends[2])


@pytest.mark.sanitize
@every_base
@every_member
def test_a_few_steps(method: Method, base: str, kernels: str) -> None:
    """Small enough for compute-sanitizer: every kind of step, tails, unaligned weights, one skipped, one restored."""
    memory = torch.randn(20000, device="cuda")
    sizes = [1, 31, 2047, 2048, 2049, 5000]
    params = [nn.Parameter(memory[3 * i + sum(sizes[:i]) :][: sizes[i]]) for i in range(len(sizes))]
    rule, options = BASES[base]
    opt = method.make([(f"weight{i}", p) for i, p in enumerate(params)], rule, **options)
    for kind in ("step", "skipped", "restored", "step", "step"):
        for p in params:
            p.grad = torch.randn_like(p)
        if kind == "skipped":
            assert params[3].grad is not None
            params[3].grad[2047] = float("nan")
        before = memory.clone()
        if opt.first_step():
            for p in params:
                p.grad = torch.randn_like(p)
        if kind == "restored":
            opt.restore()
        else:
            opt.second_step()
        assert torch.equal(before, memory) == (kind != "step")
    assert opt.stats["skipped_steps"].item() == 1


# Launches and waits.


@every_base
@every_method
def test_launches_of_a_step(method: Method, base: str, kernels: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    for count, groups in ((1, 1), (400, 1), (400, 24)):
        params = [nn.Parameter(torch.randn(1 + i % 7, device="cuda")) for i in range(count)]
        rule, options = BASES[base]
        for check in (True, False):
            split = [{"params": params[g::groups]} for g in range(groups)]
            opt = method.make(split, rule, skip_nonfinite=check, **options)
            for p in params:
                p.grad = torch.randn_like(p)
            for _ in range(2):
                opt.first_step()
                opt.second_step()
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
                opt.first_step()
                opt.second_step()
                torch.cuda.synchronize()
            events = profiled.events()
            names = [
                e.name
                for e in events
                if e.device_type == torch.autograd.DeviceType.CUDA
                and not e.is_user_annotation  # record_function around the step
                and not e.name.startswith(("Memcpy", "Memset"))
            ]
            # One for each op, and nothing of torch's. tests/test_device.py tells which ops a step takes.
            ops = [e.name for e in events if e.name in OPS]
            assert len(names) == len(ops), (names, ops)
            if method.name in ("sam", "asam"):
                assert len(names) == 3 + check, names


@every_base
@every_member
def test_nothing_waits_for_the_device(method: Method, base: str, kernels: str) -> None:
    model, opt = make(method, base)
    batches = data(6)
    for x, y in batches[:2]:
        opt.step(closure_on(model, x, y))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in batches[2:]:
            opt.step(closure_on(model, x, y))
            opt.param_groups[1]["lr"] *= 0.5
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_base
def test_the_host_far_ahead_of_the_device(base: str, kernels: str) -> None:
    """Tables are sent again and again while the device still has the first steps to do."""
    ends = []
    for ahead in (False, True):
        model, opt = make(METHODS["sam"], base)
        batches = data(40)
        opt.step(closure_on(model, *batches[0]))
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(1_000_000_000)
        held = []
        for i, (x, y) in enumerate(batches[1:]):
            opt.step(closure_on(model, x, y))
            held.append([p.grad for p in model.parameters()])  # other addresses in every step
            opt.param_groups[0]["lr"] = 0.01 + 0.001 * (i % 5)
            if not ahead:
                torch.cuda.synchronize()
        ends.append(weights(model))
    assert_same_bits(ends[0], ends[1])


@every_base
def test_another_stream(base: str, kernels: str) -> None:
    """The caller's stream: gradients come late on it, and the default stream has nothing to wait for."""
    ends = []
    for side in (False, True):
        model, opt = make(METHODS["sam"], base)
        batches = data(6)
        stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for x, y in batches:

                def closure(x: Tensor = x, y: Tensor = y, model: nn.Module = model) -> Tensor:
                    torch.cuda._sleep(20_000_000)
                    return closure_on(model, x, y)()

                opt.step(closure)
        torch.cuda.current_stream().wait_stream(stream)
        ends.append(weights(model))
    assert_same_bits(ends[0], ends[1])


# Graphs.


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def warmed_up(step: Callable[[], object], times: int) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            step()
    torch.cuda.current_stream().wait_stream(stream)


@every_base
@every_method
@pytest.mark.parametrize("flatten", [False, True], ids=["segments", "flat"])
def test_a_captured_step_equals_an_eager_one(method: Method, base: str, flatten: bool, kernels: str) -> None:
    """Forward, backward and both passes in one graph; 20 replays, eager steps before, after and in between."""
    ends = []
    batches = data(26)
    for graphed in (False, True):
        model, opt = make(method, base, flatten=flatten)
        x, y = batches[0][0].clone(), batches[0][1].clone()
        step = lambda opt=opt, model=model, x=x, y=y: opt.step(closure_on(model, x, y))  # noqa: E731
        graph = None
        for i, (bx, by) in enumerate(batches):
            x.copy_(bx)
            y.copy_(by)
            if i < 3 or not graphed or i in (13, 24, 25):
                warmed_up(step, 1)
                continue
            if graph is None:
                graph = captured(step)  # captures, but runs nothing
            graph.replay()
        ends.append((weights(model), {k: v.item() for k, v in opt.stats.items()}))
    assert_same_bits(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@over(TRIGGERED)
def test_a_decision_cannot_be_captured(method: Method, kernels: str) -> None:
    model, opt = make(method, "sgd")
    x, y = data(1)[0]
    warmed_up(lambda: opt.step(closure_on(model, x, y)), 2)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        captured(lambda: opt.step(closure_on(model, x, y)))
    opt.restore()


@over(TRIGGERED)
def test_a_decision_waits_for_nothing_later(method: Method, kernels: str) -> None:
    """It is there as soon as the norm is: a kernel that another stream keeps busy is not waited for."""
    model, opt = make(method, "sgd")
    for x, y in data(3):
        opt.step(closure_on(model, x, y))
    torch.cuda.synchronize()
    closure_on(model, *data(1)[0])()
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        torch.cuda._sleep(1_000_000_000)
    opt.first_step()
    assert not other.query()
    opt.second_step()
    other.synchronize()


def test_a_learning_rate_on_the_device_reaches_a_graph(kernels: str) -> None:
    lr = torch.tensor(0.0, device="cuda")
    p = nn.Parameter(torch.ones(5000, device="cuda"))
    opt = sk.SAM([p], SGD, lr=lr)
    p.grad = torch.ones_like(p)

    def step() -> None:
        opt.first_step()
        opt.second_step()

    warmed_up(step, 2)
    graph = captured(step)
    graph.replay()
    assert torch.equal(p, torch.ones_like(p))
    lr.fill_(0.25)
    graph.replay()
    torch.testing.assert_close(p.detach(), torch.full_like(p, 0.75))


def test_eager_steps_around_replays(kernels: str) -> None:
    """On one stream and with static gradients: what a replay sent is not what the eager step after it wants."""
    p = nn.Parameter(torch.zeros(5000, device="cuda"))
    eager, static = torch.ones_like(p), torch.full_like(p, 100.0)
    opt = sk.SAM([p], SGD, lr=1.0, rho=0.0)

    def step() -> None:
        opt.first_step()
        opt.second_step()

    def moved_by(function: Callable[[], object]) -> float:
        with torch.no_grad():
            p.zero_()
        function()
        return round(p[-1].item(), 5)

    p.grad = eager
    warmed_up(step, 2)
    p.grad = static
    opt.param_groups[0]["lr"] = 0.5
    graph = captured(step)
    p.grad = eager
    opt.param_groups[0]["lr"] = 0.01
    for _ in range(2):
        for kind in (step, opt.step):
            assert moved_by(graph.replay) == -50.0
            assert moved_by(kind) == -0.01
            assert moved_by(kind) == -0.01


@every_base
@pytest.mark.parametrize("joins", [False, True], ids=["one stream", "joins"])
def test_many_small_steps(joins: bool, base: str, kernels: str) -> None:
    """Kernels that start before the one ahead ends (sm_90 and later) see what it wrote: two of ours, one of torch's and
    ours, and behind an event of another stream, where gradients came late. Eager and in a graph, a thousand steps."""
    rule, options = BASES[base]
    ends = []
    for graphed in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(n, device="cuda")) for n in (3, 5000, 70_000)]
        opt = sk.SAM(params, rule, **options)
        for p in params:
            p.grad = torch.empty_like(p)
        other = torch.cuda.Stream()

        def backward(params: list[nn.Parameter] = params, other: torch.cuda.Stream = other) -> None:
            """Each gradient is the sine of the weights."""
            stream = torch.cuda.current_stream()
            if joins:
                other.wait_stream(stream)
                stream = other
            with torch.no_grad(), torch.cuda.stream(stream):
                if joins:
                    torch.cuda._sleep(20_000)
                for p in params:
                    torch.sin(p, out=p.grad)
            if joins:
                torch.cuda.current_stream().wait_stream(other)

        def step(opt: sk.SAM = opt, backward: Callable[[], None] = backward) -> None:
            backward()
            opt.first_step()
            backward()
            opt.second_step()

        warmed_up(step, 2)
        again = captured(step).replay if graphed else step
        for _ in range(1000):
            again()
        ends.append(dict(enumerate(params)))
    assert_same_bits(ends[0], ends[1])


def test_a_capture_without_a_step_before_it_is_an_error() -> None:
    # In a process of its own: a failed capture leaves torch's generators in a state of their own.
    code = """
import torch, sharpkern as sk
p = torch.nn.Parameter(torch.ones(100, device="cuda"))
p.grad = torch.ones_like(p)
opt = sk.SAM([p], lr=0.1)
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.first_step()
except RuntimeError as error:
    assert "take one step before the capture" in str(error), error
else:
    raise AssertionError("captured")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


# Devices.


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@every_base
def test_a_device_that_is_not_the_current_one(base: str, kernels: str) -> None:
    ends = []
    for device in ("cuda:0", "cuda:1"):
        model, opt = make(METHODS["sam"], base, device)
        for x, y in data(5, device):
            opt.step(closure_on(model, x, y))
        assert torch.cuda.current_device() == 0
        ends.append({name: w.cpu() for name, w in weights(model).items()})
    for name, w in ends[0].items():
        torch.testing.assert_close(ends[1][name], w)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_an_optimizer_over_two_devices(kernels: str) -> None:
    ends = []
    for devices in (("cuda:0", "cuda:0"), ("cuda:0", "cuda:1")):
        params = [nn.Parameter(torch.ones(3000, device=d)) for d in devices]
        opt = sk.SAM(params, SGD, lr=0.1, momentum=0.9)
        for i in range(4):
            for scale in (1.0, 2.0):
                for k, p in enumerate(params):
                    p.grad = torch.full_like(p, scale * (k + 1) + i)
                opt.first_step() if scale == 1.0 else opt.second_step()
        ends.append([p.detach().cpu() for p in params])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b)


def test_moving_a_model_between_the_cpu_and_the_device(kernels: str) -> None:
    model, opt = make(METHODS["sam"], "sgd", "cpu")
    (x, y), *_ = data(1, "cpu")
    opt.step(closure_on(model, x, y))
    model.to("cuda")
    opt.step(closure_on(model, x.cuda(), y.cuda()))
    assert all(state["momentum_buffer"].is_cuda for state in opt.state.values())
    model.cpu()
    opt.step(closure_on(model, x, y))
