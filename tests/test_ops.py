"""Every op under every backend, against its formula in float64 (written here, from the papers
and torch.optim's documentation)."""

from __future__ import annotations

import itertools
import math
import warnings
import weakref
from typing import Any

import cases
import pytest
import torch
from cases import (
    ADAM_OPTIONS,
    BACKENDS,
    DIRECTIONS,
    DTYPES,
    FAST_BACKENDS,
    INF,
    LAYOUTS,
    MASTERS,
    NAN,
    NORM_OPS,
    NUDGES,
    RADIUS,
    SGD_OPTIONS,
    VALUES,
    VARIANTS,
    Problem,
    Spec,
    big,
    bits,
    call,
    dtype_id,
    op_of,
    same_bits,
    table_of,
)
from torch import Tensor

import sharpkern as sk
from sharpkern.ops import backend, reference, schema

one_thread = cases.one_thread

Snapshot = dict[str, list[Tensor]]

needs_cpp = pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
OPS = list(schema.SCHEMAS)
ASCENTS = ["ascend", "ascend_scaled", "ascend_p"]
MIXING = ["sgd", "adam"]  # along a g + b v
RULES = [*MIXING, "nudge_sgd"]
SUMS = [*NORM_OPS, "norm_p", "dots", "nudge_dots"]
# What goes over every element to change it.
MOVES = [*ASCENTS, "restore", *RULES, "project"]
MOVING_VARIANTS = [op for op in VARIANTS if op_of(op) in MOVES]
MOVING_MASTERS = [op for op in MASTERS if op_of(op) in MOVES]
SUMMED_MASTERS = [op for op in MASTERS if op not in MOVING_MASTERS]
# Of gradients or of a flat buffer, and on top of one of them.
COMBINES = ["combine", *(op for op in VARIANTS if op_of(op) == "combine")]
# Those that skip a step, which need not be done.
SKIPPING = [*ASCENTS, *RULES, *MOVING_VARIANTS]
COMPILED = [name for name in BACKENDS if name != "reference"]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
every_backend = pytest.mark.parametrize("name", BACKENDS)
every_fast_backend = pytest.mark.parametrize("name", FAST_BACKENDS)
every_compiled_backend = pytest.mark.parametrize("name", COMPILED)


# The oracle.


class Want:
    """What each row should hold after a call. Rows that are not named keep their bits."""

    def __init__(self, problem: Problem, before: Snapshot) -> None:
        self.problem = problem
        self.before = before
        self.exact: dict[tuple[str, int], Tensor] = {}
        self.close: dict[tuple[str, int], Tensor] = {}
        self.free: set[str] = set()  # names of what nobody will use

    def check(self) -> None:
        """Tolerances. Numbers are of magnitude 8 at most, after fewer than ten roundings of the arithmetic type:
        2 eps of 8 apiece is the absolute part. Half types round the result once more; that lands on a neighbour
        of the oracle's when this error crosses a tie: eps, which is 1 to 2 ulp, of the result."""
        self.problem.memory.check()
        for name, rows in self.problem.rows().items():
            for i, got in enumerate(rows if name not in self.free else ()):
                where = f"{name}[{i}] {self.problem.specs[min(i, len(self.problem.specs) - 1)]}"
                if (name, i) in self.close:
                    expected = self.close[name, i]
                    half = got.dtype in (torch.bfloat16, torch.float16)
                    atol = 16 * torch.finfo(torch.float32 if half else got.dtype).eps
                    rtol = torch.finfo(got.dtype).eps if half else 0.0
                    if not torch.allclose(got.double(), expected, rtol=rtol, atol=atol, equal_nan=True):
                        torch.testing.assert_close(
                            got.double(),
                            expected,
                            rtol=rtol,
                            atol=atol,
                            equal_nan=True,
                            msg=lambda m, w=where: f"{w}: {m}",
                        )
                else:
                    expected = self.exact.get((name, i), self.before[name][i])
                    assert same_bits(got, expected), f"{where}: expected {expected}, got {got}"


def dtype_of(op: str) -> torch.dtype:
    """Of the parameters, where one dtype will do."""
    return torch.bfloat16 if op in MASTERS else torch.float32


def wide(t: Tensor) -> Tensor:
    return t.double()


def moves(spec: Spec, scaled: bool) -> bool:
    """Whether a row is a part of the direction."""
    return Problem.has_grad(spec) and not (scaled and spec.left_out)


def squared_norm(problem: Problem, scaled: bool) -> float:
    total = 0.0
    for spec, w, g in zip(problem.specs, problem.weights, problem.grads, strict=True):
        if moves(spec, scaled):
            t = wide(w).abs() + RADIUS[spec.group][1] if scaled and spec.scaled else 1.0
            total += (t * wide(g)).square().sum().item()
    return total


def finite(sq: Tensor) -> bool:
    return bool(sq.sum(-1).isfinite().all())


def first_and_second(problem: Problem, i: int) -> tuple[Tensor, Tensor]:
    """g and g_s of row i, zeros where there is none."""
    spec, none = problem.specs[i], torch.zeros_like(wide(problem.params[i]))
    g = wide(problem.slots_of["gradient"][i]) if spec.backed else none
    return g, wide(problem.grads[i]) if problem.has_grad(spec) else none


def along(arguments: dict[str, Any]) -> float | None:
    """<g, g_s> / ||g||^2, if there is anything to divide by, and g_v's dtype has the quotient."""
    products = arguments["products"].sum(-1)
    quotient = products[2] / products[0]
    usable = products.isfinite().all() and products[0] > 0 and quotient.to(arguments["g_v"].dtype).isfinite()
    return quotient.item() if usable else None


def sums(op: str, problem: Problem, arguments: dict[str, Any]) -> list[tuple[float, float]]:
    """What an op puts into sq, and of which magnitude were the terms: they may cancel out."""
    if op in NORM_OPS:
        squared = squared_norm(problem, scaled=op == "norm_scaled")
        return [(squared, squared)]
    if op == "norm_p":
        m, q = arguments["largest"].max().item(), arguments["q"]
        gradients = [wide(g) for g, spec in zip(problem.grads, problem.specs, strict=True) if problem.has_grad(spec)]
        powers = sum(((g.abs() / m) ** q).sum().item() for g in gradients)
        return [(powers, powers)]
    if op == "nudge_dots":
        squared = squared_norm(problem, scaled=False)
        return [(squared, squared), *products_along(problem, arguments)]
    rows = [first_and_second(problem, i) for i in range(len(problem.specs))]
    if op == "dots":
        products = [(g * g_s).sum().item() for g, g_s in rows], [(g * g_s).abs().sum().item() for g, g_s in rows]
        squared = squared_norm(problem, scaled=False)
        return [(squared, squared), (sum(products[0]), sum(products[1]))]
    a = along(arguments)
    assert op == "project"
    assert a is not None
    total = sum((g_s - a * g).square().sum().item() for g, g_s in rows)
    return [(total, sum((g_s.abs() + (a * g).abs()).square().sum().item() for g, g_s in rows))]


def products_along(problem: Problem, arguments: dict[str, Any]) -> list[tuple[float, float]]:
    """Of SGD's next momentum buffer, less the gradient's part, and of that part, with every eigenvector; and sums of
    the terms' magnitudes."""
    parts: list[tuple[int, Tensor, Tensor]] = []
    groups = [dict(zip(schema.NUDGED, group, strict=True)) for group in arguments["values"].tolist()]
    for i, spec in enumerate(problem.specs):
        if problem.has_grad(spec):
            v, buffer = (
                groups[min(spec.group, len(groups) - 1)],
                {"momentum_buffer": wide(problem.slots_of["momentum_buffer"][i])},
            )
            w, g, t = wide(problem.weights[i]), wide(problem.grads[i]), int(problem.step[i]) + 1
            without, following = (sgd_buffer(v, w, x, dict(buffer), t) for x in (torch.zeros_like(g), g))
            parts.append((i, without, following - without))
    found = []
    for k in range(len(arguments["along"]) // 2):
        e = problem.slots_of["eigenvectors"][k * len(problem.specs) :]
        for j in (1, 2):
            terms = [part[j] * wide(e[part[0]]) for part in parts]
            found.append((sum(x.sum().item() for x in terms), sum(x.abs().sum().item() for x in terms)))
    return found


def sgd_buffer(v: dict[str, float], w: Tensor, g: Tensor, state: dict[str, Tensor], t: int) -> Tensor:
    """torch.optim.SGD's momentum buffer after a step; without momentum the gradient with its weight decay."""
    d = (-g if v["maximize"] else g) + v["weight_decay"] * w
    if v["momentum"] and t > 1:
        d = v["momentum"] * state["momentum_buffer"] + (1 - v["dampening"]) * d
    if v["momentum"]:
        state["momentum_buffer"] = d
    return d


def ema_formula(mean: float, var: float, n: float, decay: float, coefficient: float) -> tuple[float, float, float]:
    """AE-SAM: exponential moving averages of the squared norm's mean and variance, and what it is compared with."""
    mean = decay * mean + (1 - decay) * n
    var = decay * var + (1 - decay) * ((n - mean) * (n - mean))
    spread = math.sqrt(var) if var >= 0 else NAN
    if spread == 0:
        return mean, var, mean + (coefficient if math.isinf(coefficient) else 0)
    return mean, var, mean + coefficient * spread


def check_ema(arguments: dict[str, Any], before: Tensor) -> None:
    """From sq as it is now: how far off that is has been checked."""
    n = 0.0
    for x in arguments["sq"].tolist():
        n += x
    mean, var, threshold = ema_formula(*before[:2].tolist(), n, arguments["decay"], arguments["coefficient"])
    got = arguments["ema"]
    if not math.isfinite(var):
        assert same_bits(got[:3], before[:3])
        assert got[3] == 0
        return
    assert got[0].item() == pytest.approx(mean, rel=1e-14)
    # n - mean may be what is left of two large numbers.
    assert got[1].item() == pytest.approx(var, rel=1e-9, abs=(1e-14 * n) ** 2)
    assert got[2].item() == pytest.approx(threshold, rel=1e-9, abs=1e-13 * n)
    assert got[3] == float(n >= got[2])


def expect_ascend(want: Want, arguments: dict[str, Any], scaled: bool) -> None:
    """w + rho T_w^2 g / (||T_w g|| + eps), and w in the backup."""
    norm = math.sqrt(arguments["sq"].sum(-1)[-1])
    goes = finite(arguments["sq"]) or not arguments["skip_nonfinite"]
    keeps = not scaled and arguments["gradient"].numel() > 0
    if keeps and not goes:
        want.free.add("gradient")
    for i, spec in enumerate(want.problem.specs):
        if moves(spec, scaled):
            w = want.before[want.problem.home][i]
            if arguments["backup"].numel():
                want.exact["backup", i] = w
            if keeps and goes:
                want.exact["gradient", i] = want.before["grads"][i]
            if goes:
                rho, eta = arguments["radius"][spec.group].tolist()
                t = wide(w).abs() + eta if scaled and spec.scaled else 1.0
                g = wide(want.before["grads"][i])
                want.close["params", i] = wide(w) + rho / (norm + arguments["eps"]) * t**2 * g
    for k in (0, 1):
        want.exact["counters", k] = want.before["counters"][k] + 1


def expect_ascend_p(want: Want, arguments: dict[str, Any]) -> None:
    """w + rho sign(g) (|g| / (||g||_q + eps))^(q - 1), and w in the backup."""
    y, m = arguments["exponent"], arguments["largest"].max().item()
    norm = m * arguments["powers"].sum().item() ** (1 / (y + 1)) + arguments["eps"]
    for i, spec in enumerate(want.problem.specs):
        if want.problem.has_grad(spec):
            w = want.exact["backup", i] = want.before[want.problem.home][i]
            if finite(arguments["sq"]) or not arguments["skip_nonfinite"]:
                g = wide(want.before["grads"][i])
                e = arguments["radius"][spec.group, 0] * g.sign() * ((g.abs() / norm) ** y if y else 1)
                want.close["params", i] = wide(w) + e
    for k in (0, 1):
        want.exact["counters", k] = want.before["counters"][k] + 1


def expect_restore(want: Want) -> None:
    for i, spec in enumerate(want.problem.specs):
        if spec.backed:
            want.exact["params", i] = want.before["backup"][i].to(want.problem.dtype)


def sgd_formula(v: dict[str, float], w: Tensor, g: Tensor, state: dict[str, Tensor], t: int) -> Tensor:
    """torch.optim.SGD. ``state`` is replaced; ``t`` counts from 1."""
    d = -g if v["maximize"] else g
    d = d + v["weight_decay"] * w
    if v["momentum"]:
        b = d if t == 1 else v["momentum"] * state["momentum_buffer"] + (1 - v["dampening"]) * d
        state["momentum_buffer"] = b
        d = d + v["momentum"] * b if v["nesterov"] else b
    return w - v["lr"] * d


def adam_formula(v: dict[str, float], w: Tensor, g: Tensor, state: dict[str, Tensor], t: int) -> Tensor:
    """torch.optim.Adam and AdamW."""
    d = -g if v["maximize"] else g
    if v["decoupled_weight_decay"]:
        w = w - v["lr"] * v["weight_decay"] * w
    else:
        d = d + v["weight_decay"] * w
    m = state["exp_avg"] = v["beta1"] * state["exp_avg"] + (1 - v["beta1"]) * d
    s = state["exp_avg_sq"] = v["beta2"] * state["exp_avg_sq"] + (1 - v["beta2"]) * d * d
    if v["amsgrad"]:
        s = state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], s)
    m_hat, s_hat = m / (1 - v["beta1"] ** t), s / (1 - v["beta2"] ** t)
    return w - v["lr"] * m_hat / (s_hat.sqrt() + v["eps"])


