"""What is particular to a device: tables that go there, marks that live there, launches, and nothing that waits.

Without a GPU the CPU stands in for one: Triton's interpreter runs the kernels, and the flat layer takes the way
of a device whose kernels cannot read the host's memory.
"""

from __future__ import annotations

import importlib
import math
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from cases import Problem, Spec
from methods import orthonormal
from models import assert_same_bits, batches, make_closure, make_net, train, weights
from remote import Graphs, pretend
from test_ops import run_and_check
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sharpkern as sk
from sharpkern.memory.layout import Layout
from sharpkern.memory.shapes import blocks_of
from sharpkern.memory.table import Table
from sharpkern.memory.transfer import GroupTable, Receiver, Sender
from sharpkern.ops import schema

triton = pytest.importorskip("triton")
tl = triton.language
walk = importlib.import_module("sharpkern.ops.triton.walk")
SGD, AdamW, RMSprop = torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop

pytestmark = pytest.mark.skipif("triton" not in sk.available_backends("cpu"), reason="no Triton interpreter")


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pretend(monkeypatch)
    with torch.device("cpu"), sk.use_backend("triton"):
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, remote: None) -> list[str]:
    """Names of the kernels that would have been launched. None is: 400 tensors take the interpreter seconds."""
    from triton.runtime.interpreter import InterpretedFunction

    names: list[str] = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda kernel, *args, **kwargs: names.append(kernel.fn.__name__))
    return names


def parameters(count: int, groups: int = 1) -> list[dict[str, Any]]:
    params = [nn.Parameter(torch.full((2 + i % 3,), float(i + 1))) for i in range(count)]
    return [{"params": params[g::groups], "weight_decay": 0.01 * g} for g in range(groups)]


def give_gradients(opt: torch.optim.Optimizer, value: float = 0.5) -> None:
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, value)


# Launches.


class Variants:
    """What a GPU's Triton would compile of every kernel that is launched: it goes by types and by some values."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction, create_function_from_signature

        self.found: dict[str, set[str]] = {}
        backend = make_backend(GPUTarget("cuda", 90, 32))
        launch = InterpretedFunction.run

        def noted(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            compiled = JITFunction(kernel.fn, do_not_specialize=kernel.kwargs["do_not_specialize"])
            bind = create_function_from_signature(compiled.signature, compiled.params, backend)
            self.found.setdefault(kernel.__name__, set()).add(str(bind(*args, **kwargs)[1]))
            launch(kernel, *args, grid=grid, warmup=warmup, **kwargs)

        patch.setattr(InterpretedFunction, "run", noted)

    def count(self) -> dict[str, int]:
        return {name: len(keys) for name, keys in self.found.items()}


@pytest.mark.parametrize("cls", [sk.AESAM, pytest.param(sk.AELookSAM, marks=pytest.mark.slow)])
def test_nothing_is_compiled_in_the_middle_of_a_training(
    cls: Any, remote: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers that are 0 or 1 for a step, as AE-SAM's coefficient is in the middle of its schedule, are numbers; and
    other models, with as many parameters or not, take the same kernels."""
    variants, counts = Variants(monkeypatch), []
    for n in (3, 16, 1):
        opt = cls(parameters(n), SGD, total_steps=8, lambda_start=1.0, lambda_end=-1.0, lr=0.1, momentum=0.9)
        for t in range(8 if n == 3 else 2):
            give_gradients(opt, 1.0 + t % 2)
            opt.first_step()
            opt.second_step()
            counts.append(variants.count())
        assert 0 < int(opt.stats["second_passes"]) < 8 or n != 3
    first = next(i for i, count in enumerate(counts) if count == counts[7])
    assert first < 4, counts
    assert counts[7] == counts[-1], counts


METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sam": (sk.SAM, {}),
    "adaptive": (sk.SAM, {"adaptive": True}),
    "asam": (sk.ASAM, {}),
    "part": (sk.SAM, {"perturb": lambda name, p: p.numel() < 4}),
    "esam": (sk.ESAM, {"beta": 1 - 1e-9}),
}


