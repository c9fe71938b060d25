"""The trajectory is that of the papers: every class, every rule (contract 1, 2, 11, 14)."""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from methods import (
    BASES,
    METHODS,
    RULES,
    SGD,
    AdamW,
    Method,
    each_method,
    every_base,
    every_deciding,
    every_method,
    is_slow,
    over,
)
from models import assert_same_bits, batches, make_closure, make_net, relative_error, split, train, weights
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.ops import current_backend

DEVICE = torch.get_default_device()
slow = pytest.mark.slow

# The op sets of the kernels: sgd, adam, scaled, mixed into one and the other, with the trigger, of a p-norm.
OP_SETS = [("sam", "nesterov"), ("sssam", "adamw-amsgrad"), ("asam", "adamw"), ("looksam", "momentum"),
           ("aelooksam", "adamw"), ("sam-p", "momentum")]  # fmt: skip
# With what the plain PyTorch of the reference has to be right: each class, each kind of rule.
# In float32 with the rounding of torch's own passes, which differs from processor to processor.
RTOL = {torch.float64: 1e-12, torch.float32: 5e-5}


def cases() -> Iterator[Any]:
    """(backend, method, rule, dtype, groups, steps), and which of them are for the slow tier."""

    def case(*values: Any, fast: bool) -> Any:
        backend, method, rule, dtype, groups, _ = values
        name = f"{backend}-{method}-{rule}-{str(dtype)[6:]}" + "-groups" * groups
        return pytest.param(*values, id=name, marks=[] if fast else slow)

    for backend in sk.available_backends(DEVICE):
        for method in METHODS:
            for rule in RULES:
                due = not is_slow(METHODS[method], rule)
                if backend == "triton" and DEVICE.type == "cpu":  # its interpreter takes a second a step
                    if rule in BASES or (method, rule) in OP_SETS:
                        fast = (method, rule) in OP_SETS
                        yield case(backend, method, rule, torch.float64, not fast, 4, fast=fast)
                elif backend == "reference":
                    if rule in BASES:
                        yield case(backend, method, rule, torch.float64, True, 12, fast=due)
                else:
                    fast = rule in BASES or method == "sam"
                    yield case(backend, method, rule, torch.float64, False, 50, fast=fast)
                    yield case(backend, method, rule, torch.float32, False, 50, fast=rule in BASES and due)
                    if rule in BASES:
                        yield case(backend, method, rule, torch.float64, True, 20, fast=due)


def compare(method: Method, rule: str, dtype: torch.dtype, groups: bool, steps: int, rtol: float, **more: Any) -> Any:
    """Trains both, checks losses, decisions and weights; returns ours."""
    ours, theirs = make_net(dtype), make_net(dtype)
    params = [split(m, RULES[rule][1]) if groups else m.named_parameters() for m in (ours, theirs)]
    opt = method.make(params[0], rule, steps, **more)
    naive = method.oracle(params[1], rule, steps, **more)
    decisions, taken = [], 0
    for batch in batches(steps, dtype):
        loss = opt.step(make_closure(ours, batch))
        expected = naive.step(make_closure(theirs, batch))
        torch.testing.assert_close(loss, expected, rtol=max(rtol * 100, 1e-9), atol=0)
        now = int(opt.stats["second_passes"])
        decisions.append(now > taken)
        taken = now
    if method.by_hand:
        assert decisions == naive.decisions
        assert method.always or steps < 20 or 0 < taken < steps
    else:
        assert float(opt.stats["lr_scale"]) == pytest.approx(naive.ratio, rel=1e-3 if dtype == torch.float32 else 1e-8)
        assert float(opt.stats["sharpness"]) == pytest.approx(
            naive.history[-1], rel=1e-3 if dtype == torch.float32 else 1e-8
        )
    assert int(opt.stats["steps"]) == steps
    assert relative_error(ours, theirs) <= rtol
    return opt


@pytest.mark.parametrize(("backend_name", "method", "rule", "dtype", "groups", "steps"), list(cases()))
def test_trajectory(backend_name: str, method: str, rule: str, dtype: torch.dtype, groups: bool, steps: int) -> None:
    with sk.use_backend(backend_name):
        compare(METHODS[method], rule, dtype, groups, steps, RTOL[dtype])


@slow
@every_base
@every_method
def test_two_hundred_steps(method: Method, base: str) -> None:
    """With every decision the same."""
    compare(method, base, torch.float64, True, 200, 1e-9)


