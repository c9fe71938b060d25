"""A part of the parameters is perturbed: by a group option, by a predicate, and SAM-ON's ``norm_layers``."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from methods import METHODS, Method, no_convolution, over
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
from naive import Naive, Trigger, asam, draws, magnitude
from torch import Tensor, nn

import sharpkern as sk

f32, SGD = torch.float32, torch.optim.SGD
CLASSES = (sk.SAM, sk.ASAM, sk.SSSAM, sk.AESAM, sk.ESAM)
PARTIAL = [m for m in METHODS.values() if m.cls in CLASSES and m.name != "sam-p"]
WHOLE = [m for m in METHODS.values() if m.cls in (sk.LookSAM, sk.AELookSAM, sk.GSAM, sk.SALR)]


def gain_or_hidden(name: str | None, p: Tensor) -> bool:
    return "gain" in (name or "") or "hidden" in (name or "")


def halves(model: nn.Module, **first: Any) -> list[dict[str, Any]]:
    """gain, conv and bn.weight; bn.bias and the linear layers."""
    named = list(model.named_parameters())
    return [{"params": named[:3], **first}, {"params": named[3:], "rho": 0.2}]


KINDS: dict[str, tuple[Any, dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "sam": (sk.SAM, {"rho": 0.1}, dict),
    "adaptive": (sk.SAM, {"rho": 0.5, "adaptive": True}, lambda: {"scale": magnitude}),
    "asam": (sk.ASAM, {"rho": 0.3, "eta": 0.01}, lambda: {"scale": asam}),
    "sssam": (sk.SSSAM, {"rho": 0.1, "p": 0.5, "seed": 3}, lambda: {"fires": draws(0.5, 3)}),
    "aesam": (sk.AESAM, {"rho": 0.1, "total_steps": 30}, lambda: {"fires": Trigger(30, 1.0, -1.0)}),
}


@pytest.mark.parametrize("how", ["group", "predicate", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_is_over_what_is_perturbed_and_all_is_updated(kind: str, how: str) -> None:
    """In float64. A parameter is perturbed where the group's option and the predicate say so."""
    cls, own, make_hooks = KINDS[kind]
    hooks = make_hooks()
    ours, theirs = make_net(), make_net()
    first = {} if how == "predicate" else {"perturb": False}
    perturb = None if how == "group" else gain_or_hidden
    rule: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-3}
    opt = cls(halves(ours, **first), SGD, perturb=perturb, **own, **rule)
    scale = hooks.get("scale", lambda name, w, group: 1.0)

    def part(name: str, w: Tensor, group: dict[str, Any]) -> Tensor | float:
        inside = group.get("perturb", True) and (perturb is None or perturb(name, w))
        return scale(name, w, group) if inside else 0.0

    groups = {key: own[key] for key in ("rho", "eta", "adaptive") if key in own}
    naive = Naive(halves(theirs, **first), SGD, groups, **{**hooks, "scale": part}, **rule)
    for batch in batches(30):
        opt.step(make_closure(ours, batch))
        naive.step(make_closure(theirs, batch))
    assert relative_error(ours, theirs) < 1e-12
    assert int(opt.stats["second_passes"]) == sum(naive.decisions)


@pytest.mark.parametrize("flatten", [False, True])
@over(PARTIAL)
def test_what_is_left_out_does_not_move(method: Method, flatten: bool) -> None:
    """In the second pass; its first gradient may be anything, its second one not."""
    every = method.name == "sam" and not flatten
    for backend in sk.available_backends("cpu") if every else ["reference"]:
        model = make_net(f32)
        options = {**method.every, "perturb": no_convolution, "flatten": flatten}
        with sk.use_backend(backend):
            opt = method.make(model.named_parameters(), "momentum", **options)
            for spoilt in (0, 1):
                before, seen = weights(model), []

                def closure(model: Any = model, seen: Any = seen, spoilt: int = spoilt) -> Tensor:
                    seen.append(weights(model))
                    loss = make_closure(model, batches(1, f32)[0])()
                    if len(seen) == spoilt + 1:
                        model.conv.weight.grad[0, 0, 0, 0] = math.nan
                    return loss

                opt.step(closure)
                assert torch.equal(seen[1]["conv.weight"], before["conv.weight"])
                assert not torch.equal(seen[1]["hidden.weight"], before["hidden.weight"])
                assert torch.equal(model.conv.weight, before["conv.weight"]) == bool(spoilt)
                assert int(opt.stats["skipped_steps"]) == spoilt
                assert all(p.isfinite().all() for p in model.parameters())


