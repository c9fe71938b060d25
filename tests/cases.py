"""What the tests of the ops and of the flat layer share: memory with guards, layouts of parameters, options."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sharpkern as sk
from sharpkern.memory.shapes import blocks_of
from sharpkern.ops import schema

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# The device of every test: the CPU, unless the suite was told otherwise (conftest.py).
DEVICE = torch.get_default_device()
# Whether the extension's kernels there are those of a device: they are, in the emulation, on the CPU.
DEVICE_KERNELS = DEVICE.type != "cpu" or "SHARPKERN_EMULATED" in os.environ
BACKENDS = sk.available_backends(DEVICE)

# Elements around every tensor that nothing may write to; a multiple of 64 bytes in every dtype.
GUARD = 64
# In the guards of what is written. Finite: NaN + x has the bits of NaN, and a stray write would not show.
SENTINEL = 768.0


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A test asks for more where it wants them: OpenMP's threads spin, and crawl on a machine that is in use."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def dtype_id(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


# Triton's interpreter is a thousand times slower than a kernel: what is only large, or only for threads, is not for it.
FAST_BACKENDS = [name for name in BACKENDS if name != "triton" or DEVICE.type != "cpu"]


@dataclasses.dataclass(frozen=True)
class Spec:
    """One parameter of a layout."""

    shape: tuple[int, ...]
    order: str = "contiguous"  # or channels_last, transposed
    offset: int = 0  # elements from the weights' 64-byte boundary to the weights, and half of it for the gradient
    grad: bool = True
    group: int = 0
    scaled: bool = True
    left_out: bool = False
    backed: bool = True


# Around what the CPU's kernels store at a time, and around their chunks.
LENGTHS = [1, 2, 15, 63, 64, 65, 127, 16383, 16384, 16385, 40000]

# Around whole blocks, and around the steps in which a kernel may take the rest of a row.
TAILS = [*range(1, 10), 255, 256, 257, 511, 512, 513, *range(2046, 2051), 4095, 4096, 4097]

LAYOUTS: dict[str, list[Spec]] = {
    "chunk": [Spec((16384,))],  # exactly
    "lengths": [
        Spec((n,), group=i % 3, scaled=i % 2 == 0, left_out=i % 5 == 3, backed=i % 4 != 1)
        for i, n in enumerate(LENGTHS)
    ],
    "unaligned": [
        Spec((n,), offset=1 + 2 * (i % 3), backed=i % 3 != 0)
        for i, n in enumerate([1, 2, 15, 63, 64, 65, 127, 2049, 4100, 10001])
    ],
    "tails": [
        Spec((n,), group=i % 3, scaled=i % 2 == 0, left_out=i % 5 == 3, backed=i % 4 != 1) for i, n in enumerate(TAILS)
    ],
    "many": [
        Spec((1 + 7 * i % 50,), offset=i % 3, grad=i % 7 != 3, group=i % 3, scaled=i % 2 == 0, backed=i % 5 != 2)
        for i in range(60)
    ],
    # Strided, empty, a scalar, without a gradient: the first and the last ones, too.
    "odd": [
        Spec((0,)),
        Spec((70,), grad=False),
        Spec((2, 8, 3, 5), "channels_last"),
        Spec(()),
        Spec((37, 91), "transposed", offset=1, group=1),
        Spec((2100,), grad=False, backed=False),
        Spec((3, 0, 2), backed=False),
        Spec((2, 5, 3, 7), "channels_last", left_out=True),
        Spec((1, 16, 1, 1), "channels_last", backed=False),
        Spec((2049,), left_out=True, backed=False),
        Spec((5,), offset=1),
        Spec((), group=2, backed=False),
        Spec((2100,), grad=False, group=1),
        Spec((33, 65), "transposed", group=2, scaled=False),
        Spec((2, 3, 4), grad=False, backed=False),
        Spec((0,)),
    ],
}


def big(dtype: torch.dtype) -> list[Spec]:
    """More than 8 MiB a buffer, where the CPU's kernels store around the cache: walk.h, kStreamBytes."""
    itemsize = torch.empty(0, dtype=dtype).element_size()
    n = (9 << 20) // itemsize
    parts = [n // 2 + 1, 63, n // 4 + 37, 1, n // 8 - 5]
    rest = n - sum(parts)
    return [
        Spec((parts[0],), group=0),
        Spec((parts[1],), offset=1, group=1, left_out=True),
        Spec((parts[2],), offset=3, group=2),  # unaligned weights
        Spec((parts[3],), backed=False),
        Spec((parts[4],), group=1, scaled=False, backed=False),
        Spec((rest // 2,), grad=False),
        Spec((rest - rest // 2,), offset=16 // itemsize, group=2),  # 16 bytes off: enough for SSE, not for a line
    ]


INF, NAN = math.inf, math.nan

# Rows of ``radius``: rho, eta. The second one is what maximize=True hands over.
RADIUS = [[0.5, 0.1], [-0.3, 0.0], [1.0, 0.7]]

_SGD = {"lr": 0.3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": 0.0, "maximize": 0.0}
_ADAM = {
    "lr": 0.1,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "amsgrad": 0.0,
    "maximize": 0.0,
    "decoupled_weight_decay": 0.0,
}

SGD_OPTIONS: dict[str, dict[str, float]] = {
    name: _SGD | changed
    for name, changed in {
        "plain": {},
        "weight_decay": {"weight_decay": 0.2},
        "maximize": {"maximize": 1.0},
        "maximize_weight_decay": {"maximize": 1.0, "weight_decay": 0.2},
        "momentum": {"momentum": 0.9},
        "dampening": {"momentum": 0.9, "dampening": 0.4},
        "nesterov": {"momentum": 0.9, "nesterov": 1.0},
        "everything": {"momentum": 0.8, "nesterov": 1.0, "weight_decay": 0.2, "maximize": 1.0},
        "dampened_weight_decay": {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.2},
    }.items()
}
ADAM_OPTIONS: dict[str, dict[str, float]] = {
    name: _ADAM | changed
    for name, changed in {
        "adam": {},
        "eps": {"eps": 0.5},
        "betas": {"beta1": 0.0, "beta2": 0.5},
        "weight_decay": {"weight_decay": 0.2},
        "decoupled": {"weight_decay": 0.5, "decoupled_weight_decay": 1.0},
        "amsgrad": {"amsgrad": 1.0, "beta2": 0.6},
        "maximize": {"maximize": 1.0},
        "everything": {"weight_decay": 0.2, "amsgrad": 1.0, "beta2": 0.6, "maximize": 1.0},
        "everything_decoupled": {
            "weight_decay": 0.5,
            "amsgrad": 1.0,
            "beta2": 0.6,
            "maximize": 1.0,
            "decoupled_weight_decay": 1.0,
        },
    }.items()
}

# Three groups with values of their own, for the layouts.
VALUES = {
    "sgd": [SGD_OPTIONS[name] for name in ("everything", "weight_decay", "dampened_weight_decay")],
    "adam": [ADAM_OPTIONS[name] for name in ("everything", "everything_decoupled", "betas")],
}
VALUES["nudge_sgd"] = VALUES["nudge_dots"] = [
    SGD_OPTIONS[name] | {"nudge": nudge}
    for name, nudge in (("dampened_weight_decay", 0.1), ("maximize_weight_decay", 3.0), ("momentum", 1.0))
]
STATE = {"sgd": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
STATE["nudge_sgd"] = STATE["nudge_dots"] = STATE["sgd"]
NUDGES = ("nudge_dots", "nudge_sgd")
DIRECTIONS = 3  # eigenvectors of a problem

# An op called with other ones of its optional arguments than by default: none beside the backup and the state.
VARIANTS = [
    "norm-ema",
    "norm_scaled-ema",
    "norm_max-ema",
    # p = inf.
    "ascend_p-sign",
    "ascend-keeping_g",
    "ascend-in_place",
    "ascend-in_place-keeping_g",
    # a g + b v with v of the state's dtype, with v of the parameters' own, and a g.
    "sgd-mixed",
    "sgd-mixed-own_dtype",
    "sgd-scaled",
    "adam-mixed",
    "adam-mixed-own_dtype",
    "adam-scaled",
    # x a flat buffer; out the buffer v itself.
    "combine-flat",
    "combine-in_place",
]


# With float32 masters of the weights, beside parameters of a half type.
MASTERS = [
    "norm_scaled-master",
    "ascend-master",
    "ascend-master-keeping_g",
    "ascend_scaled-master",
    "ascend_p-master",
    "ascend_p-master-sign",
    "restore-master",
    "sgd-master",
    "sgd-master-mixed",
    "sgd-master-mixed-own_dtype",
    "adam-master",
    "adam-master-mixed",
    "adam-master-mixed-own_dtype",
    "nudge_dots-master",
    "nudge_sgd-master",
]


# Those that write the squared norm of one flat buffer, and keep statistics of it.
NORM_OPS = ("norm", "norm_scaled", "norm_max")


def op_of(variant: str) -> str:
    return variant.partition("-")[0]


def table_of(op: str, options: list[dict[str, float]]) -> Tensor:
    """The argument ``values`` of a rule."""
    columns = {"sgd": schema.SGD, "adam": schema.ADAM}.get(op, schema.NUDGED)
    return torch.tensor([[group[column] for column in columns] for group in options], dtype=torch.float64)


def bits(t: Tensor) -> Tensor:
    """The tensor's bits as integers: equal for equal NaN, different for 0 and -0."""
    if not t.dtype.is_floating_point:
        return t
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.size() == b.size() and torch.equal(bits(a), bits(b))


class Memory:
    """Tensors inside bigger ones, and a check that nothing around them changed."""

    def __init__(self) -> None:
        self._guards: list[tuple[str, Tensor, Tensor, Tensor]] = []

    def place(self, name: str, values: Tensor, offset: int = 0, guard: float = SENTINEL) -> Tensor:
        """A copy of a dense tensor with its strides, ``offset`` elements after a 64-byte boundary."""
        base = torch.full((2 * GUARD + offset + values.numel(),), guard, dtype=values.dtype)
        view = base.as_strided(values.size(), values.stride(), GUARD + offset)
        assert view.numel() == 0 or (view.data_ptr() % 64 == 0) == (offset * values.element_size() % 64 == 0)
        self._guard(name, base, [view])
        view.copy_(values)
        return view

    def part(self, name: str, matrix: Tensor, take: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """A copy of a matrix, and the part of it that may be written to."""
        base = torch.full((2 * GUARD + matrix.numel(),), SENTINEL, dtype=matrix.dtype)
        view = base[GUARD : GUARD + matrix.numel()].view_as(matrix).copy_(matrix)
        written = take(view)
        self._guard(name, base, [written])
        return view, written

    def flat(self, name: str, size: int, rows: list[Tensor], slots: list[int]) -> Tensor:
        """A flat buffer with ``rows`` in its slots; padding and surroundings are guarded."""
        base = torch.full((2 * GUARD + size,), SENTINEL, dtype=rows[0].dtype)
        views = [base.as_strided(r.size(), r.stride(), GUARD + slot) for r, slot in zip(rows, slots, strict=True)]
        self._guard(name, base, views)
        for view, row in zip(views, rows, strict=True):
            view.copy_(row)
        return base[GUARD : GUARD + size]

    def _guard(self, name: str, base: Tensor, views: list[Tensor]) -> None:
        guarded = torch.ones(base.numel(), dtype=torch.bool)
        for view in views:
            guarded.as_strided(view.size(), view.stride(), view.storage_offset()).fill_(False)
        where = guarded.nonzero().flatten()
        self._guards.append((name, base, where, bits(base)[where]))

    def check(self) -> None:
        for name, base, where, expected in self._guards:
            wrong = where[bits(base)[where] != expected]
            assert wrong.numel() == 0, f"{name}: memory outside was written, at {wrong[:8].tolist()} of {base.numel()}"


class Problem:
    """Parameters, gradients and flat buffers of one layout, with everything an op may want.

    Weights, backup, kept gradient, g_v, direction and state hold different random numbers, none of them 0: an op that
    reads the wrong one gives wrong numbers. Gradients are bounded away from 0 and finite; backup and kept gradient of
    a row without a mark are NaN, but a master has every row. Buffers are there for ``op`` (or a variant of it), or for
    every op.
    """

    def __init__(self, specs: list[Spec], dtype: torch.dtype, op: str | None = None) -> None:
        self.specs = specs
        self.dtype = dtype
        self.state_dtype = schema.state_dtype(dtype)
        own_dtype = "own_dtype" in (op or "")
        self.mastered = "master" in (op or "")
        assert not self.mastered or dtype != self.state_dtype
        op = op and op_of(op)
        self.memory = Memory()
        self._random = torch.Generator("cpu").manual_seed(0)
        ends = list(itertools.accumulate(-(-math.prod(spec.shape) // 32) * 32 for spec in specs))
        self.slots = [0, *ends[:-1]]
        self.size = ends[-1]

        weights = [self._fresh(spec, dtype, 0.1, 2.0) for spec in specs]
        self.params = [
            self.memory.place(f"params[{i}]", w, spec.offset)
            for i, (w, spec) in enumerate(zip(weights, specs, strict=True))
        ]
        self.grads: list[Tensor] = []
        self.new_gradients()
        self.slots_of: dict[str, list[Tensor]] = {}
        self.buffers: dict[str, Tensor] = {}
        self._buffer("backup", self._masters() if self.mastered else self._where_backed())
        for name in STATE.get(op, ()) if op else (*STATE["sgd"], *STATE["adam"]):
            rows = [self._fresh(spec, self.state_dtype, 0.1, 1.0) for spec in specs]
            self._buffer(name, [row.abs() for row in rows] if name.endswith("sq") else rows)
        if op in (None, "ascend", "dots", "project"):
            self._buffer("gradient", self._where_backed())
        if op in (None, "project"):
            self._buffer("g_v", [self._fresh(spec, self.state_dtype, 0.1, 1.0) for spec in specs])
        if op in (None, "combine"):
            for name in ("out", "x", "v"):
                self._buffer(name, [self._fresh(spec, self.state_dtype, 0.1, 1.0) for spec in specs])
            for row, spec in zip(self.slots_of["x"], specs, strict=True):
                if not spec.backed:
                    row.fill_(NAN)
        if op in (None, "sgd", "adam"):
            v = dtype if own_dtype else self.state_dtype
            self._buffer("direction", [self._fresh(spec, v, 0.1, 1.0) for spec in specs])
        if op in (None, *NUDGES):
            count = range(DIRECTIONS)
            self._buffer("eigenvectors", [self._fresh(s, self.state_dtype, 0.1, 1.0) for _ in count for s in specs])
        # Rows that never stepped and rows that did.
        self.step = self.memory.place("step", torch.arange(len(specs), dtype=torch.float32).remainder(4))
        self.counters = self.memory.place("counters", torch.tensor([10, 20, 30]))

    def _fresh(self, spec: Spec, dtype: torch.dtype, low: float, high: float) -> Tensor:
        shape = spec.shape[::-1] if spec.order == "transposed" else spec.shape
        values = torch.empty(shape, device="cpu").uniform_(low - high, high - low, generator=self._random)
        values = (values + values.sign() * low).to(DEVICE, dtype)  # magnitude in [low, high]
        if spec.order == "transposed":
            return values.t()
        if spec.order == "channels_last":
            return values.contiguous(memory_format=torch.channels_last)
        return values

    def _masters(self) -> list[Tensor]:
        return [self._fresh(spec, self.state_dtype, 0.1, 2.0) for spec in self.specs]

    def _where_backed(self) -> list[Tensor]:
        rows = [self._fresh(spec, self.dtype, 0.1, 2.0) for spec in self.specs]
        return [row if spec.backed else row.fill_(NAN) for row, spec in zip(rows, self.specs, strict=True)]

    def _buffer(self, name: str, rows: list[Tensor]) -> None:
        """Of a row a parameter; of more a matrix."""
        count = len(rows) // len(self.slots)
        slots = [i * self.size + slot for i in range(count) for slot in self.slots]
        flat = self.memory.flat(name, count * self.size, rows, slots)
        self.buffers[name] = flat if count == 1 else flat.view(count, self.size)
        self.slots_of[name] = [
            flat.as_strided(row.size(), row.stride(), flat.storage_offset() + slot)
            for row, slot in zip(rows, slots, strict=True)
        ]

    @property
    def home(self) -> str:
        """Where the weights are, of rows without a backup."""
        return "backup" if self.mastered else "params"

    @property
    def weights(self) -> list[Tensor]:
        return self.slots_of["backup"] if self.mastered else self.params

    def new_gradients(self) -> None:
        """Other gradients, in other memory. Around them is NaN: what reads there shows it in its result."""
        self.grads = [
            self.memory.place(f"grads[{i}]", self._fresh(spec, self.dtype, 0.5, 2.0), spec.offset // 2, guard=NAN)
            if self.has_grad(spec)
            else torch.empty(0, dtype=self.dtype)
            for i, spec in enumerate(self.specs)
        ]

    @staticmethod
    def has_grad(spec: Spec) -> bool:
        return spec.grad and math.prod(spec.shape) > 0

    def table(self) -> Tensor:
        rows = [
            [
                p.data_ptr(),
                g.data_ptr() if g.numel() else 0,
                schema.LEFT_OUT if spec.left_out else int(spec.scaled),
                int(spec.backed) << 40,  # any number but 0
                slot,
                p.numel(),
                spec.group,
                0,
            ]
            for p, g, slot, spec in zip(self.params, self.grads, self.slots, self.specs, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.int64)

    def layout(self) -> Tensor:
        """gather's argument."""
        dim = max(len(spec.shape) for spec in self.specs)
        rows = [[p.dim(), *p.size(), *p.stride(), *([0] * 2 * (dim - p.dim()))] for p in self.params]
        return torch.tensor(rows, dtype=torch.int64, device="cpu")

    def arguments(self, op: str, backend: str, **given: Any) -> dict[str, Any]:
        """Arguments of an op, or of a variant of it, by the names of its schema, ``given`` first."""
        op, _, variant = op.partition("-")
        walks_lists = backend == "reference" or op == "gather"
        double = {"dtype": torch.float64}
        blocks = blocks_of([p.numel() for p in self.params])
        have: dict[str, Any] = {
            "params": self.params if walks_lists else [],
            "grads": self.grads if walks_lists else [],
            "table": self.table(),
            "blocks": blocks.to(DEVICE),
            "partials": self._scratch(len(blocks)),
            "sq": torch.tensor([[2.0, 7.0], [1.5, 2.5]], dtype=torch.float64),
            "radius": torch.tensor(RADIUS, dtype=torch.float64),
            # Of several flat buffers: the largest magnitude is 2.5, the sum of the powers 7.
            "largest": self.memory.place("largest", torch.tensor([1.5, 2.5, 0.0], **double)),
            "powers": self.memory.place("powers", torch.tensor([3.0, 0.0, 4.0], **double)),
            "q": 1.5,
            "exponent": 0.0 if "sign" in variant else 0.5,
            "eps": 1e-12,
            "max_norm": INF,
            "skip_nonfinite": False,
            "dtype": self.dtype,
            "step": self.step,
            "counters": self.counters,
            **self.buffers,
            "master": self.buffers["backup"] if self.mastered else torch.empty(0, dtype=self.state_dtype),
        }
        if op == "ascend" and "keeping_g" not in variant:
            have["gradient"] = torch.empty(0, dtype=self.dtype)
        if "in_place" in variant:
            have["backup"] = torch.empty(0, dtype=self.dtype)
        if op in VALUES:
            have["values"] = table_of(op, VALUES[op])
            if "mixed" in variant or "scaled" in variant:
                # Without a direction b is nobody's.
                coefficients = torch.tensor([0.8, 0.4 if "mixed" in variant else NAN], **double)
                have["coefficients"] = self.memory.place("coefficients", coefficients)
            else:
                have["coefficients"] = torch.empty(0, **double)
            if "mixed" not in variant:
                have["direction"] = torch.empty(0, dtype=self.state_dtype)
        if op in NORM_OPS:
            # As in an optimizer, a row of a matrix.
            keeps = variant == "ema"
            row = [5.0, 1.0, 7.0] if keeps else [NAN] * 3
            have |= dict(
                zip(("buffer", "decay", "coefficient"), (1, 0.9, 1.0) if keeps else (2, NAN, NAN), strict=True)
            )
            buffer = given.get("buffer", have["buffer"])
            matrix, _ = self.memory.part("sq", torch.tensor([[NAN] * 3, row], **double), lambda m: m[1, buffer])
            have["sq"] = matrix[1]
            if op == "norm_max":
                have["largest"], _ = self.memory.part(
                    "largest", torch.tensor([NAN, 3.0, NAN], **double), lambda m: m[buffer]
                )
            ema = torch.tensor([3.0, 2.0, -1.0, 0.5] if keeps else [], **double)
            have["ema"] = self.memory.place("ema", ema)
        if op == "mix":
            sums = torch.tensor([[2.5, 6.5], [NAN, NAN], [1.5, 2.5]], **double)
            matrix, _ = self.memory.part("sums", sums, lambda m: m[:0])
            have |= {"numerator": matrix[2], "denominator": matrix[0]}
            have |= {"constant": [1.0, -0.5], "slope": [0.5, 0.25], "root": True}
            have["coefficients"] = self.memory.place("coefficients", torch.tensor([NAN, NAN], **double))
        if op == "norm_p":
            _, have["sq"] = self.memory.part("sq", torch.full((3,), NAN, **double), lambda m: m[1])
        if op == "dots":
            _, have["sq"] = self.memory.part("sq", torch.full((3, 2), NAN, dtype=torch.float64), lambda m: m[1:, 1])
        if op in NUDGES:
            rows = 2 * len(given.get("eigenvectors", self.buffers["eigenvectors"]))
            if op == "nudge_dots":
                _, have["along"] = self.memory.part("along", torch.full((rows, 3), NAN, **double), lambda m: m[:, 1])
                _, have["sq"] = self.memory.part("sq", torch.full((2, 3), NAN, **double), lambda m: m[1, 2])
            else:
                sums = torch.linspace(-0.5, 0.7, 2 * rows, dtype=torch.float64, device="cpu").view(rows, 2)
                have["along"], _ = self.memory.part("along", sums.to(DEVICE), lambda m: m[:0])
        if op == "project":
            # g.g is 8, g.g_s is 4: half of g goes.
            products = torch.tensor([[3.0, 5.0], [4.0, 8.0], [1.0, 3.0], [NAN, NAN]], dtype=torch.float64)
            whole, have["sq"] = self.memory.part("sq", products, lambda m: m[3, 1])
            have["products"] = whole[:3]
        if op == "combine":
            have["coefficients"] = torch.tensor([0.8, -0.4], **double)
            have["checks"] = torch.empty(0, **double)
            have["sq"] = self.memory.place("sq", torch.tensor(NAN, **double))
            if not variant:
                have["x"] = torch.empty(0, dtype=self.state_dtype)
        if op == "gather":
            have["table"][:, schema.GRAD] = -7
            host = {"table": have["table"].cpu(), "status": torch.full((2,), -5, device="cpu"), "layout": self.layout()}
            have["like"] = torch.empty(0, dtype=self.dtype)
            have |= host
        have |= given
        if op == "combine" and variant == "in_place":
            have["out"] = have["v"]
        return {
            argument.name: have[argument.name]
            for argument in getattr(torch.ops.sharpkern, op).default._schema.arguments
        }

    def _scratch(self, blocks: int) -> Tensor:
        partials = torch.full((schema.partials_size(self.size, blocks, DIRECTIONS),), NAN, dtype=torch.float64)
        partials[0] = 0  # the ticket
        return self.memory.place("partials", partials)

    def rows(self) -> dict[str, list[Tensor]]:
        """Everything an op may change, as rows."""
        return {
            "params": self.params,
            "grads": self.grads,
            **self.slots_of,
            "step": list(self.step.unbind()),
            "counters": list(self.counters.unbind()),
        }

    def snapshot(self) -> dict[str, list[Tensor]]:
        return {name: [t.clone() for t in rows] for name, rows in self.rows().items()}


@functools.cache
def round_in_the_interpreter() -> None:
    """Triton's interpreter cuts off what a bfloat16 has not the digits for; every device rounds to nearest."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_fp_trunc(self: Any, source: Any, to: Any) -> Any:
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return self.cast_impl(source, to)
        rounded = torch.from_numpy(source.data.copy()).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.int16).numpy().view("uint16"), to.scalar)

    InterpreterBuilder.create_fp_trunc = create_fp_trunc


def call(op: str, backend: str, arguments: dict[str, Any]) -> None:
    if backend == "triton" and DEVICE.type == "cpu":
        round_in_the_interpreter()
    with sk.use_backend(backend):
        getattr(torch.ops.sharpkern, op_of(op)).default(**arguments)
