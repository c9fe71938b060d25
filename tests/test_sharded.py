"""Parameters that are DTensors: several processes, each with shards, are as one process with all of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import processes
import pytest
import remote
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from methods import METHODS, TURNS, Method
from models import relative_error
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import sharpkern as sk
from sharpkern.memory.shards import Scope

STEPS = 6
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


def trains_alike(rank: int, shard: Shard, copies: int, *loops: Any, turns: Any = TURNS) -> None:
    """Every class, with weights, state and numbers of one process.

    Args:
        copies: processes that divide a batch among them.
    """
    part = my_part(rank * copies // dist.get_world_size(), copies)
    for method, base in turns:
        if method.one_pass:
            with pytest.raises(TypeError, match="NudgedSGD takes no DTensor"):
                method.make(shard(make_net()).named_parameters(), base)
            continue
        plain, plain_opt = expected(method, base, **options_of(method))
        for loop in loops if method.two_passes else (train,):
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


def fsdp(model: nn.Module, mesh: Any = None, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    options["mesh"] = mesh or mesh_of(dist.get_world_size())
    for layer in (model.hidden, model.out):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


@cache
def mesh_of(*sizes: int) -> Any:
    """Of all processes; made once, for its groups are."""
    return dist.init_device_mesh("cpu", sizes, mesh_dim_names=("data", "rows")[-len(sizes) :])


def hybrid(model: nn.Module) -> nn.Module:
    """Two copies of two shards."""
    return fsdp(model, mesh=mesh_of(2, 2))


def parallel(model: nn.Module, mesh: Any = None) -> nn.Module:
    """Two layers in rows of their weights, the others plain tensors."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = mesh or mesh_of(dist.get_world_size())
    plan = {name: ColwiseParallel(output_layouts=Replicate()) for name in ("hidden", "middle")}
    return parallelize_module(model, mesh, plan)


def parallel_shards(model: nn.Module) -> nn.Module:
    """Of these two each row in shards; of the others shards that are the same in both of two processes."""
    mesh = mesh_of(2, 2)
    return fsdp(parallel(model, mesh["rows"]), mesh=mesh["data"])


# What else holds of two processes. Each takes place in all of them.


def _sam_over(model: nn.Module, /, **more: Any) -> Any:
    opt = sk.SAM(model.named_parameters(), torch.optim.SGD, lr=0.05, momentum=0.9, **more)
    opt.zero_grad()
    return opt


REDUCES = "reduce_scatter_tensor", "reduce_scatter_single"  # in torch up to 2.12, and since


def counts_of_collectives(rank: int) -> None:
    """(gathers and reductions of the model's, all-reduces of numbers) a step; the first number in passes."""
    calls: list[str] = []

    @contextmanager
    def counted() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in filter(partial(hasattr, dist), ("all_reduce", *REDUCES)):
                real = getattr(dist, name)
                patch.setattr(dist, name, lambda *o, real=real, name=name, **k: (calls.append(name), real(*o, **k))[1])
            yield

    def count(cls: Any, steps: int = 2, **options: Any) -> list[tuple[int, int]]:
        model = fsdp(make_net())
        opt = cls(model.named_parameters(), torch.optim.SGD, lr=0.01, **options)
        opt.zero_grad()
        train(model, opt, data()[:1], my_part(rank, 2))  # makes groups, if any
        found = []
        for batch in data()[1 : 1 + steps]:
            calls.clear()
            with counted():
                opt.step(lambda batch=batch: loss_of(model, batch, my_part(rank, 2)))
            # A backward pass reduces each of the three groups of parameters once.
            passes, rest = divmod(sum(map(calls.count, REDUCES)), 3)
            assert rest == 0
            found.append((passes, calls.count("all_reduce")))
        return found

    assert count(sk.SAM) == [(2, 2)] * 2
    assert count(sk.ASAM) == [(2, 2)] * 2
    assert count(sk.SAM, max_grad_norm=1.0) == [(2, 2)] * 2
    assert count(sk.SAM, skip_nonfinite=False) == [(2, 1)] * 2
    assert count(sk.ASAM, skip_nonfinite=False) == [(2, 1)] * 2
    assert count(sk.SAM, p=3.0) == [(2, 4)] * 2
    never, always = ({"lambda_start": x, "lambda_end": x} for x in (9.0, -9.0))
    assert count(sk.AESAM, total_steps=9, **never) == [(1, 1)] * 2
    assert count(sk.AESAM, total_steps=9, **always) == [(2, 2)] * 2
    assert count(sk.LookSAM, steps=3, k=3) == [(1, 1), (1, 1), (2, 3)]
    assert count(sk.GSAM) == [(2, 2)] * 2
    assert count(sk.MomentumSAM, momentum=0.9) == [(1, 2)] * 2