FORMULAS = {"sgd": sgd_formula, "adam": adam_formula}


def expect_rule(want: Want, op: str, arguments: dict[str, Any], options: list[dict[str, float]]) -> None:
    nudged, mastered = op == "nudge_sgd", want.problem.mastered
    backed = mastered or not nudged
    if backed:
        expect_restore(want)
    squared = arguments["sq"].sum(-1)[-1].item()
    clip = min(1.0, arguments["max_norm"] / (math.sqrt(squared) + 1e-6)) if arguments["max_norm"] < INF else 1.0
    if arguments["skip_nonfinite"] and not finite(arguments["sq"]):
        want.exact["counters", 2] = want.before["counters"][2] + 1
        return
    a, b = (1.0, 0.0) if nudged else arguments["coefficients"].tolist() or (1.0, 0.0)
    for i, spec in enumerate(want.problem.specs):
        if not want.problem.has_grad(spec):
            continue
        v = options[spec.group]
        g = a * wide(want.before["grads"][i])
        if not nudged and arguments["direction"].numel():
            g = g + b * wide(want.before["direction"][i])
        w = wide(want.before["backup" if mastered or (backed and spec.backed) else "params"][i])
        state = {name: wide(want.before[name][i]) for name in cases.STATE[op]}
        old = dict(state)
        t = int(want.before["step"][i]) + 1
        want.exact.pop(("params", i), None)
        if nudged:
            kept, pulled = arguments["along"].sum(-1).view(-1, 2).unbind(-1)
            vectors = want.before["eigenvectors"][i :: len(want.problem.specs)]
            terms = [x * wide(e) for x, e in zip(kept + clip * pulled, vectors, strict=False)]
            new = w - v["lr"] * (sgd_buffer(v, w, clip * g, state, t) + (v["nudge"] - 1) * sum(terms))
        else:
            new = FORMULAS[op](v, w, clip * g, state, t)
        want.close["params", i] = new
        if mastered:
            want.close["backup", i] = new
        for name, value in state.items():
            if value is not old[name]:
                want.close[name, i] = value
        if op == "adam" or v["momentum"]:
            want.exact["step", i] = want.before["step"][i] + 1


def expect_project(want: Want, arguments: dict[str, Any]) -> None:
    """g_s - (<g, g_s> / ||g||^2) g, where a gradient that is missing is zero."""
    a = along(arguments)
    for i, spec in enumerate(want.problem.specs if a is not None else ()):
        if spec.backed or want.problem.has_grad(spec):
            g, g_s = first_and_second(want.problem, i)
            want.close["g_v", i] = g_s - a * g
        else:
            want.exact["g_v", i] = torch.zeros_like(want.before["g_v"][i])


def expect_combine(want: Want, arguments: dict[str, Any]) -> tuple[float, float] | None:
    """a x + b v of the rows that x has. Returns its squared norm, with that of the other rows of a v which out takes
    the place of, and of which magnitude were its terms; None where it changes nothing."""
    if arguments["checks"].numel() and not finite(arguments["checks"]):
        return None
    a, b = arguments["coefficients"].tolist()
    flat, in_place = arguments["x"].numel() > 0, arguments["out"] is arguments["v"]
    total = magnitude = 0.0
    for i, spec in enumerate(want.problem.specs):
        v = wide(want.before["v"][i])
        if spec.backed if flat else want.problem.has_grad(spec):
            x = wide(want.before["x" if flat else "grads"][i])
            want.close["v" if in_place else "out", i] = a * x + b * v
            total += (a * x + b * v).square().sum().item()
            magnitude += ((a * x).abs() + (b * v).abs()).square().sum().item()
        elif in_place:
            total, magnitude = (t + v.square().sum().item() for t in (total, magnitude))
    return total, magnitude


def check_table(op: str, problem: Problem, arguments: dict[str, Any], before: Tensor) -> None:
    """Only an ascend with a backup marks rows: 1 where it kept weights. Where it did not, a device's kernels put 0."""
    if op in ASCENTS and arguments["backup"].numel():
        before = before.clone()
        for i, spec in enumerate(problem.specs):
            if moves(spec, op == "ascend_scaled"):
                before[i, schema.BACKUP] = 1
            elif arguments["table"][i, schema.BACKUP] == 0:
                before[i, schema.BACKUP] = 0
    assert torch.equal(arguments["table"], before)


def run_and_check(
    op: str, problem: Problem, name: str, options: list[dict[str, float]] | None = None, **given: Any
) -> dict[str, Any]:
    """Call an op, or a variant of it, and compare everything that it could have changed. Returns its arguments."""
    if options is not None:
        given["values"] = table_of(op_of(op), options)
    arguments = problem.arguments(op, name, **given)
    op = op_of(op)
    want = Want(problem, problem.snapshot())
    before = {name: arguments[name].clone() for name in ("table", "sq", "ema", "along") if name in arguments}
    if op == "ascend_p":
        expect_ascend_p(want, arguments)
    elif op in ASCENTS:
        expect_ascend(want, arguments, scaled=op == "ascend_scaled")
    elif op == "restore":
        expect_restore(want)
    elif op in RULES:
        expect_rule(want, op, arguments, options or VALUES[op])
    elif op == "project":
        expect_project(want, arguments)
    combined = expect_combine(want, arguments) if op == "combine" else None
    call(op, name, arguments)
    want.check()
    for name_, i in want.close:
        if name_ == "backup":  # a master that stepped: the parameter is what the half type has of it
            assert same_bits(problem.params[i], problem.slots_of["backup"][i].to(problem.dtype))
    check_table(op, problem, arguments, before["table"])
    if "partials" in arguments:
        assert bits(arguments["partials"])[0] == 0  # the ticket is ready again
    if combined:
        assert arguments["sq"].item() == pytest.approx(
            combined[0], rel=0, abs=norm_tolerance(problem.dtype) * combined[1]
        )
    elif op in SUMS or (op == "project" and along(arguments) is not None):
        got = arguments["sq"][arguments["buffer"]] if "buffer" in arguments else arguments["sq"]
        if op == "nudge_dots":
            got = torch.cat([got.reshape(1), arguments["along"]])
        for value, (expected, magnitude) in zip(got.reshape(-1).tolist(), sums(op, problem, arguments), strict=True):
            assert value == pytest.approx(expected, rel=0, abs=norm_tolerance(problem.dtype) * magnitude, nan_ok=True)
    elif "sq" in arguments:
        assert all(same_bits(arguments[name], before[name]) for name in ("sq", "along") if name in arguments)
    if op == "norm_max":
        magnitudes = [g.abs().max().item() for g in problem.grads if g.numel()]
        assert arguments["largest"][arguments["buffer"]].item() == max(magnitudes, default=0.0)
    if "ema" in arguments and arguments["ema"].numel():
        check_ema(arguments, before["ema"])
    return arguments


def run_norm(op: str, problem: Problem, name: str, **given: Any) -> Tensor:
    """What an op makes of the gradients, whether it is right or not."""
    arguments = problem.arguments(op, name, **given)
    before = problem.snapshot()
    call(op, name, arguments)
    Want(problem, before).check()
    return arguments["sq"][arguments["buffer"]] if "buffer" in arguments else arguments["sq"]


def norm_tolerance(dtype: torch.dtype) -> float:
    """A float32 sum adds a few hundred squares before it is widened, and the errors of 64 such sums a chunk are
    independent: 1e-6 is 17 roundings in the same direction. Every square counts for more in these layouts.
    In float64 the oracle adds up as many roundings as the op."""
    return 1e-13 if dtype == torch.float64 else 1e-6


def layouts_of(ops: list[str], variants: list[str]) -> list[Any]:
    """(op, layout, dtype, backend). A variant shares the walk of its op. So do dtypes, in the interpreter."""
    chosen = []
    for op, layout, dtype, name in itertools.product([*ops, *variants], LAYOUTS, DTYPES, BACKENDS):
        if ("own_dtype" in op or "master" in op) and dtype == schema.state_dtype(dtype):
            continue
        if op in variants and layout not in ("unaligned", "odd"):
            continue
        if name not in FAST_BACKENDS and "master" in op:
            if dtype == torch.float16 and (layout == "unaligned" or op != "sgd-master"):
                continue
        elif name not in FAST_BACKENDS:
            if layout == "odd" and dtype == torch.float16 and op not in ("norm", "ascend", "sgd"):
                continue
            if layout != "odd" and (dtype != torch.float32 or op in variants or layout not in ("unaligned", "tails")):
                continue
        chosen.append(pytest.param(op, layout, dtype, name, id=f"{op}-{layout}-{dtype_id(dtype)}-{name}"))
    return chosen


