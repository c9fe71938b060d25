"""Passes: by a closure and by hand, cancelled, plain, in the wrong order; hooks; norm statistics (contract 9, 14)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from methods import (
    BY_HAND,
    METHODS,
    SGD,
    AdamW,
    Method,
    each_method,
    every_base,
    every_by_hand,
    every_deciding,
    every_method,
    over,
)
from models import (
    assert_same_bits,
    batches,
    make_closure,
    make_net,
    relative_error,
    state_of,
    train,
    train_by_hand,
    weights,
)
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import sharpkern as sk

f32 = torch.float32
SAM = METHODS["sam"]
each_by_hand = pytest.mark.parametrize(
    ("method", "base"),
    [pytest.param(m, b, id=f"{m}-{b}") for m, b in zip(BY_HAND, ["momentum", "adamw", "wrapped"] * 9, strict=False)],
)


# By a closure.


@each_method
def test_step_calls_the_closure_once_a_pass_and_returns_the_first_loss(method: Method, base: str) -> None:
    model = make_net()
    opt = method.make(model.named_parameters(), base, **method.every)
    losses = []
    inner = make_closure(model, batches(1)[0])

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        assert all(p.grad is None for p in model.parameters())
        losses.append(inner())
        return losses[-1]

    with torch.no_grad():
        loss = opt.step(closure)
    assert len(losses) == method.calls
    assert torch.equal(loss, losses[0])
    assert not loss.requires_grad
    assert not any(torch.equal(losses[0], other) for other in losses[1:])


@pytest.mark.parametrize("kind", ["zeroing", "to zero", "micro", "guarded", "float"])
@every_method
def test_closures_of_any_kind_agree(method: Method, kind: str) -> None:
    """With zero_grad of its own, over micro batches, looking at grad mode, with a number for the loss."""
    ends = []
    for each in ("bare", kind):
        model = make_net().eval()  # batch statistics would differ between one batch and two halves
        opt = method.make(model.named_parameters(), "momentum")
        for x, y in batches(4):

            def closure(x: Tensor = x, y: Tensor = y, each: str = each, model: Any = model, opt: Any = opt) -> Any:
                if each in ("zeroing", "to zero"):
                    opt.zero_grad(set_to_none=each == "zeroing")
                total: Any = 0.0
                for part in (slice(0, 12), slice(12, 24)) if each == "micro" else (slice(0, 24),):
                    loss = nn.functional.cross_entropy(model(x[part]), y[part]) / (2 if each == "micro" else 1)
                    if each != "guarded" or torch.is_grad_enabled():
                        loss.backward()
                    total += loss.detach()
                return total.item() if each == "float" else total

            opt.step(closure)
        ends.append(weights(model))
    if kind != "micro":
        assert_same_bits(*ends)
    for name, w in ends[0].items():
        torch.testing.assert_close(w, ends[1][name], rtol=1e-9, atol=1e-12)


@every_base
@every_method
def test_memory_that_every_pass_writes_to(method: Method, base: str) -> None:
    """As with DDP's gradient_as_bucket_view, and with captured graphs: the tensors in ``p.grad`` and the loss are the
    same in every pass."""
    ends, losses = [], []
    for static in (False, True):
        model = make_net().eval()
        opt = method.make(model.named_parameters(), base)
        memory = {p: torch.zeros_like(p) for p in model.parameters()}
        out = torch.zeros((), dtype=torch.float64)
        for x, y in batches(4):

            def closure(
                x: Tensor = x, y: Tensor = y, model: Any = model, memory: Any = memory, out: Any = out
            ) -> Tensor:
                loss = nn.functional.cross_entropy(model(x), y)
                grads = torch.autograd.grad(loss, list(memory))
                for (p, buffer), g in zip(memory.items(), grads, strict=True):
                    p.grad = buffer.copy_(g) if static else g  # noqa: B023
                return out.copy_(loss.detach()) if static else loss.detach()  # noqa: B023

            losses.append(opt.step(closure).item())
        ends.append(weights(model) | opt.stats)
    assert losses[:4] == losses[4:]
    assert_same_bits(*ends)


# By hand.


@every_base
@every_by_hand
def test_by_hand_equals_closure(method: Method, base: str) -> None:
    """To the bit; norm statistics, too, with model= and without, where they move in both passes."""
    for frozen in (False, True):
        ends = []
        for by_hand in (False, True):
            model = make_net(f32)
            opt = method.make(model.named_parameters(), base, 200, model=model if frozen else None)
            (train_by_hand if by_hand else train)(model, opt, batches(6, f32))
            ends.append(weights(model) | dict(model.named_buffers()) | opt.stats | state_of(opt))
        assert_same_bits(*ends)
        assert method.always or base == "wrapped" or 0 < int(opt.stats["second_passes"]) < 6


def test_a_step_by_hand_in_the_wrong_order() -> None:
    model = make_net()
    opt = SAM.make(model.named_parameters(), "momentum")
    closure = make_closure(model, batches(1)[0])
    closure()
    grad = model.out.bias.grad.clone()
    with pytest.raises(RuntimeError, match=r"second_step\(\) was called before first_step"):
        opt.second_step()
    assert opt.first_step() is True
    perturbed = weights(model)
    with pytest.raises(RuntimeError, match=r"first_step\(\) was called twice"):
        opt.first_step()
    with pytest.raises(RuntimeError, match="between two passes"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(opt.param_groups) == 1
    assert_same_bits(weights(model), perturbed)
    opt.step()  # finishes the pending pass
    assert not opt.is_perturbed
    with pytest.raises(RuntimeError, match="second_step"):
        opt.second_step()
    # Gradients go when somebody asks for it.
    assert torch.equal(model.out.bias.grad, grad)
    opt.first_step(zero_grad=True)
    assert model.out.bias.grad is None
    closure()
    opt.second_step(zero_grad=True)
    assert model.out.bias.grad is None


@every_method
def test_what_is_stepped_by_a_closure_only_says_so(method: Method) -> None:
    opt = method.make(make_net().named_parameters(), "momentum")
    for act in (opt.first_step, opt.second_step) if not method.by_hand else ():
        with pytest.raises(RuntimeError, match=r"step\(closure\)"):
            act()


@every_base
@every_by_hand
def test_restore_cancels_and_is_idempotent(method: Method, base: str) -> None:
    model = make_net(f32)
    opt = method.make(model.named_parameters(), base, model=model, **method.every)
    train(model, opt, batches(2, f32))
    before = weights(model)
    opt.restore()
    opt.zero_grad()
    make_closure(model, batches(1, f32)[0])()
    assert not opt.is_perturbed
    opt.first_step()
    assert opt.is_perturbed
    assert not torch.equal(model.out.weight, before["out.weight"])
    for _ in range(2):
        opt.restore()
        assert not opt.is_perturbed
        assert_same_bits(weights(model), before)
    with pytest.raises(RuntimeError):
        opt.second_step()
    opt.step()  # a plain step works on what is there
    assert not torch.equal(model.out.weight, before["out.weight"])


# Plain steps.


def plain_step_pending(method: Method, model: nn.Module, base: str = "momentum", **options: Any) -> Any:
    """An optimizer that has what it adds to a plain step, and whose first_step just decided for one."""
    opt = method.make(model.named_parameters(), base, **options)
    data = batches(12, f32)
    closure = make_closure(model, data[0])
    for batch in data:
        opt.zero_grad()
        closure = make_closure(model, batch)
        closure()
        if not opt.first_step(zero_grad=True):
            if int(opt.stats["second_passes"]):
                return opt
        else:
            closure()
        opt.second_step()
    raise AssertionError("every step took a second pass")


@every_deciding
def test_a_plain_step_by_hand(method: Method) -> None:
    model = make_net(f32)
    opt = plain_step_pending(method, model)
    before, stats = weights(model), opt.stats
    grads = [p.grad for p in model.parameters()]
    assert all(grad is not None for grad in grads)  # zero_grad is for a second backward
    assert not opt.is_perturbed
    with pytest.raises(RuntimeError, match="twice"):
        opt.first_step()
    opt.restore()  # cancels it
    opt.restore()
    assert_same_bits(weights(model), before)
    with pytest.raises(RuntimeError, match="before first_step"):
        opt.second_step()
    opt.first_step()
    opt.second_step()
    assert not torch.equal(model.out.weight, before["out.weight"])
    assert int(opt.stats["steps"]) == int(stats["steps"]) + 1


@every_base
@every_deciding
def test_the_gradient_may_change_before_a_plain_step_ends(method: Method, base: str) -> None:
    """Clipped, averaged over processes, in whatever way: the check and the mix are of what the rule takes."""

    def after(change: str) -> dict[str, Tensor]:
        model = make_net(f32)
        opt = plain_step_pending(method, model, base, max_grad_norm=0.05)
        skipped = int(opt.stats["skipped_steps"])
        before, state = weights(model), copy.deepcopy(list(opt.state.values()))  # no state dict: the step is pending
        with torch.no_grad():
            for p in model.parameters():
                if change == "in place":
                    p.grad.mul_(0.25)
                elif change == "unseen":  # no version tells of it, nor of what a collective writes
                    p.grad.data.mul_(0.25)
                elif change in ("inf", "nan"):
                    p.grad.data.fill_(float(change))
                else:
                    p.grad = p.grad * 0.25
        opt.second_step()
        bad = change in ("inf", "nan")
        assert int(opt.stats["skipped_steps"]) - skipped == bad
        if bad:
            assert_same_bits(weights(model), before)
            for entry, kept in zip(opt.state.values(), state, strict=True):
                assert_same_bits(*({k: torch.as_tensor(v) for k, v in e.items()} for e in (entry, kept)))
        else:
            assert not torch.equal(model.out.weight, before["out.weight"])
        return weights(model)

    expected = after("another tensor")
    assert_same_bits(after("in place"), expected)
    assert_same_bits(after("unseen"), expected)
    after("inf")
    after("nan")


@every_deciding
def test_plain_steps_around_skipped_ones(method: Method) -> None:
    """A norm that was not finite must not stop the steps that follow, nor be theirs."""
    model = make_net(f32)
    opt = method.make(model.named_parameters(), "momentum")
    for t in range(9):
        opt.zero_grad()
        make_closure(model, batches(1, f32)[0])()
        bad = t in (0, 3, 4, 7)
        if bad:
            model.gain.grad.fill_(math.nan)
        before = weights(model)
        if opt.first_step(zero_grad=True):
            make_closure(model, batches(1, f32)[0])()
        opt.second_step()
        assert torch.equal(model.out.weight, before["out.weight"]) == bad
    assert int(opt.stats["skipped_steps"]) == 4
    assert int(opt.stats["steps"]) == 9


@every_base
@every_method
def test_step_without_a_closure_asks_nothing(method: Method, base: str) -> None:
    """A plain base step that touches no policy and no statistics."""
    if method.one_pass:
        pytest.skip("of one pass: step() without a closure is its step")
    model, twin = make_net(f32), make_net(f32)
    opt, plain = method.make(model.named_parameters(), base), SAM.make(twin.named_parameters(), base)
    for batch in batches(2, f32):
        for net, each in ((model, opt), (twin, plain)):
            each.zero_grad()
            make_closure(net, batch)()
            each.step()
    assert_same_bits(weights(model), weights(twin))
    fresh = method.make(make_net(f32).named_parameters(), base)
    assert opt.stats["base_steps"] == 2
    assert_same_bits({**opt.stats, "base_steps": fresh.stats["base_steps"]}, fresh.stats)
    own = [{k: torch.as_tensor(v) for k, v in o.state_dict()["sharpkern"].items()} for o in (opt, fresh)]
    for name in method.state:  # there from the first step on, of zeros
        own[1][f"{name}_count"] += len(opt.param_groups[0]["params"])
        assert not any(opt.state[p][name].any() for p in model.parameters())
    assert_same_bits(*({k: v for k, v in numbers.items() if k != "base_steps"} for numbers in own))


# Hooks and graphs.


@each_method
def test_hooks_fire_once_a_step(method: Method, base: str) -> None:
    """Those of torch's for all optimizers, too; whether or not the step takes its second pass."""
    for by_hand in (False, True) if method.by_hand else (False,):
        model = make_net()
        opt = method.make(model.named_parameters(), base)
        seen: list[str] = []
        handles = [
            opt.register_step_pre_hook(lambda *_, seen=seen: seen.append("pre")),
            opt.register_step_post_hook(lambda *_, seen=seen: seen.append("post")),
            register_optimizer_step_pre_hook(lambda *_, seen=seen: seen.append("global pre")),
            register_optimizer_step_post_hook(lambda *_, seen=seen: seen.append("global post")),
        ]
        try:
            for t in range(1, 5):
                (train_by_hand if by_hand else train)(model, opt, batches(1))
                assert sorted(seen) == sorted(["global post", "global pre", "post", "pre"] * t)
        finally:
            for handle in handles:
                handle.remove()