def an_exception_leaves_shards_as_they_were(rank: int) -> None:
    model = fsdp(make_net())
    opt = _sam_over(model)
    train(model, opt, data()[:2], my_part(rank, 2))
    before = [p._local_tensor.clone() for p in model.parameters()]
    calls = itertools.count()

    def closure() -> Tensor:
        loss = loss_of(model, data()[2], my_part(rank, 2))
        if next(calls) == 1:
            assert opt.is_perturbed
            assert not torch.equal(model.hidden.weight._local_tensor, before[1])
            raise KeyError("in the second pass")
        return loss

    with pytest.raises(KeyError):
        opt.step(closure)
    assert not opt.is_perturbed
    assert all(torch.equal(p._local_tensor, q) for p, q in zip(model.parameters(), before, strict=True))
    train(model, opt, data()[2:], my_part(rank, 2))
    twin = fsdp(make_net())
    train(twin, _sam_over(twin), data(), my_part(rank, 2))
    assert relative_error(whole(model), whole(twin)) == 0


def what_is_not_finite_here_skips_everywhere(rank: int) -> None:
    for base, at in itertools.product((torch.optim.SGD, torch.optim.RMSprop), (0, 1)):
        model = fsdp(make_net())
        opt = sk.SAM(model.parameters(), base, lr=0.01, max_grad_norm=0.5)
        opt.zero_grad()
        train(model, opt, data()[:1], my_part(rank, 2))
        before = [p._local_tensor.clone() for p in model.parameters()]
        for i in range(2):
            opt.zero_grad()
            loss_of(model, data()[1], my_part(rank, 2))
            if i == at and rank == 1:
                model.hidden.weight.grad._local_tensor[0, 0] = torch.inf
            if i == 0:
                opt.first_step()
        opt.second_step()
        assert int(opt.stats["skipped_steps"]) == 1, (base, at, opt.stats)
        assert all(torch.equal(p._local_tensor, q) for p, q in zip(model.parameters(), before, strict=True))


