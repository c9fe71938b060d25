"""Small models and data that the tests train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Convolution, batch norm, a 0-dim scale, linear layers: every kind of parameter shape in little room."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, bias=False)
        self.bn = nn.BatchNorm2d(5)
        self.hidden = nn.Linear(5 * 4 * 4, 13)
        self.gain = nn.Parameter(torch.tensor(1.3))
        self.out = nn.Linear(13, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.bn(self.conv(x)))
        return self.out(self.gain * torch.tanh(self.hidden(x.flatten(1))))


def make_net(dtype: torch.dtype = torch.float64, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    with torch.device("cpu"):  # the same weights on every device
        net = Net()
    return net.to(torch.get_default_device(), dtype)


def batches(n: int, dtype: torch.dtype = torch.float64, size: int = 24, seed: int = 7) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device()
    with torch.device("cpu"):
        data = [
            (
                torch.randn(size, 2, 6, 6, generator=generator, dtype=torch.float64),
                torch.randint(0, 3, (size,), generator=generator),
            )
            for _ in range(n)
        ]
    return [(x.to(device, dtype), y.to(device)) for x, y in data]


def make_closure(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    x, y = batch

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(model(x).float() if x.dtype.itemsize == 2 else model(x), y)
        loss.backward()
        return loss

    return closure


def train(model: nn.Module, opt: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]) -> list[float]:
    return [float(opt.step(make_closure(model, batch)).detach()) for batch in data]


def train_by_hand(model: nn.Module, opt: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]) -> None:
    for batch in data:
        closure = make_closure(model, batch)
        opt.zero_grad()
        if not getattr(opt, "one_gradient", False):
            closure()
        if opt.first_step(zero_grad=True):
            closure()
        opt.second_step(zero_grad=True)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def split(model: nn.Module, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Three groups: with an lr, with a radius and a weight decay of its own, with neither."""
    named = list(model.named_parameters())
    return [
        dict(params=named[:2], lr=options["lr"] * 2),
        dict(params=named[2:5], rho=0.09, eta=0.03, nudge=2.5, weight_decay=0.03),
        dict(params=named[5:]),
    ]


def state_of(opt: Any) -> dict[str, Tensor]:
    """The state of every parameter, flat: what a step that is skipped leaves alone."""
    state = opt.state_dict()["state"]
    return {f"{i}.{key}": torch.as_tensor(value) for i, entry in state.items() for key, value in entry.items()}


def relative_error(model: nn.Module, twin: nn.Module) -> float:
    """The largest difference of each parameter, relative to its largest element; the worst of them."""
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    return max(float(((p - q).abs().max() / q.abs().max()).detach()) for p, q in pairs)


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Wherever they lie: the numbers of an optimizer that has not stepped yet are the host's."""
    assert a.keys() == b.keys()
    for name in a:
        x, y = a[name].cpu(), b[name].cpu()
        same = torch.equal(x.nan_to_num(nan=12345.0), y.nan_to_num(nan=12345.0))
        assert same, f"{name} differs by {(x - y).abs().max()}"
