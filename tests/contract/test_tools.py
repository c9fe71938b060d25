"""Checkpoints through tools that know no more of an optimizer than torch's own: ``state`` and ``param_groups``.

torch.distributed.checkpoint (DCP) among them, nested and flattened, in one process and in two.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from methods import METHODS, SGD, AdamW, Method, each_method, every_base, every_method
from models import assert_same_bits, batches, make_net, state_of, train, weights
from test_checkpoint import without_numbers
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import sharpkern as sk

f32 = torch.float32
forms = pytest.mark.parametrize("flattened", [False, True], ids=["nested", "flattened"])


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="torch")
        yield


@pytest.fixture(scope="module", autouse=True)
def gloo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# The tools: each takes what the first pair has to the second.


def keeps_two(model: nn.Module, opt: Any, fresh: nn.Module, fresh_opt: Any) -> None:
    """Only ``state`` and ``param_groups``."""
    fresh.load_state_dict(model.state_dict())
    saved = copy.deepcopy(opt.state_dict())
    fresh_opt.load_state_dict({key: saved[key] for key in ("state", "param_groups")})


def flattens(model: nn.Module, opt: Any, fresh: nn.Module, fresh_opt: Any) -> None:
    """``state.<name>.<key>`` and ``param_groups.<name>.<key>``, of the keys that the second optimizer has."""
    names = [name for name, _ in model.named_parameters()]
    saved, here = copy.deepcopy(opt.state_dict()), fresh_opt.state_dict()
    flat: dict[str, Any] = {}
    for i, entry in saved["state"].items():
        flat |= {f"state.{names[i]}.{key}": value for key, value in entry.items()}
    for group in saved["param_groups"]:
        for i in group["params"]:
            flat |= {f"param_groups.{names[i]}.{key}": value for key, value in group.items() if key != "params"}
    state: dict[int, dict[str, Any]] = {}
    for i, name in enumerate(names):
        prefix = f"state.{name}."
        entry = {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}
        if entry:
            state[i] = entry
    groups = [
        {key: flat[f"param_groups.{names[live['params'][0]]}.{key}"] for key in group if key != "params"}
        | {"params": live["params"]}
        for group, live in zip(fresh_opt.param_groups, here["param_groups"], strict=True)
    ]
    fresh.load_state_dict(model.state_dict())
    fresh_opt.load_state_dict({"state": state, "param_groups": groups})


TOOLS: dict[str, Callable[..., None]] = {f.__name__: f for f in (keeps_two, flattens)}


def through_files(folder: Path, flattened: bool, model: nn.Module, opt: Any, fresh: nn.Module, fresh_opt: Any) -> None:
    """As torch's documentation has it: saved from one pair, loaded into the other one's own dicts, and those set."""
    options = StateDictOptions(flatten_optimizer_state_dict=flattened)
    saved = dict(zip(("model", "opt"), get_state_dict(model, opt, options=options), strict=True))
    dcp.save(saved, checkpoint_id=folder)
    loaded = dict(zip(("model", "opt"), get_state_dict(fresh, fresh_opt, options=options), strict=True))
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(fresh, fresh_opt, model_state_dict=loaded["model"], optim_state_dict=loaded["opt"], options=options)


def assert_resumes(make: Callable[..., Any], carry: Callable[..., None], seed: int = 1) -> None:
    """Five steps and five more are ten, for whoever got the first five through ``carry``."""
    data = batches(10, f32)
    straight, model, fresh = make_net(f32), make_net(f32), make_net(f32, seed=seed)
    opts = [make(m) for m in (straight, model, fresh)]
    train(straight, opts[0], data)
    train(model, opts[1], data[:5])
    carry(model, opts[1], fresh, opts[2])
    assert all(group["sharpkern"] is None for group in opts[2].param_groups)
    assert_same_bits(opts[2].stats, opts[1].stats)
    train(fresh, opts[2], data[5:])
    assert_same_bits(weights(fresh), weights(straight))
    assert_same_bits(opts[2].stats, opts[0].stats)
    assert_same_bits(state_of(opts[2]), state_of(opts[0]))


@pytest.mark.parametrize("tool", TOOLS)
@every_base
@every_method
def test_resume_through_a_tool(method: Method, base: str, tool: str) -> None:
    assert_resumes(lambda m: method.make(m.named_parameters(), base), TOOLS[tool])


@pytest.mark.parametrize("flatten", [False, True], ids=["segments", "flat"])
@forms
@each_method
def test_resume_through_dcp(method: Method, base: str, flattened: bool, flatten: bool, tmp_path: Path) -> None:
    """Into a fresh optimizer, which torch takes a step with, on zero gradients, to make its state."""

    def carry(model: nn.Module, opt: Any, fresh: nn.Module, fresh_opt: Any) -> None:
        fresh_opt.zero_grad()
        through_files(tmp_path, flattened, model, opt, fresh, fresh_opt)

    assert_resumes(lambda m: method.make(m.named_parameters(), base, flatten=flatten), carry)


# Where the parameters are cut into groups. Nested, torch loads as many groups as it saved.
CUTS = {
    "nested": [((2, 5), (4, 5)), ((1, 2), (1, 7))],
    "flattened": [((2, 5), ()), ((), (2, 5)), ((3,), (2, 5))],
}


@pytest.mark.parametrize(
    ("form", "saved", "loaded"),
    [pytest.param(form, *pair, id=f"{form}-{pair[0]}-{pair[1]}") for form, pairs in CUTS.items() for pair in pairs],
)
@each_method
def test_resume_in_other_groups(method: Method, base: str, form: str, saved: Any, loaded: Any, tmp_path: Path) -> None:
    """Parameters may be cut into groups otherwise, if their options are the same. ASAM keeps their names apart."""
    cuts = iter((saved, saved, loaded))

    def make(model: nn.Module) -> Any:
        params = list(model.named_parameters() if method.cls is sk.ASAM else model.parameters())
        bounds = [0, *next(cuts), len(params)]
        return method.make([dict(params=params[a:b]) for a, b in itertools.pairwise(bounds)], base)

    assert_resumes(make, lambda *o: through_files(tmp_path, form == "flattened", *o))


# Two processes.


def of_two(rank: int, folder: str, name: str) -> None:
    """A process of two: the ten steps of ``assert_resumes``, each with its own data."""
    method, base = METHODS[name], "momentum"

    def make(seed: int) -> tuple[nn.Module, Any]:
        model = nn.parallel.DistributedDataParallel(make_net(f32, seed), broadcast_buffers=False)
        return model, method.make(model.module.named_parameters(), base)

    # SALR's sharpness is that of a process's own loss: one process saves it for all.
    data = batches(10, f32, seed=rank if name != "salr" else 0)
    straight, model = make(0), make(0)
    train(*straight, data)
    train(*model, data[:5])
    for how in ("nested", "flattened", "broadcast"):
        fresh = make(1)
        if how == "broadcast":
            fresh[0].load_state_dict(model[0].state_dict())
            whole = StateDictOptions(full_state_dict=True)
            saved = get_optimizer_state_dict(*model, options=whole)
            whole.broadcast_from_rank0 = True
            set_optimizer_state_dict(*fresh, {} if rank else saved, options=whole)
        else:
            through_files(Path(folder) / how, how == "flattened", *model, *fresh)
        assert_same_bits(fresh[1].stats, model[1].stats)
        train(*fresh, data[5:])
        assert_same_bits(weights(fresh[0]), weights(straight[0]))
        assert_same_bits(state_of(fresh[1]), state_of(straight[1]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aelooksam", "salr"])
def test_resume_in_two_processes(name: str, tmp_path: Path) -> None:
    processes.run(of_two, tmp_path, str(tmp_path), name)


# What is lost is told.

# Of the classes whose next steps depend on more than the state of the parameters.
COURSE = {"sssam": "steps", "esam": "steps", "aesam": "steps, ema", "looksam": "steps", "aelooksam": "steps, ema",
          "salr": "steps, history, lr_scale, sharpness", "nudged": "steps, directions"}  # fmt: skip


@every_method
def test_state_without_numbers_is_told_of_once(method: Method) -> None:
    model = make_net(f32)
    opt = method.make(model.named_parameters(), "momentum")
    train(model, opt, batches(3, f32))
    plain = SGD(model.parameters(), lr=0.1, momentum=0.9)
    plain.load_state_dict(without_numbers(copy.deepcopy(opt.state_dict())))
    fresh = method.make(model.named_parameters(), "momentum")
    if not method.one_pass:  # nothing was stepped; directions are state
        fresh.load_state_dict(without_numbers(fresh.state_dict()))
    for saved in (without_numbers(opt.state_dict()), plain.state_dict()):
        before = fresh.stats
        if method.name in COURSE:
            message = f"not the numbers that {method.cls.__name__} keeps .*: the number of {COURSE[method.name]} stay"
            with pytest.warns(UserWarning, match=message) as seen:
                fresh.load_state_dict(saved)
            assert [w.filename for w in seen] == [__file__]
        else:
            fresh.load_state_dict(saved)
        assert_same_bits(fresh.stats, before)


@pytest.mark.parametrize("policy", [None, sk.policy.Every(2)])
def test_a_policy_is_what_there_is_to_lose(policy: Any) -> None:
    model = make_net(f32)
    plain = AdamW(model.parameters())
    train(model, plain, batches(1, f32))
    opt = sk.GSAM(model.parameters(), AdamW, policy=policy)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        opt.load_state_dict(plain.state_dict())
    assert len(seen) == (policy is not None)


# The numbers in the groups.


@every_method
def test_numbers_of_the_groups(method: Method) -> None:
    """Comparable, printable, the same in every group; the key at the top wins; other optimizers can have them."""
    model = make_net(f32)
    groups = [dict(params=[pair]) for pair in model.named_parameters()]
    opt = method.make(groups, "momentum")
    assert all(group["sharpkern"] is None for group in opt.param_groups)
    train(model, opt, batches(3, f32))
    saved = opt.state_dict()
    assert saved["param_groups"] == copy.deepcopy(opt.state_dict()["param_groups"])
    for group in saved["param_groups"]:
        assert group["sharpkern"].keys() == saved["sharpkern"].keys()
        for name, value in group["sharpkern"].items():
            values = [float(x) for x in value.split()] if name == "history" else value
            values = values if isinstance(values, list) else [values]
            assert all(type(x) in (int, float) for x in values)
            same = torch.as_tensor(saved["sharpkern"][name], dtype=torch.float64).reshape(-1)
            assert torch.equal(torch.tensor(values, dtype=torch.float64), same)
        group["sharpkern"] = {**group["sharpkern"], "t": 99}
    other = method.make(groups, "momentum")
    other.load_state_dict(saved)
    assert other.state_dict()["sharpkern"]["t"] == 3
    del saved["sharpkern"]
    other.load_state_dict(saved)
    assert other.state_dict()["sharpkern"]["t"] == 99
    for group in saved["param_groups"]:
        group["sharpkern"] = None  # only at the top, as before there were any
    saved["sharpkern"] = opt.state_dict()["sharpkern"]
    other.load_state_dict(saved)
    assert_same_bits(other.stats, opt.stats)


BAD_NUMBERS: list[dict[str, Any]] = [
    {"counters": [0.5, 1.5, 2.5]},
    {"counters": [1, 2]},
    {"ema": 3.0},
    {"ema": ["a"]},
    {"ema": "1 2"},
    {"version": 2},
    {"t": 1.5},
]


@pytest.mark.parametrize("bad", BAD_NUMBERS, ids=str)
def test_numbers_of_the_groups_that_do_not_fit_change_nothing(bad: dict[str, Any]) -> None:
    model = make_net(f32)
    opt = sk.AESAM(model.parameters(), lr=0.1, momentum=0.9, total_steps=9)
    train(model, opt, batches(2, f32))
    saved = opt.state_dict()
    del saved["sharpkern"]
    saved["param_groups"][0] |= {"lr": 5.0, "sharpkern": {**saved["param_groups"][0]["sharpkern"], **bad}}
    before = opt.stats, state_of(opt)
    with pytest.raises(ValueError, match=f"loaded state dict has .*{next(iter(bad))}"):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == 0.1
    assert_same_bits(opt.stats, before[0])
    assert_same_bits(state_of(opt), before[1])
