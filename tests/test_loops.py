"""The loops of other packages, in stand-ins that do what the packages do: an optimizer ends where a plain loop does.

tests/test_integrations.py has the packages themselves.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from loops import MICRO, STEPS, Batch, assert_same, data, every_way, make, mean_loss, plain
from methods import BY_HAND, CLIPPED, METHODS, RULES, TURNS, Method, over
from models import assert_same_bits, relative_error, weights
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    """A loop that is right is told nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Proxy:
    """As Lightning and Fabric wrap an optimizer: the class is a mix with the optimizer's, attributes are read from the
    optimizer and written to the wrapper, and step() goes another way, with a closure always."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Lightning" + type(optimizer).__name__, (Proxy, type(optimizer)), {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self._optimizer.step(closure=(lambda: None) if closure is None else closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class Delegate(torch.optim.Optimizer):
    """As Accelerate wraps one: it hands on what torch's optimizers have, and steps where gradients are complete."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.complete = True

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.complete:
            self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.complete:
            self.optimizer.zero_grad(set_to_none=set_to_none)


def automatic(opt: Any, backward: Callable[[], Tensor]) -> None:
    """The trainer's closure: forward, then zero_grad, then backward."""

    def closure() -> Tensor:
        opt.zero_grad()
        return backward()

    opt.step(closure=closure)


def manual(opt: Any, backward: Callable[[], Tensor]) -> None:
    opt.zero_grad()
    backward()
    assert not opt.is_perturbed
    if opt.first_step(zero_grad=True):
        assert opt.is_perturbed
        backward()
    opt.second_step()


def manual_step(opt: Any, backward: Callable[[], Tensor]) -> None:
    """The trainer, not the user, finishes the step."""
    opt.zero_grad()
    backward()
    if opt.first_step(zero_grad=True):
        backward()
    opt.step()


def manual_closure(opt: Any, backward: Callable[[], Tensor]) -> None:
    """The trainer finishes the step with its own closure, which computes the gradient of the second pass."""
    opt.zero_grad()
    backward()
    if opt.first_step(zero_grad=True):
        opt.step(backward)
    else:
        opt.step(lambda: None)


LOOPS = {"closure": automatic, "by hand": manual, "step()": manual_step, "step(closure)": manual_closure}


@every_way(*LOOPS)
def test_wrapped(method: Method, loop: str) -> None:
    model, opt = make(method)
    wrapped = Proxy(opt)
    for batch in data():
        LOOPS[loop](wrapped, lambda batch=batch: mean_loss(model, [batch]))
    assert not opt.is_perturbed
    assert not wrapped.is_perturbed
    assert_same((model, opt), plain(method))


@over(BY_HAND)
def test_a_step_is_cancelled_from_either_side_of_a_wrapper(method: Method) -> None:
    """By the wrapper or by the optimizer, whichever began it; the next step is a step."""
    (model, opt), batch = make(method, **method.every), data()[0]
    wrapped = Proxy(opt)
    before = weights(model)
    for first, second in [(wrapped, opt), (opt, wrapped), (wrapped, wrapped)]:
        mean_loss(model, [batch])
        assert first.first_step(zero_grad=True)
        with pytest.raises(RuntimeError, match="twice"):
            second.first_step()
        second.restore()
        assert_same_bits(weights(model), before)
        with pytest.raises(RuntimeError, match=r"before first_step"):
            first.second_step()

    def fail() -> None:
        raise KeyboardInterrupt

    mean_loss(model, [batch])
    assert wrapped.first_step(zero_grad=True)
    with pytest.raises(KeyboardInterrupt):
        wrapped.step(fail)
    assert_same_bits(weights(model), before)
    twin, other = make(method, **method.every)
    manual(wrapped, lambda: mean_loss(model, [batch]))
    manual(other, lambda: mean_loss(twin, [batch]))
    assert_same_bits(weights(model), weights(twin))