# Values.


@pytest.mark.parametrize(
    ("op", "layout", "dtype", "name"),
    layouts_of([*MOVES, "combine"], [*MOVING_VARIANTS, *COMBINES[1:], *MOVING_MASTERS]),
)
def test_moves(op: str, layout: str, dtype: torch.dtype, name: str) -> None:
    # Clipped by half: the norm of the last pass is 2.
    given = {"max_norm": 1.0} if op_of(op) in RULES else {}
    run_and_check(op, Problem(LAYOUTS[layout], dtype, op), name, **given)


@pytest.mark.parametrize(
    ("op", "layout", "dtype", "name"), layouts_of(SUMS, [*(f"{op}-ema" for op in NORM_OPS), *SUMMED_MASTERS])
)
def test_norms(op: str, layout: str, dtype: torch.dtype, name: str) -> None:
    run_and_check(op, Problem(LAYOUTS[layout], dtype, op), name)


@needs_cpp
@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        *((op, torch.float32) for op in [*MOVES, "sgd-mixed", *MOVING_VARIANTS[:3], *COMBINES]),
        *((op, torch.bfloat16) for op in ("ascend", "restore", "sgd", "project", *MOVING_MASTERS)),
    ],
    ids=dtype_id,
)
def test_moves_in_big_buffers(op: str, dtype: torch.dtype) -> None:
    given = {"max_norm": 1.0} if op_of(op) in RULES else {}
    run_and_check(op, Problem(big(dtype), dtype, op), "cpp", **given)


@every_fast_backend
@pytest.mark.parametrize("buffer", ["backup", "gradient"])
def test_big_flat_buffers_need_not_be_aligned(buffer: str, name: str) -> None:
    """Where the CPU's kernels store around the cache, which takes aligned memory."""
    n = 3_000_000
    problem = Problem([Spec((n,))], torch.float32, "ascend-keeping_g")
    arguments = problem.arguments("ascend-keeping_g", name)
    expected = {"backup": problem.params[0], "gradient": problem.grads[0]}[buffer].clone()
    arguments[buffer] = torch.full((n + 1,), NAN)[1:]
    call("ascend-keeping_g", name, arguments)
    assert same_bits(arguments[buffer], expected)


@every_fast_backend
@pytest.mark.parametrize("op", SUMS)
def test_norms_of_big_buffers(op: str, name: str) -> None:
    run_and_check(op, Problem(big(torch.float32), torch.float32, op), name)


@every_backend
@pytest.mark.parametrize("op", [*SUMS, "project", "combine"])
def test_norm_of_nothing_is_zero(op: str, name: str) -> None:
    for specs in ([Spec((5,), grad=False, backed=False), Spec((0,))], [Spec((0,))]):
        arguments = run_and_check(op, Problem(specs, torch.float32), name)
        got = arguments["sq"][arguments["buffer"]] if "buffer" in arguments else arguments["sq"]
        assert (got == 0).all()


# Small, with a tail, two pieces of a block, an unaligned one, one without a backup and one without a gradient.
SMALL = [
    Spec((65,)),
    Spec((3, 5), "transposed", offset=1, backed=False),
    Spec((130,)),
    Spec((7,), grad=False),
    Spec((2, 3, 2, 2), "channels_last", grad=False, backed=False),
]


@every_backend
@pytest.mark.parametrize(
    ("op", "option", "dtype"),
    [
        *(("sgd", option, torch.float32) for option in SGD_OPTIONS),
        *(("adam", option, torch.float32) for option in ADAM_OPTIONS),
        *(("nudge_sgd", option, torch.float32) for option in ("plain", "momentum", "dampened_weight_decay")),
        *((op, "everything", dtype) for op in RULES for dtype in (torch.float64, torch.bfloat16)),
        *((op, "everything", torch.float32) for op in VARIANTS if op_of(op) in RULES and "own_dtype" not in op),
        *((op, "everything", torch.bfloat16) for op in VARIANTS if op_of(op) in RULES and "own_dtype" in op),
        *((op, "everything", torch.bfloat16) for op in MASTERS if op_of(op) in RULES),
    ],
    ids=dtype_id,
)
def test_options(op: str, option: str, dtype: torch.dtype, name: str) -> None:
    """Several steps from the first one on, each from the state that the one before left; unclipped, clipped, almost."""
    options = [{"adam": ADAM_OPTIONS}.get(op_of(op), SGD_OPTIONS)[option] | {"nudge": 0.2}]
    problem = Problem(SMALL, dtype, op)
    problem.step.zero_()
    # What the buffers hold before a first step counts for Adam (zeros, here) and not for SGD.
    for buffer in cases.STATE["adam"] if op_of(op) == "adam" else ():
        for row in problem.slots_of[buffer]:
            row.zero_()
    for max_norm in (INF, 0.5, 2.1):
        run_and_check(op, problem, name, options, max_norm=max_norm)
        problem.new_gradients()


@every_backend
def test_buffers_that_no_group_uses_may_be_empty(name: str) -> None:
    none = torch.empty(0)
    problem = Problem([Spec((65,), backed=False), Spec((3,), backed=False)], torch.float32)
    run_and_check("sgd", problem, name, [SGD_OPTIONS["weight_decay"]], backup=none, momentum_buffer=none)
    run_and_check("adam", problem, name, [ADAM_OPTIONS["adam"]], backup=none, max_exp_avg_sq=none)


@every_backend
@pytest.mark.parametrize("op", SKIPPING)
def test_empty_counters_do_not_count(op: str, name: str) -> None:
    problem = Problem(SMALL, torch.float32)
    other = problem.counters[:0]
    arguments = problem.arguments(op, name, counters=other, skip_nonfinite=True)
    arguments["sq"][0, 0] = INF
    call(op, name, arguments)
    problem.memory.check()
    assert problem.counters.tolist() == [10, 20, 30]


@every_backend
@pytest.mark.parametrize("op", ASCENTS[:2])
def test_eps_bounds_a_vanishing_norm(op: str, name: str) -> None:
    sq = torch.zeros(1, 1, dtype=torch.float64)
    run_and_check(op, Problem(SMALL, torch.float32), name, sq=sq, eps=0.5)


# a g + b v: what a rule steps along.


@every_backend
@pytest.mark.parametrize("op", ["sgd-mixed", "adam-mixed", "sgd-scaled", "adam-scaled"])
def test_coefficients(op: str, name: str) -> None:
    for a, b, max_norm in ((1.0, 0.4, 1.0), (1.0, 0.0, INF), (0.0, 1.0, INF), (-0.5, -2.0, 1.0)):
        coefficients = torch.tensor([a, b], dtype=torch.float64)
        run_and_check(op, Problem(SMALL, torch.float32, op), name, coefficients=coefficients, max_norm=max_norm)


@every_backend
@pytest.mark.parametrize("op", MIXING)
def test_a_direction_needs_its_coefficients(op: str, name: str) -> None:
    problem = Problem(SMALL, torch.float32, op)
    arguments = problem.arguments(f"{op}-mixed", name, coefficients=torch.empty(0, dtype=torch.float64))
    want = Want(problem, problem.snapshot())
    with pytest.raises(RuntimeError, match="coefficients"):
        call(op, name, arguments)
    want.check()


def mix_formula(x: float, y: float, constant: float, slope: float, root: bool) -> float:
    norm = math.sqrt(y)
    if not norm > 1e-12:
        return constant
    return constant + slope * (math.sqrt(x) / norm if root else x / y) if slope else constant


LIMIT = 1e-24  # of a squared norm that is something to divide by
# The parts of x and of y in the flat buffers: exact sums, in any order.
MIXES: dict[str, tuple[list[float], list[float]]] = {
    "one": ([2.0], [7.0]),
    "many": ([1.0, 2.5, 0.0, 0.25, 4.0], [0.5, 0.0, 0.25]),
    "no x": ([0.0], [3.0]),
    "no y": ([2.0, 3.0], [0.0, 0.0]),
    "y below": ([2.0], [LIMIT * (1 - 1e-9)]),
    "y above": ([2.0], [LIMIT * (1 + 1e-9)]),
    "tiny y": ([2.0], [1e-300]),
    "large": ([1e300], [1e-20]),
    "infinite x": ([1.0, INF], [4.0]),
    "infinite y": ([2.0], [INF, 1.0]),
    "both infinite": ([INF], [INF]),
    "x overflows": ([1.5e308, 1.5e308], [4.0]),
    "nan x": ([NAN], [4.0]),
    "nan y": ([2.0], [NAN]),
}


@every_backend
@pytest.mark.parametrize(("x", "y"), MIXES.values(), ids=MIXES)
def test_mix(x: list[float], y: list[float], name: str) -> None:
    """Rows of a matrix, as in an optimizer. A slope of 0 takes nothing, of NaN neither."""
    problem = Problem([Spec((1,))], torch.float32)
    wide = max(len(x), len(y))
    matrix = torch.full((2, wide), NAN, dtype=torch.float64)
    matrix[0, : len(x)], matrix[1, : len(y)] = (torch.tensor(row, dtype=torch.float64) for row in (x, y))
    for constant, slope in (([1.0, 0.0], [0.0, 0.3]), ([1.0, -0.4], [0.4, 0.0]), ([0.5, 2.0], [-1.5, 1e-3])):
        for root in (True, False):
            given = {"constant": constant, "slope": slope, "root": root}
            given |= {"numerator": matrix[0, : len(x)], "denominator": matrix[1, : len(y)]}
            arguments = problem.arguments("mix", name, **given)
            before = matrix.clone()
            call("mix", name, arguments)
            problem.memory.check()
            assert same_bits(matrix, before)
            expected = [mix_formula(sum(x), sum(y), *line, root) for line in zip(constant, slope, strict=True)]
            assert arguments["coefficients"].tolist() == pytest.approx(expected, rel=1e-14, abs=0, nan_ok=True)
            # LookSAM: alpha ||g|| / ||g_v|| to the bit. torch's square roots are not that precise.
            if root and constant == [1.0, 0.0] and name != "reference":
                assert same_bits(arguments["coefficients"], torch.tensor(expected, dtype=torch.float64))


@every_backend
@pytest.mark.parametrize("x", [-3.0, 3.0])
def test_mix_of_a_product(x: float, name: str) -> None:
    """Which may be negative: GSAM's (1, -alpha) + (alpha, 0) <g, g_s> / ||g_s||^2."""
    given = {"numerator": torch.tensor([x, 1.0]), "denominator": torch.tensor([2.0, 2.0])}
    given = {key: value.double() for key, value in given.items()}
    arguments = Problem([Spec((1,))], torch.float32).arguments(
        "mix", name, **given, constant=[1.0, -0.25], slope=[0.25, 0.0], root=False
    )
    call("mix", name, arguments)
    assert arguments["coefficients"].tolist() == [1.0 + 0.25 * (x + 1) / 4, -0.25]


