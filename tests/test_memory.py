"""Flat buffers: slots, views, the collection of gradients, and what follows the parameters around."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from cases import DTYPES, LAYOUTS, NAN, Problem, Spec, dtype_id, same_bits
from torch import Tensor, nn

from sharpkern.memory.layout import Layout
from sharpkern.memory.shapes import is_dense, overlaps
from sharpkern.ops import schema

one_thread = cases.one_thread

pytestmark = pytest.mark.usefixtures("backend")

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


class Refused(Exception):
    """What collect() is told to raise."""


def refuse(name: str, grad: Tensor) -> Exception:
    return Refused(f"{name}: {grad.layout}")


def flat_of(params: list[Tensor], **options: Any) -> Layout:
    n = len(params)
    return Layout(params, [f"p{i}" for i in range(n)], list(range(n)), [i % 2 == 0 for i in range(n)], **options)


def parameter(t: Tensor) -> Tensor:
    return nn.Parameter(t.detach())


def numbered(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """1, 2, 3, ... in the order of indices: any mix-up of strides shows."""
    n = torch.Size(shape).numel()
    return torch.arange(1, n + 1, dtype=dtype).reshape(shape)


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def some_params() -> list[Tensor]:
    """Contiguous, channels_last, transposed, 0-dim, empty, permuted."""
    return [
        parameter(numbered(5, 7)),
        parameter(channels_last(numbered(2, 8, 3, 5))),
        parameter(numbered(6, 4).t()),
        parameter(numbered()),
        parameter(numbered(0, 3)),
        parameter(numbered(3, 4, 5).permute(1, 2, 0)),
    ]


def grads_at(flat: Layout) -> list[int]:
    return flat.table.host[:, schema.GRAD].tolist()


# is_dense, overlaps.

LAYOUT_FACTS: dict[str, tuple[Tensor, bool, bool]] = {  # tensor, dense, overlapping
    "contiguous": (torch.zeros(3, 4), True, False),
    "zero_dim": (torch.zeros(()), True, False),
    "empty": (torch.zeros(0), True, False),
    "empty_3d": (torch.zeros(3, 0, 2), True, False),
    "transposed": (torch.zeros(3, 4).t(), True, False),
    "permuted": (torch.zeros(2, 3, 4).permute(2, 0, 1), True, False),
    "channels_last": (channels_last(torch.zeros(2, 3, 4, 5)), True, False),
    "size_1_dims": (torch.zeros(12).as_strided((3, 1, 4), (4, 99, 1)), True, False),
    "one_element": (torch.zeros(1).as_strided((1, 1), (5, 0)), True, False),
    "offset": (torch.zeros(10)[3:7], True, False),
    "every_other_column": (torch.zeros(4, 6)[:, ::2], False, False),
    "every_other_element": (torch.zeros(8)[::2], False, False),
    "some_rows": (torch.zeros(4, 6)[1:3], True, False),
    "some_columns": (torch.zeros(4, 6)[:, :5], False, False),
    "expanded": (torch.zeros(1, 4).expand(3, 4), False, True),
    "expanded_scalar": (torch.zeros(()).expand(2), False, True),
    "expanded_to_1": (torch.zeros(1, 4).expand(1, 4), True, False),
    "windows": (torch.zeros(8).unfold(0, 4, 2), False, True),
    "diagonal": (torch.zeros(4, 4).diagonal(), False, False),
    "expanded_empty": (torch.zeros(1, 0).expand(3, 0), True, False),
}


@pytest.mark.parametrize(("tensor", "dense", "overlapping"), LAYOUT_FACTS.values(), ids=LAYOUT_FACTS)
def test_is_dense_and_overlaps(tensor: Tensor, dense: bool, overlapping: bool) -> None:
    assert is_dense(tensor) is dense
    assert overlaps(tensor) is overlapping


# Slots and table.


@every_dtype
@pytest.mark.parametrize("layout", ["lengths", "odd", "many"])
def test_slots_start_on_cache_lines_and_do_not_meet(layout: str, dtype: torch.dtype) -> None:
    params = [parameter(p) for p in Problem(LAYOUTS[layout], dtype).params]
    flat = flat_of(params)
    flat.buffer("momentum_buffer")
    for name in ("backup", "momentum_buffer"):
        buffer = flat.buffer(name)
        assert buffer.size() == (flat.size,)
        assert buffer.data_ptr() % 64 == 0
        end = 0
        for i, p in enumerate(params):
            assert flat.slots[i] >= end
            assert flat.slots[i] * buffer.element_size() % 64 == 0
            end = flat.slots[i] + p.numel()
        assert end <= flat.size
    assert flat.buffer("backup").dtype == dtype
    assert flat.buffer("momentum_buffer").dtype == flat.state_dtype
    assert flat.state_dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert flat.partials.numel() == schema.partials_size(flat.size, len(flat.blocks))
    assert (flat.partials == 0).all()


def test_table_describes_the_parameters() -> None:
    params = some_params()
    flat = Layout(params, "abcdef", [0, 0, 1, 2, 1, 0], [True, False, True, True, False, False])
    rows = flat.table.host.tolist()
    assert [row[schema.PARAM] for row in rows] == [p.data_ptr() for p in params]
    assert [row[schema.SLOT] for row in rows] == flat.slots
    assert [row[schema.NUMEL] for row in rows] == [p.numel() for p in params]
    assert [row[schema.GROUP] for row in rows] == [0, 0, 1, 2, 1, 0]
    assert [row[schema.SCALE] for row in rows] == [1, 0, 1, 1, 0, 0]
    assert [row[schema.GRAD] for row in rows] == [row[schema.BACKUP] for row in rows] == [0] * 6
    assert flat.table.host.size(1) == schema.COLUMNS
    assert flat.any_scaled


def test_views_have_the_parameters_strides_and_write_through() -> None:
    params = some_params()
    flat = flat_of(params)
    for i, p in enumerate(params):
        view = flat.view("exp_avg", i)
        assert (view.size(), view.stride()) == (p.size(), p.stride())
        view.copy_(p.detach() * (i + 1))
    buffer = flat.buffer("exp_avg")
    used = torch.zeros(flat.size, dtype=torch.bool)
    for i, p in enumerate(params):
        # The slot holds the elements in the order of the parameter's memory.
        memory = p.detach().as_strided((p.numel(),), (1,))
        slot = slice(flat.slots[i], flat.slots[i] + p.numel())
        assert torch.equal(buffer[slot], memory * (i + 1))
        used[slot] = True
    assert (buffer[~used] == 0).all()
    assert flat.buffer("exp_avg") is buffer


def test_state_starts_at_zero_and_the_backup_as_it_comes() -> None:
    flat = flat_of(some_params())
    assert (flat.buffer("exp_avg") == 0).all()
    assert flat.buffer("backup").isnan().all()  # torch.empty under conftest's fixture: nobody fills it


# collect.


def test_collect_takes_gradients_where_they_lie() -> None:
    params = some_params()
    flat = flat_of(params)
    for p in params[:5]:
        p.grad = torch.full_like(p, 2.0)
    before = [p.detach().clone() for p in params]
    flat.collect(refuse)
    assert grads_at(flat) == [p.grad.data_ptr() for p in params[:4]] + [0, 0]
    for p, g in zip(params[:4], flat.grads, strict=False):
        assert g is p.grad
    assert all(g.numel() == 0 for g in flat.grads[4:])
    assert all(map(same_bits, (p.detach() for p in params), before))
    for i in range(4):
        flat.table.mark(i)
    assert flat.table.host[:, schema.BACKUP].tolist() == [1] * 4 + [0] * 2
    flat.finish()
    assert not flat.table.host[:, schema.BACKUP].any()
    assert flat.grads == []


def test_collect_forgets_the_gradients_of_the_pass_before() -> None:
    params = some_params()[:2]
    flat = flat_of(params)
    for p in params:
        p.grad = torch.ones_like(p)
    flat.collect(refuse)
    params[0].grad = None
    params[1].grad = moved = torch.ones_like(params[1])
    flat.collect(refuse)
    assert grads_at(flat) == [0, moved.data_ptr()]


def gradient_memory(flat: Layout, i: int) -> Tensor:
    """What a kernel finds at row i's address, in the order in which it pairs with the weights."""
    assert grads_at(flat)[i] == flat.grads[i].data_ptr()
    assert flat.grads[i].dtype == flat.dtype
    return flat.grads[i].as_strided((flat.segments[i].numel(),), (1,))


