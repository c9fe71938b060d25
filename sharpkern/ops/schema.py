"""Every op of the package: its schema, its fake, and what its arguments hold.

All ops live in ``torch.ops.sharpkern`` and return nothing; what they change is declared. Arguments come in
one order: mutated tensors, read tensors, device scalars, then keyword-only numbers.

Segments. Parameters and gradients are lists of tensors for the reference, and rows of a ``table`` with their
addresses for the compiled backends. The reference walks the lists; ``grads[i]`` with no elements means that
parameter i has no gradient in this pass. The compiled backends take empty lists only (others are an error) and read
and write through the table's addresses, which the caller keeps alive. (That writes through memory the schema cannot
name: it is for this package's flat layer, and nobody is promised that it can be traced.)

==================  ===================================================================================
argument            holds
==================  ===================================================================================
``table``           int64 ``[rows, 8]``, one row a parameter, columns below; on a device in any memory order
``blocks``          int32 ``[blocks, 2]``: row, and which ``BLOCK`` elements of it; what a device kernel walks,
                    in the order of the rows, and whole. CPU kernels split slot space themselves
``backup``          flat, dtype of the parameters: the weights before the perturbation. Or, beside parameters of a half
                    type, flat and float32: a master, see below
``master``          as such a ``backup``; empty: the parameters are the weights
``gradient``        flat, dtype of the parameters: the gradient of the first pass, where ``table[:, BACKUP]`` says
                    that there was one
``g_v``             flat, dtype of the state: LookSAM's direction
``out``             flat, dtype of the state; may be ``v``
``x``               flat, dtype of the state, where ``table[:, BACKUP]`` says that there is one; empty: the gradients
``v``               flat, dtype of the state
``direction``       flat, dtype of the parameters or of the state: v, which a rule adds to the gradient; empty: none
``coefficients``    float64 ``[2]``: a and b of the gradient a g + b v that a rule steps along; empty: 1 and 0. Of
                    combine's a x + b v, which wants them
``ema``             float64 ``[4]``, columns ``EMA`` below: AE-SAM's statistics and its decision; empty: none are kept
``eigenvectors``    contiguous ``[k, size]``, dtype of the state: a flat buffer a row; 1 to ``DIRECTIONS`` rows
state buffers       flat, float32 (float64 for float64 parameters), slots as in the table
``step``            float32 ``[rows]``: steps applied to each parameter
``counters``        int64 ``[3]``: first passes, second passes, skipped steps (or empty: not counted)
``partials``        float64, ``partials_size()`` elements: scratch. The first is a device kernel's ticket: zero
                    before the first call, zero again after each
``radius``          float64 ``[groups, 2]``: rho (negative when maximizing), eta
``values``          float64 ``[groups, k]``: the base rule's numbers, see ``SGD``, ``ADAM`` and ``NUDGED`` below
``sq``              float64: squared norms, one element a flat buffer: norm and norm_scaled write one of a contiguous
                    ``[buffers]``, the rules and ascents read ``[passes, buffers]``, summed over buffers
``checks``          as ``sq`` of a rule; empty: nothing is checked
``products``        float64 ``[3, buffers]``: g.g, g_s.g_s and g.g_s, summed over buffers
``along``           float64: two sums a direction. nudge_dots writes ``[2 k]`` of any stride, nudge_sgd reads a
                    contiguous ``[2 k, buffers]``, summed over buffers
``numerator``, ``denominator``  float64 ``[buffers]``, contiguous: summed over buffers
``largest``         float64 ``[buffers]``: the largest magnitudes of a gradient; its own is the largest of them
``powers``          float64 ``[buffers]``: sums of powers of a gradient over that, summed over buffers
==================  ===================================================================================

A master is the weights themselves, of every row, whatever ``table[:, BACKUP]`` says; the parameters are what the half
type has of them, rounded to nearest, even on ties. Ops that keep weights in a backup have them there already, and
write the parameters only; ops that take a step read the master, and write both.

On a device that has no float64 (mps) float32 takes its place; only the reference runs there.
"""

from __future__ import annotations

import torch

# Columns of the table.
PARAM = 0  # address of the weights
GRAD = 1  # address of the gradient; 0: none in this pass; MISMATCH: gather could not use it as it is
SCALE = 2  # which T_w, see below: norm_scaled and ascend_scaled look at it
BACKUP = 3  # nonzero: the weights are in the backup
SLOT = 4  # first element in the flat buffers
NUMEL = 5
GROUP = 6  # row of the group tables
TICKET = 7  # scratch of a device kernel, whose blocks count themselves here: zero between two calls
COLUMNS = 8