# AE-SAM's statistics: mean, var, threshold, fired; what the other buffers' squared norms are; decay; coefficient.
FRESH, LATER = (0.0, 1e-10, 0.0, 0.0), (300.0, 500.0, -1.0, 1.0)
EMA_CASES: dict[str, tuple[tuple[float, ...], list[float], float, float]] = {
    "fresh": (FRESH, [], 0.9, 1.0),
    "fresh_small": (FRESH, [], 0.9, 0.1),
    "later": (LATER, [2.0, 5.0], 0.9, 1.0),
    "below": ((1e4, 500.0, -1.0, 1.0), [2.0, 5.0], 0.9, 1.0),
    "negative": (LATER, [2.0], 0.9, -0.7),
    "zero": (LATER, [2.0], 0.9, 0.0),
    "always": (LATER, [2.0], 0.9, -INF),
    "never": (LATER, [2.0], 0.9, INF),
    "no_memory": (LATER, [2.0], 0.0, 1.0),
    "no_memory_zero": (LATER, [2.0], 0.0, 0.0),
    "no_memory_always": (LATER, [2.0], 0.0, -INF),
    "no_memory_never": (LATER, [2.0], 0.0, INF),
    "no_variance": ((0.0, 0.0, 0.0, 0.0), [], 0.5, 2.0),
    "var_overflows": (LATER, [1e200], 0.9, 1.0),
    "var_overflows_always": (LATER, [1e200], 0.9, -INF),
    "sum_overflows": (LATER, [1.5e308, 1.5e308], 0.9, -INF),
    "infinite": (LATER, [3.0, INF], 0.9, -INF),
    "nan": (LATER, [NAN, 3.0], 0.9, -INF),
}


@every_backend
@pytest.mark.parametrize(
    ("op", "case"),
    [
        *(("norm-ema", case) for case in EMA_CASES),
        *((f"{op}-ema", case) for op in NORM_OPS[1:] for case in ("later", "nan")),
    ],
)
def test_ema(op: str, case: str, name: str) -> None:
    """Several steps with the norm of each buffer in turn; the norm is written even if the statistics are not."""
    ema, others, decay, coefficient = EMA_CASES[case]
    problem = Problem([Spec((65,)), Spec((7,), grad=False)], torch.float32, op)
    for buffer in range(len(others) + 1):
        values = problem.memory.place("ema", torch.tensor(ema, dtype=torch.float64))
        norms = torch.tensor([*others[:buffer], NAN, *others[buffer:]], dtype=torch.float64)
        sq, _ = problem.memory.part("sq", norms, lambda m, i=buffer: m[i])
        given = {"sq": sq, "ema": values, "buffer": buffer, "decay": decay, "coefficient": coefficient}
        fired = []
        for scale in (1.0, 3.0, 0.25):
            for g in problem.grads:
                g.mul_(scale)
            run_and_check(op, problem, name, **given)
            fired.append(values[3].item())
        seen = all(map(math.isfinite, values.tolist()[:2])) and not same_bits(
            values[:2], torch.tensor(ema[:2]).double()
        )
        if not all(x < 1e100 for x in others):
            assert not any(fired)
            assert not seen
        elif math.isinf(coefficient):
            assert fired == [float(coefficient < 0)] * 3
        else:
            assert seen


@every_backend
@pytest.mark.parametrize("bad", [-INF, NAN, 1e25], ids=str)
def test_ema_leaves_bad_norms_out(bad: float, name: str) -> None:
    problem = Problem(SMALL, torch.float32, "norm")
    problem.grads[2][129] = bad
    arguments = problem.arguments("norm-ema", name, coefficient=-INF)
    arguments["ema"][3] = 1
    before = arguments["ema"].clone()
    call("norm", name, arguments)
    problem.memory.check()
    assert not arguments["sq"][1].isfinite()
    assert same_bits(arguments["ema"][:3], before[:3])
    assert arguments["ema"][3] == 0


@every_backend
def test_ema_in_float64_may_overflow_in_the_variance_alone(name: str) -> None:
    problem = Problem(SMALL, torch.float64, "norm")
    problem.grads[0][64] = 1e90
    arguments = run_and_check("norm-ema", problem, name, coefficient=-INF)
    assert arguments["sq"][1].item() == pytest.approx(1e180)
    assert arguments["ema"].tolist() == [3.0, 2.0, -1.0, 0.0]


# The ball of a p-norm.

P = [1.01, 1.1, 1.5, 2.0, 3.0, 4.0, 101.0, 1e300, INF]
# Powers of ten: of the elements of a gradient.
SPANS = {"wide": (-30, 30), "small": (-30, -27), "large": (27, 30), "usual": (-4, 0), "equal": (-2, -2)}


def along_p(g: Tensor, p: float, eps: float = 0.0) -> tuple[float, float, Tensor]:
    """(max |g|, ||g||_q, the direction): Foret et al. 2021, eq. 2."""
    y, g = 1 / (p - 1), g.double()
    m = g.abs().max().item()
    norm = m * ((g.abs() / m) ** (y + 1)).sum().item() ** (1 / (y + 1))
    return m, norm, g.sign() * (g.abs() / (norm + eps)) ** y


def ascend_p(g: Tensor, p: float, name: str, eps: float = 1e-300) -> tuple[float, float, Tensor]:
    """The same by the ops."""
    problem = Problem([Spec(tuple(g.size()))], g.dtype)
    problem.params[0].zero_()
    problem.grads[0].copy_(g)
    y = 1 / (p - 1)
    row = torch.full((1,), NAN, dtype=torch.float64)
    largest, powers = row.clone(), row.clone()
    call("norm_max", name, problem.arguments("norm_max", name, sq=row, largest=largest, buffer=0))
    call("norm_p", name, problem.arguments("norm_p", name, sq=powers, largest=largest, q=y + 1))
    given = {"sq": torch.ones(1, 1, dtype=torch.float64), "radius": torch.ones(1, 2, dtype=torch.float64)}
    given |= {"largest": largest, "powers": powers, "exponent": y, "eps": eps}
    call("ascend_p", name, problem.arguments("ascend_p", name, **given))
    problem.memory.check()
    return largest.item(), largest.item() * powers.item() ** (1 / (y + 1)), wide(problem.params[0])


@pytest.mark.parametrize(
    ("dtype", "p", "name"),
    [
        *itertools.product([torch.float32, torch.float64, torch.bfloat16], P, FAST_BACKENDS),
        *((torch.float32, p, name) for p in (1.01, 3.0, INF) for name in set(BACKENDS) - set(FAST_BACKENDS)),
    ],
    ids=dtype_id,
)
def test_the_direction_of_a_p_norm(dtype: torch.dtype, p: float, name: str) -> None:
    """Whatever the size of the gradient and whatever lies in it. An error of the quotient counts q - 1 times, one of
    its logarithm, up to 200, for what is small beside the largest element of the direction."""
    generator = torch.Generator("cpu").manual_seed(0)
    for low, high in list(SPANS.values())[: None if name in FAST_BACKENDS else 2]:
        powers = torch.empty(700, device="cpu").uniform_(low, high, generator=generator)
        signs = torch.randint(0, 2, (700,), generator=generator, device="cpu") * 2 - 1
        g = (10.0 ** powers.double() * signs).to(cases.DEVICE, dtype)
        largest, norm, direction = along_p(g, p)
        got = ascend_p(g, p, name)
        half = dtype == torch.bfloat16
        eps = torch.finfo(torch.float32 if half else dtype).eps
        y = 1 / (p - 1)
        assert got[0] == largest
        assert got[1] == pytest.approx(norm, rel=(4 + y) * eps)
        rtol = torch.finfo(dtype).eps if half else 200 * eps
        atol = (4 + y) * eps * direction.abs().max().item()
        torch.testing.assert_close(got[2], direction, rtol=rtol, atol=atol)
        if p < 1e9:
            assert along_p(direction, y + 1)[1] == pytest.approx(1, rel=1e-9)  # its p-norm


@every_backend
@pytest.mark.parametrize("m", [1e-40, 1e-38, 3e38])
def test_the_norm_of_a_gradient_whose_inverse_is_no_normal_number(m: float, name: str) -> None:
    g = m * torch.tensor([1.0, -0.5, 0.25, 0.0] * 20)
    largest, norm, _ = ascend_p(g, 3.0, name)
    assert largest == g.abs().max().item()
    assert norm == pytest.approx(along_p(g, 3.0)[1], rel=1e-5)


@every_backend
@pytest.mark.parametrize("p", [1.01, 3.0, INF])
def test_the_direction_of_little_or_nothing(p: float, name: str) -> None:
    """Zeros do not move, whatever the others do; a gradient of zeros moves nothing; eps bounds one that vanishes."""
    g = torch.tensor([0.0, 1e-20, -3e-20, -0.0] * 20)
    want = along_p(g[1:3].repeat(20), p, eps=1e-12)[2]
    got = ascend_p(g, p, name, eps=1e-12)[2]
    assert (got[g == 0] == 0).all()
    torch.testing.assert_close(got[g != 0], want, rtol=1e-5, atol=1e-37)
    largest, norm, direction = ascend_p(torch.zeros(70), p, name, eps=1e-12)
    assert largest == norm == 0
    assert (direction == 0).all()


@every_backend
def test_the_largest_of_many_buffers(name: str) -> None:
    problem = Problem([Spec((65,)), Spec((2100,))], torch.float32)
    for m in ([4.0], [0.0, 4.0, 1.0], [2.5, 0.0, 0.0, 4.0]):
        largest = torch.tensor(m, dtype=torch.float64)
        run_and_check("norm_p", problem, name, largest=largest, q=3.0)
        run_and_check("ascend_p", problem, name, largest=largest, exponent=2.0)


# LookSAM's products and its direction.


@every_backend
@pytest.mark.parametrize("stride", [1, 2, 7])
def test_dots_writes_with_any_stride(stride: int, name: str) -> None:
    problem = Problem(SMALL, torch.float32, "dots")
    _, sq = problem.memory.part("sq", torch.full((20,), NAN, dtype=torch.float64), lambda m: m[3::stride][:2])
    assert sq.stride() == (stride,)
    run_and_check("dots", problem, name, sq=sq)


@every_backend
@pytest.mark.parametrize("bad", [INF, NAN], ids=str)
def test_dots_tell_what_is_not_finite(bad: float, name: str) -> None:
    """In g_s both of them; in g, where there is a mark and a g_s, the product alone; elsewhere neither."""
    problem = Problem(SMALL, torch.float32, "dots")
    gradient = problem.slots_of["gradient"]
    gradient[3].fill_(bad)  # no g_s
    gradient[1].fill_(bad)  # no mark
    assert run_norm("dots", problem, name).isfinite().all()
    good = gradient[2][129].item()
    gradient[2][129] = bad
    assert run_norm("dots", problem, name).isfinite().tolist() == [True, False]
    gradient[2][129] = good
    problem.grads[0][64] = bad
    assert run_norm("dots", problem, name).isfinite().tolist() == [False, False]