def test_a_plain_step_looks_at_every_gradient() -> None:
    model = make_net(f32)
    opt = sk.SSSAM(model.named_parameters(), SGD, lr=0.1, p=0.0, perturb=no_convolution)
    before = weights(model)
    make_closure(model, batches(1, f32)[0])()
    model.conv.weight.grad[0, 0, 0, 0] = math.nan
    assert not opt.first_step()
    opt.second_step()
    assert_same_bits(weights(model), before)
    assert int(opt.stats["skipped_steps"]) == 1


@pytest.mark.parametrize("how", ["group", "predicate"])
def test_where_nothing_is_perturbed_a_step_is_the_base_rules(how: str) -> None:
    """Of two passes at the same weights."""
    ours, theirs = make_net(f32), make_net(f32)
    options = {"perturb": lambda name, p: False} if how == "predicate" else {}
    params = [{"params": list(ours.parameters()), "perturb": how == "predicate"}]
    with pytest.warns(UserWarning, match="perturb= is false for every parameter: SAM takes its passes for nothing"):
        opt = sk.SAM(params, SGD, lr=0.1, **options)
    base = SGD(theirs.parameters(), lr=0.1)
    for batch in batches(3, f32):
        opt.step(make_closure(ours, batch))
        base.zero_grad()
        make_closure(theirs, batch)()
        base.step()
    assert relative_error(ours, theirs) < 1e-6
    assert int(opt.stats["second_passes"]) == 3
    assert float(opt.stats["grad_norm"]) == 0


# SAM-ON.


class OwnNorm(nn.Module):
    """A norm layer that torch does not know."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x / x.norm()


def test_norm_layers() -> None:
    norms = [
        nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.InstanceNorm1d(4, affine=True), nn.LayerNorm(4),
        nn.GroupNorm(2, 4), nn.RMSNorm(4), OwnNorm(4),
    ]  # fmt: skip
    model = nn.ModuleList(
        [*norms, nn.Linear(4, 4), nn.InstanceNorm1d(4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))]
    )
    expected = {p for norm in [*norms, model[-1][1]] for p in norm.parameters()}
    for known, more in ((expected - set(norms[-1].parameters()), ()), (expected, (OwnNorm,))):
        perturb = sk.norm_layers(model, *more)
        assert {p for p in model.parameters() if perturb(None, p)} == known
    with pytest.raises(ValueError, match="no norm layer with parameters"):
        sk.norm_layers(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model should be a torch\.nn\.Module"):
        sk.norm_layers(list(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="given by their classes"):
        sk.norm_layers(model, norms[-1])  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state dict"])
@pytest.mark.parametrize("named", [True, False])
def test_sam_on_goes_on_where_it_was(named: bool, how: str) -> None:
    """By identity, whatever the names; a copy of model and optimizer knows the copy's layers."""

    def make(model: Any) -> Any:
        params = model.named_parameters() if named else model.parameters()
        return sk.SAM(params, SGD, perturb=sk.norm_layers(model), rho=0.5, lr=0.05, momentum=0.9)

    model = make_net(f32)
    opt = make(model)
    train(model, opt, batches(3, f32))
    if how == "state dict":
        other = make_net(f32, seed=4)
        other_opt = make(other)
        train(other, other_opt, batches(1, f32, seed=9))
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        other_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    else:
        pair = (model, opt)
        other, other_opt = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = weights(other)
    make_closure(other, batches(1, f32)[0])()
    other_opt.first_step()
    assert {name for name, w in weights(other).items() if not torch.equal(w, before[name])} == {"bn.weight", "bn.bias"}
    other_opt.restore()
    other_opt.zero_grad()
    model.load_state_dict(copy.deepcopy(other.state_dict()))  # the buffers of that pass, too
    train(model, opt, batches(3, f32, seed=5))
    train_by_hand(other, other_opt, batches(3, f32, seed=5))
    assert_same_bits(weights(model) | state_of(opt), weights(other) | state_of(other_opt))


# The choice follows.


def test_a_group_that_comes_later_is_asked_too() -> None:
    model = make_net(f32)
    named = dict(model.named_parameters())
    named["hidden.weight"].requires_grad_(False)
    opt = sk.SAM([("bn.bias", named["bn.bias"])], SGD, lr=0.1, perturb=gain_or_hidden)
    opt.add_param_group({"params": [(name, named[name]) for name in ("gain", "hidden.weight", "out.weight")]})

    def moved() -> set[str]:
        before = weights(model)
        opt.zero_grad()
        make_closure(model, batches(1, f32)[0])()
        opt.first_step()
        now = {name for name, w in weights(model).items() if not torch.equal(w, before[name])}
        opt.restore()
        return now

    assert moved() == {"gain"}
    named["hidden.weight"].requires_grad_()
    assert moved() == {"gain", "hidden.weight"}
    opt.param_groups[1]["perturb"] = False
    assert moved() == set()
    saved = copy.deepcopy(opt.state_dict())
    opt.param_groups[1]["perturb"] = True
    assert moved() == {"gain", "hidden.weight"}
    opt.load_state_dict(saved)
    assert opt.param_groups[1]["perturb"] is False
    assert moved() == set()
    for group in saved["param_groups"]:  # of a version that had no such option: what is here stays
        del group["perturb"]
    opt.param_groups[1]["perturb"] = True
    opt.load_state_dict(saved)
    assert moved() == {"gain", "hidden.weight"}


