"""Finding tensors in every way that there is: what the op gather finds, for parameters and gradients in Python."""

from __future__ import annotations

import gc
import importlib
import sys
import warnings
import weakref
from collections import defaultdict
from typing import Any

import pytest
import torch
from cases import Spec
from test_ops import GRADIENTS
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.two_tensor import TwoTensor

import sharpkern as sk
from sharpkern import memory, ops
from sharpkern.memory import members
from sharpkern.memory.shapes import strides_of
from sharpkern.ops import scan, schema

PATHS = {"aten": scan._aten is not None, "dlpack": scan.Scan is not None and scan._EXCHANGE is not None, "op": True}
every_path = pytest.mark.parametrize(
    "path",
    [pytest.param(name, marks=pytest.mark.skipif(not there, reason="not here")) for name, there in PATHS.items()],
)
every_scan = pytest.mark.parametrize("path", every_path.args[1][:2])


def take(path: str, patch: pytest.MonkeyPatch) -> None:
    """Have tensors found in one of the ways that are there."""
    if path != "aten":
        patch.setattr(scan, "_aten", None)
    if path == "op":
        patch.setattr(scan, "_EXCHANGE", None)
    assert scan.path() == path


def scan_of(params: list[Any], layouts: Tensor) -> Any:
    """Layouts of parameters, and of their gradients."""
    found = scan.make_scan(params, torch.empty(0), layouts, layouts)
    assert type(found) is (scan.Scan if scan._aten is None else scan._aten.Scan)
    return found


def _negated(g: Tensor) -> Tensor:
    """Its memory holds the negative of it."""
    return torch.complex(g, -g).conj().imag


CASES = {
    **GRADIENTS,
    "negated": (Spec((4, 3)), _negated, False),
    "wrapping": (Spec((4, 3)), lambda g: TwoTensor(g, g.clone()), False),
    "meta": (Spec((4, 3)), lambda g: g.to("meta"), False),
    "int": (Spec((4, 3)), lambda g: g.int(), False),
    "offset": (Spec((4, 3)), lambda g: torch.zeros(5, 3)[1:], True),
    "zeros_without_memory": (Spec((4, 3)), lambda g: torch._efficientzerotensor(g.shape), False),
}


def _holder(grad: Tensor) -> Tensor:
    """Parameters would refuse some of these."""
    csr = grad.layout == torch.sparse_csr  # a dense tensor refuses that
    holder = grad.clone() if csr else torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    holder.grad = grad
    return holder


