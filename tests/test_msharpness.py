"""m-sharpness: processes under DistributedDataParallel that move along gradients of their own, held to one process that
takes the parts of each batch one after the other."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import processes
import pytest
import torch
import torch.distributed as dist
from methods import METHODS, TURNS, Method
from models import assert_same_bits, relative_error, weights
from naive import Gradients, dot
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import sharpkern as sk

STEPS = 12
Batch = tuple[Tensor, Tensor]
MEMBERS = [(m, base) for m, base in TURNS if m.two_passes]
SGD = torch.optim.SGD


class Net(nn.Module):
    """Without batch norm, whose statistics are those of a process's own batch. A part of a batch that is told so takes
    another head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.heads = nn.Linear(6, 9), nn.ModuleList(nn.Linear(9, 3) for _ in range(2))

    def forward(self, x: Tensor, head: int = 0) -> Tensor:
        return self.heads[head](self.trunk(x).tanh())


def net() -> nn.Module:
    return Net().double()


def used(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Without the other head."""
    return [(name, p) for name, p in model.named_parameters() if "heads.1" not in name]


def data(steps: int = STEPS) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(8, 6, generator=generator, dtype=torch.float64) for _ in range(steps)]
    return [(x * (1 + i % 3), torch.randint(0, 3, (8,), generator=generator)) for i, x in enumerate(rows)]


def part(batch: Batch, ranks: Sequence[int], processes: int = 2) -> Batch:
    rows = [i for i in range(8) if i % processes in ranks]
    return batch[0][rows], batch[1][rows]


def loss_of(model: nn.Module, batch: Batch, head: int = 0) -> Tensor:
    loss = nn.functional.cross_entropy(model(batch[0], head), batch[1])
    loss.backward()
    return loss.detach()


def mean(parts: Sequence[Gradients]) -> Gradients:
    """What a part lacks is zero there."""
    return {p: sum(g.get(p, 0 * p.detach()) for g in parts) / len(parts) for p in {k: 0 for g in parts for k in g}}


def step_in_parts(naive: Any, method: Method, closures: Sequence[Callable[[], Tensor]]) -> None:
    """w <- base(w, mean_r grad L_r(w + e_r)), e_r along the gradient of part r; other gradients are means, too."""
    if method.name == "esam":
        naive.draw()
    firsts, norms = [], []
    for closure in closures:
        naive.base.zero_grad()
        closure()
        firsts.append(naive.gradients())
        norms.append(naive.norm() ** 2)
    n = sum(norms) / len(norms)
    fired = naive.fires(naive.t, n)
    naive.t += 1
    naive.decisions.append(fired)
    g, g_s = mean(firsts), None
    if fired:
        old, seconds, averages = naive.weights(), [], []
        for first, closure in zip(firsts, closures, strict=True):
            for p in naive.params():
                p.grad = first[p].clone() if p in first else None
            naive.move(lambda group: group["rho"])
            averages.append(getattr(naive, "next", {}))
            naive.base.zero_grad()
            closure()
            naive.put_back(old)
            seconds.append(naive.gradients())
        g_s, naive.next = mean(seconds), mean(averages)
        if method.name == "stablesam":  # the mean of the squared norms, one number
            g = {p: x * (n / dot(g, g)) ** 0.5 for p, x in g.items()}
    for p in naive.params():
        p.grad = None
    naive.descend(g, g_s)


def options_of(method: Method) -> dict[str, Any]:
    return dict(lambda_start=2.0, lambda_end=0.0) if method.triggered else {}


def expected(method: Method, base: str, parts: Sequence[Sequence[int]] = ((0,), (1,)), processes: int = 2) -> Any:
    model = net()
    naive = method.oracle(used(model), base, STEPS, **options_of(method))
    for batch in data():
        step_in_parts(naive, method, [partial(loss_of, model, part(batch, ranks, processes)) for ranks in parts])
    if method.triggered:
        assert 0 < sum(naive.decisions) < STEPS
    return model, naive


def assert_on_every_rank(model: nn.Module, what: str, opt: Any = None) -> None:
    tensors = list(model.parameters())
    if opt is not None:
        tensors += [x for p in model.parameters() for x in opt.state.get(p, {}).values() if isinstance(x, Tensor)]
    flat = nn.utils.parameters_to_vector(tensors).detach()
    gathered = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, flat)
    assert all(torch.equal(flat, other) for other in gathered), f"{what}: the processes drifted apart"


def by_hand(opt: Any, backward: Callable[[], Any], scaler: Any = None, unscales: bool = False) -> None:
    opt.zero_grad()
    with opt.first_pass():
        backward()
    if unscales:
        scaler.unscale_(opt)
    if opt.first_step(zero_grad=True, scaler=scaler):
        backward()
    opt.second_step()


class Counted:
    """Collectives: of whole gradients, DDP's among them, and of a few numbers."""

    def __init__(self, parallel: DistributedDataParallel) -> None:
        self.gradients = self.numbers = 0
        parallel.register_comm_hook(None, lambda state, bucket: self._exchange(bucket))

    def _exchange(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.gradients += bucket.is_last()
        work = self.real(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    @contextlib.contextmanager
    def here(self) -> Iterator[Counted]:
        self.gradients = self.numbers = 0

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.numel() > 8:
                self.gradients += 1
            else:
                self.numbers += 1
            return self.real(tensor, *args, **kwargs)

        with mock.patch.object(dist, "all_reduce", counted):
            yield self

    real = staticmethod(dist.all_reduce)


def _every_class(rank: int) -> None:
    for method, base in MEMBERS:
        twin, naive = expected(method, base)
        for loop in ("closure", "by hand"):
            model = _trained()
            parallel = DistributedDataParallel(model, gradient_as_bucket_view=loop == "closure")
            flatten = loop == "by hand" and base != "wrapped"
            opt = method.make(
                used(model), base, STEPS, model=parallel, m_sharpness="rank", flatten=flatten, **options_of(method)
            )
            for batch in data():
                backward = partial(loss_of, parallel, part(batch, (rank,)))
                opt.step(backward) if loop == "closure" else by_hand(opt, backward)
            assert_on_every_rank(model, f"{method}, {loop}", opt)
            assert relative_error(model, twin) < 1e-11, f"{method}, {loop}"
            assert int(opt.stats["second_passes"]) == sum(naive.decisions), f"{method}, {loop}"
    _counts(rank)
    _bad_gradients(rank)
    _scaler(rank)
    _other_heads(rank)
    _a_first_gradient_that_is_missing(rank)
    _static_graph(rank)
    _errors(rank)
    _long(rank)
    _join(rank)
    replicas(rank, 1, ("sam", "aesam", "looksam"))
    replicas_and_the_rest(rank, 1)


def _trained() -> nn.Module:
    """Without the other head."""
    model = net()
    for p in model.heads[1].parameters():
        p.requires_grad_(False)
    return model


def _counts(rank: int) -> None:
    """The table of docs/loops/ddp.md: collectives of gradients and of a few numbers, a step."""
    table: list[tuple[Any, dict[str, Any], str, list[tuple[int, int]]]] = [
        (sk.SAM, {}, "global", [(2, 0)] * 2),
        (sk.SAM, {}, "rank", [(1, 0)] * 2),
        (sk.SSSAM, dict(p=lambda t: 1 - t), "rank", [(1, 0)] * 2),
        (sk.AESAM, dict(total_steps=2, lambda_start=-9, lambda_end=-9), "rank", [(1, 1)] * 2),
        (sk.AESAM, dict(total_steps=2, lambda_start=9, lambda_end=9), "rank", [(1, 1)] * 2),
        (sk.AESAM, dict(total_steps=2, lambda_start=9, lambda_end=9), "global", [(1, 0)] * 2),
        (sk.LookSAM, dict(k=2), "rank", [(2, 0), (1, 0)]),
        (sk.GSAM, {}, "rank", [(2, 0)] * 2),
        (sk.StableSAM, {}, "rank", [(1, 1)] * 2),
        (sk.SALR, {}, "global", [(11, 1), (1, 0)]),
    ]
    for cls, options, m, counts in table:
        parallel = DistributedDataParallel(_trained())
        counted = Counted(parallel)
        opt = cls(parallel.module.parameters(), SGD, lr=0.1, model=parallel, m_sharpness=m, **options)
        for batch, expected_counts in zip(data(2), counts, strict=True):
            with counted.here():
                opt.step(partial(loss_of, parallel, part(batch, (rank,))))
            found = counted.gradients, counted.numbers
            assert found == expected_counts, f"{cls.__name__}, {m}: {found}, expected {expected_counts}"


def _bad_gradients(rank: int) -> None:
    """A first gradient that is bad in one process moves nothing there, and the step is taken; where it goes into the
    step, or the last one is bad, every process skips it."""
    for name, call, taken in [("sam", 0, True), ("sam", 1, False), ("looksam", 0, False), ("aesam", 0, False)]:
        method, model, calls = METHODS[name], _trained(), iter(range(9))
        parallel = DistributedDataParallel(model)
        opt = method.make(used(model), "momentum", STEPS, model=parallel, m_sharpness="rank")
        twin = _trained()
        naive = method.oracle(used(twin), "momentum", STEPS)

        def closure(model: nn.Module, rank: int, call: int | None) -> Tensor:
            x, y = part(data()[0], (rank,))
            loss = nn.functional.cross_entropy(model(x), y)
            (loss * (float("nan") if rank == 1 and call == 0 else 1)).backward()
            return loss.detach()

        opt.step(lambda: closure(parallel, rank, next(calls) - call))  # noqa: B023
        assert_on_every_rank(model, name)
        assert int(opt.stats["skipped_steps"]) == (not taken), (name, call)
        if not taken:
            assert_same_bits(weights(model), weights(_trained()))
            continue
        firsts = []
        for r in range(2):
            naive.base.zero_grad()
            closure(twin, r, None)
            if r == 0:
                old = naive.weights()
                naive.move(lambda group: group["rho"])
                naive.base.zero_grad()
                closure(twin, r, None)
                naive.put_back(old)
            firsts.append(naive.gradients())
        naive.descend(mean(firsts))
        assert relative_error(model, twin) < 1e-11


def _scaler(rank: int) -> None:
    """An overflow in the first pass of one process lowers the scale in all of them, once."""
    for loop in ("closure", "by hand", "unscaled by the user"):
        model = _trained()
        parallel = DistributedDataParallel(model)
        opt = sk.AESAM(used(model), SGD, total_steps=9, lr=0.1, model=parallel, m_sharpness="rank")
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        calls = iter(range(9))

        def backward() -> Tensor:
            b = part(data()[0], (rank,))
            loss = nn.functional.cross_entropy(parallel(b[0]), b[1])  # noqa: B023
            scaler.scale(loss * (float("inf") if rank == 1 and next(calls) == 0 else 1)).backward()  # noqa: B023
            return loss.detach()

        if loop == "closure":
            opt.step(backward, scaler=scaler)
        else:
            by_hand(opt, backward, scaler, unscales="unscaled" in loop)
        scaler.update()
        assert scaler.get_scale() == 512.0, (rank, loop)
        assert int(opt.stats["skipped_steps"]) == 1
        opt.step(backward, scaler=scaler)
        scaler.update()
        assert_on_every_rank(model, loop, opt)
    # A process without any gradient of this optimizer takes part in that.
    parallel = DistributedDataParallel(net(), find_unused_parameters=True)
    opt = sk.SAM(parallel.module.heads[0].parameters(), SGD, lr=0.1, model=parallel, m_sharpness="rank")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def of_head() -> Tensor:
        x, y = part(data()[0], (rank,))
        loss = nn.functional.cross_entropy(parallel(x, rank), y)
        scaler.scale(loss).backward()
        return loss.detach()

    opt.step(of_head, scaler=scaler)
    scaler.update()
    assert_on_every_rank(parallel.module, "a head of one process", opt)


def _other_heads(rank: int) -> None:
    """Processes take different parts of the model, which DDP is told of: what one lacks is zero there."""
    aesam = METHODS["aesam"]
    with pytest.raises(ValueError, match="find_unused_parameters=True go with"):
        model = net()
        aesam.make(
            model.parameters(), model=DistributedDataParallel(model, find_unused_parameters=True), m_sharpness="rank"
        )
    with pytest.raises(RuntimeError, match="FriendlySAM averages"):
        parallel = DistributedDataParallel(_trained(), find_unused_parameters=True)
        opt = sk.FriendlySAM(parallel.parameters(), SGD, lr=0.1, model=parallel, m_sharpness="rank")
        opt.step(lambda: loss_of(parallel, part(data()[0], (rank,))))
    for name in ("sam", "looksam", "gsam", "esam"):
        method = METHODS[name]
        model, twin = net(), net()
        parallel = DistributedDataParallel(model, find_unused_parameters=True)
        more = options_of(method)
        opt = method.make(model.named_parameters(), "momentum", 8, model=parallel, m_sharpness="rank", **more)
        naive = method.oracle(twin.named_parameters(), "momentum", 8, **more)
        for t, batch in enumerate(data(8)):
            heads = [0, 0] if t < 2 else [t % 2, 1 - t % 2] if t % 3 else [1, 1]
            opt.step(partial(loss_of, parallel, part(batch, (rank,)), heads[rank]))
            closures = [partial(loss_of, twin, part(batch, (r,)), heads[r]) for r in range(2)]
            step_in_parts(naive, method, closures)
        assert_on_every_rank(model, name)
        assert relative_error(model, twin) < 1e-11, name


class Both(Net):
    """Of the heads; or the first one alone."""

    def forward(self, x: Tensor, heads: int = 2) -> Tensor:
        x = self.trunk(x).tanh()
        return sum(head(x) for head in self.heads[:heads])


def _a_first_gradient_that_is_missing(rank: int) -> None:
    """In one process: it is zero there. DistributedDataParallel looks after the last pass only."""
    for name in ("sam", "gsam", "looksam", "friendlysam"):
        model, method = Both().double(), METHODS[name]
        parallel, calls = DistributedDataParallel(model), iter(range(9))
        opt = method.make(model.named_parameters(), "momentum", 8, model=parallel, m_sharpness="rank")

        def closure(parallel: Any = parallel, calls: Iterator[int] = calls) -> Tensor:
            heads = 1 if next(calls) == 0 and rank == 1 else 2
            return loss_of(parallel, part(data()[0], (rank,)), heads)

        for _ in range(2):
            opt.step(closure)
            assert_on_every_rank(model, name, opt)


def _static_graph(rank: int) -> None:
    """torch synchronises the first steps of a static graph; from the third one on passes are apart."""
    model, twin = _trained(), _trained()
    parallel = DistributedDataParallel(model, static_graph=True)
    method = METHODS["looksam"]
    opt = method.make(used(model), "momentum", model=parallel, m_sharpness="rank", k=1)
    for _ in range(2):  # steps that come to nothing are none of the first ones
        with pytest.raises(ZeroDivisionError):
            opt.step(lambda: 1 / 0)
    naive = method.oracle(used(twin), "momentum", k=1)
    for t, batch in enumerate(data(5)):
        opt.step(partial(loss_of, parallel, part(batch, (rank,))))
        parts = ((0, 1),) if t < 2 else ((0,), (1,))
        step_in_parts(naive, method, [partial(loss_of, twin, part(batch, ranks)) for ranks in parts])
    assert relative_error(model, twin) < 1e-11


def _errors(rank: int) -> None:
    """An exception in each pass leaves weights and the exchange of gradients as they were."""
    model = _trained()
    parallel = DistributedDataParallel(model)
    opt = sk.LookSAM(used(model), SGD, lr=0.1, k=1, model=parallel, m_sharpness="rank")
    before, batch = weights(model), part(data()[0], (rank,))
    with pytest.raises(RuntimeError, match="first_pass"):
        opt.first_step()
    with pytest.raises(RuntimeError, match=r"accumulate\(\) with m_sharpness"):
        opt.accumulate(lambda: None)
    with pytest.raises(RuntimeError, match="within first_pass"), opt.first_pass():
        opt.step(lambda: loss_of(parallel, batch))
    with pytest.raises(KeyError), opt.first_pass():
        raise KeyError
    with pytest.raises(RuntimeError, match="first_pass"):
        opt.first_step()
    for last in range(2):
        calls = iter(range(9))

        def closure() -> Tensor:
            loss = loss_of(parallel, batch)
            if next(calls) == last:  # noqa: B023
                raise KeyError
            return loss

        with pytest.raises(KeyError):
            opt.step(closure)
        assert parallel.require_backward_grad_sync
        assert_same_bits(weights(model), before)
    opt.step(lambda: loss_of(parallel, batch))
    assert_on_every_rank(model, "after errors", opt)
    _exchanged_all_the_same(rank)
    _loops(rank)
    alone = [dist.new_group([r]) for r in range(2)]
    with pytest.raises(TypeError, match="process group"):  # torch's mark for a group of others
        sk.SAM(model.parameters(), SGD, lr=0.1, model=parallel, m_sharpness=alone[1 - rank])
    with pytest.raises(ValueError, match="not of this one and others of the model"):
        single = DistributedDataParallel(_trained(), process_group=alone[rank])
        sk.SAM(single.parameters(), SGD, lr=0.1, model=single, m_sharpness=dist.group.WORLD)
    with pytest.raises(TypeError, match="decides the same"):
        sk.SAM(model.parameters(), SGD, lr=0.1, model=parallel, m_sharpness="rank", policy=_OfItsOwn())


def _exchanged_all_the_same(rank: int) -> None:
    """A first pass whose exchange was not left out is none of one's own."""
    model = _trained()
    parallel = DistributedDataParallel(model)
    opt = sk.SAM(used(model), SGD, lr=0.1, model=parallel, m_sharpness="rank")
    batch, before = part(data()[0], (rank,)), weights(model)

    def turning_it_on() -> Tensor:
        parallel.require_backward_grad_sync = True
        return loss_of(parallel, batch)

    with pytest.raises(RuntimeError, match="were exchanged"):
        opt.step(turning_it_on)
    loss = nn.functional.cross_entropy(parallel(batch[0]), batch[1])
    with pytest.raises(RuntimeError, match="were exchanged"), opt.first_pass():
        loss.backward()
    assert_same_bits(weights(model), before)
    group = sk.SAM(used(model), SGD, lr=0.1, model=parallel, m_sharpness=dist.group.WORLD)
    with pytest.raises(RuntimeError, match=r"save its state_dict"):
        copy.deepcopy(group)
    # What DDP leaves to each process is averaged by nobody.
    model = _trained()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["trunk.bias"])
    parallel = DistributedDataParallel(model)
    for cls, refused in ((sk.SAM, False), (sk.GSAM, True)):
        opt = cls(used(model), SGD, lr=0.1, model=parallel, m_sharpness="rank")
        opt.zero_grad()
        before = weights(model)
        with pytest.raises(RuntimeError, match=r"'trunk.bias' is none") if refused else contextlib.nullcontext():
            opt.step(partial(loss_of, parallel, batch))
        if refused:
            assert_same_bits(weights(model), before)


def _loops(rank: int) -> None:
    """A base step after a first pass of one's own, a step that is cancelled in its first pass, a process that has no
    gradient, parameters without one in all processes."""
    batch = part(data()[0], (rank,))
    model = _trained()
    parallel = DistributedDataParallel(model)
    for cls, more in ((sk.SAM, {}), (sk.GSAM, {}), (sk.AESAM, dict(total_steps=9, lambda_start=9, lambda_end=9))):
        opt = cls(used(model), SGD, lr=0.1, model=parallel, m_sharpness="rank", **more)
        opt.zero_grad()
        with opt.first_pass():
            loss_of(parallel, batch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is told of a step of the base rule alone
            opt.step()
        assert_on_every_rank(model, "a base step", opt)

        def cancelling() -> Tensor:
            opt.restore()  # noqa: B023
            return loss_of(parallel, batch)

        opt.step(cancelling)
        assert_on_every_rank(model, "restore() in a first pass", opt)
    model = net()  # its other head takes no part
    parallel = DistributedDataParallel(model)
    opt = sk.AESAM(
        model.parameters(), SGD, total_steps=9, lambda_start=9, lambda_end=9, lr=0.1, weight_decay=0.1, model=parallel,
        m_sharpness="rank",
    )  # fmt: skip
    before = weights(model)
    opt.step(lambda: loss_of(parallel, batch))
    assert_on_every_rank(model, "a head without gradients", opt)
    assert_same_bits(weights(model.heads[1]), {k[8:]: w for k, w in before.items() if k.startswith("heads.1")})
    opt.zero_grad()
    with opt.first_pass():
        if rank == 0:
            loss_of(parallel, batch)
        else:
            parallel(batch[0])
    assert not opt.first_step()
    opt.second_step()
    assert_on_every_rank(model, "a process without gradients", opt)


class _OfItsOwn(sk.policy.Policy):
    def decide(self, step: Any) -> bool:
        return True


def _long(rank: int) -> None:
    """The same decisions and the same bits after a thousand steps."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    parallel = DistributedDataParallel(model)
    opt = sk.AESAM(model.parameters(), SGD, lr=0.05, momentum=0.9, total_steps=1000, model=parallel, m_sharpness="rank")
    torch.manual_seed(rank)
    for _ in range(1000):
        x = torch.randn(4, 6)

        def closure() -> Tensor:
            loss = nn.functional.cross_entropy(parallel(x), (x[:, 0] > 0).long())  # noqa: B023
            loss.backward()
            return loss.detach()

        opt.step(closure)
    assert_on_every_rank(model, "1000 steps")
    assert 200 < int(opt.stats["second_passes"]) < 800


def _join(rank: int) -> None:
    """Processes whose data end early: with joint gradients they keep the others company."""
    for cls, more in ((sk.SAM, {}), (sk.AESAM, dict(total_steps=5))):
        model = _trained()
        parallel = DistributedDataParallel(model)
        opt = cls(used(model), SGD, lr=0.1, model=parallel, **more)
        with Join([parallel]):
            for batch in data(3 + 2 * rank):
                opt.step(partial(loss_of, parallel, part(batch, (rank,))))
        assert_on_every_rank(model, "Join")
        apart = cls(used(model), SGD, lr=0.1, model=parallel, m_sharpness="rank", **more)
        with Join([parallel]), pytest.raises(RuntimeError, match="Join"):
            apart.step(lambda: loss_of(parallel, part(data()[0], (rank,))))  # noqa: B023


def _quiet(rank: int, function: Callable[[int], None]) -> None:
    warnings.simplefilter("error")
    function(rank)


def test_each_process_along_its_own_gradient(tmp_path: Path) -> None:
    processes.run(_quiet, tmp_path, _every_class)


def _groups(rank: int) -> None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for name in ("sam", "aesam", "looksam"):
        method = METHODS[name]
        twin, naive = expected(method, "momentum", ((0, 1), (2, 3)), 4)
        model = _trained()
        parallel = DistributedDataParallel(model)
        opt = method.make(
            used(model), "momentum", STEPS, model=parallel, m_sharpness=pairs[rank // 2], **options_of(method)
        )
        for batch in data():
            opt.step(partial(loss_of, parallel, part(batch, (rank,), 4)))
        assert_on_every_rank(model, name)
        assert relative_error(model, twin) < 1e-11, name
        assert int(opt.stats["second_passes"]) == sum(naive.decisions), name


@pytest.mark.slow
def test_each_pair_along_its_own_gradient(tmp_path: Path) -> None:
    processes.run(_quiet, tmp_path, _groups, processes=4)


@cache
def mesh_of(*sizes: int) -> Any:
    """Of all processes; made once, for its groups are."""
    return dist.init_device_mesh("cpu", sizes, mesh_dim_names=("copies", "shards", "rows")[: len(sizes)])


def copies(shards: int, model: nn.Module | None = None) -> nn.Module:
    """Two of a model, each in shards. They start apart: all copies become the first one."""
    from torch.distributed.fsdp import fully_shard

    mesh, model = mesh_of(2, shards), model or _trained()
    for module in (model.trunk, model):
        fully_shard(module, mesh=mesh["shards"])
    if mesh.get_local_rank(0) == 1:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2)
    return sk.replicate(model, mesh)


def whole(t: Any) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else torch.as_tensor(t)


def gathered(model: nn.Module) -> nn.Module:
    twin = _trained()
    with torch.no_grad():
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            p.copy_(whole(q.detach()))
    return twin


def assert_copies(opt: Any, model: nn.Module, what: str) -> None:
    """Weights, state and what is counted have the same bits in every copy."""
    tensors = [x.detach() for x in model.parameters()]
    tensors += [x for p in model.parameters() for x in opt.state.get(p, {}).values()]
    tensors += [x for name, x in opt.stats.items() if name != "grad_norm"]
    flat = torch.cat([whole(t).double().reshape(-1) for t in tensors]).nan_to_num(nan=-1.0)
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    assert all(torch.equal(flat, other) for other in others), f"{what}: the copies drifted apart"


def replicas(rank: int, shards: int, names: Sequence[str] = ()) -> None:
    """Each copy of a sharded model along the gradient of its own part."""
    parts = (range(shards), range(shards, 2 * shards))
    for method, base in MEMBERS:
        if names and method.name not in names:
            continue
        twin, naive = expected(method, base, parts, 2 * shards)
        for loop in ("closure", "by hand"):
            model = copies(shards)
            opt = method.make(used(model), base, STEPS, model=model, m_sharpness="replica", **options_of(method))
            for batch in data():
                backward = partial(loss_of, model, part(batch, (rank,), 2 * shards))
                opt.step(backward) if loop == "closure" else by_hand(opt, backward)
            assert_copies(opt, model, f"{method}, {loop}")
            assert relative_error(gathered(model), twin) < 1e-11, f"{method}, {loop}"
            assert int(opt.stats["second_passes"]) == sum(naive.decisions), f"{method}, {loop}"


def replicas_and_the_rest(rank: int, shards: int) -> None:
    mine = partial(part, ranks=(rank,), processes=2 * shards)
    # Joint gradients in both passes, and losses of all processes, where nothing else is asked for.
    for cls in (sk.SAM, sk.SALR):
        model, twin = copies(shards), _trained()
        opts = [cls(m.parameters(), SGD, lr=0.1, momentum=0.9) for m in (model, twin)]
        for batch in data():
            opts[0].step(partial(loss_of, model, mine(batch)))
            with warnings.catch_warnings(action="ignore"):  # this process trains a model of its own
                opts[1].step(partial(loss_of, twin, batch))
        assert_copies(opts[0], model, cls.__name__)
        assert relative_error(gathered(model), twin) < 1e-11
    # One exchange instead of two, of both modules' gradients.
    for m, exchanges in [("global", 2), ("replica", 1)]:
        model, reduced = copies(shards), mock.Mock(side_effect=Counted.real)
        opt = sk.SAM(model.parameters(), SGD, lr=0.1, model=model, m_sharpness=m)
        with mock.patch.object(dist, "all_reduce", reduced):
            opt.step(partial(loss_of, model, mine(data()[0])))
        sizes = [call.args[0].numel() for call in reduced.call_args_list]
        assert sum(size > 8 for size in sizes) == 2 * exchanges
    # What is not finite in one process: its copy stays where it is; the scale is lowered in all of them.
    for cls, more, skipped in [(sk.SAM, {}, 0), (sk.LookSAM, {}, 1)]:
        model = copies(shards)
        opt = cls(model.parameters(), SGD, lr=0.1, model=model, m_sharpness="replica", **more)
        calls = iter(range(9))

        def bad(model: nn.Module = model, calls: Iterator[int] = calls) -> Tensor:
            x, y = mine(data()[0])
            loss = nn.functional.cross_entropy(model(x), y)
            (loss * (float("inf") if rank == 0 and next(calls) == 0 else 1)).backward()
            return loss.detach()

        opt.step(bad)
        assert_copies(opt, model, cls.__name__)
        assert int(opt.stats["skipped_steps"]) == skipped
    model, scaler, calls = copies(shards), torch.amp.GradScaler("cpu", init_scale=1024.0), iter(range(9))
    opt = sk.AESAM(model.parameters(), SGD, total_steps=9, lr=0.1, model=model, m_sharpness="replica")

    def scaled() -> Tensor:
        x, y = mine(data()[0])
        loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss * (float("inf") if rank == 0 and next(calls) == 0 else 1)).backward()
        return loss.detach()

    opt.step(scaled, scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert int(opt.stats["skipped_steps"]) == 1
    # An exception in a first pass: the next one is exchanged, or not, as ever.
    model, twin = copies(shards), copies(shards)
    opts = [sk.SSSAM(m.parameters(), SGD, p=0.5, lr=0.1, model=m, m_sharpness="replica") for m in (model, twin)]
    for batch in data():
        with pytest.raises(ZeroDivisionError):
            opts[0].step(lambda: 1 / 0)
        for opt, m in zip(opts, (model, twin), strict=True):
            opt.step(partial(loss_of, m, mine(batch)))
    assert_same_bits(weights(gathered(model)), weights(gathered(twin)))
    assert_copies(opts[0], model, "after exceptions")
    # What cannot be.
    with pytest.raises(ValueError, match="is none of the model that was replicated"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="model= has to be one that .* went through sharpkern.replicate"):
        sk.SAM(twin.parameters(), SGD, lr=0.1, model=_trained(), m_sharpness="replica")
    mesh = mesh_of(2, shards)
    for m, on, error, words in [
        (_trained(), mesh, TypeError, "should be under torch.distributed.fsdp.fully_shard, but got .*Net"),
        (twin, mesh["copies"], ValueError, "a dimension of copies and others of shards"),
        (twin, None, TypeError, "mesh should be a DeviceMesh, but got None"),
        (twin.trunk, mesh, ValueError, "has an all-reduce hook"),
    ]:
        with pytest.raises(error, match=words):
            sk.replicate(m, on)
    from torch.distributed.fsdp import fully_shard

    with pytest.raises(ValueError, match="trunk.weight lies on .*, but should lie on the processes"):
        sk.replicate(fully_shard(_trained(), mesh=mesh), mesh)
    half = _trained()
    fully_shard(half.trunk, mesh=mesh["shards"])
    with pytest.raises(ValueError, match="heads.0.weight is no DTensor"):
        sk.replicate(half, mesh)
    _exchanged_after_all(shards, mine(data()[0]))
    _what_copies_start_with(shards)
    _the_same_bits_in_every_copy(rank, shards)


def _exchanged_after_all(shards: int, batch: Batch) -> None:
    """A first pass whose gradients were exchanged, or not seen, is an error; another optimizer's is none."""
    model = copies(shards)
    assert sk.replicate(model, mesh_of(2, shards)) is model
    opts = [sk.SAM(model.parameters(), SGD, lr=0.1, model=model, m_sharpness="replica") for _ in range(2)]
    with opts[0].first_pass():
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    with pytest.raises(RuntimeError, match="gradients of the first pass were exchanged"):
        opts[0].first_step()
    with pytest.raises(RuntimeError, match="did not go through the hooks"), opts[0].first_pass():
        pass
    opts[0].zero_grad()
    with opts[0].first_pass():
        with opts[1].first_pass():
            loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
        model(batch[0]).sum().backward()
    assert opts[0].first_step()
    opts[0].restore()
    for module in (model.trunk, model):
        module.set_all_reduce_hook(lambda shards: None)
    with pytest.raises(RuntimeError, match="did not go through the hooks"):
        opts[0].step(partial(loss_of, model, batch))


def _what_copies_start_with(shards: int) -> None:
    """Buffers of any dtype and any strides; nothing beside them is written."""
    from torch.distributed.fsdp import fully_shard

    mesh, model = mesh_of(2, shards), _trained()
    copy, beside = mesh.get_local_rank(0), torch.zeros(16) + mesh.get_local_rank(0)
    model.register_buffer("repeated", torch.full((1, 4), copy + 1.0).expand(3, 4))
    model.register_buffer("gaps", beside[::2])
    model.register_buffer("columns", (torch.arange(6.0).view(2, 3) + copy).t())
    for dtype in (torch.int16, torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.complex64):
        model.register_buffer(str(dtype).replace(".", "_"), torch.full((), copy + 1).to(dtype))
    model.register_buffer("empty", torch.zeros(0))
    sk.replicate(fully_shard(model, mesh=mesh["shards"]), mesh)
    assert torch.equal(model.repeated, torch.ones(3, 4))
    assert torch.equal(model.gaps, torch.zeros(8))
    assert torch.equal(beside[1::2], torch.zeros(8) + copy)
    assert torch.equal(model.columns, torch.arange(6.0).view(2, 3).t())
    assert all(b.float() == 1 for name, b in model.named_buffers() if name.startswith("torch_") and not b.is_complex())


def _the_same_bits_in_every_copy(rank: int, shards: int) -> None:
    """Also where the shards of another copy are summed in another order."""
    mine = partial(part, ranks=(rank,), processes=2 * shards)
    for cls, more in [(sk.SAM, {"max_grad_norm": 0.01}), (sk.LookSAM, {"k": 2}), (sk.GSAM, {}), (sk.StableSAM, {})]:
        for m in ("global", "replica"):
            model = copies(shards)
            opt = cls(model.parameters(), SGD, lr=0.1, model=model, m_sharpness=m, **more)
            opt._step.refresh()
            here = opt._step.layouts.scope.here
            order = 1 + 2.0**-51 * (rank // shards)
            with mock.patch.object(
                here, "all_reduce", lambda *o, f=order, real=here.all_reduce, **k: real(*o, **k) * f, create=True
            ):
                for batch in data(4):
                    opt.step(partial(loss_of, model, mine(batch)))
            assert_copies(opt, model, f"{cls.__name__}, {m}")


def _tensor_parallel(rank: int) -> None:
    """Of two processes that have rows of one layer, and share the other one and a plain sum of squares with it."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    twin, naive = expected(METHODS["aesam"], "momentum", ((0, 1), (2, 3)), 4)
    mesh, model = mesh_of(2, 1, 2), _trained()
    parallelize_module(model, mesh["rows"], {"trunk": ColwiseParallel(output_layouts=Replicate())})
    sk.replicate(fully_shard(model, mesh=mesh["shards"]), mesh)
    opt = METHODS["aesam"].make(
        used(model), "momentum", STEPS, model=model, m_sharpness="replica", **options_of(METHODS["aesam"])
    )
    for batch in data():
        opt.step(partial(loss_of, model, part(batch, [(0, 1), (2, 3)][rank // 2], 4)))
    assert relative_error(gathered(model), twin) < 1e-11
    assert int(opt.stats["second_passes"]) == sum(naive.decisions)


def _numbers(rank: int) -> None:
    """All-reduces of a few numbers a step, of the shards of a copy and over all."""
    for cls, more, expected_counts in [
        (sk.SAM, {}, [2, 2]),
        (sk.AESAM, dict(total_steps=2, lambda_start=9, lambda_end=9), [3, 3]),
        (sk.AESAM, dict(total_steps=2, lambda_start=-9, lambda_end=-9), [3, 3]),
        (sk.LookSAM, dict(k=2), [4, 1]),
        (sk.GSAM, {}, [3, 3]),
        (sk.StableSAM, {}, [3, 3]),
        (sk.FriendlySAM, {}, [4, 4]),
    ]:
        model, found = copies(2), []
        opt = cls(model.parameters(), SGD, lr=0.1, model=model, m_sharpness="replica", **more)
        for batch in data(2):
            reduced = mock.Mock(side_effect=Counted.real)
            with mock.patch.object(dist, "all_reduce", reduced):
                opt.step(partial(loss_of, model, part(batch, (rank,), 4)))
            found.append(sum(call.args[0].numel() <= 4 for call in reduced.call_args_list))
        assert found == expected_counts, cls.__name__


def _replicas_of_two(rank: int) -> None:
    replicas(rank, 2)
    replicas_and_the_rest(rank, 2)
    _tensor_parallel(rank)
    _numbers(rank)


@pytest.mark.slow
def test_each_copy_of_a_sharded_model_along_its_own_gradient(tmp_path: Path) -> None:
    processes.run(_quiet, tmp_path, _replicas_of_two, processes=4)


def test_refused() -> None:
    """Before anything changed: what has no meaning, and who cannot."""
    model = net()
    for value, error, words in [
        ("ranks", ValueError, "Invalid m_sharpness: 'ranks'"),
        (2, TypeError, "process group, but got int"),
        ("rank", ValueError, "under DistributedDataParallel, whose exchange can be left out, but got .*Net"),
    ]:
        with pytest.raises(error, match=words):
            sk.SAM(model.parameters(), SGD, lr=0.1, model=model, m_sharpness=value)
    for cls, words in [(sk.SALR, "S of each"), (sk.MomentumSAM, "one gradient"), (sk.NudgedSGD, "one gradient")]:
        base = () if cls is sk.NudgedSGD else (SGD,)
        with pytest.raises(TypeError, match=words):
            cls(model.parameters(), *base, lr=0.1, momentum=0.9, m_sharpness="rank")
    with sk.SAM(model.parameters(), SGD, lr=0.1).first_pass():
        pass