@pytest.mark.parametrize("moment", ["first_step", "second_step", "restore"])
@each_by_hand
def test_a_stale_graph_raises_as_in_torch(method: Method, base: str, moment: str) -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = method.make([("weight", p), ("other", q)], base, **method.every)
    p.grad = torch.ones(3)
    version = q._version
    if moment != "first_step":
        opt.first_step()
    loss = (p * p).sum()
    getattr(opt, moment)()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert q._version == version  # what has no gradient is not announced as written


def test_an_autocast_region_around_the_passes() -> None:
    """autocast keeps low-precision copies of weights: no pass must see those of another one."""
    device = torch.get_default_device()
    for method in (METHODS["sam"], METHODS["salr"]):
        losses = []
        for outside in (True, False):
            torch.manual_seed(0)
            with torch.device("cpu"):
                model, x, y = nn.Linear(8, 3), torch.randn(16, 8), torch.randint(0, 3, (16,))
            model, x, y = model.to(device), x.to(device), y.to(device)
            opt = method.make(model.named_parameters(), SGD, lr=0.1, **method.every, **{method.radius: 5.0})
            seen: list[float] = []

            def closure(
                model: nn.Module = model, x: Any = x, y: Any = y, seen: Any = seen, outside: bool = outside
            ) -> Tensor:
                with torch.autocast(device.type, torch.bfloat16) if not outside else torch.enable_grad():
                    loss = nn.functional.cross_entropy(model(x).float(), y)
                loss.backward()
                seen.append(float(loss.detach()))
                return loss

            with torch.autocast(device.type, torch.bfloat16, enabled=outside):
                for _ in range(2):
                    opt.step(closure)
            losses.append(seen)
        assert losses[0] == losses[1]
        assert max(losses[0]) > 1.5 * losses[0][0]


