"""Checkpoints, copies and pickles keep everything, to the bit; dicts of other classes and of torch (contract 3, 4)."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import itertools
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from methods import (
    BY_HAND,
    LOOKING,
    METHODS,
    RULES,
    SGD,
    AdamW,
    Method,
    RMSprop,
    each_method,
    every_base,
    every_method,
    over,
)
from models import (
    assert_same_bits,
    batches,
    make_closure,
    make_net,
    relative_error,
    split,
    state_of,
    train,
    train_by_hand,
    weights,
)
from torch import Tensor, nn

import sharpkern as sk

f32, bf16 = torch.float32, torch.bfloat16
HOW = ("weights_only", "live dict", "deepcopy", "pickle")
# Of the fast tier: every way in float32, half precision through a file, flat ones copied.
FAST = {*((how, False, f32) for how in HOW), ("weights_only", False, bf16), ("deepcopy", True, f32)}


def make(method: Method, model: nn.Module, base: str, **more: Any) -> Any:
    """Over three groups, and without the warning about half precision."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return method.make(split(model, RULES[base][1]), base, **more)


@pytest.mark.parametrize(
    ("how", "flatten", "dtype"),
    [
        pytest.param(*each, id="-".join(map(str, each)), marks=() if each in FAST else pytest.mark.slow)
        for each in itertools.product(HOW, (False, True), (f32, bf16))
    ],
)
@every_base
@every_method
def test_resume(method: Method, base: str, how: str, flatten: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Seven steps and six more are thirteen: weights, state and statistics. The source trains on undisturbed."""
    data = batches(13, dtype)
    straight = make_net(dtype)
    straight_opt = make(method, straight, base, flatten=flatten)
    train(straight, straight_opt, data)
    model = make_net(dtype)
    opt = make(method, model, base, flatten=flatten)
    train(model, opt, data[:7])
    if how in ("weights_only", "live dict"):
        saved = {"model": model.state_dict(), "opt": opt.state_dict()}
        if how == "weights_only":
            torch.save(saved, tmp_path / "seven.pt")
            saved = torch.load(tmp_path / "seven.pt", weights_only=True)
        resumed = make_net(dtype, seed=1)
        resumed_opt = make(method, resumed, base, flatten=flatten)
        train(resumed, resumed_opt, batches(2, dtype, seed=9))  # another past
        resumed.load_state_dict(saved["model"])
        resumed_opt.load_state_dict(saved["opt"])
    else:
        pair = (model, opt)
        resumed, resumed_opt = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert resumed.out.weight is not model.out.weight
    assert_same_bits(resumed_opt.stats, opt.stats)
    assert_same_bits(state_of(resumed_opt), state_of(opt))
    for key, value in state_of(resumed_opt).items():  # never cast down
        assert value.dtype == state_of(opt)[key].dtype
    for m, o in ((model, opt), (resumed, resumed_opt)):
        train(m, o, data[7:])
        assert_same_bits(weights(m), weights(straight))
        assert_same_bits(o.stats, straight_opt.stats)
        assert_same_bits(state_of(o), state_of(straight_opt))
    assert resumed_opt.state_dict()["sharpkern"].keys() == opt.state_dict()["sharpkern"].keys()


def schedule(t: int) -> float:
    return 1.0 - t / 12


def test_a_schedule_is_resumed_and_copied() -> None:
    data = batches(12, f32)
    pairs = [(make_net(f32), None)]
    straight = pairs[0][0]
    opts = [METHODS["sssam"].make(straight.named_parameters(), "momentum", p=schedule)]
    train(straight, opts[0], data[:5])
    twin, twin_opt = copy.deepcopy((straight, opts[0]))
    other, other_opt = pickle.loads(pickle.dumps((straight, opts[0])))
    for m, o in ((straight, opts[0]), (twin, twin_opt), (other, other_opt)):
        train(m, o, data[5:])
    for m, o in ((twin, twin_opt), (other, other_opt)):
        assert_same_bits(weights(m), weights(straight))
        assert_same_bits(o.stats, opts[0].stats)


def without_numbers(state: dict[str, Any]) -> dict[str, Any]:
    """As torch's own optimizer makes it."""
    groups = [{k: v for k, v in group.items() if k != "sharpkern"} for group in state["param_groups"]]
    return {"state": state["state"], "param_groups": groups}


@every_base
@every_method
def test_a_state_dict_is_a_copy_without_backups(method: Method, base: str) -> None:
    """It does not change with the next steps, and holds torch's keys, the method's own and nothing else."""
    model = make_net()
    opt = make(method, model, base)
    train(model, opt, batches(3))
    state = opt.state_dict()
    kept = copy.deepcopy(state)
    torchs = {"momentum_buffer", "step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg"}
    keys = {key for entry in state["state"].values() for key in entry}
    assert keys <= torchs | set(method.state)
    assert set(method.state) <= keys
    file = io.BytesIO()
    torch.save(state, file)
    total = sum(p.numel() for p in model.parameters()) * 8
    assert file.tell() < total * len(keys - {"step"}) * 1.5 + 20_000
    train(model, opt, batches(3))
    if base != "wrapped":  # torch's own state is alive in a dict of torch's, too
        for i, entry in kept["state"].items():
            assert_same_bits(*({k: torch.as_tensor(v) for k, v in e.items()} for e in (state["state"][i], entry)))
    for key, value in kept["sharpkern"].items():
        torch.testing.assert_close(state["sharpkern"][key], value, rtol=0, atol=0, equal_nan=True)


def test_a_pickle_is_not_larger_than_its_state() -> None:
    """A view pickled with its buffer would make it 50 times as large."""
    for method in (METHODS["sam"], METHODS["looksam"]):
        params = [nn.Parameter(torch.randn(1000)) for _ in range(50)]
        opt = method.make(params, AdamW, lr=0.1)

        def closure(params: Any = params) -> Tensor:
            for p in params:
                p.grad = torch.ones_like(p)
            return torch.tensor(1.0)

        opt.step(closure)
        buffers = 2 + len(method.state)
        assert len(pickle.dumps(opt.state_dict())) < buffers * 50 * 1000 * 4 * 1.3 + 100_000
        assert len(pickle.dumps(opt)) < (buffers + 1) * 50 * 1000 * 4 * 1.3 + 100_000


@each_method
def test_copies_keep_the_model(method: Method, base: str) -> None:
    model = make_net()
    opt = method.make(model.named_parameters(), base, model=model, **method.every)
    twin, twin_opt = copy.deepcopy((model, opt))
    before = weights(model)
    twin_opt.step(make_closure(twin, batches(1)[0]))
    assert twin.bn.num_batches_tracked == 1  # in the first of its passes
    assert model.bn.num_batches_tracked == 0
    assert_same_bits(weights(model), before)


@every_base
@every_method
def test_nothing_is_saved_copied_or_loaded_while_perturbed(method: Method, base: str) -> None:
    """Between two passes, which is inside of a closure, too."""
    model = make_net()
    opt = make(method, model, base, **method.every)
    state = opt.state_dict()
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            for act in (opt.state_dict, lambda: copy.deepcopy(opt), lambda: pickle.dumps(opt)):
                with pytest.raises(RuntimeError, match="perturbed"):
                    act()
            with pytest.raises(RuntimeError, match="between two passes"):
                opt.load_state_dict(state)
        return make_closure(model, batches(1)[0])()

    opt.step(closure)
    assert calls == method.calls
    opt.state_dict()


@over(m for m in METHODS.values() if (m.by_hand and not m.always) or m.one_gradient or m.one_pass)
def test_nothing_is_saved_or_copied_while_a_step_is_pending(method: Method) -> None:
    """Whose weights are at home: it is counted already, and was not taken."""
    model = make_net()
    plain = {"k": 9} if method.name == "looksam" else method.never or {}
    opt = method.make(model.named_parameters(), "momentum", **plain)
    closure = make_closure(model, batches(1)[0])
    if "k" in plain:  # whose first step is another
        opt.step(closure)
    closure()
    opt.first_step()
    assert not opt.is_perturbed
    for act in (opt.state_dict, lambda: copy.deepcopy(opt), lambda: pickle.dumps(opt)):
        with pytest.raises(RuntimeError, match="between two passes"):
            act()
    opt.second_step()
    opt.state_dict()
    if not method.one_gradient:  # which moves its weights before the first micro-batch
        opt.accumulate(closure)
        copy.deepcopy(opt)
        opt.state_dict()


@each_method
def test_a_default_device_of_the_callers_changes_nothing(method: Method, base: str) -> None:
    """What an optimizer makes lies with the parameters, or on the host. Not what torch's own rules make."""
    base, data, ends = "adamw" if base == "wrapped" else base, batches(6, f32), []
    for elsewhere in (False, True):
        models = [make_net(f32) for _ in range(2)]
        opts = [make(method, model, base) for model in models]
        with torch.device("meta") if elsewhere else contextlib.nullcontext():
            train(models[0], opts[0], data[:3])
            if method.by_hand:
                train_by_hand(models[0], opts[0], data[3:4])
            models[1].load_state_dict(models[0].state_dict())
            state = opts[0].state_dict()
            state["state"][0]["step"] = float(state["state"][0]["step"])
            opts[1].load_state_dict(state)
            model, opt = copy.deepcopy((models[1], opts[1]))
            train(model, opt, data[4:])
        ends.append(weights(model) | opt.stats | state_of(opt))
    assert_same_bits(*ends)


# Dicts of torch and of other classes.


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "wrapped-nadam"])
@every_method
def test_a_plain_torch_state_dict_loads_and_goes_back(method: Method, rule: str) -> None:
    base, options = method.base_of(rule, {})
    model, twin = make_net(), make_net()
    own = base(twin.parameters(), **options)
    data = batches(8)

    def plain_steps(pairs: Any, data: Any) -> None:
        for batch in data:
            for m, o in pairs:
                o.zero_grad()
                make_closure(m, batch)()
                o.step()

    plain_steps([(twin, own)], data[:4])
    more = {"rho": 0.07} if method.radius == "rho" else {}
    opt = method.make(model.named_parameters(), rule, **{**more, "lr": 1.0})
    model.load_state_dict(twin.state_dict())
    opt.load_state_dict(own.state_dict())
    assert opt.param_groups[0].get("rho") == more.get("rho")  # what the dict lacks keeps its value
    assert opt.param_groups[0]["lr"] == options["lr"]
    plain_steps([(model, opt), (twin, own)], data[4:6])
    assert relative_error(model, twin) < 1e-12
    if rule.startswith("wrapped") and method.state:
        return  # torch's would meet what is the method's own
    train(model, opt, batches(2))
    twin.load_state_dict(model.state_dict())
    own.load_state_dict(copy.deepcopy(opt.state_dict()))  # torch would share our tensors
    plain_steps([(model, opt), (twin, own)], data[6:])
    assert relative_error(model, twin) < 1e-12


