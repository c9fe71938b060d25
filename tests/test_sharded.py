"""Parameters that are DTensors: several processes, each with shards, are as one process with all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from methods import TURNS, Method
from models import relative_error
from torch import Tensor, nn

STEPS = 8
Batch = tuple[Tensor, Tensor]
Shard = Callable[[nn.Module], nn.Module]


class Net(nn.Module):
    """Rows that no number of processes divides, and parameters of one row, of which most processes have nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 5)
        self.gain = nn.Parameter(torch.full((1,), 1.3))
        self.middle = nn.Linear(5, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.gain * self.hidden(x))
        return self.out(torch.tanh(self.middle(x)))


def make_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def data(seed: int = 3) -> list[Batch]:
    """Batches that two, three and four processes divide."""
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(12, 6, generator=g, dtype=torch.float64), torch.randint(0, 3, (12,), generator=g))
        for _ in range(STEPS)
    ]


def loss_of(model: nn.Module, batch: Batch, part: slice = slice(None)) -> Tensor:
    loss = nn.functional.cross_entropy(model(batch[0][part]), batch[1][part])
    loss.backward()
    return loss.detach()


def my_part(rank: int, of: int) -> slice:
    return slice(rank, None, of)


def train(model: nn.Module, opt: Any, batches: list[Batch], part: slice = slice(None)) -> None:
    for batch in batches:
        opt.step(lambda batch=batch: loss_of(model, batch, part))


def train_by_hand(model: nn.Module, opt: Any, batches: list[Batch], part: slice = slice(None)) -> None:
    for batch in batches:
        opt.zero_grad()
        loss_of(model, batch, part)
        if opt.first_step(zero_grad=True):
            loss_of(model, batch, part)
        opt.second_step()


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def whole(model: nn.Module) -> nn.Module:
    """A plain model with the weights of a sharded one."""
    net = make_net()
    with torch.no_grad():
        for p, q in zip(net.parameters(), model.parameters(), strict=True):
            p.copy_(full(q.detach()))
    return net


def assert_same_everywhere(*tensors: Tensor) -> None:
    """To the bit, on every process."""
    flat = torch.cat([t.detach().double().reshape(-1) for t in tensors]).nan_to_num(nan=12345.0)
    gathered = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, flat)
    assert all(torch.equal(gathered[0], other) for other in gathered[1:])


def expected(method: Method, base: str, **more: Any) -> tuple[nn.Module, Any]:
    model = make_net()
    opt = method.make(model.named_parameters(), base, STEPS, **more)
    train(model, opt, data())
    return model, opt


def options_of(method: Method) -> dict[str, Any]:
    """A trigger that fires in some of the steps."""
    return dict(lambda_start=0.5, lambda_end=-0.5) if method.triggered else {}


def assert_trains_alike(rank: int, shard: Shard, copies: int) -> None:
    """Every class, with weights, state and numbers of one process.

    Args:
        copies: processes that divide a batch among them.
    """
    part = my_part(rank * copies // dist.get_world_size(), copies)
    for method, base in TURNS:
        if method.one_pass:
            with pytest.raises(TypeError, match="NudgedSGD takes no DTensor"):
                method.make(shard(make_net()).named_parameters(), base)
            continue
        plain, plain_opt = expected(method, base, **options_of(method))
        for loop in (train, train_by_hand) if method.two_passes else (train,):
            model = shard(make_net())
            opt = method.make(model.named_parameters(), base, STEPS, **options_of(method))
            opt.zero_grad()
            loop(model, opt, data(), part)
            said = f"{method}, {loop.__name__}"
            assert relative_error(whole(model), plain) < 1e-11, said
            assert opt.stats.keys() == plain_opt.stats.keys()
            for name, value in opt.stats.items():
                torch.testing.assert_close(value, plain_opt.stats[name], rtol=1e-9, atol=1e-12, equal_nan=True)
            assert_same_everywhere(*whole(model).parameters(), *opt.stats.values())
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                state, other = opt.state[p], plain_opt.state[q]
                assert state.keys() == other.keys(), said
                for name in state:
                    mine = full(torch.as_tensor(state[name]))
                    torch.testing.assert_close(mine, torch.as_tensor(other[name]), rtol=1e-8, atol=1e-10, msg=said)


def fsdp(model: nn.Module, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in (model.hidden, model.out):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def on_two(rank: int) -> None:
    assert_trains_alike(rank, fsdp, 2)


def test_two_shards(tmp_path: Any) -> None:
    processes.run(on_two, tmp_path)