MISMATCH = -1

# Values of SCALE; csrc/common.h has their twins. An op that looks at it neither reads nor moves what is left out.
PLAIN = 0  # T_w = 1
SCALED = 1  # T_w = |w| + eta
LEFT_OUT = 2  # T_w = 0

# Slot elements a partial sum covers; csrc/common.h has its twin.
CHUNK = 16384

# Elements of a parameter in one row of ``blocks``; csrc/cuda/walk.cuh has its twin.
BLOCK = 2048

# Columns of AE-SAM's statistics: the mean and the variance of the squared norm, what it was compared with last, and
# whether it was at least that.
EMA = ("mean", "var", "threshold", "fired")

# A direction with a norm up to this is none; csrc/math.h has its twin.
NORM_MIN = 1e-12

# Rows of ``eigenvectors`` at most; csrc/math.h has its twin.
DIRECTIONS = 8

# Columns of the group values.
SGD = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
ADAM = ("lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")
NUDGED = (*SGD, "nudge")  # nesterov is not looked at

_PASS = "Tensor[] grads, Tensor table, Tensor blocks"
_NORM = "*, int buffer, float decay, float coefficient, ScalarType dtype"
_RULE = (
    "Tensor[] grads, Tensor(m!) backup, Tensor direction, Tensor table, Tensor blocks, Tensor values, Tensor sq, "
    "Tensor coefficients, *, float max_norm, bool skip_nonfinite, ScalarType dtype"
)
_ASCENT = (
    "Tensor[] grads, Tensor(d!) table, Tensor blocks, Tensor radius, Tensor sq, *, "
    "float eps, bool skip_nonfinite, ScalarType dtype"
)