@pytest.mark.parametrize("source", [*METHODS, "torch"])
@every_method
def test_any_state_dict_of_the_family_or_of_torch_loads(method: Method, source: str) -> None:
    """The rule's state and the number of steps go over; what is not there keeps its value."""
    model = make_net(f32)
    if source == "torch":
        other: Any = SGD(model.parameters(), lr=0.05, momentum=0.9)
        for batch in batches(3, f32):
            other.zero_grad()
            make_closure(model, batch)()
            other.step()
    else:
        other = METHODS[source].make(model.named_parameters(), SGD, lr=0.05, momentum=0.9)
        train(model, other, batches(3, f32))
    opt = method.make(model.named_parameters(), SGD, lr=0.05, momentum=0.9)
    if (method.name, source) == ("sam-p", "sam-adaptive"):
        with pytest.raises(ValueError, match="adaptive=True goes with p=2 only, but p is 3.0"):
            opt.load_state_dict(other.state_dict())
        assert not opt.state
        assert opt.param_groups[0]["adaptive"] is False
        return
    opt.load_state_dict(other.state_dict())
    for p in model.parameters():
        assert torch.equal(opt.state[p]["momentum_buffer"], other.state[p]["momentum_buffer"])
        assert set(opt.state[p]) <= {"momentum_buffer", "step", *method.state}
    assert int(opt.stats["steps"]) == (0 if source == "torch" else 3)
    before = weights(model)
    train(model, opt, batches(3, f32))
    assert not torch.equal(model.out.weight, before["out.weight"])
    assert all(p.isfinite().all() for p in model.parameters())