@pytest.mark.parametrize("rule", [SGD, AdamW], ids=lambda b: b.__name__)
def test_grad_scaler_by_hand(rule: Any) -> None:
    """A scale of a power of two cancels; an overflow that the scaler sees is undone by restore()."""
    model, twin = make_net(f32), make_net(f32)
    opt, twin_opt = (sk.SAM(m.parameters(), rule, lr=0.01) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i, (x, y) in enumerate(batches(4, f32)):
        before = weights(model)
        for last in (False, True):
            loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            if last and i == 2:
                model.out.bias.grad[0] = float("inf")
            if last:
                scaler.step(opt)
            else:
                opt.first_step(zero_grad=True)
        opt.restore()
        scaler.update()
        opt.zero_grad()
        if i == 2:
            assert_same_bits(weights(model), before)
        else:
            twin_opt.step(make_closure(twin, (x, y)))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# Statistics.


@each_method
def test_stats(method: Method, base: str) -> None:
    model, twin = make_net(), make_net()
    opt, naive = method.make(model.named_parameters(), base), method.oracle(twin.named_parameters(), base)
    counted = dict(steps=0, second_passes=0, skipped_steps=0, grad_norm=0)
    assert {k: float(opt.stats[k]) for k in counted} == counted
    make_closure(twin, batches(1)[0])()
    opt.step(make_closure(model, batches(1)[0]))
    held = opt.stats
    train(model, opt, batches(2))
    for value in held.values():
        assert value.shape == ()
        assert value.device == model.out.weight.device
    assert float(held["grad_norm"]) == pytest.approx(naive.norm(), rel=1e-12)  # that of the first pass
    assert held["steps"] == 1  # what was read stays what it was
    assert opt.stats["steps"] == 3
    if method.always:
        assert opt.stats["second_passes"] == 3 * method.two_passes


# Norm statistics.


@over([m for m in METHODS.values() if not m.one_gradient])
def test_model_keeps_norm_statistics_to_the_first_pass(method: Method) -> None:
    model, twin = make_net(), make_net()
    opt = method.make(model.named_parameters(), SGD, lr=0.0, model=model)
    for batch in batches(6):
        opt.step(make_closure(model, batch))
        make_closure(twin, batch)()
    assert_same_bits(dict(model.named_buffers()), dict(twin.named_buffers()))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(3),
    "BatchNorm1d cumulative": lambda: nn.BatchNorm1d(3, momentum=None),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(3),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(3, track_running_stats=True),
    "InstanceNorm1d without": lambda: nn.InstanceNorm1d(3),
    "BatchNorm1d without": lambda: nn.BatchNorm1d(3, track_running_stats=False),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_frozen_batch_stats(norm: str, training: bool) -> None:
    model = nn.Sequential(NORMS[norm]()).train(training)
    twin = copy.deepcopy(model)
    x = torch.randn(5, 3, 4)
    if norm == "SyncBatchNorm" and training:
        return  # needs a process group
    buffers = dict(model.named_buffers())
    before = {name: b.clone() for name, b in buffers.items()}
    with sk.frozen_batch_stats(model):
        with sk.frozen_batch_stats(model):
            out = model(torch.full_like(x, float("inf")))
        out = model(x)
    assert torch.equal(out, twin(x))  # normalizes as it does outside
    for name, b in model.named_buffers():
        assert b is buffers[name]
        assert torch.equal(b, before[name]), name
    model(x)
    if training and "without" not in norm:
        assert not torch.equal(model[0].running_mean, before["0.running_mean"])


def test_frozen_batch_stats_survives_exceptions_and_leaves_others_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.LayerNorm(3))
    with pytest.raises(ValueError, match="training True"), sk.frozen_batch_stats(model):
        raise ValueError(f"training {model.training and model[0].training}")
    assert model[0].track_running_stats
    mean = model[0].running_mean.clone()
    model(torch.randn(4, 3))
    assert not torch.equal(model[0].running_mean, mean)