MISMATCHED = {
    "contiguous_for_channels_last": (channels_last(numbered(2, 8, 3, 5)), lambda g: g.contiguous()),
    "channels_last_for_contiguous": (numbered(2, 8, 3, 5), channels_last),
    "transposed": (numbered(5, 7), lambda g: g.t().contiguous().t()),
    "expanded": (numbered(5, 7), lambda g: g[:1].expand(5, 7)),
    "gaps": (numbered(5, 7), lambda g: torch.stack([g, g + 1], -1)[..., 0]),
}


@pytest.mark.parametrize(("weights", "change"), MISMATCHED.values(), ids=MISMATCHED)
def test_collect_rearranges_gradients_that_lie_otherwise(weights: Tensor, change: Any) -> None:
    first, p, last = parameter(numbered(3)), parameter(weights), parameter(numbered(2))
    flat = flat_of([first, p, last])
    first.grad, last.grad = torch.ones(3), torch.ones(2)
    p.grad = grad = change(p.detach().clone() * 10)
    values, stride = grad.clone(), grad.stride()
    flat.collect(refuse)
    # The value that index [i, j, ...] has lies where the parameter keeps its element [i, j, ...].
    assert torch.equal(gradient_memory(flat, 1).as_strided(p.size(), p.stride()), values)
    assert p.grad is grad
    assert grad.stride() == stride
    assert torch.equal(grad, values)
    assert grads_at(flat)[::2] == [first.grad.data_ptr(), last.grad.data_ptr()]