@over(m for m in BY_HAND if "adaptive" not in inspect.signature(m.cls.__init__).parameters)
def test_a_loaded_group_may_have_keys_of_another_class(method: Method) -> None:
    """Every state dict of SAM has ``adaptive``, an option that these classes do not have."""
    ends = []
    for adaptive in (False, True):
        model = make_net(f32)
        source = sk.SAM(make_net(f32).named_parameters(), adaptive=adaptive, lr=0.05, momentum=0.9)
        opt = method.make(model.named_parameters(), SGD, lr=0.05, momentum=0.9)
        opt.load_state_dict(source.state_dict())
        assert opt.param_groups[0]["adaptive"] is adaptive
        train(model, opt, batches(3, f32))
        assert int(opt.stats["second_passes"]) > 0
        ends.append(weights(model))
    assert_same_bits(*ends)


def test_a_policy_goes_on_at_the_step_of_the_state_dict() -> None:
    model = make_net(f32)
    sam = sk.SAM(model.parameters(), SGD, lr=0.05)
    train(model, sam, batches(3, f32))
    for missing in ((), ("t", "plain_steps")):  # as before there were any
        state = sam.state_dict()
        for key in missing:
            del state["sharpkern"][key]
        asked: list[int] = []
        opt = sk.SSSAM(model.parameters(), SGD, p=lambda t, asked=asked: asked.append(t) or 0.0, lr=0.05)
        make_closure(model, batches(1, f32)[0])()
        opt.step()
        assert asked == []  # not by a step without a closure
        opt.load_state_dict(state)
        train(model, opt, batches(2, f32))
        assert asked == [3, 4]
        assert opt.stats["steps"].item() == 5


def test_unknown_group_keys_are_kept() -> None:
    model = make_net()
    opt = sk.SAM([{"params": model.parameters(), "initial_lr": 0.3, "note": "mine"}], SGD, lr=0.1)
    state = opt.state_dict()
    assert state["param_groups"][0]["note"] == "mine"
    state["param_groups"][0]["other"] = 5
    opt.load_state_dict(state)
    assert opt.param_groups[0]["note"] == "mine"
    assert opt.param_groups[0]["other"] == 5


