"""The trajectory is that of the papers: every rule, every dtype, every backend (contract 1, 2, 7, 11, 14)."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from models import assert_same_bits, batches, make_closure, make_net, train, train_by_hand, weights
from naive import Naive, asam, magnitude, plain

import sharpkern as sk
from sharpkern.ops import current_backend, schema

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW

RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (SGD, dict(lr=0.1)),
    "momentum": (SGD, dict(lr=0.05, momentum=0.9, weight_decay=5e-3)),
    "dampening": (SGD, dict(lr=0.05, momentum=0.8, dampening=0.4)),
    "nesterov": (SGD, dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2)),
    "adam": (Adam, dict(lr=1e-2, weight_decay=1e-2)),
    "amsgrad": (Adam, dict(lr=1e-2, amsgrad=True, betas=(0.8, 0.9))),
    "adam-decoupled": (Adam, dict(lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True)),
    "adamw": (AdamW, dict(lr=1e-2, weight_decay=0.1)),
    "adamw-amsgrad": (AdamW, dict(lr=1e-2, amsgrad=True, eps=1e-6)),
    "rmsprop-wrapped": (torch.optim.RMSprop, dict(lr=1e-3, momentum=0.5)),
    "adagrad-wrapped": (torch.optim.Adagrad, dict(lr=1e-2)),
    "nadam-wrapped": (torch.optim.NAdam, dict(lr=1e-3)),
}

METHODS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "sam": (sk.SAM, dict(rho=0.05), plain),
    "sam-adaptive": (sk.SAM, dict(rho=0.5, adaptive=True), magnitude),
    "asam": (sk.ASAM, dict(rho=0.5, eta=0.01), asam),
}


INTERPRETED = ("momentum", "nesterov", "adamw-amsgrad", "rmsprop-wrapped")


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, where fifty steps would take minutes."""
    return os.environ.get("TRITON_INTERPRET") == "1" and current_backend(torch.get_default_device()) == "triton"


def compare(
    method: str, rule: str, dtype: torch.dtype, steps: int, rtol: float, groups: bool = False, **extra: Any
) -> None:
    if interpreted():
        if rule not in INTERPRETED:
            pytest.skip("the interpreter takes seconds: a few rules only")
        steps = min(steps, 4)
    cls, own, scale = METHODS[method]
    base, kwargs = RULES[rule]
    ours, theirs = make_net(dtype), make_net(dtype)
    data = batches(steps, dtype)

    def split(model: torch.nn.Module) -> list[dict[str, Any]]:
        named = list(model.named_parameters())
        if not groups:
            return [dict(params=named)]
        return [
            dict(params=named[:2], lr=kwargs["lr"] * 2),
            dict(params=named[2:5], rho=own["rho"] * 1.7, weight_decay=0.03),
            dict(params=named[5:]),
        ]

    opt = cls(split(ours), base, **own, **kwargs, **extra)
    reference_groups = [{**own, **g, "params": [p for _, p in g["params"]]} for g in split(theirs)]
    names = {p: name for name, p in theirs.named_parameters()}
    naive = Naive(reference_groups, base, scale, names, **kwargs, **extra)
    for batch in data:
        loss = opt.step(make_closure(ours, batch))
        expected = naive.step(make_closure(theirs, batch))
        torch.testing.assert_close(loss, expected, rtol=max(rtol * 100, 1e-9), atol=0)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        error = (p - q).abs().max() / q.abs().max()
        assert error <= rtol, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", METHODS)