@pytest.mark.parametrize("scheduled", ["optimizer", "wrapper"])
@pytest.mark.parametrize("wrapper", ["optimizer", "proxy", "delegate"])
@pytest.mark.parametrize("loop", ["closure", "by hand"])
@over([METHODS["sam"], METHODS["aelooksam"]])
def test_schedulers_count_one_step_a_step(method: Method, loop: str, wrapper: str, scheduled: str) -> None:
    """torch's put a step() of their own over the one of what they are given, and warn where it was not called."""
    model, opt = make(method)
    wrapped = {"optimizer": lambda opt: opt, "proxy": Proxy, "delegate": Delegate}[wrapper](opt)
    target = wrapped if scheduled == "wrapper" else opt
    calls = 0
    step = target.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return step(*args, **kwargs)

    scheduler = torch.optim.lr_scheduler.StepLR(target, 2, 0.5)
    step = target.step
    target.step = counted
    counted._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    for batch in data():
        backward = lambda batch=batch: mean_loss(model, [batch])  # noqa: E731
        if wrapper == "delegate" and loop == "by hand":
            backward()
            if opt.first_step(zero_grad=True):
                backward()
            wrapped.step()
            wrapped.zero_grad()
        else:
            LOOPS[loop](wrapped, backward)
        scheduler.step()
    assert calls == STEPS
    assert_same((model, opt), plain(method, schedule=lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)))


@every_way("closure", "by hand")
def test_accumulation_as_in_accelerate(method: Method, loop: str) -> None:
    """The wrapper takes one step in three calls; micro-batches are kept, and all of them are in both passes."""
    model, opt = make(method)
    wrapped, kept = Delegate(opt), []
    for i, batch in enumerate(data(MICRO)):
        kept.append(batch)
        wrapped.complete = (i + 1) % MICRO == 0
        if loop == "by hand":
            # The first pass has no need to wait.
            (nn.functional.cross_entropy(model(batch[0]), batch[1]) / MICRO).backward()
            if wrapped.complete and opt.first_step(zero_grad=True):
                mean_loss(model, kept)
            wrapped.step()
            wrapped.zero_grad()
        else:
            wrapped.step(lambda: mean_loss(model, kept))
        if wrapped.complete:
            kept.clear()
    assert_same((model, opt), plain(method, MICRO))


class Trainer:
    """As Hugging Face's: training_step() is forward and backward; the trainer clips and steps, with no closure."""

    def __init__(self, model: nn.Module, opt: Any, max_grad_norm: float | None = None) -> None:
        self.model, self.optimizer, self.max_grad_norm = model, Delegate(opt), max_grad_norm

    def training_step(self, batch: Batch) -> None:
        (nn.functional.cross_entropy(self.model(batch[0]), batch[1]) / MICRO).backward()

    def train(self) -> None:
        for i, batch in enumerate(data(MICRO)):
            self.optimizer.complete = (i + 1) % MICRO == 0
            self.training_step(batch)
            if self.optimizer.complete:
                if self.max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
                self.optimizer.step()
                self.model.zero_grad()


class TwoPasses(Trainer):
    """The recipe of docs/loops/transformers.md."""

    batches: tuple[Batch, ...] = ()

    def training_step(self, batch: Batch) -> None:
        super().training_step(batch)
        self.batches += (batch,)
        if self.optimizer.complete:
            if self.optimizer.optimizer.first_step(zero_grad=True):
                for batch in self.batches:
                    super().training_step(batch)
            self.batches = ()


@over(BY_HAND)
def test_a_trainer_without_closures(method: Method) -> None:
    model, opt = make(method)
    TwoPasses(model, opt).train()
    assert_same((model, opt), plain(method, MICRO))


@over(CLIPPED)
def test_a_trainer_that_clips(method: Method) -> None:
    """What it clips is the gradient of the last pass, as max_grad_norm= does. (GSAM and WSAM add the first one to it,
    StableSAM scales it.)"""
    model, opt = make(method)
    TwoPasses(model, opt, max_grad_norm=0.1).train()
    expected = plain(method, MICRO, max_grad_norm=0.1)
    assert relative_error(model, expected[0]) < 1e-12
    assert relative_error(model, plain(method, MICRO)[0]) > 1e-3
    assert int(opt.stats["second_passes"]) == int(expected[1].stats["second_passes"])


