"""What lives as long as what: nothing holds a model or a graph longer than needed, and proxies share one state."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from methods import METHODS, Method, each_method, every_by_hand, over
from models import assert_same_bits, batches, make_closure, make_net, train, train_by_hand, weights
from torch import Tensor

import sharpkern as sk

f32 = torch.float32


@pytest.fixture
def without_gc() -> Iterator[None]:
    """What dies here dies because nobody holds it."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("flatten", [False, True])
@each_method
def test_nothing_outlives_the_optimizer(method: Method, base: str, flatten: bool, without_gc: None) -> None:
    model = make_net(f32)
    opt = method.make(model.named_parameters(), base, flatten=flatten)
    train(model, opt, batches(3, f32))
    gone = [weakref.ref(model.out.weight), weakref.ref(opt)]
    del model, opt
    assert [ref() for ref in gone] == [None, None]


@pytest.mark.parametrize("flatten", [False, True])
def test_an_old_layout_is_gone_when_there_is_a_new_one(flatten: bool, without_gc: None) -> None:
    model = make_net(f32)
    opt = sk.LookSAM(model.parameters(), lr=0.1, momentum=0.9, flatten=flatten)
    gone = []
    for batch in batches(3, f32):
        opt.step(make_closure(model, batch))
        gone.append(weakref.ref(opt.state[model.out.weight]["momentum_buffer"]))
        model.out.weight.data = model.out.weight.data.t().contiguous().t()
        opt.zero_grad()
        opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    opt.step(make_closure(model, batches(1, f32)[0]))
    assert [ref() for ref in gone] == [None] * 3


def test_the_second_loss_is_gone_before_the_base_step() -> None:
    """A closure may return more than a loss, and that its graph with it."""
    alive: list[bool] = []
    held: list[Any] = []

    class Watching(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            alive.append(held[-1]() is not None)
            return super().step(closure)

    model = make_net(f32)
    opt = sk.SAM(model.parameters(), Watching, lr=0.1)
    inner = make_closure(model, batches(1, f32)[0])

    def closure() -> Tensor:
        loss = inner()
        held.append(weakref.ref(loss))
        return loss

    opt.step(closure)
    assert alive == [False]


# Proxies, as trainers have them: attributes shared by copy, or read through; writes stay on the proxy.


def copied(opt: Any) -> Any:
    """Its class is a mix with the optimizer's, its attributes those of the optimizer when it was wrapped."""

    class Mixed:
        def __init__(self, inner: Any) -> None:
            self.__dict__ = dict(inner.__dict__)
            self.inner = inner

    return type("Mixed" + type(opt).__name__, (Mixed, type(opt)), {})(opt)


def read_through(opt: Any) -> Any:
    """Attribute reads fall through to the optimizer."""

    class Through:
        def __init__(self, inner: Any) -> None:
            self.__dict__["inner"] = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["inner"], name)

    return type("Through" + type(opt).__name__, (Through, type(opt)), {})(opt)


PROXIES = {"copied": copied, "read through": read_through}


@pytest.mark.parametrize("proxy", PROXIES)
@every_by_hand
def test_steps_through_a_proxy(method: Method, proxy: str) -> None:
    ends = []
    for wrap in (lambda opt: opt, PROXIES[proxy]):
        model = make_net(f32)
        opt = method.make(model.named_parameters(), "momentum", model=model)
        wrapped = wrap(opt)
        data = batches(8, f32)
        train_by_hand(model, wrapped, data[:3])
        train(model, wrapped, data[3:5])
        before = weights(model)
        make_closure(model, data[5])()
        wrapped.first_step()
        opt.restore()
        assert_same_bits(weights(model), before)
        train_by_hand(model, opt, data[5:6])
        train_by_hand(model, wrapped, data[6:])
        ends.append((weights(model), wrapped.stats))
    assert_same_bits(ends[0][0], ends[1][0])
    assert_same_bits(ends[0][1], ends[1][1])


@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("base", ["momentum", "wrapped"])
@every_by_hand
def test_a_state_dict_loads_through_a_proxy(method: Method, base: str, proxy: str) -> None:
    """All of it, for whoever steps then."""
    source_model = make_net(f32)
    source = method.make(source_model.named_parameters(), base, lr=0.003)
    train(source_model, source, batches(4, f32))
    for through in (True, False):
        model, twin = make_net(f32), make_net(f32)
        for m in (model, twin):
            m.load_state_dict(source_model.state_dict())
        opt, straight = (method.make(m.named_parameters(), base) for m in (model, twin))
        train(model, opt, batches(1, f32))
        model.load_state_dict(source_model.state_dict())
        wrapped = PROXIES[proxy](opt)
        wrapped.load_state_dict(source.state_dict())
        straight.load_state_dict(source.state_dict())
        assert opt.param_groups[0]["lr"] == wrapped.param_groups[0]["lr"] == 0.003
        train_by_hand(model, wrapped if through else opt, batches(3, f32, seed=4))
        train_by_hand(twin, straight, batches(3, f32, seed=4))
        assert_same_bits(weights(model), weights(twin))


@pytest.mark.parametrize("momentum", [0, 0.9])
@over(METHODS[name] for name in ("looksam", "friendlysam", "vasso"))
def test_state_stays_where_it_is(method: Method, momentum: float) -> None:
    """From the first step that has any: whoever holds it, or captured a step, has the live one."""
    model = make_net()
    opt = method.make(model.named_parameters(), torch.optim.SGD, lr=0.05, momentum=momentum)
    train(model, opt, batches(1))
    held = [(p, name, id(x)) for p in model.parameters() for name, x in opt.state[p].items()]
    assert held
    train(model, opt, batches(3))
    assert all(id(opt.state[p][name]) == at for p, name, at in held)