def test_float64_trajectory(method: str, rule: str, backend: str) -> None:
    compare(method, rule, torch.float64, 50, 1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", METHODS)
def test_float32_trajectory(method: str, rule: str) -> None:
    compare(method, rule, torch.float32, 50, 1e-5)


@pytest.mark.parametrize("rule", ["momentum", "adamw", "rmsprop-wrapped"])
@pytest.mark.parametrize("method", METHODS)
def test_groups_with_their_own_options(method: str, rule: str, backend: str) -> None:
    compare(method, rule, torch.float64, 20, 1e-12, groups=True)


@pytest.mark.parametrize("rule", ["momentum", "adamw", "rmsprop-wrapped"])
def test_maximize_climbs_and_perturbs_downwards(rule: str, backend: str) -> None:
    compare("sam", rule, torch.float64, 10, 1e-12, maximize=True)


@pytest.mark.parametrize("rule", ["momentum", "adamw", "rmsprop-wrapped"])
@pytest.mark.parametrize("max_grad_norm", [1e-2, 1e6])
def test_clipping_the_last_gradient(rule: str, max_grad_norm: float, backend: str) -> None:
    compare("sam", rule, torch.float64, 10, 1e-12, max_grad_norm=max_grad_norm)


@pytest.mark.parametrize("rule", RULES)
def test_by_hand_equals_closure(rule: str, backend: str) -> None:
    base, kwargs = RULES[rule]
    models = [make_net(torch.float32) for _ in range(2)]
    opts = [sk.SAM(m.parameters(), base, rho=0.05, **kwargs) for m in models]
    data = batches(6, torch.float32)
    train(models[0], opts[0], data)
    train_by_hand(models[1], opts[1], data)
    # Without model=, running statistics move in both passes, by either way of stepping.
    assert_same_bits(
        weights(models[0]) | dict(models[0].named_buffers()), weights(models[1]) | dict(models[1].named_buffers())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", ["momentum", "adamw", "rmsprop-wrapped"])
def test_lr_zero_gives_the_same_bits_back(rule: str, dtype: torch.dtype, backend: str) -> None:
    base, kwargs = RULES[rule]
    if rule == "rmsprop-wrapped":
        kwargs = {**kwargs, "eps": 1e-3}  # torch keeps its state in float16: the default rounds to 0, then 0 / 0
    model = make_net(dtype)
    opt = sk.ASAM(model.named_parameters(), base, rho=0.5, **{**kwargs, "lr": 0.0})
    before = weights(model)
    for batch in batches(3, dtype):
        closure = make_closure(model, batch)
        opt.zero_grad()
        closure()
        opt.first_step(zero_grad=True)
        assert not torch.equal(model.hidden.weight, before["hidden.weight"])
        closure()
        opt.second_step()
        assert_same_bits(weights(model), before)


@pytest.mark.parametrize("rule", RULES)
def test_rho_zero_is_the_base_optimizer(rule: str, backend: str) -> None:
    """To the bit against a plain base step of the same rule, and within rounding of torch's own."""
    base, kwargs = RULES[rule]
    two, one, torchs = (make_net(torch.float64) for _ in range(3))
    sam = sk.SAM(two.parameters(), base, rho=0.0, model=two, **kwargs)
    bare = sk.SAM(one.parameters(), base, rho=0.05, model=one, **kwargs)
    own = base(torchs.parameters(), **kwargs)
    for batch in batches(8, torch.float64):
        sam.step(make_closure(two, batch))
        for model, opt in ((one, bare), (torchs, own)):
            opt.zero_grad()
            make_closure(model, batch)()
            opt.step()
    assert_same_bits(weights(two), weights(one))
    for p, q in zip(two.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    assert bare.stats["steps"] == 0


@pytest.mark.parametrize("rule", ["momentum", "adamw", "rmsprop-wrapped"])
def test_zero_gradient(rule: str, backend: str) -> None:
    base, kwargs = RULES[rule]
    ours, theirs = make_net(), make_net()
    opt, own = sk.SAM(ours.parameters(), base, **kwargs), base(theirs.parameters(), **kwargs)
    for _ in range(3):
        for model in (ours, theirs):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
        opt.first_step()
        opt.second_step()
        own.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.isfinite(p).all()
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "overflow": 1e30}


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("rule", ["momentum", "adamw", "rmsprop-wrapped"])
def test_non_finite_gradient_changes_nothing(rule: str, value: str, which: int, backend: str) -> None:
    base, kwargs = RULES[rule]
    model = make_net(torch.float32)
    opt = sk.SAM(model.parameters(), base, **kwargs)
    data = batches(4, torch.float32)
    train(model, opt, data[:2])
    before, state = weights(model), copy.deepcopy(opt.state_dict()["state"])
    closure = make_closure(model, data[2])
    calls = 0

    def poisoned() -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = closure()
        if calls == which:
            model.out.weight.grad[-1, -1] = BAD[value]
        return loss

    opt.step(poisoned)
    assert calls == 2
    assert_same_bits(weights(model), before)
    after = opt.state_dict()["state"]
    for i, entry in state.items():
        for key, kept in entry.items():
            assert torch.equal(torch.as_tensor(after[i][key]), torch.as_tensor(kept)), key
    assert opt.stats["skipped_steps"] == 1
    assert opt.stats["steps"] == 3
    train(model, opt, data[3:])
    assert not torch.equal(model.out.weight, before["out.weight"])
    assert opt.stats["skipped_steps"] == 1


@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_without_the_check_nan_goes_through_as_in_torch(rule: str, backend: str) -> None:
    base, kwargs = RULES[rule]
    model = make_net(torch.float32)
    opt = sk.SAM(model.parameters(), base, skip_nonfinite=False, **kwargs)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.first_step()
    model.out.bias.grad[0] = float("nan")
    opt.second_step()
    assert torch.isnan(model.out.bias[0])
    assert opt.stats["skipped_steps"] == 0


# Half-precision weights take the float32 step from the same rounded weights: one rounding apart.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_half_precision_steps_round_once(rule: str, dtype: torch.dtype, backend: str) -> None:
    base, kwargs = RULES[rule]
    torch.manual_seed(3)
    half = [torch.nn.Parameter(torch.randn(37, 11).to(dtype)), torch.nn.Parameter(torch.randn(70).to(dtype))]
    wide = [torch.nn.Parameter(p.detach().float()) for p in half]
    opt = sk.SAM(half, base, rho=0.5, **kwargs)
    own = base(wide, **kwargs)
    for _ in range(4):
        first = [torch.randn(p.shape).to(dtype) for p in half]
        second = [torch.randn(p.shape).to(dtype) for p in half]
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
        for p in half:
            for key, value in opt.state[p].items():
                assert value.dtype == torch.float32, key


def test_several_dtypes_share_one_norm(backend: str) -> None:
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    opt = sk.SAM([a, b], SGD, rho=1.0, lr=0.1)
    a.grad, b.grad = torch.full((3,), 2.0), torch.full((4,), 1.0, dtype=torch.float64)
    opt.first_step()
    assert opt.stats["grad_norm"] == 4.0
    torch.testing.assert_close(a.detach(), torch.full((3,), 1.5))
    torch.testing.assert_close(b.detach(), torch.full((4,), 1.25, dtype=torch.float64))
    opt.second_step()
    torch.testing.assert_close(a.detach(), torch.full((3,), 0.8))
    torch.testing.assert_close(b.detach(), torch.full((4,), 0.9, dtype=torch.float64))
    assert opt.stats["steps"] == 1
    assert opt.stats["second_passes"] == 1


def test_several_dtypes_skip_together(backend: str) -> None:
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    opt = sk.SAM([a, b], SGD, lr=0.1)
    a.grad, b.grad = torch.full((3,), float("nan")), torch.ones(4, dtype=torch.float64)
    opt.first_step()
    opt.second_step()
    assert torch.equal(a.detach(), torch.ones(3))
    assert torch.equal(b.detach(), torch.ones(4, dtype=torch.float64))
    assert opt.stats["skipped_steps"] == 1


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "gaps", "odd offset"])
@pytest.mark.parametrize("rule", ["momentum", "adamw", "rmsprop-wrapped"])
def test_memory_layouts(layout: str, rule: str, backend: str) -> None:
    base, kwargs = RULES[rule]
    torch.manual_seed(5)
    start = torch.randn(6, 5, 3, 3, dtype=torch.float64)

    def place(values: torch.Tensor) -> torch.Tensor:
        if layout == "channels_last":
            return values.to(memory_format=torch.channels_last)
        if layout == "transposed":
            return values.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
        memory = torch.zeros(values.numel() * 2 + 1, dtype=values.dtype)
        view = memory[1::2] if layout == "gaps" else memory[1 : 1 + values.numel()]
        return (
            view.view_as(values).copy_(values)
            if layout == "odd offset"
            else view.as_strided(values.shape, [2 * s for s in values.stride()], 1).copy_(values)
        )

    ours = place(start.clone()).requires_grad_()
    assert layout == "odd offset" or not ours.is_contiguous()
    theirs = start.clone().requires_grad_()
    strides = ours.stride()
    opt = sk.ASAM([("weight", ours)], base, rho=0.5, **kwargs)
    naive = Naive([dict(params=[theirs], rho=0.5, eta=0.01)], base, asam, {theirs: "weight"}, **kwargs)
    target = torch.randn_like(start)
    for i in range(5):

        def closure(w: torch.Tensor = ours, i: int = i) -> torch.Tensor:
            loss = ((w - target) ** 4 + i * w).mean()
            loss.backward()
            return loss

        opt.step(closure)
        naive.step(lambda closure=closure: closure(theirs))
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-12, atol=1e-14)
    assert ours.stride() == strides
    if layout == "channels_last" and rule == "momentum":
        assert opt.state[ours]["momentum_buffer"].stride() == strides


