"""What is particular to a device: the order of threads and blocks, tables and blocks in device memory, tickets,
offsets beyond 2^31. test_cuda_emulated.py runs this file where the emulation has taken the place of the CPU kernels.
"""

from __future__ import annotations

import mmap
import resource
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from cases import DTYPES, NAN, VARIANTS, Problem, Spec, bits, call, dtype_id, op_of, same_bits, table_of
from test_ops import SMALL, SUMS, finite, moves, run_and_check
from torch import Tensor

import sharpkern as sk
from emulation import accesses, configure, launches, overlap
from sharpkern.memory.shapes import blocks_of
from sharpkern.ops import schema

one_thread = cases.one_thread

OPS = [op for op in schema.SCHEMAS if op not in ("gather", "mix")]
CALLS = [*OPS, *VARIANTS]
REDUCTIONS = [*SUMS, "project", "combine"]
# The emulation takes the place of the CPU's kernels.
CPP = "cpp"


# In any order, on devices of any size.


@pytest.fixture
def emulated() -> Any:
    yield configure
    configure()


# Rows within one CTA and rows that several share, with and without a tail. A gradient is half as far off its
# boundary as its weights: with 2, 4 and 8 only the gradient is unaligned, in float64, float32 and the half types.
MIXED = [
    Spec((n,), offset=offset, grad=i % 5 != 3, group=i % 3, scaled=i % 2 == 0, left_out=i % 6 == 1, backed=i % 4 != 1)
    for i, (n, offset) in enumerate(
        [(5, 0), (2048, 0), (30000, 4), (4096, 0), (1, 1), (2049, 8), (16384, 0), (100, 2), (8191, 1), (40001, 0)]
    )
]


# More blocks than the few CTAs of a small device take in one round: they come back, to the same rows, too.
LONG = [Spec((5,), group=1), Spec((200_000,)), Spec((90_000,), grad=False), Spec((2049,), group=2, backed=False)]


def result(op: str, problem: Problem, **given: Any) -> list[Tensor]:
    arguments = problem.arguments(op, CPP, **given)
    call(op, CPP, arguments)
    problem.memory.check()
    assert (arguments["table"][:, schema.TICKET] == 0).all()
    if "partials" in arguments:
        assert bits(arguments["partials"])[0] == 0
    rows = [t for rows in problem.snapshot().values() for t in rows]
    return [*rows, arguments["table"][:, schema.BACKUP], *written(op, arguments)]


def written(op: str, arguments: dict[str, Any]) -> list[Tensor]:
    """What an op that adds up writes beside the rows."""
    names = ("ema", "along", "sq", "largest")
    return [arguments[name] for name in names if op_of(op) in REDUCTIONS and name in arguments]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize(("specs", "multiprocessors"), [(MIXED, 5), (LONG, 1)], ids=["mixed", "long"])
@pytest.mark.parametrize("op", CALLS)
def test_same_bits_in_any_order(
    op: str, specs: list[Spec], multiprocessors: int, dtype: torch.dtype, emulated: Callable[..., None]
) -> None:
    first = None
    for seed in range(5):
        emulated(seed, multiprocessors)
        got = result(op, Problem(specs, dtype, op))
        first = first or got
        assert all(map(same_bits, got, first)), seed


@pytest.mark.parametrize("multiprocessors", [1, 2, 7, 1000])
@pytest.mark.parametrize("op", CALLS)
def test_devices_of_any_size(op: str, multiprocessors: int, emulated: Callable[..., None]) -> None:
    """From one that walks many rows and blocks with each CTA to one with a CTA for each block."""
    emulated(1, multiprocessors)
    problem = Problem(MIXED if multiprocessors > 1 else LONG, torch.float32, op)
    arguments = run_and_check(op, problem, CPP, skip_nonfinite=True)
    if op_of(op) in SUMS:  # the ticket is ready again
        run_and_check(op, problem, CPP, partials=arguments["partials"])


RUN = 16  # kRun in walk.cuh
BACKWARDS = ("ascend", "ascend_scaled", "ascend_p", "project", "sgd", "adam", "nudge_sgd")