@every_scan
@pytest.mark.parametrize(("spec", "change", "usable"), CASES.values(), ids=CASES)
def test_gradients(spec: Spec, change: Any, usable: bool, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(path, monkeypatch)
    param = torch.randn(spec.shape)
    param = param.contiguous(memory_format=torch.channels_last) if spec.order == "channels_last" else param
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse")
        grad = change(torch.zeros_like(param))
    holders = [_holder(torch.zeros(5)), _holder(grad), torch.zeros(2), _holder(torch.zeros(0))]
    table = torch.zeros(4, schema.COLUMNS, dtype=torch.int64)
    column, layouts = table[:, schema.GRAD], strides_of([torch.zeros(5), param, torch.zeros(2), torch.zeros(0)])
    found = scan_of(holders, layouts)
    before = table.clone()
    counts = found.gather(holders, column.data_ptr(), schema.COLUMNS)
    assert counts == (int(not usable), 2, True)
    expected = [holders[0].grad.data_ptr(), grad.data_ptr() if usable else schema.MISMATCH, 0, 0]
    assert column.tolist() == expected
    column.copy_(before[:, schema.GRAD])
    assert torch.equal(table, before)
    column.copy_(torch.tensor(expected))
    assert found.gather(holders, column.data_ptr(), schema.COLUMNS) == (int(not usable), 2, False)


@every_scan
def test_gradients_of_another_class(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Python's alone: DLPack's table does not tell it from one that wraps others."""
    take(path, monkeypatch)
    holder, layouts, column = torch.empty(5), strides_of([torch.empty(5)]), torch.zeros(1, dtype=torch.int64)
    holder.grad = nn.Parameter(torch.ones(5))
    found = scan_of([holder], layouts)
    assert found.gather([holder], column.data_ptr(), 1) == (int(path == "dlpack"), 0, True)
    assert column.item() == (schema.MISMATCH if path == "dlpack" else holder.grad.data_ptr())


@every_path
def test_no_gradient_is_held(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A last gradient lives no longer than its parameter says."""
    take(path, monkeypatch)
    p = nn.Parameter(torch.ones(5))
    opt = sk.SAM([p], torch.optim.SGD, lr=0.1)
    p.grad = torch.ones(5)
    memory = StorageWeakRef(p.grad.untyped_storage())
    opt.first_step()
    opt.second_step(zero_grad=True)
    assert memory.expired()


@every_path
@pytest.mark.parametrize("flatten", [False, True])
def test_a_parameter_that_leads_to_its_optimizer_is_collected(
    flatten: bool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that the garbage collector cannot see holds it."""
    take(path, monkeypatch)
    p = nn.Parameter(torch.ones(5))
    opt = sk.SAM([p], torch.optim.SGD, lr=0.1, flatten=flatten)
    p.optimizer = opt
    for _ in range(2):
        p.square().sum().backward()
        opt.first_step()
        opt.second_step()
    gone = [weakref.ref(p), weakref.ref(opt)]
    del p, opt
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


@every_scan
def test_an_error_is_the_callers(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Holder:
        @property
        def grad(self) -> Tensor:
            raise KeyError("mine")

    take(path, monkeypatch)
    layouts, column = strides_of([torch.zeros(5)]), torch.zeros(1, dtype=torch.int64)
    found = scan_of([torch.zeros(5)], layouts)
    for call in (lambda: found.unmoved([], 0), lambda: found.gather([Holder()] * 2, column.data_ptr(), 1)):
        with pytest.raises(ValueError, match="another number of parameters"):
            call()
    if path == "aten":
        with pytest.raises(TypeError, match="parameters should be tensors"):
            found.gather([Holder()], column.data_ptr(), 1)
        with pytest.raises(TypeError, match="increment_version expects tensors"):
            scan.increment_version([torch.ones(2), None])
    else:
        with pytest.raises(KeyError, match="mine"):
            found.gather([Holder()], column.data_ptr(), 1)


def _double(p: nn.Parameter) -> None:
    p.data = p.data.double()


def _transposed(p: nn.Parameter) -> None:
    p.data = p.data.t().contiguous().t()


def _elsewhere(p: nn.Parameter) -> None:
    p.data = p.data.clone()


@every_scan
@pytest.mark.parametrize("move", [_double, _transposed, _elsewhere, lambda p: p.untyped_storage().resize_(0)])
def test_parameters(move: Any, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(path, monkeypatch)
    params = [nn.Parameter(torch.randn(4, 3)) for _ in range(3)]
    layouts, addresses = strides_of(params), torch.tensor([p.data_ptr() for p in params])
    found = scan_of(list(params), layouts)
    assert found.unmoved(params, addresses.data_ptr())
    held = [p.data for p in params]  # the memory is not used again
    move(params[1])
    assert not found.unmoved(params, addresses.data_ptr())
    del held


class Wrapping(nn.Parameter):
    """A parameter of another class: nobody knows what it does."""


def _steps(cls: Any) -> tuple[Tensor, list[int], bool]:
    """Weights after three, what autograd is told of writes to them, and whether there was a scan."""
    params = [cls(torch.arange(6.0).view(2, 3)), cls(torch.ones(3))]
    opt = sk.SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9)
    for t in range(3):
        for p in params[: 1 + t % 2]:
            p.grad = torch.full_like(p, t + 1.0)
        if opt.first_step(zero_grad=True):
            for p in params:
                p.grad = torch.full_like(p, 2.0)
        opt.second_step(zero_grad=True)
    scanned = opt._step.layouts[0].table._scan is not None
    return torch.cat([p.detach().flatten() for p in params]), [p._version for p in params], scanned


@every_path
def test_steps_are_the_same(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, versions, _ = _steps(Wrapping)
    take(path, monkeypatch)
    found, found_versions, scanned = _steps(nn.Parameter)
    assert scanned == (path != "op")
    assert torch.equal(found, expected)
    assert found_versions == versions
    assert min(versions) > 0
    assert not _steps(Wrapping)[2]


@pytest.mark.skipif(not PATHS["aten"], reason="not here")
def test_versions() -> None:
    """Of all but inference tensors, which have none."""
    plain = torch.ones(2)
    with torch.inference_mode():
        inference = torch.ones(2)
    scan.increment_version([plain, inference, plain])
    assert plain._version == 2


@pytest.mark.skipif(not PATHS["aten"], reason="not here")
def test_of_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was built against it is not used."""
    for attribute, value in (("torch_version", "2.13.0 0"), ("torch_version", scan._aten.torch_version)):
        with monkeypatch.context() as patch:
            patch.setattr(scan._aten, attribute, value)
            patch.delitem(sys.modules, scan.__name__)
            patch.setattr(ops, "scan", scan)  # which the import replaces
            again = importlib.import_module(scan.__name__)
            assert (again.path() == "aten") == (value != "2.13.0 0")


def test_lists_and_dictionaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension's answers are Python's."""
    a, b = torch.ones(1), torch.ones(1)
    modules = [members]
    if scan.Scan is not None:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "sharpkern._C", None)
            patch.delitem(sys.modules, members.__name__)
            patch.setattr(memory, "members", members)
            modules.append(importlib.import_module(members.__name__))
    assert len({module.identical for module in modules}) == len(modules)
    for module in modules:
        assert module.identical([a, b], [a, b])
        assert module.identical([], [])
        assert module.identical((a, b), [a, b])
        for other in ([a, a], [a], [a, b, a], [b, a]):
            assert not module.identical([a, b], other)
        state = defaultdict(dict, {a: {"x": 1, "y": 2}, b: {}, "mine": 3, "more": {"z": 1}})
        assert module.count_entries(state) == 3


@pytest.mark.skipif(not (PATHS["aten"] or PATHS["dlpack"]), reason="not here")
def test_an_interrupt_while_addresses_are_written() -> None:
    """They count as others then: a device would read the old ones."""
    p = nn.Parameter(torch.ones(5))
    opt = sk.SAM([p], torch.optim.SGD, lr=0.1)
    p.grad = torch.ones(5)
    opt.first_step()
    opt.second_step()
    table = opt._step.layouts[0].table
    gather, table._touched = table._scan.gather, False

    class Interrupted:
        def gather(self, *arguments: Any) -> None:
            gather(*arguments)
            raise KeyboardInterrupt

    table._scan = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        table.scan()
    assert table._touched