@over([METHODS[name] for name in ("sam", "asam", "sssam", "looksam")])
def test_a_scaler(method: Method) -> None:
    """A scale of the gradients of both passes cancels, or is gone with the scaler's step; restore() does nothing."""
    model, opt = make(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for x, y in data():
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if opt.first_step(zero_grad=True):
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        scaler.step(opt)
        scaler.update()
        opt.restore()
        opt.zero_grad()
    assert relative_error(model, plain(method)[0]) < 1e-9


# Several processes.


def _net() -> nn.Module:
    """Without batch norm, whose statistics are those of a process's own batch."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 9), nn.Tanh(), nn.Linear(9, 3)).double()


def _loss(model: nn.Module, batch: Batch, rank: int | None = None) -> Tensor:
    x, y = batch if rank is None else (t[rank::2] for t in batch)
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def _micro(model: nn.Module, batch: Batch, rank: int, i: int, exchange: Any) -> Tensor:
    """Of half of a process's batch; its gradients are exchanged, or not."""
    x, y = (t[rank::2][2 * i : 2 * i + 2] for t in batch)
    with exchange:
        loss = nn.functional.cross_entropy(model(x), y) / 2
        loss.backward()
    return loss


def _one_process(method: Method, base: str) -> nn.Module:
    model = _net()
    opt = method.make(model.named_parameters(), base, STEPS)
    for batch in data():
        opt.step(lambda batch=batch: _loss(model, batch))
    return model


def _each_along_its_own(rho: float, base: Any, options: dict[str, Any]) -> nn.Module:
    """SAM over halves of a batch: the mean of their gradients, each taken where the half's own gradient leads."""
    model = _net()
    opt, params = base(model.parameters(), **options), list(model.parameters())
    for batch in data():
        seconds = []
        for rank in range(2):
            model.zero_grad()
            _loss(model, batch, rank)
            norm = torch.cat([p.grad.flatten() for p in params]).norm()
            before = [p.detach().clone() for p in params]
            with torch.no_grad():
                for p in params:
                    p += rho * p.grad / norm
            model.zero_grad()
            _loss(model, batch, rank)
            seconds.append([p.grad.clone() for p in params])
            for p, w in zip(params, before, strict=True):
                p.data.copy_(w)
        for p, *grads in zip(params, *seconds, strict=True):
            p.grad = sum(grads) / 2
        opt.step()
    return model


def _process(rank: int) -> None:
    def check(method: Method, base: str, loop: str, expected: nn.Module) -> None:
        model = _net()
        parallel = nn.parallel.DistributedDataParallel(model)
        opt = method.make(model.named_parameters(), base, STEPS, model=parallel)
        for batch in data():
            if loop == "closure":
                opt.step(lambda batch=batch: _loss(parallel, batch, rank))
                continue
            if loop == "accumulate":
                opt.accumulate(lambda batch=batch: _micro(parallel, batch, rank, 0, parallel.no_sync()))
                opt.accumulate(lambda batch=batch: _micro(parallel, batch, rank, 1, contextlib.nullcontext()))
                opt.step()
                continue
            opt.zero_grad()
            with parallel.no_sync() if loop == "no_sync" else contextlib.nullcontext():
                _loss(parallel, batch, rank)
            if opt.first_step(zero_grad=True):
                _loss(parallel, batch, rank)
            opt.second_step()
        flat = parameters_to_vector(model.parameters()).detach()
        gathered = [torch.empty_like(flat) for _ in range(2)]
        dist.all_gather(gathered, flat)
        assert torch.equal(*gathered), f"{method}, {loop}: the processes drifted apart"
        assert relative_error(model, expected) < 1e-11, f"{method}, {loop}"

    for method, base in TURNS:
        expected = _one_process(method, base)
        for loop in ("closure", "accumulate", "by hand")[: 3 if method.by_hand else 2]:
            check(method, base, loop, expected)
    _salr(rank)
    sam = METHODS["sam"]
    check(sam, "momentum", "no_sync", _each_along_its_own(sam.options["rho"], *RULES["momentum"]))


def _salr(rank: int) -> None:
    """What one process meets is the others', too; who is not told of them says so."""
    model = _net()
    parallel = nn.parallel.DistributedDataParallel(model)
    opt = METHODS["salr"].make(model.named_parameters(), model=parallel, **METHODS["salr"].every)
    opt.step(lambda: _loss(parallel, data()[0], rank))
    before, sharpness = parameters_to_vector(model.parameters()).detach(), float(opt.stats["sharpness"])
    calls = itertools.count()

    def infinite() -> Any:
        """Of one process, at the end of a branch."""
        loss = _loss(parallel, data()[1], rank)
        return loss * math.inf if rank == 1 and next(calls) == 3 else loss

    opt.step(infinite)
    assert float(opt.stats["sharpness"]) == sharpness
    after = parameters_to_vector(model.parameters()).detach()
    assert not torch.equal(before, after)
    both = after.clone()
    dist.all_reduce(both)
    assert torch.equal(both, 2 * after)
    opt = METHODS["salr"].make(model.named_parameters(), **METHODS["salr"].every)
    opt.zero_grad()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            opt.step(lambda: _loss(model, data()[0], rank))
    assert [str(w.message)[:26] for w in seen] == ["SALR in several processes "]


def test_data_parallel(tmp_path: Path) -> None:
    """Two processes with half of each batch are as one with all of it."""
    processes.run(_process, tmp_path)
