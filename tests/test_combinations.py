"""Shards, masters, accumulation and processes with gradients of their own, two at a time."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import sharpkern as sk

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
RULES: list[tuple[Any, dict[str, Any]]] = [
    (SGD, dict(lr=0.1, momentum=0.9, weight_decay=1e-2)),
    (AdamW, dict(lr=1e-2)),
]
CLASSES: list[tuple[Any, dict[str, Any]]] = [
    (sk.SAM, {}),
    (sk.ASAM, {}),
    (sk.AESAM, dict(total_steps=8)),
    (sk.LookSAM, dict(k=2)),
    (sk.GSAM, {}),
]


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))  # 9 rows over 2 processes, 3 over 2
    for p in model.parameters():  # on the half type's grid
        p.data = p.data.bfloat16().float()
    return model


def data(rank: int, steps: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    return [
        (torch.randn(4, 6, generator=generator) * (1 + i % 3), torch.randint(0, 3, (4,), generator=generator))
        for i in range(steps)
    ]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor], share: float = 1.0) -> Tensor:
    x, y = batch
    loss = nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)).float(), y) * share
    loss.backward()
    return loss.detach()


def sharded(dtype: torch.dtype = torch.float32, policy: Any = None) -> nn.Module:
    model, mesh = net().to(dtype), dist.init_device_mesh("cpu", (2,))
    return fully_shard(model, mesh=mesh, **({} if policy is None else {"mp_policy": policy}))


def local(t: Any) -> Tensor:
    return t.to_local().detach()


def masters_of_shards(rank: int) -> None:
    """A float32 model under FSDP2 that casts for its passes, to the bit; resumed, too."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    for cls, more in CLASSES:
        for rule, options in RULES:
            half, wide = sharded(torch.bfloat16), sharded(policy=policy)
            opt = cls(half.named_parameters(), rule, **more, **options, master_weights=True)
            other = cls(wide.named_parameters(), rule, **more, **options)
            for i, batch in enumerate(data(rank)):
                if i == 4:  # on it goes in another optimizer
                    saved = get_optimizer_state_dict(half, opt)
                    opt = cls(half.named_parameters(), rule, **more, **options, master_weights=True)
                    set_optimizer_state_dict(half, opt, saved)
                opt.step(partial(loss_of, half, batch))
                other.step(partial(loss_of, wide, batch))
            for p, q in zip(half.parameters(), wide.parameters(), strict=True):
                assert torch.equal(local(opt.state[p]["master"]), local(q)), (cls, rule)
                assert torch.equal(local(p), local(q).bfloat16()), (cls, rule)
            assert int(opt.stats["second_passes"]) == int(other.stats["second_passes"])


def accumulated_shards(rank: int) -> None:
    """As one closure over the micro-batches."""
    for cls, more in CLASSES:
        ends = []
        for accumulates in (False, True):
            model = sharded()
            opt = cls(model.named_parameters(), SGD, lr=0.1, momentum=0.9, **more)
            batches = data(rank)
            for i in range(0, len(batches), 2):
                closures = [partial(loss_of, model, batch, 0.5) for batch in batches[i : i + 2]]
                if accumulates:
                    for closure in closures:
                        opt.accumulate(closure)
                    opt.step()
                else:
                    opt.step(lambda closures=closures: sum(closure() for closure in closures))
            ends.append([local(p).clone() for p in model.parameters()])
        assert all(map(torch.equal, *ends)), cls


def accumulated_in_buckets(rank: int) -> None:
    """Gradients that become views of DDP's buckets with the last micro-batch are those of all of them."""
    ends = []
    for views in (False, True):
        model = DistributedDataParallel(net(), gradient_as_bucket_view=views)
        opt = sk.SAM(model.module.parameters(), SGD, lr=0.1)

        def apart(batch: tuple[Tensor, Tensor], model: DistributedDataParallel = model) -> Tensor:
            with model.no_sync():
                return loss_of(model, batch, 0.5)

        batches = data(rank)
        for first, last in zip(batches[::2], batches[1::2], strict=True):
            opt.accumulate(partial(apart, first))
            opt.accumulate(partial(loss_of, model, last, 0.5))
            opt.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


def masters_apart(rank: int) -> None:
    """Each process along its own gradient: masters are the same in all of them; SAM's near those of a float32 model
    that is cast for each pass. Sums over processes are rounded to the half type here, not there."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Tensor:
            low = {name: p.bfloat16() for name, p in self.inner.named_parameters()}
            return torch.func.functional_call(self.inner, low, x.bfloat16())

    for cls, more in CLASSES:
        half, wide = DistributedDataParallel(net().bfloat16()), DistributedDataParallel(Cast())
        options = dict(lr=0.1, momentum=0.9, m_sharpness="rank", **more)
        opt = cls(half.module.named_parameters(), SGD, model=half, master_weights=True, **options)
        other = cls(wide.module.inner.named_parameters(), SGD, model=wide, **options)
        for batch in data(rank):
            opt.step(partial(loss_of, half, batch))
            other.step(partial(loss_of, wide, batch))
        for p, q in zip(half.parameters(), wide.parameters(), strict=True):
            assert torch.equal(p, opt.state[p]["master"].bfloat16()), cls
            both = opt.state[p]["master"].clone()
            dist.all_reduce(both)
            assert torch.equal(both, 2 * opt.state[p]["master"]), cls
            if cls in (sk.SAM, sk.ASAM):
                assert (opt.state[p]["master"] - q).abs().max() < 2e-2 * q.abs().max(), cls


def _two(rank: int) -> None:
    warnings.filterwarnings("error", message="the closure of a micro-batch")
    accumulated_in_buckets(rank)
    masters_of_shards(rank)
    accumulated_shards(rank)
    masters_apart(rank)


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    processes.run(_two, tmp_path)
