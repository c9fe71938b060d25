"""Checkpoints, copies and pickles keep everything, to the bit (contract 3, 4)."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_same_bits, batches, make_closure, make_net, train, weights
from torch import nn

import sharpkern as sk

SGD, Adam, AdamW, RMSprop = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop

MAKERS: dict[str, Any] = {
    "sam-sgd": lambda m: sk.SAM(m.parameters(), SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "sam-plain-sgd": lambda m: sk.SAM(m.parameters(), SGD, lr=0.05),
    "sam-adamw": lambda m: sk.SAM(m.parameters(), AdamW, lr=1e-2, amsgrad=True),
    "asam-adam": lambda m: sk.ASAM(m.named_parameters(), Adam, lr=1e-2),
    "sam-wrapped": lambda m: sk.SAM(m.parameters(), RMSprop, lr=1e-3, momentum=0.9),
    "sam-flat": lambda m: sk.SAM(m.parameters(), AdamW, lr=1e-2, flatten=True),
    "sssam-adamw": lambda m: sk.SSSAM(m.parameters(), AdamW, lr=1e-2, p=0.6, seed=4),
    "aelooksam-adamw": lambda m: sk.AELookSAM(m.parameters(), AdamW, lr=1e-2, total_steps=20),
    "looksam-wrapped": lambda m: sk.LookSAM(m.parameters(), RMSprop, lr=1e-3, k=2),
    "aesam-sgd": lambda m: sk.AESAM(m.parameters(), SGD, lr=0.05, total_steps=20),
    "sam-groups": lambda m: sk.SAM(
        [{"params": m.hidden.parameters(), "lr": 0.1, "rho": 0.1}, {"params": [m.conv.weight, m.gain]}],
        SGD,
        lr=0.05,
        momentum=0.9,
    ),
}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Any:
    return MAKERS[request.param]


def numbers(opt: sk.SAM) -> dict[str, torch.Tensor]:
    return opt.stats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_equals_straight_on(make: Any, dtype: torch.dtype, tmp_path: Path, backend: str) -> None:
    data = batches(10, dtype)
    straight = make_net(dtype)
    straight_opt = make(straight)
    train(straight, straight_opt, data)

    model = make_net(dtype)
    opt = make(model)
    train(model, opt, data[:5])
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "five.pt")
    saved = torch.load(tmp_path / "five.pt", weights_only=True)

    resumed = make_net(dtype, seed=1)
    resumed_opt = make(resumed)
    resumed.load_state_dict(saved["model"])
    resumed_opt.load_state_dict(saved["opt"])
    assert_same_bits(resumed_opt.stats, opt.stats)
    train(resumed, resumed_opt, data[5:])
    assert_same_bits(weights(resumed), weights(straight))
    assert_same_bits(resumed_opt.stats, straight_opt.stats)


def test_loading_copies(make: Any) -> None:
    """The source goes on training without touching what was loaded from its live state dict."""
    data = batches(6)
    model = make_net()
    opt = make(model)
    train(model, opt, data[:3])
    other = make_net()
    other_opt = make(other)
    other.load_state_dict(model.state_dict())
    other_opt.load_state_dict(opt.state_dict())
    train(model, opt, data[3:])
    train(other, other_opt, data[3:])
    assert_same_bits(weights(model), weights(other))


def test_backups_and_tables_are_never_saved(make: Any) -> None:
    model = make_net()
    opt = make(model)
    train(model, opt, batches(2))
    keys = {key for entry in opt.state_dict()["state"].values() for key in entry}
    torchs = {"momentum_buffer", "step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg"}
    assert keys <= torchs | {"g_v"}
    total = sum(p.numel() for p in model.parameters()) * 8
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    buffers = len(keys - {"step"})
    assert file.tell() < total * buffers * 1.5 + 20_000


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_keep_everything(make: Any, how: str) -> None:
    data = batches(8)
    model = make_net()
    opt = make(model)
    train(model, opt, data[:4])
    twin, twin_opt = copy.deepcopy((model, opt)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, opt)))
    assert_same_bits(twin_opt.stats, opt.stats)
    train(model, opt, data[4:])
    train(twin, twin_opt, data[4:])
    assert_same_bits(weights(model), weights(twin))
    assert twin.out.weight is not model.out.weight
    assert_same_bits(twin_opt.stats, opt.stats)


def test_a_pickle_is_not_larger_than_its_state() -> None:
    params = [nn.Parameter(torch.randn(1000)) for _ in range(50)]
    opt = sk.SAM(params, AdamW, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    # Weights and two moments; a view pickled with its buffer would make it 50 times as large.
    assert len(pickle.dumps(opt)) < 3 * 50 * 1000 * 4 * 1.3 + 100_000


def test_copies_keep_the_model(backend: str) -> None:
    model = make_net()
    opt = sk.SAM(model.parameters(), SGD, lr=0.1, model=model)
    twin, twin_opt = copy.deepcopy((model, opt))
    assert twin_opt._model is twin
    batch = batches(1)[0]
    twin_opt.zero_grad()
    make_closure(twin, batch)()
    twin_opt.first_step()
    assert not twin.bn.track_running_stats
    assert model.bn.track_running_stats
    twin_opt.restore()


def test_nothing_is_saved_or_copied_while_perturbed(make: Any) -> None:
    model = make_net()
    opt = make(model)
    make_closure(model, batches(1)[0])()
    state = opt.state_dict()
    opt.first_step()
    for act in (opt.state_dict, lambda: copy.deepcopy(opt), lambda: pickle.dumps(opt)):
        with pytest.raises(RuntimeError, match="perturbed"):
            act()
    with pytest.raises(RuntimeError, match="between two passes"):
        opt.load_state_dict(state)
    opt.second_step()
    opt.state_dict()


TORCH: dict[str, Any] = {
    "SGD": (SGD, dict(lr=0.05, momentum=0.9, weight_decay=1e-3)),
    "SGD dampened": (SGD, dict(lr=0.05, momentum=0.9, dampening=0.5)),
    "SGD without momentum": (SGD, dict(lr=0.05)),
    "Adam": (Adam, dict(lr=1e-2)),
    "AdamW amsgrad": (AdamW, dict(lr=1e-2, amsgrad=True)),
    "RMSprop": (RMSprop, dict(lr=1e-3)),
}


@pytest.mark.parametrize("name", TORCH)
def test_a_plain_torch_state_dict_loads(name: str, backend: str) -> None:
    base, options = TORCH[name]
    model, twin = make_net(), make_net()
    own = base(twin.parameters(), **options)
    data = batches(8)
    for batch in data[:4]:
        own.zero_grad()
        make_closure(twin, batch)()
        own.step()
    opt = sk.SAM(model.parameters(), base, rho=0.07, **{**options, "lr": 1.0})
    model.load_state_dict(twin.state_dict())
    opt.load_state_dict(own.state_dict())
    assert opt.param_groups[0]["rho"] == 0.07  # what the dict lacks keeps its value
    assert opt.param_groups[0]["lr"] == options["lr"]
    for batch in data[4:]:
        for m, o in ((model, opt), (twin, own)):
            o.zero_grad()
            make_closure(m, batch)()
            o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW amsgrad"])
def test_torch_loads_ours(name: str) -> None:
    base, options = TORCH[name]
    model, twin = make_net(), make_net()
    opt, own = sk.SAM(model.parameters(), base, **options), base(twin.parameters(), **options)
    train(model, opt, batches(3))
    twin.load_state_dict(model.state_dict())
    own.load_state_dict(copy.deepcopy(opt.state_dict()))  # torch would share our tensors
    for batch in batches(2):
        for m, o in ((model, opt), (twin, own)):
            o.zero_grad()
            make_closure(m, batch)()
            o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_half_precision_state_is_never_cast_down() -> None:
    model = make_net(torch.bfloat16)
    opt = sk.SAM(model.parameters(), AdamW, lr=1e-2)
    train(model, opt, batches(2, torch.bfloat16))
    other = sk.SAM(make_net(torch.bfloat16).parameters(), AdamW, lr=1e-2)
    other.load_state_dict(opt.state_dict())
    for mine, theirs in zip(opt.state.values(), other.state.values(), strict=True):
        for key, value in mine.items():
            assert theirs[key].dtype == torch.float32
            assert torch.equal(theirs[key], value)


def test_unknown_group_keys_are_kept() -> None:
    model = make_net()
    opt = sk.SAM([{"params": model.parameters(), "initial_lr": 0.3, "note": "mine"}], SGD, lr=0.1)
    state = opt.state_dict()
    assert state["param_groups"][0]["note"] == "mine"
    state["param_groups"][0]["other"] = 5
    opt.load_state_dict(state)
    assert opt.param_groups[0]["note"] == "mine"
    assert opt.param_groups[0]["other"] == 5


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


BAD_DICTS: dict[str, Any] = {
    "groups": lambda s: s["param_groups"].append(dict(s["param_groups"][0])),
    "size": lambda s: s["param_groups"][0]["params"].pop(),
    "shape": lambda s: s["state"][0].update(momentum_buffer=torch.zeros(3)),
    "statistics": lambda s: s["sharpkern"].pop("counters"),
    "version": lambda s: s["sharpkern"].update(version=99),
}


@pytest.mark.parametrize("bad", BAD_DICTS)
def test_a_dict_that_does_not_fit_changes_nothing(bad: str) -> None:
    model = make_net()
    opt = sk.SAM(model.parameters(), SGD, lr=0.1, momentum=0.9)
    train(model, opt, batches(2))
    state = copy.deepcopy(opt.state_dict())
    before = copy.deepcopy(state)
    BAD_DICTS[bad](state)
    state["param_groups"][0]["lr"] = 123.0
    with pytest.raises(ValueError):
        opt.load_state_dict(state)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, entry in before["state"].items():
        for key, value in entry.items():
            assert torch.equal(after["state"][i][key], value)
    train(model, opt, batches(1))


def test_a_pickled_state_dict_is_not_larger_than_its_state() -> None:
    params = [nn.Parameter(torch.randn(1000)) for _ in range(50)]
    opt = sk.SAM(params, SGD, lr=0.1, momentum=0.9)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    assert len(pickle.dumps(opt.state_dict())) < 50 * 1000 * 4 * 1.3 + 100_000


def test_loaded_names_scale_what_they_name(backend: str) -> None:
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


def test_resetting_one_entry_starts_that_parameter_afresh(backend: str) -> None:
    for reset in (lambda o, p: o.state[p].clear(), lambda o, p: o.state.update({p: {}}), lambda o, p: o.state.pop(p)):
        p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        opt = sk.SAM([p, q], SGD, lr=0.1, momentum=0.9)
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        opt.step()
        reset(opt, p)
        opt.step()
        assert torch.equal(opt.state[p]["momentum_buffer"], torch.ones(3))
        assert torch.equal(opt.state[q]["momentum_buffer"], torch.full((3,), 1.9))
        assert len(opt.state_dict()["state"][0]) == 2


def test_clearing_the_state_by_hand_starts_afresh(backend: str) -> None:
    model, twin = make_net(), make_net()
    opt = sk.SAM(model.parameters(), SGD, lr=0.1, momentum=0.9)
    data = batches(4)
    train(model, opt, data[:2])
    twin.load_state_dict(model.state_dict())
    fresh = sk.SAM(twin.parameters(), SGD, lr=0.1, momentum=0.9)
    opt.state.clear()
    train(model, opt, data[2:])
    train(twin, fresh, data[2:])
    assert_same_bits(weights(model), weights(twin))