@every_deciding
def test_a_plain_step_by_hand_counts_when_it_begins(method: Method) -> None:
    """``steps`` counts calls of first_step, those that are cancelled too."""
    model = make_net(torch.float32)
    options = method.never or {"k": 9}
    opt = method.make(model.named_parameters(), "momentum", **options)
    closure = make_closure(model, batches(1, torch.float32)[0])
    opt.step(closure)
    taken = int(opt.stats["second_passes"])
    for t in range(1, 3):
        opt.zero_grad()
        closure()
        assert not opt.first_step()
        assert int(opt.stats["steps"]) == t + 1
        opt.restore()
        assert int(opt.stats["steps"]) == t + 1
    assert int(opt.stats["second_passes"]) == taken


def test_clipping_can_be_changed_between_steps() -> None:
    """As a trainer sets it: what is set is what the constructor would have been given."""
    models = []
    for norms in ((0.05, None), (None, 0.05)):
        model = make_net()
        opt = sk.SAM(model.parameters(), lr=0.1, max_grad_norm=norms[0])
        for batch, norm in zip(batches(2), (0.05, None), strict=True):
            opt.max_grad_norm = norm
            assert opt.max_grad_norm == norm
            train(model, opt, [batch])
        models.append(model)
        with pytest.raises(ValueError, match="Invalid max_grad_norm: 0"):
            opt.max_grad_norm = 0
    assert_same_bits(*map(weights, models))
    twin = make_net()
    train(twin, sk.SAM(twin.parameters(), lr=0.1), batches(2))
    assert relative_error(models[0], twin) > 1e-4