# Bad input.


@over(WHOLE)
def test_who_uses_the_whole_gradient_leaves_nothing_out(method: Method) -> None:
    assert "perturb" not in inspect.signature(method.cls).parameters
    model = make_net(f32)
    why = "it goes along the whole momentum" if method.cls is sk.MomentumSAM else "it uses the whole first gradient"
    with pytest.raises(TypeError, match=f"{method.cls.__name__} takes no perturb=: {why}"):
        method.make(model.parameters(), lr=0.1, perturb=no_convolution)
    with pytest.raises(ValueError, match="Invalid perturb: False"):
        method.make([{"params": list(model.parameters()), "perturb": False}], lr=0.1)
    opt = method.make(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="Invalid perturb: False"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "perturb": False})
    assert len(opt.param_groups) == 1


def test_nudged_sgd_leaves_nothing_out() -> None:
    with pytest.raises(TypeError, match="NudgedSGD takes no perturb=: its directions are of all parameters"):
        sk.NudgedSGD(make_net(f32).parameters(), perturb=no_convolution)


REST = [m for m in METHODS.values() if m not in PARTIAL]


@over(REST)
def test_who_leaves_nothing_out_notices_a_group_that_asks_for_it_later(method: Method) -> None:
    model = make_net()
    opt = method.make(model.named_parameters(), lr=0.1)
    closure = make_closure(model, batches(1)[0])
    opt.step(closure)
    before = weights(model)
    opt.param_groups[0]["perturb"] = False
    with pytest.raises(ValueError, match="Invalid perturb: False"):
        opt.step(closure)
    assert_same_bits(weights(model), before)
    del opt.param_groups[0]["perturb"]
    opt.step(closure)


@over(PARTIAL)
def test_who_leaves_out_says_so(method: Method) -> None:
    assert "perturb" in inspect.signature(method.cls).parameters
    assert "perturb" in (method.cls.__doc__ or "")


BAD: dict[str, tuple[dict[str, Any], Callable[[Any], Any], type[Exception], str]] = {
    "no function": ({"perturb": "norm"}, list, TypeError, "perturb should be a function"),
    "no bool": (
        {"perturb": lambda name, p: p.dim()},
        list,
        TypeError,
        r"perturb\(None, parameter\) should return a bool",
    ),
    "group": ({}, lambda ps: [{"params": list(ps), "perturb": 0}], TypeError, "perturb of a group should be a bool"),
    "raises": ({"perturb": lambda name, p: "bn" in name}, list, TypeError, "not iterable"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_choices(case: str) -> None:
    options, params, error, message = BAD[case]
    model = make_net(f32)
    with pytest.raises(error, match=message):
        sk.SAM(params(model.parameters()), SGD, lr=0.1, **options)


def test_a_bad_choice_later_changes_nothing() -> None:
    def perturb(name: str | None, p: Tensor) -> Any:
        return None if p.dim() == 3 else True

    opt = sk.SAM(make_net(f32).parameters(), SGD, lr=0.1, perturb=perturb)
    with pytest.raises(TypeError, match="should return a bool, but got None"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1, 1, 1))]})
    assert len(opt.param_groups) == 1
    with pytest.raises((pickle.PicklingError, AttributeError), match="perturb"):  # it says what it could not pickle
        pickle.dumps(opt)


def test_a_ball_that_scales_nothing_notices_a_group_that_asks_for_it_later() -> None:
    model = make_net(f32)
    opt = sk.SAM(model.parameters(), SGD, lr=0.1, p=3.0)
    closure = make_closure(model, batches(1, f32)[0])
    opt.step(closure)
    before = weights(model)
    opt.param_groups[0]["adaptive"] = True
    with pytest.raises(ValueError, match="adaptive=True goes with p=2 only, but p is 3.0"):
        opt.step(closure)
    assert_same_bits(weights(model), before)
    opt.param_groups[0]["adaptive"] = False
    opt.step(closure)
    assert weights(model)["gain"] != before["gain"]