@pytest.mark.parametrize("op", CALLS)
def test_blocks_are_dealt_in_runs(op: str, emulated: Callable[..., None]) -> None:
    """A CTA takes every so many-th run, the other ones those beside it; from the tail where a sum just came along."""
    emulated(1, 1)
    count = 150
    problem = Problem([Spec((count * schema.BLOCK,))], torch.float32, op)
    arguments = problem.arguments(op, CPP)
    found = accesses(lambda: call(op, CPP, arguments))
    flat = op in ("combine-flat", "combine-in_place")
    walked = problem.params[0] if op == "restore" else problem.buffers["x"] if flat else problem.grads[0]
    blocks = (found[:, 2] - walked.data_ptr()) // (schema.BLOCK * walked.element_size())
    ctas = int(found[:, 0].max()) + 1
    runs = ctas * -(-count // (ctas * RUN))
    assert runs > ctas > 1
    order = [range(count * run // runs, count * (run + 1) // runs) for run in range(runs)]
    if op_of(op) in BACKWARDS:
        order.reverse()
    for cta in range(ctas):
        mine = (found[:, 0] == cta) & (found[:, 1] == 0) & (blocks >= 0) & (blocks < count)
        got = blocks[mine].unique_consecutive().tolist()
        assert got == [block for run in order[cta::ctas] for block in run]


@pytest.mark.parametrize("op", REDUCTIONS)
def test_reductions_make_do_with_few_partials(op: str, emulated: Callable[..., None]) -> None:
    emulated(1, 100)
    problem = Problem(MIXED, torch.float32, op)
    sums = {"dots": 2, "norm_max": 2, "nudge_dots": 1 + 2 * cases.DIRECTIONS}.get(op, 1)
    for size in (1 + sums, 2 + sums, 1 + 2 * sums):
        memory = torch.full((size + 8,), NAN, dtype=torch.float64)
        memory[0] = 0
        run_and_check(op, problem, CPP, partials=memory[:size])
        assert memory[size:].isnan().all()
    with pytest.raises(RuntimeError, match="partials"):
        call(op, CPP, problem.arguments(op, CPP, partials=torch.zeros(sums, dtype=torch.float64)))


# The table.


@pytest.mark.parametrize("op", CALLS)
def test_tables_in_any_memory_order(op: str, emulated: Callable[..., None]) -> None:
    rows = len(MIXED)
    views: list[Callable[[Tensor], Tensor]] = [
        lambda t: t,
        lambda t: t.t().contiguous().t(),
        lambda t: torch.full((2 * rows, 3, 9), -7)[::2, 1, 1:].copy_(t),
        lambda t: torch.full((8, rows + 5), -7)[:, 2:-3].copy_(t.t()).t(),
    ]
    expected = None
    for view in views:
        emulated(3, 2)
        problem = Problem(MIXED, torch.float32, op)
        got = result(op, problem, table=view(problem.table()))
        expected = expected or got
        assert all(map(same_bits, got, expected))


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("op", ["ascend", "ascend-keeping_g", "ascend_scaled", "ascend_p"])
def test_ascend_marks_what_it_kept(op: str, skipped: bool) -> None:
    """1 for a row with a gradient, 0 for one without, whatever an earlier step left there; nothing else."""
    problem = Problem([*MIXED, Spec((0,)), Spec((0,), backed=False)], torch.float32, op)
    table = problem.table()
    before = table.clone()
    sq = torch.tensor([[NAN if skipped else 1.0]], dtype=torch.float64)
    assert finite(sq) != skipped
    call(op, CPP, problem.arguments(op, CPP, table=table, sq=sq, skip_nonfinite=True))
    marks = [int(moves(spec, op == "ascend_scaled")) for spec in MIXED]
    assert table[: len(MIXED), schema.BACKUP].tolist() == marks
    before[: len(MIXED), schema.BACKUP] = torch.tensor(marks)
    assert torch.equal(table, before)


@pytest.mark.parametrize("op", [op for op in CALLS if not op.startswith("ascend") or "in_place" in op])
def test_the_other_ops_leave_the_table_alone(op: str) -> None:
    problem = Problem(MIXED, torch.float32, op)
    arguments = problem.arguments(op, CPP)
    before = arguments["table"].clone()
    call(op, CPP, arguments)
    assert torch.equal(arguments["table"], before)


# Steps and counters.


@pytest.mark.parametrize("op", ["sgd", "adam", "sgd-mixed", "adam-mixed", "nudge_sgd"])
def test_a_row_counts_each_step_once(op: str, emulated: Callable[..., None]) -> None:
    """However many CTAs share it. Groups: with momentum; without, where sgd does not count; with it again."""
    for seed in range(6):
        emulated(seed, max(seed, 1))
        problem = Problem(MIXED if seed else LONG, torch.float32, op)
        for step in range(1, 4):
            before = problem.step.clone()
            arguments = problem.arguments(op, CPP, skip_nonfinite=True)
            if step == 2:
                arguments["sq"][0, 0] = NAN
            call(op, CPP, arguments)
            counts = [
                float(step != 2 and spec.grad and not (op_of(op) != "adam" and spec.group == 1))
                for spec in problem.specs
            ]
            assert (problem.step - before).tolist() == counts
            assert (arguments["table"][:, schema.TICKET] == 0).all()
        assert problem.counters.tolist() == [10, 20, 31]


def test_state_that_is_not_there_is_not_used() -> None:
    """The host cannot look whether a group asks for it: the rule is then the one without."""
    none = torch.empty(0)
    for op, name, option, off in [
        ("sgd", "momentum_buffer", {**cases.SGD_OPTIONS["momentum"], "weight_decay": 0.2}, {"momentum": 0.0}),
        ("adam", "max_exp_avg_sq", cases.ADAM_OPTIONS["amsgrad"], {"amsgrad": 0.0}),
    ]:
        asked, plain = (
            result(op, Problem(SMALL, torch.float32, op), values=table_of(op, [o] * 3), **{name: none})
            for o in (option, option | off)
        )
        assert all(map(same_bits, asked, plain))


def test_no_blocks() -> None:
    """The norm of nothing is zero, and a pass over nothing counts."""
    problem = Problem([Spec((0,)), Spec((0,))], torch.float32)
    assert len(blocks_of([0, 0])) == 0
    for op in OPS:
        run_and_check(op, problem, CPP)
    assert problem.counters.tolist() == [13, 23, 30]


# Alignment.


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("op", [op for op in CALLS if not op.startswith("norm")])
def test_flat_buffers_need_not_be_aligned(op: str, dtype: torch.dtype) -> None:
    """Each buffer off by one element in turn: the other ones alone do not decide."""
    specs = [Spec((n,), group=i % 3) for i, n in enumerate((5000, 4096, 33))]
    names = flat_buffers(op, Problem(specs, dtype, op).arguments(op, CPP))
    expected: list[Tensor] | None = None
    total: Tensor | None = None
    for shifted in (None, *names):
        problem = Problem(specs, dtype, op)
        given = {}
        for name in names:
            buffer = problem.buffers[name]
            moved = torch.full((buffer.numel() + 65,), NAN, dtype=buffer.dtype)
            given[name] = moved[int(name == shifted) :][: buffer.numel()].view_as(buffer).copy_(buffer)
            assert (given[name].data_ptr() % 16 == 0) == (name != shifted)
        got = result(op, problem, **given)
        if op_of(op) in REDUCTIONS:
            # Threads then add up other elements.
            sq = torch.cat([got.pop().flatten() for _ in written(op, problem.arguments(op, CPP))])
            total = sq if total is None else total
            torch.testing.assert_close(sq, total, rtol=1e-6, atol=1e-3)
        got += [
            given[name].view(-1, problem.size)[:, slot : slot + p.numel()]
            for name in names
            for slot, p in zip(problem.slots, problem.params, strict=True)
        ]
        expected = expected or got
        assert all(map(same_bits, got, expected)), shifted


def flat_buffers(op: str, arguments: dict[str, Any]) -> list[str]:
    """Those that the call uses."""
    names = ("backup", "gradient", "g_v", "direction", "eigenvectors", "out", "x", "v", *cases.STATE.get(op_of(op), ()))
    names = tuple(name for name in names if name in arguments and arguments[name].numel())
    return [name for name in names if name != "out" or arguments["out"] is not arguments["v"]]


# Launches that overlap.


@pytest.mark.parametrize("op", [*CALLS, "mix"])
def test_who_lets_the_next_kernel_start(op: str) -> None:
    """Every kernel may start early, and waits, or its launch would fail; only those that write no weights let the next
    one start."""
    problem = Problem(MIXED, torch.float32, op)
    call(op, CPP, problem.arguments(op, CPP))
    assert overlap() == (True, op == "mix" or op_of(op) in REDUCTIONS)


# What an instruction moves.

SECTOR = 32  # bytes, of which a GPU's memory moves whole ones
WARP = 32
WHOLE = [
    Spec((schema.BLOCK * n,), group=i % 3, grad=i % 5 != 3, scaled=i % 2 == 0, backed=i % 4 != 1)
    for i, n in enumerate((1, 2, 5, 3, 1, 40, 2))
]


@pytest.mark.parametrize(
    ("op", "dtype"),
    [*((op, torch.float32) for op in CALLS), *((op, torch.bfloat16) for op in (*CALLS, *cases.MASTERS))],
    ids=dtype_id,
)
def test_a_warp_moves_whole_sectors(op: str, dtype: torch.dtype) -> None:
    """Of whole, aligned blocks: what its threads load or store in one instruction fills the sectors that it touches."""
    problem = Problem(WHOLE, dtype, op)
    arguments = problem.arguments(op, CPP)
    found = accesses(lambda: call(op, CPP, arguments))
    for block in found[:, 0].unique():
        of_block = found[found[:, 0] == block]
        threads = int(of_block[:, 1].max()) + 1
        of_thread = of_block[of_block[:, 1].argsort(stable=True)].view(threads // WARP, WARP, -1, 4)
        address, size = of_thread[..., 2], of_thread[..., 3]
        sectors = (address // SECTOR).sort(1).values
        count = 1 + (sectors.diff(dim=1) != 0).sum(1)
        assert (size >= 8).all()
        assert torch.equal(count * SECTOR, size.sum(1))


# More elements than 32 bits count.

FAR = 1 << 31
TAIL = 5000


def untouched(size: int, dtype: torch.dtype) -> Tensor:
    """Zeros of which no page exists before somebody writes there."""
    itemsize = torch.empty(0, dtype=dtype).element_size()
    no_reserve = 0x4000
    memory = mmap.mmap(-1, size * itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(memory, dtype=dtype)


def tail_of(op: str, dtype: torch.dtype, slot: int, first: int) -> list[Tensor]:
    """What an op makes of the last elements of a row of ``first + TAIL`` ones whose buffers start at ``slot``."""
    random = torch.Generator().manual_seed(0)
    numel = first + TAIL
    problem = Problem(SMALL[:1], dtype, op)
    flat = flat_buffers(op, problem.arguments(op, CPP))
    memory = {name: untouched(numel, dtype) for name in ("param", "grad")}
    memory |= {name: untouched(numel + slot, problem.buffers[name].dtype) for name in flat}
    tails = {name: t[-TAIL:] for name, t in memory.items()}
    if "eigenvectors" in memory:  # of one direction
        memory["eigenvectors"] = memory["eigenvectors"][None]
    for tail in tails.values():
        tail.copy_(torch.rand(TAIL, generator=random) + 0.5)
    blocks = blocks_of([TAIL])
    blocks[:, 1] += first // schema.BLOCK
    columns = {schema.PARAM: memory["param"].data_ptr(), schema.GRAD: memory["grad"].data_ptr(), schema.SLOT: slot}
    columns |= {schema.BACKUP: int(not op.startswith("ascend")), schema.NUMEL: numel, schema.SCALE: schema.SCALED}
    table = torch.tensor([[columns.get(i, 0) for i in range(schema.COLUMNS)]])
    arguments = problem.arguments(
        op,
        CPP,
        **{name: memory[name] for name in flat},
        table=table,
        blocks=blocks,
        partials=torch.zeros(10, dtype=torch.float64),
    )
    call(op, CPP, arguments)
    return [*tails.values(), *written(op, arguments)]


@pytest.mark.parametrize("where", ["slot", "row"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("op", CALLS)
def test_offsets_beyond_31_bits(op: str, dtype: torch.dtype, where: str) -> None:
    """A slot that starts beyond 2^31 elements, and a row that goes on beyond: the last blocks of it alone."""
    near = tail_of(op, dtype, 0, 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    far = tail_of(op, dtype, FAR + 64, 0) if where == "slot" else tail_of(op, dtype, 0, FAR + schema.BLOCK)
    assert all(map(same_bits, far, near))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # KiB: nothing else was touched


# Launches.


@pytest.mark.parametrize("cls", [sk.SAM, sk.ASAM])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize(("count", "groups"), [(1, 1), (400, 24)])
def test_launches_of_a_step(count: int, groups: int, base: Any, cls: Any) -> None:
    params = [torch.nn.Parameter(torch.ones(1 + i % 5, 2)) for i in range(count)]
    for check in (True, False):
        opt = cls([{"params": params[g::groups]} for g in range(groups)], base, lr=0.01, skip_nonfinite=check)
        for p in params:
            p.grad = torch.ones_like(p)
        for _ in range(2):
            before = launches()
            opt.first_step()
            opt.second_step()
            assert launches() - before == 3 + check
            before = launches()
            opt.step()
            assert launches() - before == 1 + check