# Of any number of flat buffers.
PRODUCTS: dict[str, list[list[float]]] = {
    "one": [[2.0], [5.0], [-3.0]],
    "five": [[2.0, 0.0, 0.0, 1.5, 0.5], [1.0, 1.0, 1.0, 1.0, 1.0], [0.25, 0.5, -0.25, 0.0, 1.0]],
    "orthogonal": [[4.0, 4.0], [0.0, 0.0], [0.0, 0.0]],
    "tiny": [[1e-300, 1e-300], [1.0, 1.0], [1e-300, 0.0]],
    "huge": [[1e300, 1e300], [1.0, 1.0], [-1e300, 1e299]],
}


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_project(dtype: torch.dtype, name: str) -> None:
    """Into memory that holds anything."""
    problem = Problem(SMALL, dtype, "project")
    for products in PRODUCTS.values():
        for row in problem.slots_of["g_v"]:
            row.fill_(NAN)
        sq = problem.memory.place("sq", torch.tensor(NAN, dtype=torch.float64))
        given = torch.tensor(products, dtype=torch.float64)
        run_and_check("project", problem, name, products=given, sq=sq)
        assert same_bits(given, torch.tensor(products, dtype=torch.float64))


USELESS: dict[str, list[list[float]]] = {
    "zero": [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]],
    "zero_g_but_not_the_product": [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]],
    **{
        f"{name}_{row}": [[*values[:i], bad, *values[i + 1 :]] if row == j else values for j in range(3)]
        for values in ([3.0, 5.0],)
        for row in range(3)
        for i, (name, bad) in enumerate([("inf", INF), ("nan", NAN)])
    },
    "minus_inf": [[3.0, 5.0], [1.0, 1.0], [-INF, 1.0]],
    "quotient": [[1e-44, 0.0], [1.0, 1.0], [1.0, 1.0]],  # beyond float32
    **{f"sum_{row}": [[1.5e308 if row == j else 1.0] * 2 for j in range(3)] for row in range(3)},
}


@every_backend
def test_project_changes_nothing_without_products(name: str) -> None:
    """Not even NaN in the gradients shows."""
    problem = Problem([*SMALL, Spec((5000,)), Spec((2048,), grad=False)], torch.float32, "project")
    for g in (*problem.grads, *problem.slots_of["gradient"]):
        g.fill_(NAN)
    for products in USELESS.values():
        matrix = torch.tensor([*products, [-1.0, -2.0]], dtype=torch.float64)
        whole, sq = problem.memory.part("sq", matrix, lambda m: m[3, :1])
        run_and_check("project", problem, name, products=whole[:3], sq=sq)
        assert sq.item() == -1


@every_backend
@pytest.mark.parametrize("op", COMBINES)
def test_combine_changes_nothing_where_a_check_fails(op: str, name: str) -> None:
    """Nor where a gradient is NaN; the checks are read, and no more."""
    problem = Problem([*SMALL, Spec((5000,)), Spec((2048,), grad=False)], torch.float32, op)
    for checks in NORMS.values():
        given = torch.tensor(checks, dtype=torch.float64)
        if not finite(given):
            for x in (*problem.grads, *problem.slots_of["x"]):
                x.fill_(NAN)
            sq = problem.memory.place("sq", torch.tensor([-1.0], dtype=torch.float64))
            run_and_check(op, problem, name, checks=given, sq=sq)
            assert sq.item() == -1
        else:
            run_and_check(op, problem, name, checks=given)
        assert same_bits(given, torch.tensor(checks, dtype=torch.float64))


@every_backend
@pytest.mark.parametrize("op", COMBINES)
def test_combine_shows_what_is_not_finite(op: str, name: str) -> None:
    """Of what it takes, and of nothing else."""
    problem = Problem(SMALL, torch.float32, op)
    x = problem.grads if op == "combine" else problem.slots_of["x"]
    for row, bad in ((0, INF), (2, NAN)):
        arguments = problem.arguments(op, name)
        x[row][1] = bad
        call(op, name, arguments)
        assert not arguments["sq"].isfinite()


# Gradients that are not finite.


@every_backend
@pytest.mark.parametrize("bad", [INF, NAN], ids=str)
@pytest.mark.parametrize("op", SUMS)
def test_norm_meets_what_is_not_finite(op: str, bad: float, name: str) -> None:
    """At the first and last element, in the tail of a block, around the border of a chunk, in either tensor."""
    numel = 20000 if name in FAST_BACKENDS else 4200
    problem = Problem([Spec((numel,)), Spec((67,), offset=2, scaled=False)], torch.float32)
    assert run_norm(op, problem, name).isfinite().all()
    inside = [i for i in (2047, 2048, 16383, 16384) if i < numel]
    for row, i in [(0, i) for i in (0, *inside, numel - 1)] + [(1, i) for i in (0, 66)]:
        good = problem.grads[row][i].item()
        problem.grads[row][i] = bad
        assert not run_norm(op, problem, name).isfinite().any(), (row, i)
        problem.grads[row][i] = good


@every_backend
@pytest.mark.parametrize(("dtype", "huge"), [(torch.float32, 1e25), (torch.bfloat16, 1e25), (torch.float64, 1e200)])
@pytest.mark.parametrize("op", [*NORM_OPS, "dots"])
def test_norm_overflows_to_infinity(op: str, dtype: torch.dtype, huge: float, name: str) -> None:
    problem = Problem([Spec((70,))], dtype)
    problem.grads[0][69] = huge
    assert run_norm(op, problem, name).flatten()[0] == INF


# Norms of two passes and two flat buffers, and whether they are finite.
FINITE, IN_FIRST, IN_LAST, NAN_LAST, IN_SUM = (
    [[2.0, 7.0], [1.5, 2.5]],
    [[2.0, INF], [1.5, 2.5]],
    [[2.0, 7.0], [INF, 2.5]],
    [[2.0, 7.0], [1.5, NAN]],
    [[1.5e308, 1.5e308], [1.5, 2.5]],
)
NORMS = {"finite": FINITE, "first": IN_FIRST, "last": IN_LAST, "nan": NAN_LAST, "sum": IN_SUM}


@every_backend
@pytest.mark.parametrize(
    ("op", "norms", "dtype"),
    [
        *((op, norms, torch.float32) for op in [*ASCENTS, *RULES] for norms in NORMS),
        *((op, "last", torch.float32) for op in MOVING_VARIANTS),
        *((op, "nan", torch.bfloat16) for op in [*ASCENTS, *RULES]),
        *((op, "last", torch.bfloat16) for op in MOVING_MASTERS if op != "restore-master"),
    ],
    ids=dtype_id,
)
def test_skip(op: str, norms: str, dtype: torch.dtype, name: str) -> None:
    """With a norm that is not finite nothing moves beyond the backups; gradients full of NaN leave no trace."""
    sq = NORMS[norms]
    specs = [Spec((2100,)), Spec((70,), grad=False), Spec((2500,), grad=False, backed=False)]
    problem = Problem([*SMALL, *specs], dtype, op)
    if sq is not FINITE:
        for g in (*problem.grads, *problem.slots_of.get("direction", ())):
            g.fill_(NAN)
    before = problem.snapshot()
    run_and_check(op, problem, name, sq=torch.tensor(sq, dtype=torch.float64), skip_nonfinite=True)
    gives_back = op_of(op) in MIXING or op == "nudge_sgd-master"
    moved = not all(
        same_bits(p, old["backup" if gives_back and spec.backed else "params"].to(dtype))
        for p, spec, old in zip(
            problem.params,
            problem.specs,
            ({"params": p, "backup": b} for p, b in zip(before["params"], before["backup"], strict=True)),
            strict=True,
        )
    )
    assert moved == (sq is FINITE)