def test_strides_of_size_1_dimensions_do_not_count() -> None:
    p = parameter(numbered(4, 1, 3))
    flat = flat_of([p])
    p.grad = torch.ones(100).as_strided((4, 1, 3), (3, 50, 1))
    flat.collect(refuse)
    assert grads_at(flat) == [p.grad.data_ptr()]


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no gradients of another dtype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=dtype_id)
def test_collect_casts_gradients_of_another_dtype(dtype: torch.dtype) -> None:
    p = parameter(numbered(6, 4).t())
    p.grad_dtype = dtype
    p.grad = (p.detach() / 4).to(dtype)
    flat = flat_of([p])
    flat.collect(refuse)
    assert torch.equal(gradient_memory(flat, 0).as_strided(p.size(), p.stride()), p.grad.float())


def test_collect_refuses_sparse_gradients_by_name() -> None:
    params = [parameter(numbered(5, 7)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones_like(p)
    params[1].grad = torch.ones(5, 7).to_sparse()
    before = [p.detach().clone() for p in params]
    flat = flat_of(params)
    with pytest.raises(Refused, match=r"^p1: torch\.sparse_coo$"):
        flat.collect(refuse)
    assert all(map(same_bits, (p.detach() for p in params), before))
    params[1].grad = torch.ones(5, 7)
    flat.collect(refuse)
    assert grads_at(flat) == [p.grad.data_ptr() for p in params]


# Parameters with gaps.


@torch.no_grad()
def test_parameters_with_gaps_are_served_by_copies() -> None:
    """A step of the ops on base[:, ::2]: the weights arrive, and the columns between stay."""
    base = numbered(4, 6)
    p, dense = parameter(base[:, ::2]), parameter(numbered(5))
    assert p.data_ptr() == base.data_ptr()
    flat = flat_of([p, dense])
    start = base.clone()
    base[:, ::2] += 100  # after the copy was made
    p.grad, dense.grad = numbered(4, 3), numbered(5)
    flat.collect(refuse)
    params, *walk = flat.walk
    radius = torch.tensor([[2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    torch.ops.sharpkern.ascend(
        params,
        flat.buffer("backup"),
        flat.empty,
        torch.zeros(3, dtype=torch.int64),
        *walk,
        radius,
        one,
        eps=0.0,
        skip_nonfinite=False,
        dtype=torch.float32,
    )
    flat.table.after_ascent()
    flat.written()
    assert torch.equal(base[:, ::2], start[:, ::2] + 100 + 2 * numbered(4, 3))
    assert torch.equal(base[:, 1::2], start[:, 1::2])
    assert torch.equal(dense.detach(), 3 * numbered(5))
    assert torch.equal(flat.view("backup", 0), start[:, ::2] + 100)
    assert flat.view("backup", 0).is_contiguous()

    params, _, *walk = flat.walk
    torch.ops.sharpkern.restore(params, flat.buffer("backup"), *walk, dtype=torch.float32)
    flat.written()
    start[:, ::2] += 100
    assert torch.equal(base, start)
    assert torch.equal(dense.detach(), numbered(5))


# written.


def versions(params: list[Tensor]) -> list[int]:
    return [p._version for p in params]


def test_written_bumps_the_versions_of_what_was_touched() -> None:
    params = [parameter(numbered(n)) for n in (3, 4, 5)]
    flat = flat_of(params)
    for p in params:
        p.grad = torch.ones_like(p)
    flat.collect(refuse)
    before = versions(params)
    flat.written()
    assert [new > old for new, old in zip(versions(params), before, strict=True)] == [True, True, True]

    params[1].grad = None
    flat.collect(refuse)
    before = versions(params)
    flat.written()
    assert [new > old for new, old in zip(versions(params), before, strict=True)] == [True, False, True]

    # A parameter that comes back from the backup is touched without a gradient.
    flat.table.host[:, schema.BACKUP] = flat.table.host[:, schema.GRAD] != 0
    params[0].grad = None
    params[1].grad = torch.ones(4)
    flat.collect(refuse)
    params[2].grad = None
    flat.table.host[2, schema.BACKUP] = 0
    flat.collect(refuse)
    before = versions(params)
    flat.written()
    assert [new > old for new, old in zip(versions(params), before, strict=True)] == [True, True, False]


def test_backward_through_overwritten_weights_is_an_error() -> None:
    p = parameter(numbered(3))
    flat = flat_of([p])
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    flat.collect(refuse)
    flat.written()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# lists.


def test_lists_are_handed_over_where_they_are_walked(backend: str) -> None:
    params = [parameter(numbered(3)), parameter(numbered(4))]
    flat = flat_of(params)
    params[0].grad = torch.ones(3)
    if backend != "reference":
        assert flat.walk[:2] == ([], [])
        return
    segments, grads, *_ = flat.walk
    assert [s.data_ptr() for s in segments] == [p.data_ptr() for p in params]
    assert [g.numel() for g in grads] == [0, 0]
    flat.collect(refuse)
    segments, grads, *_ = flat.walk
    assert grads[0] is params[0].grad
    assert grads[1].numel() == 0


# attached.


def test_attached_follows_parameters_that_moved() -> None:
    params = some_params()
    flat = flat_of(params)
    assert flat.attached()
    kept = [p.detach() for p in params]  # the old memory stays taken: addresses do change
    for p in params:
        p.data = p.data.clone()
    assert [p.data_ptr() == k.data_ptr() for p, k in zip(params, kept, strict=True)].count(False) == 5
    assert flat.attached()
    assert flat.table.host[:, schema.PARAM].tolist() == [p.data_ptr() for p in params]


# What happens to the data of a 4x4 float32 parameter.
CHANGES = {
    "dtype": lambda t: t.double(),
    "strides": lambda t: t.t().clone(),
    "shape": lambda t: torch.zeros(4, 5),
    "strides_in_place": lambda t: t.t(),
    "shape_in_place": lambda t: t[:2],
    "dtype_in_place": lambda t: t.view(torch.bfloat16)[:, :4],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_attached_tells_of_another_layout(change: Any) -> None:
    """Also where the address is the old one: by chance (freed memory is reused) as well as in a view."""
    params = [parameter(numbered(3)), parameter(numbered(4, 4))]
    flat = flat_of(params)
    old = params[1].detach()
    params[1].data = change(old)
    assert not flat.attached()


def test_attached_tells_of_a_parameter_that_left_the_flat_buffer() -> None:
    params = [parameter(numbered(3)), parameter(numbered(4, 4))]
    flat = flat_of(params, flatten=True)
    assert flat.attached()
    params[1].data = params[1].data.clone()
    assert not flat.attached()


# flatten.


@every_dtype
def test_flatten_moves_weights_and_gradients(dtype: torch.dtype) -> None:
    specs = [
        Spec((5, 7)),
        Spec((2, 8, 3, 5), "channels_last"),
        Spec((6, 4), "transposed"),
        Spec(()),
        Spec((0, 3)),
        Spec((9,), grad=False),
    ]
    problem = Problem(specs, dtype)
    params = [parameter(p) for p in problem.params]
    for p, g, spec in zip(params, problem.grads, specs, strict=True):
        p.grad = g.clone() if problem.has_grad(spec) else None
    params[1].grad = problem.grads[1].contiguous()  # comes to lie as its parameter does
    params[2].grad = problem.grads[2].to_sparse()
    strides = [p.stride() for p in params]
    flat = flat_of(params, flatten=True)
    assert flat.flat is not None
    taken = torch.zeros(flat.size, dtype=torch.bool)
    assert params[5].grad is None  # tools tell by that whether a step was taken
    for i, (p, old, g) in enumerate(zip(params, problem.params, problem.grads, strict=True)):
        assert same_bits(p.detach(), old)
        moved = [(p, flat.flat.params)]
        if p.grad is not None:
            assert torch.equal(p.grad, g if g.numel() else torch.zeros_like(p))
            moved.append((p.grad, flat.flat.grads))
        for t, whole in moved:
            assert t.stride() == strides[i]
            assert t.untyped_storage().data_ptr() == whole.data_ptr()
            assert t.storage_offset() == flat.slots[i]
        taken[flat.slots[i] : flat.slots[i] + p.numel()] = True
    assert not flat.flat.params.requires_grad  # no history of the move is kept
    assert not flat.flat.grads.requires_grad
    assert (flat.flat.params[~taken] == 0).all()
    assert (flat.flat.grads[~taken] == 0).all()
    flat.collect(refuse)
    assert flat.table.host[:, schema.PARAM].tolist() == [p.data_ptr() for p in params]
    assert grads_at(flat) == [0 if p.grad is None or not p.numel() else p.grad.data_ptr() for p in params]


def test_collect_moves_gradients_into_the_flat_buffer() -> None:
    """Those that a kernel can use; a slot whose gradient went away is zero."""
    params = [parameter(numbered(4, 4)), parameter(numbered(3)), parameter(numbered(2)), parameter(numbered(5, 7))]
    flat = flat_of(params, flatten=True)
    assert flat.flat is not None
    assert all(p.grad is None for p in params)
    for first in (True, False):
        params[0].grad = numbered(4, 4).t()
        params[1].grad = numbered(3) if first else None
        own = params[3].grad = torch.ones(5, 7).to_sparse()
        with pytest.raises(Refused):
            flat.collect(refuse)
        assert params[3].grad is own
        params[3].grad = None
        flat.collect(refuse)
        slots = [flat.flat.grads[slot:][: p.numel()] for slot, p in zip(flat.slots, params, strict=True)]
        assert torch.equal(slots[0].view(4, 4), numbered(4, 4).t())
        assert torch.equal(slots[1], numbered(3) * first)
        assert params[0].grad.data_ptr() == slots[0].data_ptr() == grads_at(flat)[0]
        assert params[2].grad is None
        assert grads_at(flat)[2] == 0


def test_flatten_accepts_empty_parameters() -> None:
    p = parameter(torch.zeros(3, 0, 2))
    assert flat_of([parameter(numbered(3)), p], flatten=True).attached()


def test_zero_grads_zeroes_and_points_back() -> None:
    params = [parameter(numbered(3)), parameter(numbered(4, 4)), parameter(numbered(5)).requires_grad_(False)]
    for p in params[:2]:
        p.grad = torch.zeros_like(p)
    flat = flat_of(params, flatten=True)
    views = [p.grad for p in params]
    assert views[2] is None
    (params[0].sum() + params[1].square().sum()).backward()
    assert flat.flat is not None
    assert params[1].grad is views[1]
    assert torch.equal(flat.flat.grads[flat.slots[1] :][:16].view(4, 4), 2 * params[1].detach())
    params[0].grad = torch.ones(3)
    flat.flat.zero_grads()
    assert params[0].grad is views[0]
    params[0].grad = None
    flat.flat.zero_grads()
    assert params[0].grad is None
    assert params[2].grad is None
    assert (flat.flat.grads == 0).all()


def test_unflatten_gives_everyone_memory_of_their_own() -> None:
    params = some_params()
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, i + 1)
    flat = flat_of(params, flatten=True)
    own = params[3].grad = torch.tensor(7.0)  # not a view of the flat buffer: stays
    values = [p.detach().clone() for p in params]
    strides = [p.stride() for p in params]
    flat.unflatten()
    assert flat.flat is None
    storages = [t.untyped_storage().data_ptr() for p in params if p.numel() for t in (p, p.grad)]
    assert len(set(storages)) == len(storages) == 10
    for i, p in enumerate(params):
        assert same_bits(p.detach(), values[i])
        assert p.stride() == strides[i]
        assert p.untyped_storage().nbytes() == p.numel() * 4
        assert p.grad.stride() == strides[i]
        assert (p.grad == (7 if i == 3 else i + 1)).all()
    assert params[3].grad is own
    assert flat.attached()
    assert flat.table.host[:, schema.PARAM].tolist() == [p.data_ptr() for p in params]
    flat.unflatten()  # nothing to do
    assert flat.attached()


def test_unflatten_keeps_state() -> None:
    params = [parameter(numbered(3)), parameter(numbered(4, 4))]
    flat = flat_of(params, flatten=True)
    flat.view("exp_avg", 1).fill_(NAN)
    flat.unflatten()
    assert flat.view("exp_avg", 1).isnan().all()
    assert (flat.view("exp_avg", 0) == 0).all()