@pytest.mark.parametrize(("p", "base"), [(1.5, "adamw"), (3.0, "wrapped"), (math.inf, "momentum")])
def test_two_hundred_steps_in_another_ball(p: float, base: str) -> None:
    method = dataclasses.replace(METHODS["sam-p"], options={"rho": 0.005, "p": p})
    compare(method, base, torch.float64, True, 200, 1e-10)


@every_base
@every_method
def test_maximize_climbs_and_perturbs_downwards(method: Method, base: str) -> None:
    compare(method, base, torch.float64, False, 10, 1e-12, maximize=True)


@every_base
@every_method
def test_clipping_the_last_gradient(method: Method, base: str) -> None:
    for max_grad_norm in (1e-2, 1e6):
        compare(method, base, torch.float64, False, 10, 1e-12, max_grad_norm=max_grad_norm)


@each_method
def test_devices_without_float64(method: Method, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on mps: norms, group values and bias corrections in float32, by the reference."""
    for name, module in list(sys.modules.items()):
        if name.startswith("sharpkern.") and "scalar_dtype" in vars(module):
            monkeypatch.setattr(module, "scalar_dtype", lambda device: torch.float32)
    with sk.use_backend("reference"):
        opt = compare(method, base, torch.float32, False, 30, 1e-5, max_grad_norm=0.5)
    assert opt.stats["grad_norm"].dtype == torch.float32


# Limits.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@every_base
@every_method
def test_lr_zero_gives_the_same_bits_back(method: Method, base: str, dtype: torch.dtype) -> None:
    """In the middle of the step the weights are others: those of the second pass."""
    model = make_net(dtype)
    # torch keeps RMSprop's state in float16: the default eps rounds to 0, then 0 / 0.
    options = {"eps": 1e-3} if base == "wrapped" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # half precision
        options = {**options, **method.every, **({method.radius: 0.5} if method.radius else {}), "lr": 0.0}
        opt = method.make(model.named_parameters(), base, **options)
    before = weights(model)
    for batch in batches(3, dtype):
        seen = []

        def closure(batch: Any = batch, seen: Any = seen) -> Tensor:
            seen.append(weights(model))
            return make_closure(model, batch)()

        opt.step(closure)
        assert len(seen) == method.calls
        if method.one_gradient:
            away = opt.stats["steps"] > 1  # along what the first step left
        else:
            assert_same_bits(seen[0], before)
            away = not method.one_pass
        assert torch.equal(seen[min(1, len(seen) - 1)]["hidden.weight"], before["hidden.weight"]) != away
        assert_same_bits(weights(model), before)


@pytest.mark.parametrize("rule", RULES)
def test_a_plain_step_is_that_of_the_base_rule(rule: str) -> None:
    """rho = 0 and step() without a closure: the same bits, and torch's own step within rounding."""
    two, one, torchs = (make_net() for _ in range(3))
    base, options = RULES[rule]
    sam, bare, own = (
        sk.SAM(two.parameters(), base, rho=0.0, model=two, **options),
        sk.SAM(one.parameters(), base, model=one, **options),
        base(torchs.parameters(), **options),
    )
    for batch in batches(8):
        sam.step(make_closure(two, batch))
        for model, opt in ((one, bare), (torchs, own)):
            opt.zero_grad()
            make_closure(model, batch)()
            opt.step()
    assert_same_bits(weights(two), weights(one))
    assert relative_error(two, torchs) < 1e-12
    assert bare.stats["steps"] == bare.stats["grad_norm"] == 0


@every_base
@every_method
def test_the_other_classes_at_their_limits_are_sam_or_the_base_rule(method: Method, base: str) -> None:
    for limit, second in ((method.every, True), (method.never, False)):
        if not limit or not method.by_hand:
            continue
        ours, theirs = make_net(torch.float32), make_net(torch.float32)
        opt, twin = method.make(ours.named_parameters(), base, **limit), METHODS["sam"].make(theirs.parameters(), base)
        for batch in batches(5, torch.float32):
            opt.step(make_closure(ours, batch))
            if second:
                twin.step(make_closure(theirs, batch))
            else:
                twin.zero_grad()
                make_closure(theirs, batch)()
                twin.step()
        assert_same_bits(weights(ours) | dict(ours.named_buffers()), weights(theirs) | dict(theirs.named_buffers()))
        assert int(opt.stats["second_passes"]) == 5 * second
        assert int(opt.stats["steps"]) == 5


@over(METHODS[name] for name in ("asam", "sam-p", "sam-part", "esam", "wsam"))
def test_without_a_radius_it_is_the_base_rule_to_the_bit(method: Method) -> None:
    """The second gradient is the first one there."""
    ours, theirs = make_net(torch.float32), make_net(torch.float32)
    opt = method.make(ours.named_parameters(), "momentum", rho=0.0, model=ours, **method.every)
    base, options = RULES["momentum"]
    twin = sk.SAM(theirs.parameters(), base, model=theirs, **options)
    for batch in batches(5, torch.float32):
        opt.step(make_closure(ours, batch))
        twin.zero_grad()
        make_closure(theirs, batch)()
        twin.step()
    assert_same_bits(weights(ours), weights(theirs))


@every_deciding
def test_rho_0_changes_no_decision(method: Method) -> None:
    taken: list[list[int]] = []
    for rho in (0.0, 1e-9):
        model = make_net()
        opt = method.make(model.named_parameters(), rho=rho, lr=0.05)
        taken.append([])
        for batch in batches(20):
            opt.step(make_closure(model, batch))
            taken[-1].append(int(opt.stats["second_passes"]))
    assert taken[0] == taken[1]


# Dtypes.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_half_precision_steps_round_once(rule: str, dtype: torch.dtype) -> None:
    """Half-precision weights take the float32 step from the same rounded weights; their state is float32."""
    base, options = RULES[rule]
    torch.manual_seed(3)
    half = [nn.Parameter(torch.randn(37, 11).to(dtype)), nn.Parameter(torch.randn(70).to(dtype))]
    wide = [nn.Parameter(p.detach().float()) for p in half]
    opt = sk.SAM(half, base, rho=0.5, **options)
    own = base(wide, **options)
    for _ in range(4):
        first, second = ([torch.randn(p.shape).to(dtype) for p in half] for _ in range(2))
        for p, g in zip(half, first, strict=True):
            p.grad = g.clone()
        opt.first_step()
        for p, q, g in zip(half, wide, second, strict=True):
            p.grad, q.grad = g.clone(), g.float()
        opt.second_step()
        own.step()
        for p, q in zip(half, wide, strict=True):
            torch.testing.assert_close(p.detach(), q.detach().to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
            q.data.copy_(p.detach())
            assert {value.dtype for value in opt.state[p].values()} == {torch.float32}


class TwoTypes(nn.Module):
    """Parameters of two dtypes: two layouts in one optimizer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        with torch.device("cpu"):
            self.wide = nn.Linear(6, 5, dtype=torch.float64)
            self.narrow = nn.Linear(5, 3, dtype=torch.float32)
        self.to(DEVICE)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(torch.tanh(self.wide(x)).float())


def two_types(steps: int) -> Iterator[Any]:
    """Closures over a batch each, of a model."""
    generator = torch.Generator("cpu").manual_seed(0)
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64, device="cpu").to(DEVICE)

        def closure(model: nn.Module, x: Tensor = x) -> Tensor:
            loss = model(x).double().square().mean() + model.wide.weight.square().sum()
            loss.backward()
            return loss

        yield closure


@every_base
@every_method
def test_one_decision_for_several_dtypes(method: Method, base: str) -> None:
    """Norms, products and statistics go over all layouts: as in one net of one dtype, to its precision."""
    ours, theirs = TwoTypes(), TwoTypes()
    opt, naive = method.make(ours.named_parameters(), base, 6), method.oracle(theirs.named_parameters(), base, 6)
    for closure in two_types(6):
        opt.step(lambda closure=closure: closure(ours))
        naive.step(lambda closure=closure: closure(theirs))
    if method.by_hand:
        assert int(opt.stats["second_passes"]) == sum(naive.decisions)
    assert relative_error(ours, theirs) < 1e-5


@each_method
def test_several_dtypes_skip_together(method: Method, base: str) -> None:
    model = TwoTypes()
    opt = method.make(model.named_parameters(), base, **method.every)
    first, second, third = two_types(3)
    opt.step(lambda: first(model))
    for bad in (model.wide.bias, model.narrow.bias):
        before = weights(model)

        def poisoned(bad: Tensor = bad) -> Tensor:
            loss = second(model)
            bad.grad.fill_(float("nan"))
            return loss

        opt.step(poisoned)
        assert_same_bits(weights(model), before)
    assert int(opt.stats["skipped_steps"]) == 2
    assert int(opt.stats["steps"]) == 3
    opt.step(lambda: third(model))
    assert not torch.equal(model.wide.weight, before["wide.weight"])


# Memory layouts and threads.


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "gaps", "odd offset"])
@pytest.mark.parametrize("base", BASES)
@every_method
def test_memory_layouts(layout: str, base: str, method: Method) -> None:
    torch.manual_seed(5)
    start = torch.randn(6, 5, 3, 3, dtype=torch.float64)

    def place(values: Tensor) -> Tensor:
        if layout == "channels_last":
            return values.to(memory_format=torch.channels_last)
        if layout == "transposed":
            return values.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
        memory = torch.zeros(values.numel() * 2 + 1, dtype=values.dtype)
        if layout == "odd offset":
            return memory[1 : 1 + values.numel()].view_as(values).copy_(values)
        return memory[1::2].as_strided(values.shape, [2 * s for s in values.stride()], 1).copy_(values)

    ours = place(start.clone()).requires_grad_()
    assert layout == "odd offset" or not ours.is_contiguous()
    theirs = start.clone().requires_grad_()
    strides = ours.stride()
    opt, naive = (make([("weight", w)], base) for make, w in ((method.make, ours), (method.oracle, theirs)))
    target = torch.randn_like(start)
    for i in range(5):

        def closure(w: Tensor, i: int = i) -> Tensor:
            loss = ((w - target) ** 4 + i * w).mean()
            loss.backward()
            return loss

        opt.step(lambda closure=closure: closure(ours))
        naive.step(lambda closure=closure: closure(theirs))
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-12, atol=1e-14)
    assert ours.stride() == strides
    if layout == "channels_last":
        for name, value in opt.state[ours].items():
            assert name == "step" or value.stride() == strides


@pytest.mark.parametrize("base", ["momentum", "adamw"])
@every_method
def test_same_bits_at_any_thread_count_and_on_every_run(method: Method, base: str) -> None:
    ends = []
    threads = torch.get_num_threads()
    try:
        # The reference adds up as torch does: the same bits on every run, not at every thread count.
        for count in (1, 2, 3, 2) if current_backend(DEVICE) != "reference" else (2, 2):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            params = [nn.Parameter(torch.randn(n)) for n in (100_003, 7, 16_384, 50_001)]
            opt = method.make(params, base, 4)
            angles = iter(range(99))

            def closure(params: Any = params, angles: Any = angles) -> Tensor:
                factor = 11 + 12 * next(angles)
                for p in params:
                    p.grad = torch.sin(factor * p.detach())
                return torch.tensor(float(factor))

            for _ in range(4):
                opt.step(closure)
            ends.append({str(i): p.detach() for i, p in enumerate(params)} | opt.stats)
    finally:
        torch.set_num_threads(threads)
    for end in ends[1:]:
        assert_same_bits(end, ends[0])


def test_one_step_by_the_numbers() -> None:
    """Two dtypes, one norm, and the naive versions are not what is believed."""
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, dtype=torch.float64))
    opt = sk.SAM([a, b], SGD, rho=1.0, lr=0.1)
    a.grad, b.grad = torch.full((3,), 2.0), torch.full((4,), 1.0, dtype=torch.float64)
    opt.first_step()
    assert opt.stats["grad_norm"] == 4.0
    torch.testing.assert_close(a.detach(), torch.full((3,), 1.5))
    torch.testing.assert_close(b.detach(), torch.full((4,), 1.25, dtype=torch.float64))
    opt.second_step()
    torch.testing.assert_close(a.detach(), torch.full((3,), 0.8))
    torch.testing.assert_close(b.detach(), torch.full((4,), 0.9, dtype=torch.float64))
    assert opt.stats["steps"] == opt.stats["second_passes"] == 1


def test_backends_agree() -> None:
    ends = []
    for name in sk.available_backends(DEVICE):
        with sk.use_backend(name):
            model = make_net()
            train(model, sk.SAM(model.parameters(), AdamW, lr=1e-2), batches(3))
            ends.append(weights(model))
    for end in ends[1:]:
        for name, p in end.items():
            torch.testing.assert_close(p, ends[0][name], rtol=1e-13, atol=1e-15)