def test_same_bits_at_any_thread_count_and_on_every_run(backend: str) -> None:
    results = []
    threads = torch.get_num_threads()
    try:
        # The reference adds up as torch does: the same bits on every run, not at every thread count.
        for count in (1, 2, 3, 2) if backend != "reference" else (2, 2):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            params = [torch.nn.Parameter(torch.randn(n)) for n in (100_003, 7, 16_384, 50_001)]
            opt = sk.ASAM(params, AdamW, rho=0.5, lr=1e-2)
            for _ in range(3):
                for p in params:
                    p.grad = torch.sin(37 * p.detach())
                opt.first_step()
                for p in params:
                    p.grad = torch.cos(23 * p.detach())
                opt.second_step()
            results.append({str(i): p.detach() for i, p in enumerate(params)} | opt.stats)
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("rule", ["momentum", "adamw", "adamw-amsgrad"])
@pytest.mark.parametrize("method", METHODS)
def test_devices_without_float64(method: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on mps: norms, group values and bias corrections in float32, by the reference."""
    monkeypatch.setattr(schema, "scalar_dtype", lambda device: torch.float32)
    monkeypatch.setattr("sharpkern.optim.optimizer.scalar_dtype", lambda device: torch.float32)
    with sk.use_backend("reference"):
        compare(method, rule, torch.float32, 50, 1e-5, max_grad_norm=0.5)
        model = make_net(torch.float32)
        opt = sk.SAM(model.parameters(), AdamW, lr=1e-2)
        train(model, opt, batches(2, torch.float32))
    assert {t.dtype for t in opt._norms.values()} == {torch.float32}
    assert opt.stats["grad_norm"].dtype == torch.float32


def test_backends_agree() -> None:
    ends = []
    for name in sk.available_backends(torch.get_default_device()):
        with sk.use_backend(name):
            model = make_net(torch.float64)
            train(model, sk.SAM(model.parameters(), AdamW, lr=1e-2), batches(10, torch.float64))
            ends.append(weights(model))
    for end in ends[1:]:
        for name, p in end.items():
            torch.testing.assert_close(p, ends[0][name], rtol=1e-13, atol=1e-15)
