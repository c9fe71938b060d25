"""Finding tensors through the extension's Scan: what the op gather finds, for parameters and gradients in Python."""

from __future__ import annotations

import types
import warnings
from typing import Any

import pytest
import torch
from cases import Spec
from test_ops import GRADIENTS
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.memory.shapes import strides_of
from sharpkern.ops import scan, schema

pytestmark = pytest.mark.skipif(not scan.available(), reason="needs the extension, and DLPack's table in torch")


def _negated(g: Tensor) -> Tensor:
    """Its memory holds the negative of it."""
    return torch.complex(g, -g).conj().imag


CASES = {
    **GRADIENTS,
    "negated": (Spec((4, 3)), _negated, False),
    "another_class": (Spec((4, 3)), lambda g: nn.Parameter(g), False),
    "meta": (Spec((4, 3)), lambda g: g.to("meta"), False),
    "int": (Spec((4, 3)), lambda g: g.int(), False),
    "offset": (Spec((4, 3)), lambda g: torch.zeros(5, 3)[1:], True),
}


@pytest.mark.parametrize(("spec", "change", "usable"), CASES.values(), ids=CASES)
def test_gradients(spec: Spec, change: Any, usable: bool) -> None:
    param = torch.randn(spec.shape)
    param = param.contiguous(memory_format=torch.channels_last) if spec.order == "channels_last" else param
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse")
        grad = change(torch.zeros_like(param))
    # Parameters would refuse some of these.
    holders: list[Any] = [types.SimpleNamespace(grad=g) for g in (torch.zeros(5), grad, None, torch.zeros(0))]
    layouts = strides_of([torch.zeros(5), param, torch.zeros(2), torch.zeros(0)])
    table = torch.zeros(4, schema.COLUMNS, dtype=torch.int64)
    column = table[:, schema.GRAD]
    found = scan.Scan(scan._EXCHANGE, holders, torch.empty(0), layouts.data_ptr(), layouts.data_ptr(), layouts.size(1))
    before = table.clone()
    counts = found.gather(column.data_ptr(), schema.COLUMNS)
    assert counts == (int(not usable), 2, True)
    expected = [holders[0].grad.data_ptr(), grad.data_ptr() if usable else schema.MISMATCH, 0, 0]
    assert column.tolist() == expected
    column.copy_(before[:, schema.GRAD])
    assert torch.equal(table, before)
    column.copy_(torch.tensor(expected))
    assert found.gather(column.data_ptr(), schema.COLUMNS) == (int(not usable), 2, False)


def test_an_error_in_a_gradient_is_the_callers() -> None:
    class Holder:
        @property
        def grad(self) -> Tensor:
            raise KeyError("mine")

    layouts, column = strides_of([torch.zeros(5)]), torch.zeros(1, dtype=torch.int64)
    rows = layouts.data_ptr(), layouts.data_ptr(), layouts.size(1)
    with pytest.raises(KeyError, match="mine"):
        scan.Scan(scan._EXCHANGE, [Holder()], torch.empty(0), *rows).gather(column.data_ptr(), 1)


def _double(p: nn.Parameter) -> None:
    p.data = p.data.double()


def _transposed(p: nn.Parameter) -> None:
    p.data = p.data.t().contiguous().t()


def _elsewhere(p: nn.Parameter) -> None:
    p.data = p.data.clone()


@pytest.mark.parametrize("move", [_double, _transposed, _elsewhere, lambda p: p.untyped_storage().resize_(0)])
def test_parameters(move: Any) -> None:
    params = [nn.Parameter(torch.randn(4, 3)) for _ in range(3)]
    layouts, addresses = strides_of(params), torch.tensor([p.data_ptr() for p in params])
    rows = layouts.data_ptr(), layouts.data_ptr(), layouts.size(1)
    found = scan.Scan(scan._EXCHANGE, list(params), torch.empty(0), *rows)
    assert found.unmoved(addresses.data_ptr())
    held = [p.data for p in params]  # the memory is not used again
    move(params[1])
    assert not found.unmoved(addresses.data_ptr())
    del held


class Wrapping(nn.Parameter):
    """A parameter of another class: nobody knows what it does."""


def test_who_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are the same with and without it."""
    ends = []
    for cls, lacking, expected in ((nn.Parameter, False, True), (Wrapping, False, False), (nn.Parameter, True, False)):
        with monkeypatch.context() as patch:
            if lacking:
                patch.setattr(scan, "_EXCHANGE", None)
            assert scan.available() is not lacking
            params = [cls(torch.arange(6.0).view(2, 3)), cls(torch.ones(3))]
            opt = sk.SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9)
            for t in range(3):
                for p in params[: 1 + t % 2]:
                    p.grad = torch.full_like(p, t + 1.0)
                if opt.first_step(zero_grad=True):
                    for p in params:
                        p.grad = torch.full_like(p, 2.0)
                opt.second_step(zero_grad=True)
            assert (opt._step.layouts[0].table._scan is not None) == expected
            ends.append(torch.cat([p.detach().flatten() for p in params]))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_an_interrupt_while_addresses_are_written() -> None:
    """They count as others then: a device would read the old ones."""
    p = nn.Parameter(torch.ones(5))
    opt = sk.SAM([p], torch.optim.SGD, lr=0.1)
    p.grad = torch.ones(5)
    opt.step()
    table = opt._step.layouts[0].table
    gather, table._touched = table._scan.gather, False

    class Interrupted:
        def gather(self, *arguments: int) -> None:
            gather(*arguments)
            raise KeyboardInterrupt

    table._scan = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        table.scan()
    assert table._touched