@every_backend
@pytest.mark.parametrize("max_norm", [INF, 1.0], ids=["unclipped", "clip"])
@pytest.mark.parametrize("sq", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("op", RULES)
def test_rules_do_not_skip_unasked(op: str, sq: list[list[float]], max_norm: float, name: str) -> None:
    """The norm only clips then: by max_norm / inf = 0, or by NaN as torch's clip_grad_norm_ does."""
    problem = Problem(SMALL, torch.float32)
    norms = torch.tensor(sq, dtype=torch.float64)
    if math.isnan(norms[1].sum()) and max_norm < INF:
        call(op, name, problem.arguments(op, name, sq=norms, max_norm=max_norm))
        assert all(p.isnan().all() for p, spec in zip(problem.params, SMALL, strict=True) if problem.has_grad(spec))
    else:
        run_and_check(op, problem, name, sq=norms, max_norm=max_norm)
    assert problem.counters.tolist() == [10, 20, 30]


@every_backend
@pytest.mark.parametrize("op", [op for op in SKIPPING if op_of(op) in ASCENTS])
def test_ascend_does_not_skip_unasked(op: str, name: str) -> None:
    run_and_check(op, Problem(SMALL, torch.float32), name, sq=torch.tensor([[NAN]], dtype=torch.float64))


@every_backend
@pytest.mark.parametrize("op", RULES)
def test_gradients_that_are_not_finite_reach_the_weights_unasked(op: str, name: str) -> None:
    problem = Problem(SMALL, torch.float32)
    problem.grads[0][64] = NAN
    run_and_check(op, problem, name)
    assert problem.params[0].isnan().nonzero().flatten().tolist() == [64]


# Determinism.


@pytest.mark.parametrize("name", [name for name in FAST_BACKENDS if name != "reference"])
@pytest.mark.parametrize("op", [op for op in [*OPS, *VARIANTS, *MASTERS] if op not in ("gather", "mix")])
def test_same_bits_on_any_number_of_threads(op: str, name: str) -> None:
    # Enough chunks for two threads to get their share: walk.h, kGrain.
    specs = [Spec((n,), offset=i % 2, group=i % 3) for i, n in enumerate((200001, 63, 33000, 16384, 70003, 5))]
    results = []
    for threads in (1, 2, 2):
        problem = Problem(specs, dtype_of(op), op)
        arguments = problem.arguments(op, name)
        torch.set_num_threads(threads)
        call(op, name, arguments)
        torch.set_num_threads(1)
        rows = [bits(t) for rows in problem.snapshot().values() for t in rows]
        results.append(rows + [bits(arguments[key]) for key in ("sq", "ema", "along", "largest") if key in arguments])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


# gather.


GATHERED = [
    Spec((2, 8, 3, 5), "channels_last"),
    Spec((3, 5), "transposed"),
    Spec((4,)),
    Spec(()),
    Spec((0,)),
    Spec((6, 2)),
]


@every_backend
@every_dtype
def test_gather_takes_addresses(name: str, dtype: torch.dtype) -> None:
    problem = Problem(GATHERED, dtype)
    arguments = problem.arguments("gather", name)
    before = arguments["table"].clone()
    before[:, schema.GRAD] = torch.tensor([g.data_ptr() if g.numel() else 0 for g in problem.grads])
    want = Want(problem, problem.snapshot())
    call("gather", name, arguments)
    assert torch.equal(arguments["table"], before)
    assert arguments["status"].tolist() == [0, 1]
    want.check()


def _without_memory(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def _with_stride(t: Tensor, stride: tuple[int, ...]) -> Tensor:
    return torch.zeros(1000, dtype=t.dtype).as_strided(t.size(), stride)


# What stands in for a parameter's gradient -> whether kernels can use it where it lies.
GRADIENTS = {
    "same": (Spec((4, 3)), lambda g: g, True),
    "other_strides": (Spec((4, 3)), lambda g: g.t().contiguous().t(), False),
    "expanded": (Spec((4, 3)), lambda g: g[:, :1].expand(4, 3), False),
    "gaps": (Spec((4, 3)), lambda g: _with_stride(g, (6, 2)), False),
    "channels_last_for_contiguous": (
        Spec((2, 8, 3, 5)),
        lambda g: g.contiguous(memory_format=torch.channels_last),
        False,
    ),
    "contiguous_for_channels_last": (Spec((2, 8, 3, 5), "channels_last"), lambda g: g.contiguous(), False),
    "size_1_strides": (Spec((4, 1, 3)), lambda g: _with_stride(g, (3, 17, 1)), True),
    "all_size_1": (Spec((1, 1)), lambda g: _with_stride(g, (5, 7)), True),
    "other_dtype": (Spec((4, 3)), lambda g: g.double(), False),
    "half_dtype": (Spec((4, 3)), lambda g: g.bfloat16(), False),
    "fewer_dims": (Spec((4, 3)), lambda g: g.flatten(), False),
    "more_dims": (Spec((4, 3)), lambda g: g[None], False),
    "other_size": (Spec((4, 3)), lambda g: g[:3], False),
    "swapped_size": (Spec((4, 3)), lambda g: g.t(), False),
    "no_memory": (Spec((4, 3)), _without_memory, False),
    "sparse": (Spec((4, 3)), lambda g: g.to_sparse(), False),
    "sparse_csr": (Spec((4, 3)), lambda g: g.to_sparse_csr(), False),
}


@every_backend
@pytest.mark.parametrize(("spec", "change", "usable"), GRADIENTS.values(), ids=GRADIENTS)
def test_gather_compares_layouts(name: str, spec: Spec, change: Any, usable: bool) -> None:
    problem = Problem([Spec((5,)), spec, Spec((7, 2), "transposed", grad=False)], torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse")  # CSR tensors are in beta
        grad = change(problem.grads[1])
    grads = [problem.grads[0], grad, torch.empty(0)]
    arguments = problem.arguments("gather", name, grads=grads)
    call("gather", name, arguments)
    address = grad.data_ptr() if usable else schema.MISMATCH
    assert arguments["table"][:, schema.GRAD].tolist() == [grads[0].data_ptr(), address, 0]
    assert arguments["status"].tolist() == [int(not usable), 1]


def test_gather_holds_no_gradient_where_it_refuses() -> None:
    problem = Problem(GATHERED, torch.float32)
    arguments = problem.arguments("gather", "cpp") | {"grads": [torch.ones(3), torch.ones(3)]}
    held = [weakref.ref(g) for g in arguments["grads"]]
    with pytest.raises(RuntimeError, match="table should be int64"):
        call("gather", "cpp", arguments)
    del arguments
    assert [ref() for ref in held] == [None, None]


# Schemas.


def test_every_schema_has_a_reference_and_nothing_else() -> None:
    assert set(reference.IMPLEMENTATIONS) == set(schema.SCHEMAS)
    registered = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("sharpkern::")}
    assert registered == {f"sharpkern::{op}" for op in schema.SCHEMAS}


@needs_cpp
@pytest.mark.parametrize("op", OPS)
def test_every_op_is_compiled(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sharpkern::{op}", "CPU")


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for t in value if isinstance(t, Tensor)]


@every_backend
@pytest.mark.parametrize("op", OPS)
def test_declared_mutations_are_the_true_ones(op: str, name: str) -> None:
    """Every declared argument changes in a step or in a skipped one, and no other ever does."""
    arguments_of = getattr(torch.ops.sharpkern, op).default._schema.arguments
    declared = {a.name for a in arguments_of if a.alias_info is not None and a.alias_info.is_write}
    changed = set()
    forms = [(op, FINITE), (op, IN_FIRST), *((variant, FINITE) for variant in MASTERS if op_of(variant) == op)]
    for form, sq in forms:
        problem = Problem(SMALL, dtype_of(form), form if form != op else None)
        given: dict[str, Any] = {}
        if op in [*ASCENTS, *RULES]:
            given = {"sq": torch.tensor(sq, dtype=torch.float64), "skip_nonfinite": True}
        if op == "ascend" and form == op:
            given["gradient"] = problem.buffers["gradient"]
        if op == "adam":
            given["values"] = table_of(op, [ADAM_OPTIONS["amsgrad"] | {"beta2": 0.0}])  # the maximum surely moves
        if form == op and op.startswith("norm"):
            form = f"{op}-ema"
        arguments = problem.arguments(form, name, **given)
        values = {k: tensors(v) for k, v in arguments.items() if isinstance(v, (Tensor, list))}
        if name != "reference" and "params" in values:
            values["params"] = problem.params  # of which the table holds the addresses
        before = {k: [t.clone() for t in v] for k, v in values.items()}
        call(op, name, arguments)
        changed |= {k for k, v in values.items() if not all(map(same_bits, v, before[k]))}
    # The reference needs no scratch.
    assert changed == declared - ({"partials"} if name == "reference" else set())


# opcheck sees what a schema names. Of a compiled backend that is everything but weights and gradients, which it
# reaches through addresses: test_declared_mutations_are_the_true_ones sees that it declares what it writes there.
# And opcheck's test of tracing is for the reference: it runs an op twice, on clones of its arguments, and addresses
# would lead to the same weights both times.
@every_backend
@pytest.mark.parametrize("op", [*OPS, *MASTERS])
def test_opcheck(op: str, name: str) -> None:
    specs = [Spec((65,)), Spec((3, 5), "transposed"), Spec((7,), grad=False)]
    problem = Problem(specs, dtype_of(op), op if op in MASTERS else None)
    utilities = ["test_schema", "test_faketensor"]
    if name == "reference":
        utilities += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    with sk.use_backend(name):
        function = getattr(torch.ops.sharpkern, op_of(op)).default
        torch.library.opcheck(function, (), problem.arguments(op, name), test_utils=utilities)


@every_compiled_backend
@pytest.mark.parametrize("op", [op for op in OPS if op not in ("gather", "mix")])
def test_lists_are_for_the_reference(op: str, name: str) -> None:
    problem = Problem(SMALL, torch.float32, op)
    lists = {"params": problem.params, "grads": problem.grads}
    want = Want(problem, problem.snapshot())
    for given in lists.keys() & problem.arguments(op, name).keys():
        with pytest.raises(RuntimeError, match="lists are for the reference"):
            call(op, name, problem.arguments(op, name, **{given: lists[given]}))
    want.check()


# Traffic.

# What the kernels' files say: bytes a float32 parameter, read and written.
BYTES = {
    "norm": (4, 0),
    "norm_scaled": (8, 0),
    "norm-ema": (4, 0),
    "norm_max": (4, 0),
    "norm_max-ema": (4, 0),
    "norm_p": (4, 0),
    "norm_scaled-ema": (8, 0),
    "dots": (8, 0),
    "project": (8, 4),
    "combine": (8, 4),
    "combine-flat": (8, 4),
    "combine-in_place": (8, 4),
    "ascend": (8, 8),
    "ascend-keeping_g": (8, 12),
    "ascend-in_place": (8, 4),
    "ascend-in_place-keeping_g": (8, 8),
    "ascend_scaled": (8, 8),
    "ascend_p": (8, 8),
    "ascend_p-sign": (8, 8),
    "restore": (4, 4),
    "sgd": (12, 8),
    "sgd-mixed": (16, 8),
    "sgd-mixed-own_dtype": (16, 8),
    "sgd-scaled": (12, 8),
    "adam": (16, 12),
    "adam-mixed": (20, 12),
    "adam-mixed-own_dtype": (20, 12),
    "adam-scaled": (16, 12),
    "nudge_dots": (12 + 4 * DIRECTIONS, 0),
    "nudge_sgd": (12 + 4 * DIRECTIONS, 8),
    # Of bfloat16 parameters: masters 4, weights and gradients 2.
    "norm_scaled-master": (6, 0),
    "ascend-master": (6, 2),
    "ascend-master-keeping_g": (6, 4),
    "ascend_scaled-master": (6, 2),
    "ascend_p-master": (6, 2),
    "ascend_p-master-sign": (6, 2),
    "restore-master": (4, 2),
    "sgd-master": (10, 10),
    "sgd-master-mixed": (14, 10),
    "sgd-master-mixed-own_dtype": (12, 10),
    "adam-master": (14, 14),
    "adam-master-mixed": (18, 14),
    "adam-master-mixed-own_dtype": (16, 14),
    "nudge_dots-master": (10 + 4 * DIRECTIONS, 0),
    "nudge_sgd-master": (10 + 4 * DIRECTIONS, 10),
}


@pytest.mark.skipif("triton" not in BACKENDS or cases.DEVICE.type != "cpu", reason="needs Triton's interpreter")
@pytest.mark.parametrize("op", BYTES)
def test_bytes_that_triton_kernels_move(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an aligned row with whole blocks and a rest, each element once: all else is cells, coefficients and sums."""
    from triton.runtime.interpreter import InterpreterBuilder

    moved = {"load": 0, "store": 0}

    def counted(kind: str) -> Any:
        run = getattr(InterpreterBuilder, f"create_masked_{kind}")

        def count(builder: Any, pointers: Any, *args: Any) -> Any:
            mask = args[0 if kind == "load" else 1]
            moved[kind] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
            return run(builder, pointers, *args)

        return count

    for kind in moved:
        monkeypatch.setattr(InterpreterBuilder, f"create_masked_{kind}", counted(kind))
    numel = 8 * schema.BLOCK + 2000
    problem = Problem([Spec((numel,))], dtype_of(op), op)
    given: dict[str, Any] = {}
    if op_of(op) in [*RULES, *NUDGES]:
        options = ADAM_OPTIONS["adam"] if op_of(op) == "adam" else SGD_OPTIONS["momentum"] | {"nudge": 0.5}
        given["values"] = table_of(op_of(op), [options])
    call(op, "triton", problem.arguments(op, "triton", **given))
    loaded, stored = BYTES[op]
    # Three programs: neither the rows' cells nor the sums come to an eighth of a byte a parameter.
    assert 0 <= moved["load"] - loaded * numel < numel / 8
    assert 0 <= moved["store"] - stored * numel < numel / 8


def test_every_triton_kernel_is_counted() -> None:
    assert set(BYTES) == {*schema.SCHEMAS, *VARIANTS, *MASTERS} - {"gather", "mix"}


# Backends.


def test_a_device_without_kernels_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_noticed", set())
    monkeypatch.setattr(backend, "_chosen", None)
    with pytest.warns(UserWarning, match="reference on mps, right but slow: .*mps") as told:
        backend.prepare(torch.device("mps"))
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.prepare(torch.device("mps"))
        backend.prepare(torch.device("mps", 0))
        # Who asked for the reference knows.
        backend._noticed.clear()
        monkeypatch.setattr(backend, "_chosen", "reference")
        backend.prepare(torch.device("mps"))


def test_use_backend_nests_and_comes_back() -> None:
    default = BACKENDS[0]
    assert backend.current_backend(cases.DEVICE) == default
    for outer, inner in itertools.product(BACKENDS, repeat=2):
        with sk.use_backend(outer):
            assert backend.current_backend(cases.DEVICE) == outer
            with sk.use_backend(inner):
                assert backend.current_backend(cases.DEVICE) == inner
            assert backend.current_backend(cases.DEVICE) == outer
        assert backend.current_backend(cases.DEVICE) == default


@every_backend
def test_use_backend_comes_back_after_an_exception(name: str) -> None:
    default = BACKENDS[0]
    with pytest.raises(KeyError), sk.use_backend(name):
        raise KeyError
    assert backend.current_backend(cases.DEVICE) == default


def test_use_backend_names_the_unknown_one() -> None:
    with pytest.raises(ValueError, match=r"'opencl'.*reference"), sk.use_backend("opencl"):
        pass
    assert backend.current_backend(cases.DEVICE) == BACKENDS[0]


def runs_on(arguments: dict[str, Any], norm: Any) -> str:
    """Only the compiled backend has a use for the scratch."""
    arguments["partials"][1:] = -1
    norm(**arguments)
    return "reference" if (arguments["partials"][1:] == -1).all() else backend.current_backend(cases.DEVICE)


def test_use_backend_changes_what_runs() -> None:
    problem = Problem(SMALL, torch.float32)
    for name in (*BACKENDS, *BACKENDS):
        with sk.use_backend(name):
            assert runs_on(problem.arguments("norm", name), torch.ops.sharpkern.norm.default) == name
    assert runs_on(problem.arguments("norm", BACKENDS[0]), torch.ops.sharpkern.norm.default) == BACKENDS[0]


def test_compiled_functions_follow_use_backend() -> None:
    problem = Problem(SMALL, torch.float32)

    @torch.compile(backend="eager", fullgraph=True)
    def norm(**arguments: Any) -> None:
        torch.ops.sharpkern.norm(**arguments)

    for name in (*BACKENDS, *BACKENDS):
        arguments = problem.arguments("norm", name, decay=0.0, coefficient=0.0)
        with sk.use_backend(name):
            assert runs_on(arguments, norm) == name
        got = arguments["sq"][arguments["buffer"]].item()
        assert got == pytest.approx(squared_norm(problem, False), rel=norm_tolerance(torch.float32))
    torch._dynamo.reset()


# Argument checks of the compiled backend.

# Op, what to change in its arguments, part of the message.
WRONG: dict[str, tuple[str, Any, str]] = {
    "table_dtype": ("norm", lambda a: {"table": a["table"].int()}, "table should be .* int64"),
    "table_columns": ("norm", lambda a: {"table": a["table"][:, :7].contiguous()}, "table should be .* 8 columns"),
    "table_contiguous": ("ascend", lambda a: {"table": a["table"].t().contiguous().t()}, "contiguous"),
    "table_dim": ("restore", lambda a: {"table": a["table"].flatten()}, "table should be"),
    "dtype": ("norm", lambda a: {"dtype": torch.int32}, "unsupported dtype Int"),
    "sq_dtype": ("norm", lambda a: {"sq": torch.zeros(3)}, "sq should be"),
    "sq_not_a_row": ("norm_scaled", lambda a: {"sq": a["sq"][None]}, "sq should be"),
    "sq_contiguous": ("norm-ema", lambda a: {"sq": torch.zeros(6, dtype=torch.float64)[::2]}, "sq should be"),
    "buffer_large": ("norm", lambda a: {"buffer": 3}, "(buffer|sq) should be"),
    "buffer_negative": ("norm_scaled", lambda a: {"buffer": -1}, "(buffer|sq) should be"),
    "sq_matrix": ("ascend", lambda a: {"sq": torch.zeros(2, dtype=torch.float64)}, "sq should be .* matrix"),
    "sq_matrix_dtype": ("sgd", lambda a: {"sq": torch.zeros(1, 1)}, "sq should be .*float64"),
    "partials_dtype": ("norm", lambda a: {"partials": a["partials"].float()}, "partials should be .*Double"),
    "partials_short": ("norm", lambda a: {"partials": a["partials"][:0]}, "partials is empty"),
    "radius_dtype": ("ascend", lambda a: {"radius": a["radius"].float()}, "radius should be .*float64"),
    "radius_columns": ("ascend_scaled", lambda a: {"radius": a["radius"][:, :1].contiguous()}, "radius.* 2 columns"),
    "radius_rows": ("norm_scaled", lambda a: {"radius": a["radius"][:0]}, "radius should be .* 1 rows"),
    "values_columns": ("sgd", lambda a: {"values": a["values"][:, :5].contiguous()}, "values should be .* 6 columns"),
    "values_dtype": ("adam", lambda a: {"values": a["values"].float()}, "values should be .*float64"),
    "values_rows": ("adam", lambda a: {"values": a["values"][:0]}, "values should be .* 1 rows and 8 columns"),
    "backup_short": ("ascend", lambda a: {"backup": a["backup"][:-32]}, "backup should be .* at least"),
    "backup_dtype": ("ascend_scaled", lambda a: {"backup": a["backup"].double()}, "backup should be .*Float"),
    "backup_empty": ("ascend_scaled", lambda a: {"backup": a["backup"][:0]}, "backup is empty"),
    "restore_backup_empty": ("restore", lambda a: {"backup": a["backup"][:0]}, "backup is empty"),
    "restore_backup_short": ("restore", lambda a: {"backup": a["backup"][:64]}, "backup should be .* at least"),
    "descend_backup_empty": ("sgd", lambda a: {"backup": a["backup"][:0]}, "backup is empty"),
    "descend_backup_short": ("adam", lambda a: {"backup": a["backup"][:64]}, "backup should be .* at least"),
    "momentum_short": ("sgd", lambda a: {"momentum_buffer": a["momentum_buffer"][:64]}, "momentum_buffer should be"),
    "momentum_dtype": ("sgd", lambda a: {"momentum_buffer": a["momentum_buffer"].double()}, "momentum_buffer.*Float"),
    "momentum_empty": ("sgd", lambda a: {"momentum_buffer": a["momentum_buffer"][:0]}, "momentum_buffer is empty"),
    "exp_avg_short": ("adam", lambda a: {"exp_avg": a["exp_avg"][:64]}, "exp_avg should be"),
    "exp_avg_sq_dtype": ("adam", lambda a: {"exp_avg_sq": a["exp_avg_sq"].half()}, "exp_avg_sq should be .*Float"),
    "exp_avg_sq_empty": ("adam", lambda a: {"exp_avg_sq": a["exp_avg_sq"][:0]}, "exp_avg.* is empty"),
    "max_short": ("adam", lambda a: {"max_exp_avg_sq": a["max_exp_avg_sq"][:64]}, "max_exp_avg_sq should be"),
    "max_empty": ("adam", lambda a: {"max_exp_avg_sq": a["max_exp_avg_sq"][:0]}, "max_exp_avg_sq is empty"),
    "step_dtype": ("sgd", lambda a: {"step": a["step"].double()}, "step should be .*Float"),
    "step_short": ("adam", lambda a: {"step": a["step"][:-1]}, "step should be .* 5"),
    "step_empty": ("adam", lambda a: {"step": a["step"][:0]}, "step is empty"),
    "ascend_counters_dtype": ("ascend", lambda a: {"counters": a["counters"].int()}, "counters should be .*Long"),
    "ascend_counters_short": ("ascend_scaled", lambda a: {"counters": a["counters"][:2]}, "counters should be"),
    "sgd_counters_dtype": ("sgd", lambda a: {"counters": a["counters"].float()}, "counters should be .*Long"),
    "adam_counters_short": ("adam", lambda a: {"counters": a["counters"][:1]}, "counters should be"),
    "kept_gradient_short": ("ascend-keeping_g", lambda a: {"gradient": a["gradient"][:64]}, "gradient should be"),
    "kept_gradient_dtype": ("ascend-keeping_g", lambda a: {"gradient": a["gradient"].double()}, "gradient should be"),
    "ema_dtype": ("norm-ema", lambda a: {"ema": a["ema"].float()}, "ema should be"),
    "ema_short": ("norm_scaled-ema", lambda a: {"ema": a["ema"][:3]}, "ema should be"),
    "ema_contiguous": ("norm-ema", lambda a: {"ema": torch.zeros(8, dtype=torch.float64)[::2]}, "ema should be"),
    "ema_partials": ("norm-ema", lambda a: {"partials": a["partials"][:0]}, "partials (is empty|should be)"),
    "largest_dtype": ("norm_max", lambda a: {"largest": torch.zeros(3)}, "largest should be"),
    "largest_short": (
        "norm_max-ema",
        lambda a: {"largest": a["largest"][:2].clone()},
        "largest should have an element",
    ),
    "norm_max_buffer": ("norm_max-ema", lambda a: {"buffer": 3}, "buffer should be"),
    "norm_max_partials": ("norm_max-ema", lambda a: {"partials": a["partials"][:2]}, "partials (is empty|should be)"),
    "norm_p_sq_dtype": ("norm_p", lambda a: {"sq": torch.zeros(())}, "sq should be"),
    "norm_p_sq_numel": ("norm_p", lambda a: {"sq": torch.zeros(2, dtype=torch.float64)}, "sq should be"),
    "norm_p_largest": ("norm_p", lambda a: {"largest": a["largest"][None]}, "largest should be"),
    "norm_p_partials": ("norm_p", lambda a: {"partials": a["partials"][:0]}, "partials (is empty|should be)"),
    "ascend_p_largest": ("ascend_p-sign", lambda a: {"largest": a["largest"].float()}, "largest should be"),
    "ascend_p_powers": ("ascend_p", lambda a: {"powers": a["powers"].repeat(2)[::2]}, "powers should be"),
    "ascend_p_exponent": ("ascend_p", lambda a: {"exponent": -0.5}, "exponent should be"),
    "ascend_p_nan_exponent": ("ascend_p-sign", lambda a: {"exponent": NAN}, "exponent should be"),
    "ascend_p_backup_empty": ("ascend_p", lambda a: {"backup": a["backup"][:0]}, "backup (is empty|should be)"),
    "ascend_p_counters": ("ascend_p", lambda a: {"counters": a["counters"][:2]}, "counters should be"),
    "dots_sq_dtype": ("dots", lambda a: {"sq": torch.zeros(2)}, "sq should be"),
    "dots_sq_numel": ("dots", lambda a: {"sq": torch.zeros(3, dtype=torch.float64)}, "sq should be"),
    "dots_sq_matrix": ("dots", lambda a: {"sq": torch.zeros(1, 2, dtype=torch.float64)}, "sq should be"),
    "dots_partials_for_one_sum": ("dots", lambda a: {"partials": a["partials"][:2]}, "partials (is empty|should be)"),
    "dots_gradient_dtype": ("dots", lambda a: {"gradient": a["gradient"].double()}, "gradient should be"),
    "dots_gradient_short": ("dots", lambda a: {"gradient": a["gradient"][:64]}, "gradient should be"),
    "dots_gradient_empty": ("dots", lambda a: {"gradient": a["gradient"][:0]}, "gradient (is empty|should be)"),
    "project_g_v_dtype": ("project", lambda a: {"g_v": a["g_v"].double()}, "g_v should be"),
    "project_g_v_short": ("project", lambda a: {"g_v": a["g_v"][:64]}, "g_v should be"),
    "project_g_v_empty": ("project", lambda a: {"g_v": a["g_v"][:0]}, "g_v (is empty|should be)"),
    "project_sq_dtype": ("project", lambda a: {"sq": torch.zeros(())}, "sq should be"),
    "project_sq_numel": ("project", lambda a: {"sq": torch.zeros(2, dtype=torch.float64)}, "sq should be"),
    "project_partials": ("project", lambda a: {"partials": a["partials"][:0]}, "partials (is empty|should be)"),
    "project_gradient_dtype": ("project", lambda a: {"gradient": a["gradient"].half()}, "gradient should be"),
    "project_gradient_short": ("project", lambda a: {"gradient": a["gradient"][:64]}, "gradient should be"),
    "project_gradient_empty": ("project", lambda a: {"gradient": a["gradient"][:0]}, "gradient (is empty|should be)"),
    "products_dtype": ("project", lambda a: {"products": a["products"].float()}, "products should be"),
    "products_rows": ("project", lambda a: {"products": a["products"][:2]}, "products should be"),
    "products_dim": ("project", lambda a: {"products": a["products"][:, 0].clone()}, "products should be"),
    "products_contiguous": ("project", lambda a: {"products": a["products"].t().contiguous().t()}, "products should"),
    "combine_out_dtype": ("combine", lambda a: {"out": a["out"].double()}, "out should be"),
    "combine_out_short": ("combine", lambda a: {"out": a["out"][:64]}, "out should be"),
    "combine_out_empty": ("combine", lambda a: {"out": a["out"][:0]}, "out (is empty|should be)"),
    "combine_v_dtype": ("combine", lambda a: {"v": a["v"].half()}, "v should be"),
    "combine_v_short": ("combine-flat", lambda a: {"v": a["v"][:64]}, "v should be"),
    "combine_v_empty": ("combine", lambda a: {"v": a["v"][:0]}, "v (is empty|should be)"),
    "combine_x_dtype": ("combine-flat", lambda a: {"x": a["x"].double()}, "x should be"),
    "combine_x_short": ("combine-in_place", lambda a: {"x": a["x"][:64]}, "x should be"),
    "combine_sq_numel": ("combine", lambda a: {"sq": torch.zeros(2, dtype=torch.float64)}, "sq should be"),
    "combine_partials": ("combine", lambda a: {"partials": a["partials"][:0]}, "partials (is empty|should be)"),
    "combine_coefficients": ("combine", lambda a: {"coefficients": a["coefficients"][:1]}, "coefficients should be"),
    "combine_checks": ("combine", lambda a: {"checks": torch.zeros(2, dtype=torch.float64)}, "checks should be"),
    "mix_coefficients_dtype": ("mix", lambda a: {"coefficients": torch.zeros(2)}, "coefficients should be"),
    "mix_coefficients_short": ("mix", lambda a: {"coefficients": a["coefficients"][:1]}, "coefficients should be"),
    "mix_numerator_dtype": ("mix", lambda a: {"numerator": a["numerator"].float()}, "numerator should be"),
    "mix_numerator_matrix": ("mix", lambda a: {"numerator": a["numerator"][None]}, "numerator should be"),
    "mix_denominator": ("mix", lambda a: {"denominator": a["denominator"].repeat(2)[::2]}, "denominator should be"),
    "mix_constant": ("mix", lambda a: {"constant": [1.0]}, "constant"),
    "mix_slope": ("mix", lambda a: {"slope": [1.0, 2.0, 3.0]}, "slope"),
    "sgd_direction_dtype": ("sgd-mixed", lambda a: {"direction": a["direction"].double()}, "direction should be"),
    "adam_direction_dtype": ("adam-mixed", lambda a: {"direction": a["direction"].half()}, "direction should be"),
    "sgd_direction_short": ("sgd-mixed", lambda a: {"direction": a["direction"][:64]}, "direction should be"),
    "adam_direction_short": ("adam-mixed", lambda a: {"direction": a["direction"][:64]}, "direction should be"),
    "coefficients_dtype": ("adam-mixed", lambda a: {"coefficients": a["coefficients"].float()}, "coefficients should"),
    "coefficients_short": ("sgd-scaled", lambda a: {"coefficients": a["coefficients"][:1]}, "coefficients should be"),
    "coefficients_empty": ("sgd-mixed", lambda a: {"coefficients": a["coefficients"][:0]}, "coefficients should be"),
    "norm_scaled_master_short": ("norm_scaled-master", lambda a: {"master": a["master"][:64]}, "master should be"),
    "norm_scaled_master_dtype": ("norm_scaled-master", lambda a: {"master": a["master"].double()}, "master should be"),
    "nudge_dots_master_dtype": ("nudge_dots-master", lambda a: {"master": a["master"].half()}, "master should be"),
    "nudge_sgd_master_dtype": ("nudge_sgd-master", lambda a: {"master": a["master"].bfloat16()}, "master should be"),
    "nudge_sgd_master_short": ("nudge_sgd-master", lambda a: {"master": a["master"][:64]}, "master should be"),
    "master_of_float32": ("nudge_sgd", lambda a: {"master": a["momentum_buffer"]}, "master should be"),
    "ascend_master_short": ("ascend-master", lambda a: {"backup": a["backup"][:64]}, "backup should be"),
    "ascend_p_master_dtype": ("ascend_p-master", lambda a: {"backup": a["backup"].double()}, "backup should be"),
    "restore_master_dtype": ("restore-master", lambda a: {"backup": a["backup"].half()}, "backup should be"),
    "sgd_master_short": ("sgd-master", lambda a: {"backup": a["backup"][:64]}, "backup should be"),
    "adam_master_dtype": ("adam-master-mixed", lambda a: {"backup": a["backup"].double()}, "backup should be"),
    "gather_table_rows": ("gather", lambda a: {"grads": a["grads"][:-1]}, "table should be .* row"),
    "gather_table_dtype": ("gather", lambda a: {"table": a["table"].double()}, "table should be int64"),
    "gather_layout_rows": ("gather", lambda a: {"layout": a["layout"][:-1].contiguous()}, "layout should be int64"),
    "gather_layout_dtype": ("gather", lambda a: {"layout": a["layout"].int()}, "layout should be int64"),
    "gather_status": ("gather", lambda a: {"status": a["status"][:1]}, "status should be two int64"),
    "gather_dtype": ("gather", lambda a: {"dtype": torch.int64}, "unsupported dtype Long"),
}


# What the host cannot check where the table is on a device: numels, slots, groups and marks. And the table's memory
# order, which is free there.
NOT_ON_A_DEVICE = {
    "table_contiguous", "backup_short", "restore_backup_short", "descend_backup_empty", "descend_backup_short",
    "momentum_short", "momentum_empty", "exp_avg_short", "max_short", "max_empty", "kept_gradient_short",
    "dots_gradient_short", "project_g_v_short", "project_gradient_short", "sgd_direction_short",
    "adam_direction_short", "combine_out_short", "combine_v_short", "combine_x_short", "norm_scaled_master_short",
    "nudge_sgd_master_short", "ascend_master_short", "sgd_master_short",
}  # fmt: skip

# Triton's own words differ for the rest.
SAID_BY_TRITON = [
    case
    for case, (op, *_) in WRONG.items()
    if (op in [*VARIANTS, *MASTERS] or op in ("norm_p", "ascend_p", "dots", "project", "combine", "mix"))
    and case not in {*NOT_ON_A_DEVICE, "mix_constant", "mix_slope"}
]


@pytest.mark.parametrize(
    ("name", "case"), [*(("cpp", case) for case in WRONG), *(("triton", case) for case in SAID_BY_TRITON)]
)
def test_wrong_arguments_change_nothing(name: str, case: str) -> None:
    """In a step that is to be skipped neither."""
    if name not in BACKENDS:
        pytest.skip(f"{name} is not there")
    if case in NOT_ON_A_DEVICE and cases.DEVICE_KERNELS:
        pytest.skip("the table is on the device")
    op, change, message = WRONG[case]
    problem = Problem([*SMALL[:4], Spec((4000,))], dtype_of(op), op)
    for skipping in {False, op in SKIPPING}:
        arguments = problem.arguments(op, name)
        if op_of(op) in VALUES:
            arguments["values"] = table_of(op_of(op), VALUES[op_of(op)][:1])
        if skipping:
            arguments["skip_nonfinite"] = True
            arguments["sq"][0] = INF
        arguments |= change(arguments)
        given = {k: [t.clone() for t in tensors(v)] for k, v in arguments.items() if isinstance(v, (Tensor, list))}
        want = Want(problem, problem.snapshot())
        with pytest.raises(RuntimeError, match=message):
            call(op, name, arguments)
        want.check()
        for key, before in given.items():
            assert all(map(same_bits, tensors(arguments[key]), before)), key


@pytest.mark.skipif(cases.DEVICE.type == "cpu", reason="there is no other device")
@every_compiled_backend
@pytest.mark.parametrize(
    ("op", "argument"),
    [
        (op, argument)
        for op, arguments in {
            "norm-ema": ["sq", "partials", "ema"],
            "norm_max": ["sq", "largest", "partials"],
            "norm_p": ["sq", "largest", "partials"],
            "ascend_p": ["largest", "powers", "backup"],
            "dots": ["sq", "partials", "gradient"],
            "project": ["g_v", "sq", "partials", "gradient", "products"],
            "ascend-keeping_g": ["gradient"],
            "sgd-mixed": ["direction", "coefficients"],
            "adam-mixed": ["direction", "coefficients"],
            "combine-flat": ["out", "sq", "partials", "x", "v", "coefficients"],
            "mix": ["numerator", "denominator"],
        }.items()
        for argument in arguments
    ],
)
def test_arguments_on_another_device(op: str, argument: str, name: str) -> None:
    problem = Problem(SMALL, torch.float32, op)
    arguments = problem.arguments(op, name)
    arguments[argument] = arguments[argument].cpu()
    want = Want(problem, problem.snapshot())
    with pytest.raises(RuntimeError, match=rf"{argument}\b"):
        call(op, name, arguments)
    want.check()