@pytest.mark.parametrize(("count", "groups"), [(1, 1), (400, 1), (24, 24), (400, 24)])
@pytest.mark.parametrize("base", [SGD, AdamW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("method", METHODS)
def test_launches_of_a_step(method: str, base: Any, count: int, groups: int, launched: list[str]) -> None:
    options = {"momentum": 0.9} if base is SGD else {}
    rule = "sgd_kernel" if base is SGD else "adam_kernel"
    cls, own = METHODS[method]
    for check in (True, False):
        opt = cls(parameters(count, groups), base, lr=0.1, skip_nonfinite=check, **own, **options)
        for _ in range(3):
            launched.clear()
            give_gradients(opt)
            opt.first_step()
            assert launched == ["norm_kernel", "ascend_kernel"]
            give_gradients(opt)
            opt.second_step()
            assert launched[2:] == (["norm_kernel", rule] if check else [rule])
            launched.clear()
            give_gradients(opt)
            opt.step()
            assert launched == (["norm_kernel", rule] if check else [rule])


def test_launches_of_a_plain_step(launched: list[str]) -> None:
    opt = sk.SSSAM(parameters(9, 3), SGD, lr=0.1, momentum=0.9, p=0.0)
    for _ in range(2):
        launched.clear()
        give_gradients(opt)
        assert not opt.first_step()
        opt.second_step()
        assert launched == ["norm_kernel", "sgd_kernel"]


@pytest.mark.parametrize(("count", "groups"), [(1, 1), (400, 24)])
def test_launches_of_every_kind_of_step(
    count: int, groups: int, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def launches_of(opt: Any, by_hand: bool = False) -> list[str]:
        launched.clear()
        if by_hand:
            step_by_hand(opt)
        else:
            opt.step(lambda: give_gradients(opt))
        return list(launched)

    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    ae = sk.AESAM(parameters(count, groups), SGD, total_steps=90, **options)
    look = sk.LookSAM(parameters(count, groups), SGD, k=3, **options)
    ae_look = sk.AELookSAM(parameters(count, groups), SGD, total_steps=90, **options)
    refresh = ["norm_kernel", "ascend_kernel", "dots_kernel", "project_kernel", "sgd_kernel"]
    for by_hand in (False, True, False):
        assert launches_of(look, by_hand) == refresh
        for _ in range(2):
            assert launches_of(look, by_hand) == ["norm_kernel", "mix_kernel", "sgd_kernel"]
        for fired in (1.0, 0.0):
            monkeypatch.setattr(Receiver, "read", lambda self, values, fired=fired: torch.tensor([fired]))
            # By hand the gradient may have changed in between.
            plain = ["norm_kernel", *["norm_kernel"] * by_hand, "sgd_kernel"]
            sam = ["norm_kernel", "ascend_kernel", "norm_kernel", "sgd_kernel"]
            assert launches_of(ae, by_hand) == (sam if fired else plain)
            assert launches_of(ae_look, by_hand) == (refresh if fired else [*plain[:-1], "mix_kernel", plain[-1]])


@pytest.mark.parametrize(
    ("p", "norm", "ascent"),
    [(2.0, "norm_kernel", ["ascend_kernel"]), (3.0, "norm_max_kernel", ["norm_p_kernel", "ascend_p_kernel"]),
     (math.inf, "norm_kernel", ["ascend_p_kernel"])],
)  # fmt: skip
def test_launches_in_a_ball(
    p: float, norm: str, ascent: list[str], launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opt = sk.AESAM(parameters(400, 24), SGD, total_steps=90, lr=0.1, p=p)
    for fired in (1.0, 0.0, 1.0):
        monkeypatch.setattr(Receiver, "read", lambda self, values, fired=fired: torch.tensor([fired]))
        launched.clear()
        opt.step(lambda: give_gradients(opt))
        assert launched == ([norm, *ascent, "norm_kernel", "sgd_kernel"] if fired else [norm, "sgd_kernel"])


def test_launches_of_the_family(launched: list[str]) -> None:
    """Of a step of float32 parameters, whatever their number."""
    averaging = ["mix_kernel", "combine_kernel", "ascend_kernel", "norm_kernel", "mix_kernel", "combine_kernel"]
    weighing = ["norm_kernel", "ascend_kernel", "mix_kernel", "norm_kernel", "sgd_kernel"]
    expected = {
        sk.StableSAM: ["norm_kernel", "ascend_kernel", "norm_kernel", "mix_kernel", "sgd_kernel"],
        sk.WSAM: [*weighing, "mix_kernel", "sgd_kernel"],
        sk.FriendlySAM: [*averaging, "sgd_kernel"],
        sk.VaSSO: [*averaging, "sgd_kernel"],
        sk.MomentumSAM: ["norm_kernel", "ascend_kernel", "norm_kernel", "sgd_kernel"],
    }
    for cls, names in expected.items():
        for own in ({}, {"decouple": False}) if cls is sk.WSAM else ({},):
            opt = cls(parameters(40, 3), SGD, lr=0.1, momentum=0.9, **own)
            for t in range(3):
                launched.clear()
                opt.step(lambda opt=opt: give_gradients(opt))
                wanted = weighing if own else names
                assert launched == (wanted[2:] if cls is sk.MomentumSAM and t == 0 else wanted)


@pytest.mark.parametrize(("count", "groups"), [(1, 1), (400, 24)])
@pytest.mark.parametrize("clip", [{}, {"max_grad_norm": 0.1}], ids=["", "clipped"])
def test_launches_of_nudged_sgd(count: int, groups: int, clip: dict[str, float], launched: list[str]) -> None:
    """Whatever the number of directions; without any those of SGD."""
    opt = sk.NudgedSGD(parameters(count, groups), lr=0.1, momentum=0.9, **clip)
    params = [p for group in opt.param_groups for p in group["params"]]
    for k, expected in (
        (0, ["norm_kernel", "sgd_kernel"]),
        *((k, ["nudge_dots_kernel", "nudge_sgd_kernel"]) for k in (1, 4)),
    ):
        opt.refresh(orthonormal(params, k) if k else None)
        for closure in (None, lambda: give_gradients(opt)):
            opt.zero_grad()
            if closure is None:
                give_gradients(opt)
            launched.clear()
            opt.step(closure)
            assert launched == expected


def test_launches_of_salr(launched: list[str]) -> None:
    opt = sk.SALR(parameters(5, 2), SGD, lr=0.1, n_ascent=2, n_descent=3)

    def closure() -> float:
        give_gradients(opt)
        return 1.0

    move = ["norm_kernel", "ascend_kernel"]
    for _ in range(2):
        launched.clear()
        opt.step(closure)
        assert launched == [
            *move * 3, "restore_kernel", "ascend_kernel", *move, "restore_kernel", "sgd_kernel",
        ]  # fmt: skip
        launched.clear()
        opt.step(closure)
        assert launched == ["norm_kernel", "sgd_kernel"]


def test_launches_around_a_wrapped_optimizer(launched: list[str]) -> None:
    opt = sk.SAM(parameters(5), RMSprop, lr=0.1)
    give_gradients(opt)
    opt.first_step()
    opt.second_step()
    assert launched == ["norm_kernel", "ascend_kernel", "norm_kernel", "restore_kernel"]


# Who walks what.


@triton.jit
def note_kernel(table, stride_row, stride_column, blocks, n_blocks, runs, ends, T: tl.constexpr, A: tl.constexpr):
    i, end = walk.share(n_blocks)
    while i < end:
        first, last = walk.rest_of_run(i, n_blocks, False)
        tl.store(runs + first, tl.program_id(0))
        tl.store(ends + first, last)
        i += last - first


@pytest.mark.parametrize("n_blocks", [0, 1, 2, 3, 7, 11, 12, 13, 24, 25, 35, 100])
def test_blocks_are_taken_in_runs(n_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By three programs in turns; the last round shares out what remains, to a block alike."""
    monkeypatch.setattr(walk, "RUN", tl.constexpr(4))
    takers, ends = torch.full((2, n_blocks), -1)
    blocks = torch.zeros(n_blocks, 2, dtype=torch.int32)
    walk.launch(
        note_kernel, torch.zeros(1, schema.COLUMNS, dtype=torch.int64), blocks, takers, ends, dtype=torch.float32
    )
    runs, begin = [], 0
    while begin < n_blocks:
        runs.append((int(takers[begin]), int(ends[begin]) - begin))
        begin = int(ends[begin])
    assert (takers >= 0).sum() == len(runs)
    rounds, rest = divmod(n_blocks, 12)
    assert runs[: 3 * rounds] == [(0, 4), (1, 4), (2, 4)] * rounds
    last = runs[3 * rounds :]
    assert [program for program, _ in last] == sorted({program for program, _ in last})
    assert sum(n for _, n in last) == rest
    assert not last or max(n for _, n in last) - min(n for _, n in last) <= 1


@pytest.mark.parametrize("op", [op for op in schema.SCHEMAS if op not in ("gather", "mix")])
def test_a_program_may_come_back_to_a_row(op: str, remote: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of two blocks: each of the three programs has several stretches of either long row, and counts them."""
    monkeypatch.setattr(walk, "RUN", tl.constexpr(2))
    specs = [Spec((13 * schema.BLOCK + 5,)), Spec((300,), grad=False), Spec((9 * schema.BLOCK,), offset=1, group=1)]
    run_and_check(op, Problem(specs, torch.float32, op), "triton")


@pytest.mark.parametrize("op", [op for op in schema.SCHEMAS if op not in ("gather", "mix")])
def test_a_move_begins_where_a_sum_ended(op: str, remote: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    begins: list[int] = []
    call = InterpretedFunction.__call__

    def noted(function: Any, *args: Any, **kwargs: Any) -> Any:
        result = call(function, *args, **kwargs)
        if function.fn.__name__ == "rest_of_run":
            begins.append(int(result[0].handle.data[0]))
        return result

    monkeypatch.setattr(InterpretedFunction, "__call__", noted)
    run_and_check(op, Problem([Spec((6 * schema.BLOCK,))], torch.float32, op), "triton")
    moves = ("ascend", "ascend_scaled", "ascend_p", "project", "sgd", "adam", "nudge_sgd")
    assert begins == ([4, 2, 0] if op in moves else [0, 2, 4])


# What goes to the device.


class Sent:
    """Records what is sent: the shape of every piece."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, ...]] = []
        send = Sender.send

        def recording(sender: Sender, values: Tensor) -> None:
            self.shapes.append(tuple(values.size()))
            send(sender, values)

        clear = Sender.clear

        def clearing(sender: Sender, row: int) -> None:
            self.shapes.append(tuple(sender.target[row].size()))
            clear(sender, row)

        monkeypatch.setattr(Sender, "send", recording)
        monkeypatch.setattr(Sender, "clear", clearing)

    def take(self) -> list[tuple[int, ...]]:
        taken, self.shapes = self.shapes, []
        return taken


def test_only_what_changed_is_sent(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sent = Sent(monkeypatch)
    opt = sk.SAM(parameters(7), SGD, lr=0.1, momentum=0.9)
    params = opt.param_groups[0]["params"]
    first, second = ([torch.full_like(p, 0.5) for p in params] for _ in range(2))

    def grads(values: list[Tensor]) -> None:
        for p, g in zip(params, values, strict=True):
            p.grad = g

    grads(first)
    opt.first_step()
    assert sent.take() == [(schema.COLUMNS, 7), (1, 2)]  # the whole table, then radius
    opt.second_step()
    assert sent.take() == [(1, len(schema.SGD))]
    for _ in range(3):
        opt.first_step()
        assert sent.take() == [(7,)]  # marks to clear
        opt.second_step()
        assert sent.take() == []
    opt.first_step()
    sent.take()
    grads(second)
    opt.second_step()
    assert sent.take() == [(3, 7)]  # addresses, scales: the marks there are the kernel's
    opt.param_groups[0]["lr"] = 0.2
    opt.step()
    assert sent.take() == [(7,), (1, len(schema.SGD))]
    opt.step()
    assert sent.take() == []


def test_the_table_on_a_device(remote: None) -> None:
    params = [nn.Parameter(torch.randn(n)) for n in (5, 0, 3000)]
    flat = Layout(params, ["a", "b", "c"], [0, 1, 1], [True, False, True])
    for p in params:
        p.grad = torch.randn_like(p)
    flat.collect(lambda name, grad: ValueError(name))
    rows = flat.walk[2]
    assert rows is not flat.table.host
    assert torch.equal(rows, flat.table.host)
    assert rows.stride() == (1, 3)  # a column goes up in one piece
    assert flat.blocks.tolist() == [[0, 0], [2, 0], [2, 1]]
    with sk.use_backend("reference"):
        assert flat.walk[2] is flat.table.host


def test_tensors_that_are_drawn_on_a_device(remote: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales go there as they are drawn; marks, there and here, are of what moved. No capture repeats a draw."""
    sent = Sent(monkeypatch)
    opt = sk.ESAM(parameters(7, 2), SGD, lr=0.1, momentum=0.9, beta=0.3, seed=8)
    params = [p for group in opt.param_groups for p in group["params"]]
    kinds = set()
    for t in range(6):
        give_gradients(opt)
        before = [p.detach().clone() for p in params]
        sent.take()
        kept = opt.draw(t).tolist()
        assert opt.first_step() is any(kept)
        kinds.add(any(kept))
        assert (
            sent.take()[t == 0 : 2] == [(4, 7), (3, 7)][t == 0 :]
        )  # those of the last step cleared; those of this one
        assert [not torch.equal(p, old) for p, old in zip(params, before, strict=True)] == kept
        (layout,) = opt._step.layouts
        assert [row[schema.BACKUP] for row in layout.table.host.tolist()] == list(map(int, kept))
        if any(kept):
            assert layout.table.marked() == kept
        if t % 3:
            opt.second_step()
        else:
            opt.restore()
            assert all(map(torch.equal, params, before))
        assert not layout.table.host[:, schema.SCALE].any()
    assert kinds == {True, False}
    graphs = Graphs(monkeypatch)
    with pytest.raises(RuntimeError, match="draws tensors cannot be captured"):
        graphs.capture(both(opt))
    assert not opt.is_perturbed
    opt.beta = 1.0
    graphs.capture(both(opt))


def test_blocks_cover_every_element_once() -> None:
    numels = [1, 0, schema.BLOCK - 1, schema.BLOCK, 0, schema.BLOCK + 1, 10 * schema.BLOCK]
    covered = [0] * len(numels)
    blocks = blocks_of(numels).tolist()
    assert blocks == sorted(blocks)
    for row, k in blocks:
        assert k * schema.BLOCK == covered[row]
        covered[row] = min(numels[row], (k + 1) * schema.BLOCK)
    assert covered == numels
    assert blocks_of([0, 0]).size() == (0, 2)


def test_group_tables() -> None:
    table = GroupTable((2, 2), torch.device("cpu"))
    rows: list[list[float | Tensor]] = [[1.0, 2.0], [3.0, 4.0]]
    got = table.update(rows)
    assert got.tolist() == rows
    assert table.update([[1.0, 2.0], [3.0, 5.0]]) is got
    assert got.tolist() == [[1.0, 2.0], [3.0, 5.0]]
    lr = torch.tensor(7.0)
    assert table.update([[lr, 2.0], [3.0, 5.0]]).tolist() == [[7.0, 2.0], [3.0, 5.0]]
    lr.fill_(8.0)
    assert table.update([[lr, 2.0], [3.0, 5.0]]).tolist() == [[8.0, 2.0], [3.0, 5.0]]


# Marks live on the device.


def twins(**kwargs: Any) -> tuple[nn.Module, Any, nn.Module, Any]:
    ours, theirs = make_net(torch.float32), make_net(torch.float32)
    options = {"lr": 0.05, "momentum": 0.9, **kwargs}
    return ours, sk.SAM(ours.parameters(), SGD, **options), theirs, sk.SAM(theirs.parameters(), SGD, **options)


def close(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_steps_of_every_kind_in_turn(remote: None) -> None:
    """A SAM step's marks must not reach a plain step after it, nor a restored one."""
    ours, opt, theirs, twin = twins()
    data = batches(6, torch.float32)
    for model, optimizer, name in ((ours, opt, "triton"), (theirs, twin, "reference")):
        with sk.use_backend(name):
            train(model, optimizer, data[:2])
            make_closure(model, data[2])()
            optimizer.step()
            before = weights(model)
            optimizer.first_step()
            assert not torch.equal(model.out.weight, before["out.weight"])
            optimizer.restore()
            assert_same_bits(weights(model), before)
            optimizer.restore()
            # A parameter without a gradient in the first pass, another in the second.
            optimizer.zero_grad()
            make_closure(model, data[3])()
            model.gain.grad = None
            optimizer.first_step(zero_grad=True)
            make_closure(model, data[3])()
            model.out.bias.grad = None
            optimizer.second_step(zero_grad=True)
            train(model, optimizer, data[4:])
    close(ours, theirs)


@pytest.mark.parametrize("first", ["triton", "reference"])
def test_another_backend_for_the_second_pass(first: str, remote: None) -> None:
    second = {"triton": "reference", "reference": "triton"}[first]
    for end in ("second_step", "restore"):
        ours, opt, theirs, twin = twins()
        for batch in batches(3, torch.float32):
            before = weights(ours)
            opt.zero_grad()
            make_closure(ours, batch)()
            with sk.use_backend(first):
                opt.first_step(zero_grad=True)
            make_closure(ours, batch)()
            with sk.use_backend(second):
                getattr(opt, end)()
            if end == "restore":
                assert_same_bits(weights(ours), before)
            else:
                with sk.use_backend("reference"):
                    twin.step(make_closure(theirs, batch))
        if end == "second_step":
            close(ours, theirs)


@contextmanager
def interrupted_ascent() -> Iterator[None]:
    """An interrupt where the weights are away already, and no kernel ran: the backup holds those of another step."""

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Table, "before_ascent", interrupted)
        yield


def test_an_interrupt_before_the_launch_restores_nothing_old(remote: None) -> None:
    ours, opt, _, _ = twins()
    data = batches(3, torch.float32)
    train(ours, opt, data[:2])
    before = weights(ours)
    opt.zero_grad()
    make_closure(ours, data[2])()
    with interrupted_ascent():
        opt.first_step()
    assert not opt.is_perturbed
    assert_same_bits(weights(ours), before)
    opt.first_step()
    opt.restore()
    assert_same_bits(weights(ours), before)


@pytest.mark.parametrize("first", ["triton", "reference"])
@pytest.mark.parametrize("end", ["second_step", "restore"])
def test_another_backend_when_the_table_is_complete(first: str, end: str, remote: None) -> None:
    """Marks of backups are the host's on one, the device's on the other."""
    second = {"triton": "reference", "reference": "triton"}[first]
    ours, opt, theirs, twin = twins()
    data = batches(3, torch.float32)
    for model, o in ((ours, opt), (theirs, twin)):
        o.zero_grad()
        make_closure(model, data[0])()
        with sk.use_backend("triton"):
            o.step()  # plain: the copy is complete, and its marks are clear
    before = weights(ours)
    opt.zero_grad()
    make_closure(ours, data[1])()
    with sk.use_backend(first):
        opt.first_step(zero_grad=True)
    if end == "second_step":
        make_closure(ours, data[1])()
    with sk.use_backend(second):
        getattr(opt, end)()
    if end == "restore":
        assert_same_bits(weights(ours), before)
    else:
        twin.step(make_closure(theirs, data[1]))
        close(ours, theirs)


def test_weights_kept_by_the_host_are_marked_on_the_device(remote: None) -> None:
    """A gradient that first appears on a branch."""
    ps = [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0]))]
    opt = sk.SALR(ps, SGD, lr=0.1, n_ascent=3, n_descent=3)
    calls: list[int] = []

    def closure() -> Tensor:
        loss = sum(p.square().sum() for p in (ps if calls else ps[:1]))
        loss.backward()
        calls.append(1)
        return loss

    with sk.use_backend("triton"):
        opt.step(closure)
    assert ps[1].item() == 3.0


def test_unflatten_between_passes_then_restore(remote: None) -> None:
    ours = make_net(torch.float32)
    opt = sk.SAM(ours.parameters(), SGD, lr=0.1, flatten=True)
    train(ours, opt, batches(1, torch.float32))
    before = weights(ours)
    make_closure(ours, batches(1, torch.float32)[0])()
    opt.first_step()
    opt.unflatten()
    opt.restore()
    assert_same_bits(weights(ours), before)


# Interrupts between a copy and the note of it.


def one(lr: float = 1.0) -> tuple[nn.Parameter, sk.SAM]:
    p = nn.Parameter(torch.zeros(5))
    p.grad = torch.ones(5)
    return p, sk.SAM([p], SGD, lr=lr, rho=0.0)


def moved_by(p: Tensor, step: Callable[[], object]) -> float:
    with torch.no_grad():
        p.zero_()
    step()
    return round(p[0].item(), 5)


@pytest.mark.parametrize("what", [torch.int64, torch.float64], ids=["table", "values"])
def test_an_interrupt_right_after_a_copy(what: torch.dtype, remote: None, monkeypatch: pytest.MonkeyPatch) -> None:
    p, opt = one()
    first = p.grad
    opt.step()
    send = Sender.send

    def interrupted(sender: Sender, values: Tensor) -> None:
        send(sender, values)
        if values.dtype == what:
            raise KeyboardInterrupt

    p.grad = torch.full((5,), 100.0)
    opt.param_groups[0]["lr"] = 50.0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Sender, "send", interrupted)
        opt.step()
    p.grad = first
    opt.param_groups[0]["lr"] = 1.0
    assert moved_by(p, opt.step) == -1.0


def test_an_interrupt_while_parameters_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, too: the old memory is not written to, however often somebody presses a key."""
    p, opt = one()
    opt.step()
    old = p.detach()
    p.data = torch.zeros(5)
    kept = old.clone()

    def interrupted(table: Table) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Table, "_point", interrupted)
        opt.step()
    opt.step()
    assert p.tolist() == [-1.0] * 5
    assert torch.equal(old, kept)


# Graphs.


def both(opt: Any) -> Callable[[], None]:
    def step() -> None:
        opt.first_step()
        opt.second_step()

    return step


def test_eager_steps_around_replays(remote: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay brings its addresses and its values along; an eager step after it must bring its own again."""
    graphs = Graphs(monkeypatch)
    p, opt = one()
    eager, graph = p.grad, torch.full((5,), 100.0)
    step = both(opt)
    step()
    p.grad = graph
    opt.param_groups[0]["lr"] = 0.5
    replay = graphs.capture(step)
    assert graphs.sent == [(4, 1), (1, 2), (3, 1), (1, len(schema.SGD))]
    opt.param_groups[0]["lr"] = 0.01
    p.grad = eager
    for _ in range(2):
        for kind in (step, opt.step):
            assert moved_by(p, replay) == -50.0
            assert moved_by(p, kind) == -0.01
            assert moved_by(p, kind) == -0.01
    assert opt.stats["steps"].item() == 1 + 4 + 4


def test_an_interrupt_after_a_replay_restores_nothing_of_it(remote: None, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs(monkeypatch)
    p, opt = one()
    both(opt)()
    replay = graphs.capture(both(opt))
    opt.step()
    replay()
    with torch.no_grad():
        p.fill_(7.0)
    with interrupted_ascent():
        opt.first_step()
    assert p.tolist() == [7.0] * 5


def test_captures_need_a_step_before_them_and_are_limited(remote: None, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs(monkeypatch)
    p, opt = one()
    with pytest.raises(RuntimeError, match="one step before the capture"):
        graphs.capture(both(opt))
    both(opt)()
    captured = 0
    with pytest.raises(RuntimeError, match="too many steps were captured"):
        for _ in range(Sender.STOCK):
            graphs.capture(both(opt))
            captured += 1
    assert captured == Sender.STOCK // 2
    opt.restore()
    assert moved_by(p, both(opt)) == -1.0


# Nothing waits.


class NothingButKernels(TorchDispatchMode):
    """Fails on any torch op that touches a device's tensors, but for views and what a Sender sends.

    An op that reads a number (``_local_scalar_dense``, ``nonzero``, ``equal``) would wait for the device; any
    other would be one more launch. What may be touched freely is the host's memory, by address.
    """

    VIEWS = ("slice", "select", "t", "transpose", "detach", "view", "as_strided", "alias", "unsqueeze", "squeeze")

    def __init__(self, host: list[Tensor]) -> None:
        super().__init__()
        self.host = {t.untyped_storage().data_ptr() for t in host}
        self.sending = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if self.sending or name.startswith("sharpkern::") or name.split("::")[1].split(".")[0] in self.VIEWS:
            return out
        # lift_fresh is how torch.tensor's new memory first shows.
        given = [] if name == "aten::lift_fresh" else [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        touched = [tuple(t.size()) for t in given if t.untyped_storage().data_ptr() not in self.host]
        assert not touched, f"{name} on {touched}"
        # What the host makes from its own is its own.
        self.host |= {t.untyped_storage().data_ptr() for t in tree_leaves(out) if isinstance(t, Tensor)}
        return out


def host_tensors(opt: Any) -> list[Tensor]:
    """What is the host's of an optimizer's tables."""
    names = ("host", "_grad_strides", "_status", "_param_strides", "_found", "_found_status", "_addresses", "_sent")
    return [getattr(layout.table, name) for layout in opt._step.layouts for name in names]


def step_by_hand(opt: Any) -> None:
    give_gradients(opt)
    opt.first_step()
    give_gradients(opt)
    opt.second_step()


@pytest.mark.parametrize("base", [SGD, AdamW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("cls", [sk.SAM, sk.ASAM])
def test_a_step_is_nothing_but_its_kernels(cls: Any, base: Any, remote: None, monkeypatch: pytest.MonkeyPatch) -> None:
    opt = cls(parameters(6, 2), base, lr=0.1, max_grad_norm=1.0)
    step_by_hand(opt)
    gradients = {p: torch.full_like(p, 0.25) for group in opt.param_groups for p in group["params"]}
    with NothingButKernels(host_tensors(opt)) as mode:
        send = Sender.send

        def sending(sender: Sender, values: Tensor) -> None:
            mode.sending = True
            send(sender, values)
            mode.sending = False

        clear = Sender.clear

        def clearing(sender: Sender, row: int) -> None:
            mode.sending = True
            clear(sender, row)
            mode.sending = False

        monkeypatch.setattr(Sender, "send", sending)
        monkeypatch.setattr(Sender, "clear", clearing)
        for _ in range(2):
            for p, g in gradients.items():
                p.grad = g
            opt.first_step()
            opt.second_step()
            opt.param_groups[0]["lr"] *= 0.5  # a scheduler's work


def family(method: str) -> Any:
    options: dict[str, Any] = {"lr": 0.1, "max_grad_norm": 1.0}
    return {
        "sssam": lambda: sk.SSSAM(parameters(6, 2), AdamW, **options),
        "looksam": lambda: sk.LookSAM(parameters(6, 2), AdamW, k=2, **options),
        "aesam": lambda: sk.AESAM(parameters(6, 2), AdamW, total_steps=40, **options),
        "aelooksam": lambda: sk.AELookSAM(parameters(6, 2), AdamW, total_steps=40, lambda_start=0.5, **options),
    }[method]()


@pytest.mark.parametrize("method", ["sssam", "looksam", "aesam", "aelooksam"])
def test_a_decision_is_all_that_is_read(method: str, remote: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a step where the policy is adaptive, before anything but the norm was launched; never elsewhere."""
    opt = family(method)
    gradients = {p: torch.full_like(p, 0.25) for group in opt.param_groups for p in group["params"]}
    for _ in range(4):  # of each kind, so that everything is there
        step_by_hand(opt)
    opt.load_state_dict(opt.state_dict())
    step_by_hand(opt)
    read: list[int] = []
    moved: list[bool] = []
    with NothingButKernels(host_tensors(opt)) as mode:
        send, receive = Sender.send, Receiver.read

        def sending(sender: Sender, values: Tensor) -> None:
            mode.sending = True
            send(sender, values)
            mode.sending = False

        def reading(receiver: Receiver, values: Tensor) -> Tensor:
            mode.sending = True
            read.append(values.numel())
            moved.append(opt.is_perturbed)
            got = receive(receiver, values).clone()
            mode.sending = False
            mode.host.add(got.untyped_storage().data_ptr())
            return got

        clear = Sender.clear

        def clearing(sender: Sender, row: int) -> None:
            mode.sending = True
            clear(sender, row)
            mode.sending = False

        monkeypatch.setattr(Sender, "send", sending)
        monkeypatch.setattr(Sender, "clear", clearing)
        monkeypatch.setattr(Receiver, "read", reading)
        for _ in range(4):
            for p, g in gradients.items():
                p.grad = g
            opt.first_step()
            opt.second_step()
    assert read == ([1] * 4 if method.startswith("ae") else [])
    assert not any(moved)


@pytest.mark.parametrize(
    "reading",
    [
        lambda p: bool(p.sum() > 0),
        lambda p: p.norm().item(),
        lambda p: p.nonzero(),
        lambda p: torch.equal(p, p.clone()),
        lambda p: p.mul_(2),
    ],
    ids=["bool", "item", "nonzero", "equal", "mul_"],
)
def test_whoever_watches_a_step_sees_what_should_not_be_there(
    reading: Callable[[Tensor], object], remote: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt = sk.SAM(parameters(3), SGD, lr=0.1)
    step_by_hand(opt)
    step = opt._step

    def measure_and_read() -> None:
        type(step).norm(step)
        reading(step.layouts[0].params[0].detach())

    monkeypatch.setattr(step, "norm", measure_and_read)
    with pytest.raises(AssertionError, match="aten::"), NothingButKernels(host_tensors(opt)):
        opt.first_step()


# Offsets beyond 2^31.


def untouched(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written."""
    reserve = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    size = elements * dtype.itemsize
    return torch.from_numpy(np.frombuffer(mmap.mmap(-1, size, flags=reserve), dtype=np.uint8)).view(dtype)


def test_elements_beyond_2_to_the_31(remote: None) -> None:
    """The last blocks of a row of more than 2^31 elements, whose slot begins behind 2^31 elements, too."""
    beyond = 2**31 // schema.BLOCK  # the first block that begins there
    numel = 2**31 + schema.BLOCK + 100
    slot = 2**31 + 64
    dtype = torch.bfloat16
    param, grad = untouched(numel, dtype), untouched(numel, dtype)
    backup = untouched(slot + numel, dtype)
    momentum = untouched(slot + numel, torch.float32)
    end = slice(2**31, numel)
    param[end] = torch.arange(numel - 2**31) % 7 + 1
    grad[end] = torch.arange(numel - 2**31) % 5 - 2
    before = param[end].clone()
    row = [0] * schema.COLUMNS
    for column, value in {
        schema.PARAM: param.data_ptr(),
        schema.GRAD: grad.data_ptr(),
        schema.SLOT: slot,
        schema.NUMEL: numel,
    }.items():
        row[column] = value
    table = torch.tensor([row])
    blocks = torch.tensor([[0, beyond], [0, beyond + 1]], dtype=torch.int32)
    partials = torch.zeros(3, dtype=torch.float64)
    sq = torch.zeros(1, 1, dtype=torch.float64)
    none = torch.empty(0)
    counters = torch.zeros(3, dtype=torch.int64)
    radius = torch.tensor([[0.5, 0.0]], dtype=torch.float64)
    ops = torch.ops.sharpkern
    ops.norm(sq[0], partials, none, [], table, blocks, buffer=0, decay=0.0, coefficient=0.0, dtype=dtype)
    expected = grad[end].double().square().sum()
    assert sq.item() == pytest.approx(expected.item(), rel=1e-6)
    ops.ascend([], backup, none, counters, [], table, blocks, radius, sq, eps=1e-12, skip_nonfinite=True, dtype=dtype)
    held = backup[slot + 2**31 : slot + numel]
    assert torch.equal(held, before)
    moved = before.float() + 0.5 / expected.sqrt() * grad[end].float()
    torch.testing.assert_close(param[end].float(), moved.float(), rtol=2**-7, atol=0)
    # Block 0 is not among the blocks: nobody marked the row.
    table[0, schema.BACKUP] = 1
    values = torch.tensor([[0.1, 0.9, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    step = torch.zeros(1)
    ops.sgd(
        [], momentum, step, counters, [], backup, none, table, blocks, values, sq, none,
        max_norm=float("inf"), skip_nonfinite=True, dtype=dtype,
    )  # fmt: skip
    assert torch.equal(momentum[slot + 2**31 : slot + numel], grad[end].float())
    torch.testing.assert_close(param[end].float(), before.float() - 0.1 * grad[end].float(), rtol=2**-7, atol=0)
    ops.restore([], backup, table, blocks, dtype=dtype)
    assert torch.equal(param[end], before)
    # Nothing around was written.
    for t, first in ((param, 0), (backup, slot), (momentum, slot)):
        assert not t[first + 2**31 - 4096 : first + 2**31].any()