SCHEMAS: dict[str, str] = {
    # table[:, GRAD] = addresses; status = [gradients that do not lie as their parameter does, missing ones]; a
    # gradient on another device than `like` does not
    "gather": (
        "(Tensor(a!) table, Tensor(b!) status, Tensor[] grads, Tensor layout, Tensor like, *, ScalarType dtype) -> ()"
    ),
    # sq[buffer] = ||g||^2. Unless `ema` is empty, then AE-SAM's statistics of n = sum(sq):
    # mean = decay mean + (1 - decay) n;  var = decay var + (1 - decay) (n - mean)^2;
    # threshold = mean + coefficient sqrt(var);  fired = n >= threshold.  An n that is not finite, or whose variance
    # is not, changes nothing and does not fire
    "norm": f"(Tensor(a!) sq, Tensor(b!) partials, Tensor(c!) ema, {_PASS}, {_NORM}) -> ()",
    # sq[buffer] = ||T_w g||^2, and the statistics of that
    "norm_scaled": (
        "(Tensor(a!) sq, Tensor(b!) partials, Tensor(c!) ema, Tensor[] params, Tensor master, "
        f"{_PASS}, Tensor radius, {_NORM}) -> ()"
    ),
    # sq = [||g_s||^2, <g, g_s>], two elements of any stride; g is `gradient`, g_s are `grads`
    "dots": f"(Tensor(a!) sq, Tensor(b!) partials, Tensor gradient, {_PASS}, *, ScalarType dtype) -> ()",
    # g_v = g_s - <g, g_s> / ||g||^2 g;  sq = ||g_v||^2. A gradient that is missing is zero. Changes nothing where
    # g is zero, or a product is not finite
    "project": (
        f"(Tensor(a!) g_v, Tensor(b!) sq, Tensor(c!) partials, Tensor gradient, {_PASS}, Tensor products, *, "
        "ScalarType dtype) -> ()"
    ),
    # out = a x + b v;  sq = ||out||^2. A row that x has not stays as it is, and counts where out is v. Changes nothing
    # where one of `checks` is not finite
    "combine": (
        f"(Tensor(a!) out, Tensor(b!) sq, Tensor(c!) partials, Tensor x, Tensor v, {_PASS}, Tensor coefficients, "
        "Tensor checks, *, ScalarType dtype) -> ()"
    ),
    # backup = w;  w += rho g / (norm + eps);  table[:, BACKUP] of what moved, in the same call (on a device:
    # by the same launch), so that no interrupt can come in between. `gradient` keeps g, unless it is empty. With an
    # empty `backup` w moves in place, and no mark changes
    "ascend": (f"(Tensor(a!)[] params, Tensor(b!) backup, Tensor(e!) gradient, Tensor(c!) counters, {_ASCENT}) -> ()"),
    # backup = w;  w += rho T_w^2 g / (norm + eps)
    "ascend_scaled": f"(Tensor(a!)[] params, Tensor(b!) backup, Tensor(c!) counters, {_ASCENT}) -> ()",
    # The ball of a p-norm, with q = p / (p - 1), its dual exponent. norm_max is norm, and largest[buffer] = max |g|
    "norm_max": (f"(Tensor(a!) sq, Tensor(d!) largest, Tensor(b!) partials, Tensor(c!) ema, {_PASS}, {_NORM}) -> ()"),
    # sq = sum (|g| / m)^q, one element; m is the largest magnitude. So ||g||_q = m sq^(1/q), and nothing overflows.
    # 0 where g is zero
    "norm_p": (f"(Tensor(a!) sq, Tensor(b!) partials, {_PASS}, Tensor largest, *, float q, ScalarType dtype) -> ()"),
    # backup = w;  w += rho sign(g) (|g| / (||g||_q + eps))^(q - 1).  `exponent` is q - 1, which is more than q has
    # digits for. 0 is p = inf, w += rho sign(g), and reads neither `largest` nor `powers`
    "ascend_p": (
        "(Tensor(a!)[] params, Tensor(b!) backup, Tensor(c!) counters, Tensor[] grads, Tensor(d!) table, "
        "Tensor blocks, Tensor radius, Tensor sq, Tensor largest, Tensor powers, *, "
        "float exponent, float eps, bool skip_nonfinite, ScalarType dtype) -> ()"
    ),
    # w = backup
    "restore": "(Tensor(a!)[] params, Tensor backup, Tensor table, Tensor blocks, *, ScalarType dtype) -> ()",
    # coefficients = constant + slope q, with q = x / y of the sums x, y of numerator and denominator, or
    # sqrt(x) / sqrt(y) with `root`; q = 0 unless sqrt(y) > NORM_MIN. A slope of 0 takes no q, whatever it is
    "mix": (
        "(Tensor(a!) coefficients, Tensor numerator, Tensor denominator, *, "
        "float[2] constant, float[2] slope, bool root) -> ()"
    ),
    # torch.optim.SGD's step from the backup, or in place, along clip (a g + b v): clipped as g would be
    "sgd": f"(Tensor(a!)[] params, Tensor(b!) momentum_buffer, Tensor(c!) step, Tensor(d!) counters, {_RULE}) -> ()",
    # torch.optim.Adam's and AdamW's
    "adam": (
        "(Tensor(a!)[] params, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) max_exp_avg_sq, "
        f"Tensor(e!) step, Tensor(f!) counters, {_RULE}) -> ()"
    ),
    # sq = ||g||^2, and of SGD's next momentum buffer, momentum buf + (1 - dampening) (clip g + weight_decay w), the
    # products with every eigenvector: along[2 i] = <the terms without g, e_i>, along[2 i + 1] = <that of g
    # unclipped, e_i>. Over the parameters with a gradient; sq is one element
    "nudge_dots": (
        "(Tensor(a!) sq, Tensor(b!) along, Tensor(c!) partials, Tensor[] params, Tensor master, Tensor[] grads, "
        "Tensor momentum_buffer, Tensor step, Tensor eigenvectors, Tensor table, Tensor blocks, Tensor values, *, "
        "ScalarType dtype) -> ()"
    ),
    # sgd's step in place along clip g, but w -= lr (buf + (nudge - 1) sum_i <buf, e_i> e_i), with
    # <buf, e_i> = along[2 i] + clip along[2 i + 1]
    "nudge_sgd": (
        "(Tensor(a!)[] params, Tensor(e!) master, Tensor(b!) momentum_buffer, Tensor(c!) step, Tensor(d!) counters, "
        "Tensor[] grads, Tensor eigenvectors, Tensor table, Tensor blocks, Tensor values, Tensor sq, Tensor along, *, "
        "float max_norm, bool skip_nonfinite, ScalarType dtype) -> ()"
    ),
}


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state buffers for parameters of a dtype: that of the arithmetic."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scalar_dtype(device: torch.device) -> torch.dtype:
    """The dtype of norms and of group values: float64, or float32 on a device that has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def partials_size(size: int, blocks: int, directions: int = 0) -> int:
    """Elements of ``partials`` for flat buffers of ``size`` elements and so many blocks: for any backend, two sums, and
    two more for each direction."""
    return 1 + (2 + 2 * directions) * max(1, -(-size // CHUNK), blocks)


library = torch.library.Library("sharpkern", "DEF")


def _fake(*args: object, **kwargs: object) -> None:
    """Every op only mutates: there is nothing to infer."""


for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema)
    torch.library.register_fake(f"sharpkern::{_name}", _fake, lib=library)