@each_method
def test_state_of_the_users_own_passes_through(method: Method, base: str) -> None:
    """A hook, say, keeps a value in ``opt.state`` that is no parameter's."""
    data = batches(4, f32)
    ends = []
    for own in (False, True):
        model = make_net(f32)
        opt = method.make(model.named_parameters(), base)
        train(model, opt, data[:2])
        if own:
            opt.state["test"], opt.state["more"] = 1, {"g_v": 2}
            twins = [pickle.loads(pickle.dumps((model, opt))), copy.deepcopy((model, opt))]
            fresh = make_net(f32)
            fresh.load_state_dict(model.state_dict())
            fresh_opt = method.make(fresh.named_parameters(), base)
            fresh_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
            for m, o in ((model, opt), *twins, (fresh, fresh_opt)):
                train(m, o, data[2:])
                assert (o.state["test"], o.state["more"]) == (1, {"g_v": 2})
                assert o.state_dict()["state"]["test"] == 1
                ends.append(weights(m))
        else:
            train(model, opt, data[2:])
            ends.append(weights(model))
    for end in ends[1:]:
        assert_same_bits(end, ends[0])


@each_method
def test_state_dict_hooks_see_and_return_whole_dicts(method: Method, base: str) -> None:
    model = make_net(f32)
    opt = method.make(model.named_parameters(), base)
    train(model, opt, batches(2, f32))
    plain = opt.state_dict()
    seen: list[Any] = []

    def hook(o: Any, state: dict[str, Any]) -> Any:
        seen.append((o is opt, state["sharpkern"]["t"], len(state["param_groups"])))
        return {"mine": state}

    handle = opt.register_state_dict_post_hook(hook, prepend=True)
    found = opt.state_dict()
    assert seen == [(True, 2, 1)]
    assert found.keys() == {"mine"}
    assert found["mine"]["param_groups"] == plain["param_groups"]
    assert len(opt._optimizer_state_dict_post_hooks) == 1
    handle.remove()
    opt.register_state_dict_post_hook(lambda o, state: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        opt.state_dict()
    assert len(opt._optimizer_state_dict_post_hooks) == 1
    opt.register_load_state_dict_pre_hook(lambda o, state: state["mine"])
    opt.load_state_dict(found)


def test_load_hooks_see_the_finished_optimizer() -> None:
    model = make_net()
    opt = sk.SAM(model.parameters(), SGD, rho=0.3, lr=0.1, momentum=0.9)
    train(model, opt, batches(2))
    state = SGD(make_net().parameters(), lr=0.5, momentum=0.9).state_dict()
    seen = []
    opt.register_load_state_dict_pre_hook(lambda o, s: {**s, "param_groups": [{**s["param_groups"][0], "lr": 0.7}]})
    opt.register_load_state_dict_post_hook(lambda o: seen.append((o.param_groups[0]["rho"], o.param_groups[0]["lr"])))
    opt.load_state_dict(state)
    assert seen == [(0.3, 0.7)]


def test_loaded_names_scale_what_they_name() -> None:
    """ASAM goes by the names of the loaded dict, whether it had taken a step before or not."""
    named = sk.ASAM(make_net().named_parameters(), SGD, lr=0.1)
    ends = []
    for steps in (0, 2):
        model = make_net()
        opt = sk.ASAM(model.parameters(), SGD, lr=0.1)
        train(model, opt, batches(steps))
        model.load_state_dict(make_net().state_dict())
        opt.load_state_dict(named.state_dict())
        train(model, opt, batches(2))
        ends.append(weights(model))
    assert_same_bits(*ends)


@pytest.mark.parametrize("loaded", [False, True], ids=["into unnamed", "into named"])
@pytest.mark.parametrize("saved", [False, True], ids=["from unnamed", "from named"])
def test_loading_that_changes_what_is_scaled_is_told_of(saved: bool, loaded: bool) -> None:
    """Names of the loaded dict are taken; where it has none, those that are here, by which other tensors are scaled."""

    def make(named: bool) -> tuple[Any, Any]:
        model = make_net(f32)
        return model, sk.ASAM(model.named_parameters() if named else model.parameters(), SGD, lr=0.1, momentum=0.9)

    model, opt = make(saved)
    train(model, opt, batches(2, f32))
    whole = opt.state_dict()
    for state in (whole, {key: whole[key] for key in ("state", "param_groups")}):
        _, other = make(loaded)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            other.load_state_dict(state)
            other.load_state_dict(other.state_dict())  # as it is now
            make(loaded)[1].load_state_dict(without_numbers(whole))  # which does not say
        said = "ASAM scaled 3 tensors of 1169 elements when the state dict was saved, and scales 4 of 1174"
        assert [str(w.message).partition(":")[0] for w in seen] == [said] * (loaded and not saved)


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_a_number_of_steps_has_any_shape(base: str) -> None:
    """Of one element, as some tools store numbers."""
    model = make_net(f32)
    opt = METHODS["sam"].make(model.named_parameters(), base)
    train(model, opt, batches(2, f32))
    state = copy.deepcopy(opt.state_dict())
    for i, entry in state["state"].items():
        entry["step"] = [5, 5.0, torch.tensor(5.0), torch.tensor([5.0]), torch.tensor([[5]])][i % 5]
    opt.load_state_dict(state)
    assert [entry["step"].tolist() for entry in opt.state.values()] == [5.0] * len(opt.state)
    train(model, opt, batches(1, f32))


def test_a_frozen_parameter_without_memory_takes_no_part_in_loading() -> None:
    """A layer that is kept elsewhere; state for one has nowhere to go."""
    away, p = nn.Parameter(torch.ones(3, device="meta"), requires_grad=False), nn.Parameter(torch.ones(3))
    opt = sk.LookSAM([away, p], lr=0.1, momentum=0.9)
    p.grad = torch.ones(3)
    opt.step()
    state = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(state)
    assert torch.equal(opt.state[p]["momentum_buffer"], torch.ones(3))
    state["state"][0] = copy.deepcopy(state["state"][1])
    state["param_groups"][0]["lr"] = 5.0
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 is on the meta device"):
        opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.1


def test_an_adamw_decays_as_one_whatever_it_loads() -> None:
    """A state dict of Adam says that its decay is not decoupled: torch's AdamW does not heed that, its Adam does."""
    for source, base in ((torch.optim.Adam, AdamW), (AdamW, torch.optim.Adam)):
        model, twin = make_net(), make_net()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numbers that it lacks
            ours, theirs = sk.AESAM(model.parameters(), base, total_steps=9), base(twin.parameters())
            for opt in (ours, theirs):
                opt.load_state_dict(source(make_net().parameters(), lr=0.01, weight_decay=0.5).state_dict())
            for m, opt in ((model, ours), (twin, theirs)):
                make_closure(m, batches(1)[0])()
                opt.step()
        assert ours.param_groups[0]["decoupled_weight_decay"] == theirs.param_groups[0]["decoupled_weight_decay"]
        assert relative_error(model, twin) < 1e-12


def test_a_base_optimizer_that_saves_more_is_told_of() -> None:
    class Counting(SGD):
        k = 0

        def state_dict(self) -> dict[str, Any]:
            return super().state_dict() | {"k": self.k}

    opt = sk.SAM(make_net().parameters(), Counting, lr=0.1)
    with pytest.warns(UserWarning, match="Counting has a state_dict.. or load_state_dict.. of its own"):
        saved = opt.state_dict()
    with pytest.warns(UserWarning, match="Counting has"):
        sk.SAM(make_net().parameters(), Counting, lr=0.1).load_state_dict(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.SAM(make_net().parameters(), RMSprop, lr=0.1).load_state_dict(saved)


def test_a_loaded_radius_may_be_a_tensor() -> None:
    """A schedule may have written one into the group, which a step takes."""
    model = make_net(f32)
    for rho in (0.1, torch.tensor(0.1), torch.tensor([0.1])):
        opt = sk.SAM(model.parameters(), lr=0.0)
        opt.param_groups[0]["rho"] = rho
        opt.zero_grad()
        train(model, opt, batches(1, f32))
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        assert torch.as_tensor(opt.param_groups[0]["rho"]) == torch.tensor(0.1)


def test_a_loaded_lr_scale_is_within_its_bound() -> None:
    """Of a run that had none, which is resumed with one."""
    model = make_net(f32)
    opt = METHODS["salr"].make(model.named_parameters())
    state = opt.state_dict()
    state["sharpkern"]["lr_scale"] = torch.tensor(1e7, dtype=torch.float64)
    for bound in (None, 2.0):
        other = METHODS["salr"].make(model.named_parameters(), max_lr_scale=bound)
        other.load_state_dict(state)
        assert other.stats["lr_scale"] == (bound or 1e7)


# Dicts that do not fit.

CLASSES = {
    "g_v": "aelooksam",
    "ema": "aelooksam",
    "g_v_squared_norm": "aelooksam",
    "history": "salr",
    "lr_scale": "salr",
    "g_v no tensor": "aelooksam",
    "rho": "sssam",
    "rho nan": "gsam",
    "eta": "asam",
    "scaled": "asam",
}
BAD_DICTS: dict[str, Any] = {
    "groups": lambda s: s["param_groups"].append(dict(s["param_groups"][0])),
    "size": lambda s: s["param_groups"][0]["params"].pop(),
    "shape": lambda s: s["state"][0].update(momentum_buffer=torch.zeros(3)),
    "no counters": lambda s: s["sharpkern"].pop("counters"),
    "counters": lambda s: s["sharpkern"].update(counters=torch.zeros(3)),
    "version": lambda s: s["sharpkern"].update(version=99),
    "no numbers": lambda s: s.update(sharpkern=[1]),
    "g_v": lambda s: s["state"][0].update(g_v=torch.zeros(7)),
    "ema": lambda s: s["sharpkern"].update(ema=torch.zeros(2, 2)),
    "g_v_squared_norm": lambda s: s["sharpkern"].update(g_v_squared_norm=torch.zeros(2, 2)),
    "history": lambda s: s["sharpkern"].update(history=torch.zeros(2, 2)),
    "lr_scale": lambda s: s["sharpkern"].pop("lr_scale"),
    "no tensor": lambda s: s["state"][0].update(momentum_buffer=1.0),
    "g_v no tensor": lambda s: s["state"][0].update(g_v=[0.0]),
    "step": lambda s: s["state"][0].update(step="3"),
    "steps": lambda s: s["state"][0].update(step=torch.zeros(2)),
    "no entry": lambda s: s["state"].update({0: 5}),
    "rho": lambda s: s["param_groups"][0].update(rho=-0.1),
    "rho nan": lambda s: s["param_groups"][0].update(rho=math.nan),
    "scaled": lambda s: s["sharpkern"].update(scaled=[3]),
    "eta": lambda s: s["param_groups"][0].update(eta=-1.0),
}


@pytest.mark.parametrize("bad", BAD_DICTS)
def test_a_dict_that_does_not_fit_changes_nothing(bad: str) -> None:
    for method in [METHODS[CLASSES[bad]]] if bad in CLASSES else METHODS.values():
        model = make_net()
        opt = method.make(model.named_parameters(), "momentum")
        train(model, opt, batches(2))
        state = copy.deepcopy(opt.state_dict())
        before = copy.deepcopy(state)
        BAD_DICTS[bad](state)
        state["param_groups"][0]["lr"] = 123.0
        stats, kept = opt.stats, state_of(opt)
        with pytest.raises(ValueError):
            opt.load_state_dict(state)
        assert opt.state_dict()["param_groups"] == before["param_groups"]
        assert_same_bits(opt.stats, stats)
        assert_same_bits(state_of(opt), kept)
        train(model, opt, batches(1))
        opt.load_state_dict(before)  # and one that fits does


@every_base
def test_a_dict_of_a_base_that_keeps_no_moments_is_refused(base: str) -> None:
    """Adam would take its number of steps, and correct no bias. SGD takes any: momentum begins with zeros."""
    model, source = make_net(f32), make_net(f32)
    opt, other = (METHODS["sam"].make(m.named_parameters(), b) for m, b in ((model, "adamw"), (source, base)))
    for m, o in ((model, opt), (source, other)):
        train(m, o, batches(2, f32))
    before, stats, state = state_of(opt), opt.stats, other.state_dict()
    if base == "adamw":
        del state["state"][7]["exp_avg_sq"]
    with pytest.raises(ValueError, match="exp_avg_sq for parameter .* is not of AdamW"):
        opt.load_state_dict(state)
    assert_same_bits(state_of(opt), before)
    assert_same_bits(opt.stats, stats)
    METHODS["sam"].make(make_net(f32).named_parameters(), "momentum").load_state_dict(state)
    if base == "adamw":
        state["state"][7]["step"] = 0
        opt.load_state_dict(state)


@every_method
def test_a_dict_that_the_wrapped_optimizer_does_not_take_changes_nothing(method: Method) -> None:
    """RMSprop looks for its own numbers of steps in what it loads."""
    model, twin = make_net(f32), make_net(f32)
    opt, other = (method.make(m.named_parameters(), "wrapped") for m in (model, twin))
    for m, o in ((model, opt), (twin, other)):
        train(m, o, batches(3, f32))
    state = copy.deepcopy(opt.state_dict())
    for entry in state["state"].values():
        del entry["step"]
    state["param_groups"][0]["lr"] = 123.0
    for numbers in (state["sharpkern"], *(group["sharpkern"] for group in state["param_groups"])):
        numbers["t"] = 99
    before = state_of(opt)
    with pytest.raises(KeyError, match="step"):
        opt.load_state_dict(state)
    assert opt.state_dict()["sharpkern"]["t"] == other.state_dict()["sharpkern"]["t"]
    assert_same_bits(state_of(opt), before)
    for m, o in ((model, opt), (twin, other)):
        train(m, o, batches(4, f32)[3:])
    assert_same_bits(weights(model), weights(twin))
    assert_same_bits(opt.stats, other.stats)


# State that the user clears.


@every_method
def test_resetting_one_entry_starts_that_parameter_afresh(method: Method) -> None:
    for reset in (lambda o, p: o.state[p].clear(), lambda o, p: o.state.update({p: {}}), lambda o, p: o.state.pop(p)):
        p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        opt = method.make([p, q], SGD, lr=0.1, momentum=0.9)
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        opt.step()
        reset(opt, p)
        opt.step()
        assert torch.equal(opt.state[p]["momentum_buffer"], torch.ones(3))
        assert torch.equal(opt.state[q]["momentum_buffer"], torch.full((3,), 1.9))
        assert opt.state_dict()["state"][0].keys() == {"momentum_buffer", "step", *method.state}


@every_base
@every_method
def test_clearing_the_state_by_hand_starts_afresh(method: Method, base: str) -> None:
    model, twin = make_net(), make_net()
    opt = method.make(model.named_parameters(), base, **method.every)
    data = batches(4)
    train(model, opt, data[:2])
    twin.load_state_dict(model.state_dict())
    fresh = method.make(twin.named_parameters(), base, **method.every)
    opt.state.clear()
    if method.one_pass:
        fresh.refresh(None)  # directions are state
    if not method.by_hand:  # its median is no state of a parameter
        fresh.load_state_dict({**fresh.state_dict(), "sharpkern": opt.state_dict()["sharpkern"]})
    train(model, opt, data[2:])
    train(twin, fresh, data[2:])
    assert_same_bits(weights(model), weights(twin))


@every_base
@every_method
def test_state_cleared_between_two_passes_comes_back(method: Method, base: str) -> None:
    model = make_net(f32)
    opt = method.make(model.named_parameters(), base, **method.every)
    opt.step(make_closure(model, batches(1, f32)[0]))
    keys = {p: set(entry) for p, entry in opt.state.items()}
    assert keys
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            opt.state.clear()
        return make_closure(model, batches(1, f32)[0])()

    opt.step(closure)
    assert {p: set(entry) for p, entry in opt.state.items()} == keys


# g_v.


@every_base
@over(LOOKING)
def test_g_v_in_the_state(method: Method, base: str) -> None:
    """Parameter-shaped, of the state's dtype, gone when the state is cleared, unseen by a wrapped optimizer."""
    model = make_net(bf16)
    opt = make(method, model, base)
    train(model, opt, batches(2, bf16))
    for p in model.parameters():
        assert opt.state[p]["g_v"].shape == p.shape
        assert opt.state[p]["g_v"].dtype == torch.float32
    assert float(opt.state_dict()["sharpkern"]["g_v_squared_norm"]) > 0
    opt.state.clear()
    opt.zero_grad()
    make_closure(model, batches(1, bf16)[0])()
    opt.step()
    assert float(opt.state_dict()["sharpkern"]["g_v_squared_norm"]) == 0


@pytest.mark.parametrize(
    "how", ["no statistics", "one cleared", "frozen and back", "written", "written and loaded", "pruned", "inference"]
)
@over(LOOKING)
def test_the_norm_of_g_v_is_that_of_what_is_there(method: Method, how: str) -> None:
    model = make_net()
    opt = method.make(model.named_parameters(), SGD, lr=0.05, momentum=0.9)
    train(model, opt, batches(2))
    state = opt.state_dict()
    if how == "no statistics":
        for entry in state["state"].values():
            entry["g_v"] *= 3
        with pytest.warns(UserWarning, match="the number of steps"):
            opt.load_state_dict(without_numbers(state))
    elif how == "one cleared":
        opt.state[model.hidden.weight].clear()
    elif how == "written":
        opt.state[model.hidden.weight]["g_v"].mul_(3)
    elif how == "written and loaded":
        state["state"][4]["g_v"] *= 3
        opt.load_state_dict(state)
    elif how == "pruned":
        params = opt.param_groups[0]["params"]
        old, params[4] = params[4], nn.Parameter(params[4].detach()[:2])
        opt.state[params[4]] = {key: x[:2] if x.dim() else x for key, x in opt.state.pop(old).items()}
    elif how == "inference":  # such tensors do not count writes
        with torch.inference_mode():
            opt.load_state_dict(state)
    else:
        model.out.weight.requires_grad_(False)
        model.out.weight.grad = None
        opt.add_param_group({"params": [("more", nn.Parameter(torch.zeros(2, dtype=torch.float64)))]})
        opt.step(lambda: None)
        model.out.weight.requires_grad_(True)
    opt.zero_grad()
    make_closure(model, batches(1)[0])()
    opt.step()  # without a closure: nothing but the rule
    squared = sum(float(e["g_v"].double().square().sum()) for e in opt.state.values() if "g_v" in e)
    assert squared > 0
    assert float(opt.state_dict()["sharpkern"]["g_v_squared_norm"]) == pytest.approx(squared, rel=1e-12)


@pytest.mark.parametrize("case", ["a parameter without a gradient", "a first refresh that was skipped"])
@pytest.mark.parametrize("rule", [RMSprop, torch.optim.NAdam, SGD, AdamW], ids=lambda b: b.__name__)
@over(LOOKING)
def test_a_parameter_that_has_no_state_of_its_rule(method: Method, rule: Any, case: str) -> None:
    """Checkpoints load and copies step, here and in torch: many optimizers look into any state that is not empty."""
    params = [nn.Parameter(torch.randn(4)) for _ in range(3)]
    opt = method.make(params, rule, lr=0.01, **method.every)

    def closure_over(these: list[nn.Parameter], factor: float = 1.0) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            loss = factor * sum(p.cos().sum() + p.pow(4).sum() for p in these)
            loss.backward()
            return loss

        return closure

    if case.startswith("a first"):
        opt.step(closure_over(params, math.nan))
        assert int(opt.stats["skipped_steps"]) == 1
    else:
        opt.step(closure_over(params[:2]))
        assert params[2] not in opt.state
    state = copy.deepcopy(opt.state_dict())
    for other in (method.make(params, rule, lr=0.01, **method.every), sk.SAM(params, rule, lr=0.01)):
        other.load_state_dict(state)
        other.step(closure_over(params))
        assert all("g_v" in other.state[p] for p in params) == isinstance(other, sk.LookSAM)
    if not case.startswith("a first"):
        theirs = rule(params, lr=0.01)
        theirs.load_state_dict(state)
        closure_over(params)()
        theirs.step()
    twins, twin = copy.deepcopy((params, opt))
    twin.step(closure_over(twins))


@pytest.mark.parametrize("base", ["adam", "sgd", "momentum"])
def test_g_v_alone_does_not_say_that_a_parameter_was_stepped(base: str) -> None:
    """One that had a gradient in a first pass only: its bias correction, or first momentum, is still to come."""
    rule, options = RULES[base]

    def run(opt: Any, params: list[nn.Parameter], calls: list[bool]) -> None:
        for both in calls:
            loss = sum(p.cos().sum() + p.square().sum() for p in (params if both else params[:1]))
            opt.zero_grad()
            loss.backward()
            if opt.first_step(zero_grad=True):
                (params[0].sin().sum() + params[0].square().sum()).backward()
            opt.second_step()

    ends = []
    for resumed in (False, True):
        params = [nn.Parameter(torch.linspace(0.1, 1, 4)), nn.Parameter(torch.linspace(1, 2, 3))]
        opt = sk.LookSAM(params, rule, k=4, **options)
        run(opt, params, [True])
        if resumed:
            saved = opt.state_dict()
            opt = sk.LookSAM(params, rule, k=4, **options)
            opt.load_state_dict(saved)
            assert opt.state[params[1]].keys() == {"g_v"}
        run(opt, params, [True, True])
        ends.append({str(i): p.detach() for i, p in enumerate(params)})
    assert_same_bits(*ends)


@pytest.mark.parametrize("counters", [torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.bool)])
def test_counters_of_another_dtype_are_refused(counters: Tensor) -> None:
    opt = sk.SAM(make_net(f32).parameters(), lr=0.1)
    state = opt.state_dict()
    state["sharpkern"]["counters"] = counters
    with pytest.raises(ValueError, match="loaded state dict has counters"):
        opt.load_state_dict(state)


def test_a_resumed_run_is_told_that_it_goes_past_total_steps() -> None:
    model = make_net(f32)
    opt = sk.AESAM(model.parameters(), lr=0.01, total_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, opt, batches(4, f32))
    resumed = sk.AESAM(model.parameters(), lr=0.01, total_steps=2)
    resumed.load_state_dict(opt.state_dict())
    resumed.zero_grad()
    with pytest.warns(UserWarning, match="total_steps=2") as seen:
        train(model, resumed, batches(3, f32))
    assert len(seen) == 1


@pytest.mark.parametrize("base", [torch.optim.NAdam, torch.optim.Adagrad, torch.optim.RAdam], ids=lambda b: b.__name__)
def test_a_wrapped_optimizer_amends_what_it_loads(base: Any) -> None:
    """torch once saved numbers of steps as Python's, which its optimizers no longer count up."""
    model = make_net(f32)
    opt = sk.SAM(model.parameters(), base, lr=1e-3)
    train(model, opt, batches(2, f32))
    state = copy.deepcopy(opt.state_dict())
    for entry in state["state"].values():
        entry["step"] = float(entry["step"])
    opt.load_state_dict(state)
    train(model, opt, batches(1, f32))
    assert [float(entry["step"]) for entry in opt.state.values()] == [3.0] * len(list(model.parameters()))


@every_method
def test_a_state_dict_is_of_its_moment(method: Method) -> None:
    """Whoever keeps one in memory finds it unchanged when the training has gone on."""
    model = make_net(f32)
    opt = method.make(model.named_parameters(), "momentum")
    train(model, opt, batches(3, f32))
    kept = opt.state_dict()
    before = copy.deepcopy(kept)
    train(model, opt, batches(4, f32))
    for key, value in before["sharpkern"].items():
        assert torch.equal(torch.as_tensor(kept["sharpkern"][key]), torch.as_tensor(value)), key
    for i, entry in before["state"].items():
        assert_same_bits({k: torch.as_tensor(v) for k, v in kept["state"][i].items()},
                         {k: torch.as_tensor(v) for k, v in entry.items()})  # fmt: skip


@every_method
def test_names_of_a_wrapped_optimizers_state_are_its_own(method: Method) -> None:
    """RMSprop's, whose ``grad_avg`` is what algorithms like to keep."""
    data, (straight, opt) = batches(4), runs(method)
    train(straight, opt, data[:2])
    fresh, other = runs(method, seed=1)
    fresh.load_state_dict(straight.state_dict())
    other.load_state_dict(opt.state_dict())
    train(straight, opt, data[2:])
    train(fresh, other, data[2:])
    assert_same_bits(weights(fresh), weights(straight))
    assert_same_bits(state_of(other), state_of(opt))


def runs(method: Method, seed: int = 0) -> tuple[nn.Module, Any]:
    model = make_net(seed=seed)
    return model, method.make(model.named_parameters(), torch.optim.RMSprop, 4, lr=1e-3, centered=True)