def every_process_decides_alike(rank: int) -> None:
    steps = 200
    model = fsdp(make_net())
    opt = sk.AESAM(model.parameters(), torch.optim.AdamW, lr=1e-3, total_steps=steps)
    opt.zero_grad()
    taken = []
    for i in range(steps):
        batch = data(seed=i // STEPS)[i % STEPS]
        opt.step(lambda batch=batch: loss_of(model, batch, my_part(rank, 2)))
        taken.append(int(opt.stats["second_passes"]))
    assert 0.2 * steps < taken[-1] < 0.9 * steps
    assert_same_everywhere(torch.tensor(taken), *opt.stats.values())


def moved_weights_reach_modules_that_keep_them_whole(rank: int) -> None:
    """Between passes, and after a pass without gradients, too."""
    for base in (torch.optim.SGD, torch.optim.RMSprop):
        found = []
        for keeps in (False, True):
            model = fsdp(make_net(), reshard_after_forward=not keeps)
            if keeps:
                model.set_reshard_after_backward(False)
            opt = sk.SAM(model.named_parameters(), base, lr=0.05)
            opt.zero_grad()
            outputs = []
            for batch in data():
                opt.step(lambda model=model, batch=batch: loss_of(model, batch, my_part(rank, 2)))
                with torch.no_grad():
                    outputs.append(model(batch[0]))
            found.append(torch.stack(outputs))
        assert torch.equal(*found)


def shards_of_columns_and_of_one_parameter(rank: int) -> None:
    """Columns of a matrix have gaps in between where it is not copied; one process has none of ``gain``."""
    from torch.distributed.tensor import DTensor, Shard

    columns = lambda p: Shard(int(p.dim() == 2 and p.size(1) % 2 == 0))  # noqa: E731
    model, plain = fsdp(make_net(), shard_placement_fn=columns), make_net()
    assert model.hidden.weight.placements == (Shard(1),)
    train(model, _sam_over(model), data(), my_part(rank, 2))
    train(plain, _sam_over(plain), data())
    assert relative_error(whole(model), plain) < 1e-11
    for cls, base in itertools.product((sk.SAM, sk.LookSAM, sk.ESAM), (torch.optim.SGD, torch.optim.AdamW)):
        model, plain = fsdp(make_net()), make_net()
        opts = [cls([net.gain], base, lr=0.05, **({"gamma": 1.0} if cls is sk.ESAM else {})) for net in (model, plain)]
        train(model, opts[0], data(), my_part(rank, 2))
        train(plain, opts[1], data())
        assert relative_error(whole(model), plain) < 1e-11
    every_other = torch.arange(24.0).view(4, 6)[:, ::2]
    parts = DTensor.from_local(every_other, mesh_of(2), [Shard(0)])
    params = [nn.Parameter(t) for t in (parts, parts.full_tensor())]
    for p in params:
        opt = sk.ASAM([p], torch.optim.AdamW, lr=0.1)
        opt.zero_grad()
        for _ in range(3):
            opt.step(lambda p=p: full((p * p).sum()).backward())
    torch.testing.assert_close(full(params[0].detach()), params[1].detach())


def gradients_that_are_parts_of_a_sum_are_summed(rank: int) -> None:
    from torch.distributed.tensor import DTensor, Partial

    model, plain = parallel(make_net()), make_net()
    opts = _sam_over(model), _sam_over(plain)
    for batch in data():
        for net, opt in zip((model, plain), opts, strict=True):
            opt.zero_grad()
            for again in (True, False):
                loss_of(net, batch)
                if net is model:
                    grad = net.hidden.weight.grad
                    part = grad.full_tensor() * (0.25 if rank == 0 else 0.75)
                    net.hidden.weight.grad = DTensor.from_local(part, grad.device_mesh, [Partial()])
                if again:
                    opt.first_step(zero_grad=True)
            opt.second_step()
    assert relative_error(whole(model), plain) < 1e-11


def wrapped_rules_mix_and_clip_shards(rank: int) -> None:
    for name in ("looksam", "gsam", "wsam", "salr"):
        method, plain = METHODS[name], expected(METHODS[name], "wrapped", max_grad_norm=0.3)[0]
        model = fsdp(make_net())
        opt = method.make(model.named_parameters(), "wrapped", STEPS, max_grad_norm=0.3)
        opt.zero_grad()
        train(model, opt, data(), my_part(rank, 2))
        assert relative_error(whole(model), plain) < 1e-11, name


def the_reference_has_shards_too(rank: int) -> None:
    with sk.use_backend("reference"):
        for name in ("sam-adaptive", "looksam", "friendlysam"):
            plain = expected(METHODS[name], "adamw")[0]
            model = fsdp(make_net())
            opt = METHODS[name].make(model.named_parameters(), "adamw", STEPS)
            opt.zero_grad()
            train(model, opt, data(), my_part(rank, 2))
            assert relative_error(whole(model), plain) < 1e-11, name


def a_table_on_a_device(rank: int) -> None:
    """Which is told of empty shards by the host."""
    with pytest.MonkeyPatch.context() as patch, sk.use_backend("triton"):
        remote.pretend(patch)
        for name, base in (("looksam", "adamw"), ("esam", "momentum")):
            plain, other = expected(METHODS[name], base)
            model = fsdp(make_net())
            opt = METHODS[name].make(model.named_parameters(), base, STEPS)
            opt.zero_grad()
            train(model, opt, data(), my_part(rank, 2))
            assert relative_error(whole(model), plain) < 1e-11, name
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                assert float(opt.state[p]["step"]) == float(other.state[q]["step"])


def parameters_come_and_go(rank: int) -> None:
    nets: list[nn.Module] = []
    for shard, part in ((fsdp, my_part(rank, 2)), (lambda net: net, slice(None))):
        first, second = shard(make_net()), shard(make_net(seed=1))
        opt = sk.LookSAM(first.named_parameters(), torch.optim.AdamW, lr=0.01, k=2)
        opt.zero_grad()
        for i, batch in enumerate(data()):
            first.hidden.weight.requires_grad_(i not in (1, 2))
            if i == 3:
                opt.add_param_group({"params": [(f"second.{name}", p) for name, p in second.named_parameters()]})
                second.zero_grad()
            if i == 4:
                opt.state.clear()
            both = (first, second) if i > 2 else (first,)
            opt.step(lambda both=both, batch=batch, part=part: sum(loss_of(net, batch, part) for net in both))
        nets += [first, second]
    for net, plain in zip(nets[:2], nets[2:], strict=True):
        assert relative_error(whole(net), plain) < 1e-11


def buffers_are_those_of_the_first_pass(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    fully_shard(model, mesh=mesh_of(2))
    opt = _sam_over(model, model=model)
    train(model, opt, data(), my_part(rank, 2))
    assert int(model[1].num_batches_tracked) == STEPS


def zeros_by_which_tools_make_state_count_nothing(rank: int) -> None:
    """A rate of 0 with a gradient somewhere is a step, on each process."""
    model = fsdp(make_net())
    opt = _sam_over(model)
    opt.param_groups[0]["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert int(opt.stats["base_steps"]) == 0
    assert all(opt.state[p].keys() == {"momentum_buffer", "step"} for p in model.parameters())
    if rank == 1:
        model.hidden.weight.grad._local_tensor.fill_(1.0)
    opt.step()
    assert int(opt.stats["base_steps"]) == 1


def a_scaler_skips_everywhere(rank: int) -> None:
    """After an overflow in one of two passes, of one process."""

    def run(net: nn.Module, part: slice, overflows: bool) -> torch.amp.GradScaler:
        scaler, calls = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3), itertools.count()
        opt = _sam_over(net)
        for x, y in data():

            def closure(x: Tensor = x[part], y: Tensor = y[part]) -> Tensor:
                loss = nn.functional.cross_entropy(net(x), y)
                scaler.scale(loss * (torch.inf if next(calls) == 7 and overflows else 1)).backward()
                return loss.detach()

            opt.step(closure, scaler=scaler)
            scaler.update()
        assert int(opt.stats["skipped_steps"]) == 1
        return scaler

    model, plain = fsdp(make_net()), make_net()
    scalers = run(model, my_part(rank, 2), rank == 1), run(plain, slice(None), True)
    assert relative_error(whole(model), plain) < 1e-9
    assert scalers[0].get_scale() == scalers[1].get_scale() < 2.0**8 + 1


def what_cannot_be_is_refused(rank: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for shard in (fsdp, parallel):  # of which the second one leaves some parameters what they were
        model = make_net()
        opt = sk.SAM(model.parameters(), lr=0.1, **({} if shard is fsdp else {"model": model}))
        opt.zero_grad()
        shard(model)
        with pytest.raises(RuntimeError, match="SAM was made before the model was sharded"):
            train(model, opt, data()[:1])
        assert not opt.is_perturbed
    model = fsdp(make_net())
    opt = sk.SAM(model.named_parameters(), lr=0.1)
    loss_of(model, data()[0])
    model.gain.grad = torch.ones(1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="gradient of parameter 'gain' is no DTensor, unlike the parameter"):
        opt.first_step()
    for original in (True, False):
        net = make_net()
        early = sk.SAM(net.parameters(), lr=0.1)
        model = FullyShardedDataParallel(net, use_orig_params=original, device_id=torch.device("cpu"))
        with pytest.raises(TypeError, match="belongs to FullyShardedDataParallel .FSDP1.*fully_shard"):
            sk.SAM(model.parameters(), lr=0.1)
        if original:
            with pytest.raises(TypeError, match="belongs to FullyShardedDataParallel"):
                train(model, early, data()[:1])
    model = fsdp(make_net())
    with pytest.raises(ValueError, match="m_sharpness=.rank. goes with DistributedDataParallel.*replicate"):
        sk.SAM(model.parameters(), lr=0.1, model=model, m_sharpness="rank")
    replicas = nn.parallel.DistributedDataParallel(make_net())
    with pytest.raises(TypeError, match="m_sharpness= takes no DTensor"):
        sk.SAM(model.parameters(), lr=0.1, model=replicas, m_sharpness="rank")
    with pytest.raises(TypeError, match="ZeroRedundancyOptimizer cannot shard SAM"):
        ZeroRedundancyOptimizer(make_net().parameters(), optimizer_class=sk.SAM, lr=0.1)
    # The other way round it trains.
    model, plain = nn.parallel.DistributedDataParallel(make_net()), make_net()
    sgd = {"lr": 0.05, "momentum": 0.9}
    opt = sk.SAM(model.parameters(), ZeroRedundancyOptimizer, optimizer_class=torch.optim.SGD, **sgd)
    opt.zero_grad()
    train(model, opt, data(), my_part(rank, 2))
    train(plain, _sam_over(plain), data())
    assert relative_error(model.module, plain) < 1e-11
    for call in (opt.state_dict, lambda: opt.load_state_dict({"state": {}, "param_groups": []})):
        with pytest.raises(RuntimeError, match="SAM over ZeroRedundancyOptimizer.*fully_shard"):
            call()


# Checkpoints.


def run_of(method: Method, base: str, seed: int = 0) -> tuple[nn.Module, Any]:
    model = fsdp(make_net(seed))
    opt = method.make(model.named_parameters(), base, STEPS, **options_of(method))
    opt.zero_grad()
    return model, opt


def everything(model: nn.Module, opt: Any) -> dict[str, Any]:
    """Weights, state and numbers, whole."""
    found = {name: p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{name}.{key}": value for key, value in opt.state[p].items()}
    found |= opt.state_dict()["sharpkern"]
    return {key: full(torch.as_tensor(value)).clone() for key, value in found.items()}


def assert_same(found: dict[str, Tensor], other: dict[str, Tensor], said: Any, tolerance: float = 0) -> None:
    assert found.keys() == other.keys(), said
    for name in found:
        torch.testing.assert_close(
            found[name],
            other[name],
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda m, name=name: f"{said}: {name}: {m}",
        )


def save(folder: Path, model: nn.Module, opt: Any, options: Any) -> None:
    saved = dict(zip(("model", "opt"), get_state_dict(model, opt, options=options), strict=True))
    dcp.save(saved, checkpoint_id=folder)


def load(folder: Path, model: nn.Module, opt: Any, options: Any) -> None:
    loaded = dict(zip(("model", "opt"), get_state_dict(model, opt, options=options), strict=True))
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=loaded["model"], optim_state_dict=loaded["opt"], options=options)


FORMS = {"nested": StateDictOptions(), "flattened": StateDictOptions(flatten_optimizer_state_dict=True)}
# Each class in one of them.
SAVED = [(*turn, form) for turn, form in zip(TURNS, itertools.cycle(FORMS), strict=False) if not turn[0].one_pass]


def resumes(rank: int, folder: Path, turns: Any = SAVED) -> None:
    """Half of the steps, saved, loaded into a fresh optimizer of as many processes, and the other half: all of them."""
    part = my_part(rank, dist.get_world_size())
    for method, base, form in turns:
        options = FORMS[form]
        straight, half, fresh = run_of(method, base), run_of(method, base), run_of(method, base, seed=1)
        train(*straight, data(), part)
        train(*half, data()[:3], part)
        where, said = folder / f"{method}-{form}", (str(method), form)
        save(where, *half, options)
        load(where, *fresh, options)
        assert_same(everything(*fresh), everything(*half), said)
        train(*fresh, data()[3:], part)
        assert_same(everything(*fresh), everything(*straight), said)


def saves_for_others(rank: int, folder: str) -> None:
    part = my_part(rank, dist.get_world_size())
    for method, base, form in SAVED:
        run = run_of(method, base)
        train(*run, data()[:3], part)
        save(Path(folder) / str(method), *run, FORMS[form])
        before = everything(*run)
        train(*run, data()[3:], part)
        after = everything(*run)
        if rank == 0:
            torch.save((before, after), f"{folder}/{method}.pt")


def loads_of_others(rank: int, folder: str) -> None:
    part = my_part(rank, dist.get_world_size())
    for method, base, form in SAVED:
        run, said = run_of(method, base, seed=1), (str(method), form)
        load(Path(folder) / str(method), *run, FORMS[form])
        before, after = torch.load(f"{folder}/{method}.pt")
        assert_same(everything(*run), before, said)
        train(*run, data()[3:], part)
        assert_same(everything(*run), after, said, 1e-12)
        assert_same_everywhere(*everything(*run).values())


@pytest.mark.slow
def test_other_numbers_of_processes_load(tmp_path: Path) -> None:
    """State and numbers to the bit; sums are taken in another order from then on."""
    for count, function in ((2, saves_for_others), (1, loads_of_others), (3, loads_of_others)):
        folder = tmp_path / str(count)
        folder.mkdir()
        processes.run(function, folder, str(tmp_path), processes=count)


def what_is_written_into_state_is_measured(rank: int) -> None:
    """In place, through a DTensor or into the shards: the norm is that of the whole."""
    opt = METHODS["looksam"].make((model := fsdp(make_net())).named_parameters(), "momentum")
    train(model, opt, data()[:1], my_part(rank, 2))
    for local in (False, True):
        for p in model.parameters():
            g_v = opt.state[p]["g_v"]
            (g_v.to_local() if local else g_v).mul_(3)
        train(model, opt, data()[:1], my_part(rank, 2))
        squared = sum(float(opt.state[p]["g_v"].full_tensor().square().sum()) for p in model.parameters())
        assert abs(float(opt.state_dict()["sharpkern"]["g_v_squared_norm"]) / squared - 1) < 1e-12


def state_that_is_whole_is_cut(rank: int) -> None:
    """As torch does it for its own: from the first process, and by the optimizer itself, of a dict of one process."""
    whole_dict = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for name in ("looksam", "aesam"):
        method = METHODS[name]
        half, fresh = run_of(method, "adamw"), run_of(method, "adamw", seed=1)
        train(*half, data()[:3], my_part(rank, 2))
        saved = get_optimizer_state_dict(*half, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        set_optimizer_state_dict(*fresh, saved if rank == 0 else {}, options=whole_dict)
        weights = dict(fresh[0].named_parameters())
        same = {key: value for key, value in everything(*half).items() if key not in weights}
        assert_same({key: value for key, value in everything(*fresh).items() if key not in weights}, same, name)
        plain, other = expected(method, "adamw", **options_of(method)), run_of(method, "adamw")
        other[1].load_state_dict(plain[1].state_dict())
        assert_same(
            {key: value for key, value in everything(*other).items() if key not in weights},
            {key: value for key, value in everything(*plain).items() if key not in weights},
            name,
        )


CHECKS: tuple[Callable[[int], None], ...] = (
    counts_of_collectives,
    an_exception_leaves_shards_as_they_were,
    what_is_not_finite_here_skips_everywhere,
    every_process_decides_alike,
    moved_weights_reach_modules_that_keep_them_whole,
    shards_of_columns_and_of_one_parameter,
    gradients_that_are_parts_of_a_sum_are_summed,
    wrapped_rules_mix_and_clip_shards,
    the_reference_has_shards_too,
    parameters_come_and_go,
    buffers_are_those_of_the_first_pass,
    zeros_by_which_tools_make_state_count_nothing,
    a_scaler_skips_everywhere,
    state_that_is_whole_is_cut,
    what_is_written_into_state_is_measured,
    what_cannot_be_is_refused,
)


def _of_two(rank: int, folder: str) -> None:
    for check in CHECKS:
        check(rank)
    brief = [turn for turn in TURNS if not (turn[0].brief or turn[0].like)]
    trains_alike(rank, fsdp, 2, train, turns=brief)
    resumes(rank, Path(folder), [(METHODS["aelooksam"], "momentum", form) for form in FORMS])


def test_two_processes(tmp_path: Path) -> None:
    processes.run(_of_two, tmp_path, str(tmp_path))


def _more_of_two(rank: int, folder: str) -> None:
    trains_alike(rank, fsdp, 2, train, train_by_hand)
    trains_alike(rank, parallel, 1, train, train_by_hand)
    resumes(rank, Path(folder))
    if "triton" in sk.available_backends():
        a_table_on_a_device(rank)


@pytest.mark.slow
def test_more_of_two_processes(tmp_path: Path) -> None:
    processes.run(_more_of_two, tmp_path, str(tmp_path))


def _of_four(rank: int) -> None:
    trains_alike(rank, hybrid, 4, train)
    trains_alike(rank, parallel_shards, 2, train)
    meshes_that_are_not_all_processes(rank)


def meshes_that_are_not_all_processes(rank: int) -> None:
    from torch.distributed.tensor import DeviceMesh, Replicate, Shard

    cube = dist.init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("apart", "replicate", "shard"))
    model, plain = fsdp(make_net(), cube["replicate", "shard"]), make_net()
    opt = _sam_over(model)
    train(model, opt, data(), my_part(rank % 2, 2))
    train(plain, _sam_over(plain), data())
    assert opt._step.layouts.scope.here.size == 2
    assert relative_error(whole(model), plain) < 1e-11
    assert_same_everywhere(*whole(model).parameters())
    nameless = DeviceMesh("cpu", [[0], [3]])
    if rank in (0, 3):
        scope = Scope([(nameless, (Replicate(), Shard(0))), None])
        assert scope.complete(torch.tensor([[1.0 + rank, 2.0]])).tolist() == [[2.5, 2.0]]
    with pytest.raises(RuntimeError, match="meshes of which none contains the others.*one mesh"):
        Scope([(cube["apart"], (Shard(0),)), (cube["replicate"], (Shard(0),))])


@pytest.mark.slow
def test_four_processes(tmp_path: Path) -> None:
    processes.run(_of_four, tmp_path, processes=4)
