"""Every op in plain PyTorch: the fallback where nothing is compiled, and the tests' oracle.

Each function has the arguments of its schema (see ``schema.py``) and walks the lists of tensors. No number
made from data is read on the host: a skipped step is a ``torch.where``, not an ``if``. Arithmetic is float32
for the half types, as in every backend. Sums are torch's: the same on every run, not for every number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .schema import (
    ADAM,
    BACKUP,
    GRAD,
    GROUP,
    LEFT_OUT,
    MISMATCH,
    NORM_MIN,
    NUDGED,
    NUMEL,
    SCALE,
    SCALED,
    SGD,
    SLOT,
    library,
)

Row = list[int]


def _rows(table: Tensor, params: Sequence[Tensor]) -> list[Row]:
    rows: list[Row] = table.tolist()
    if len(rows) != len(params):
        raise RuntimeError(f"sharpkern: {len(params)} tensors for a table of {len(rows)} rows")
    return rows


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _slot(buffer: Tensor, like: Tensor, row: Row) -> Tensor:
    """The view of a flat buffer that belongs to a parameter: the parameter's own shape and strides."""
    return buffer.as_strided(like.size(), like.stride(), buffer.storage_offset() + row[SLOT])


def _weights(param: Tensor, backup: Tensor, row: Row) -> Tensor:
    """A parameter's weights, in the dtype of the arithmetic: those of the master, where the backup is one."""
    return _slot(backup, param, row) if _is_master(backup, param) else _wide(param)


def _is_master(backup: Tensor, param: Tensor) -> bool:
    return backup.numel() > 0 and backup.dtype != param.dtype


def _has_grad(param: Tensor, grad: Tensor) -> bool:
    return grad.numel() != 0 and param.numel() != 0


def gather(
    table: Tensor, status: Tensor, grads: Sequence[Tensor], layout: Tensor, like: Tensor, *, dtype: torch.dtype
) -> None:
    addresses = []
    for grad, (dim, *expected) in zip(grads, layout.tolist(), strict=True):
        address = MISMATCH
        if grad.layout == torch.strided:
            if grad.numel() == 0:
                address = 0
            elif (
                grad.dtype == dtype
                and grad.device == like.device
                and grad.dim() == dim
                and list(grad.size()) == expected[:dim]
                and all(
                    size == 1 or have == want
                    for size, have, want in zip(grad.size(), grad.stride(), expected[dim : 2 * dim], strict=True)
                )
            ):
                address = grad.data_ptr() or MISMATCH
        addresses.append(address)
    table[:, GRAD] = torch.tensor(addresses, dtype=torch.int64, device="cpu")
    status.copy_(torch.tensor([addresses.count(MISMATCH), addresses.count(0)], device="cpu"))


def gather_negative(
    table: Tensor, status: Tensor, grads: Sequence[Tensor], layout: Tensor, like: Tensor, *, dtype: torch.dtype
) -> None:
    """gather for a list with lazily negated tensors, which torch would resolve into copies that do not live on.

    A real gradient comes out so when it is the imaginary part of a conjugate.
    """
    unusable = torch.empty(1, dtype=torch.bool, device="cpu")  # of a dtype that nothing has: a mismatch
    torch.ops.sharpkern.gather.default(
        table, status, [unusable if g.is_neg() else g for g in grads], layout, like, dtype=dtype
    )


def norm(
    sq: Tensor,
    partials: Tensor,
    ema: Tensor,
    grads: Sequence[Tensor],
    table: Tensor,
    blocks: Tensor,
    *,
    buffer: int,
    decay: float,
    coefficient: float,
    dtype: torch.dtype,
) -> None:
    total = sq.new_zeros(())
    for grad in grads:
        if grad.numel():
            total += _wide(grad).square().sum(dtype=sq.dtype)
    sq[buffer] = total
    update_ema(ema, sq, decay, coefficient)


def norm_scaled(
    sq: Tensor,
    partials: Tensor,
    ema: Tensor,
    params: Sequence[Tensor],
    master: Tensor,
    grads: Sequence[Tensor],
    table: Tensor,
    blocks: Tensor,
    radius: Tensor,
    *,
    buffer: int,
    decay: float,
    coefficient: float,
    dtype: torch.dtype,
) -> None:
    total = sq.new_zeros(())
    for param, grad, row in zip(params, grads, _rows(table, params), strict=True):
        if _has_grad(param, grad) and row[SCALE] != LEFT_OUT:
            a = _wide(grad)
            if row[SCALE] == SCALED:
                a = a * (_weights(param, master, row).abs() + radius[row[GROUP], 1].to(a.dtype))
            total += a.square().sum(dtype=sq.dtype)
    sq[buffer] = total
    update_ema(ema, sq, decay, coefficient)


def update_ema(ema: Tensor, sq: Tensor, decay: float, coefficient: float) -> None:
    if not ema.numel():
        return
    n = sq.sum()
    mean = decay * ema[0] + (1 - decay) * n
    var = decay * ema[1] + (1 - decay) * (n - mean) ** 2
    spread = var.sqrt()
    # An infinite coefficient times a spread of 0 would be NaN.
    threshold = mean + torch.where(spread > 0, coefficient * spread, coefficient if math.isinf(coefficient) else 0.0)
    seen = var.isfinite()
    ema[:3] = torch.where(seen, torch.stack([mean, var, threshold]), ema[:3])
    ema[3] = (seen & (n >= threshold)).to(ema.dtype)


def norm_max(
    sq: Tensor,
    largest: Tensor,
    partials: Tensor,
    ema: Tensor,
    grads: Sequence[Tensor],
    table: Tensor,
    blocks: Tensor,
    *,
    buffer: int,
    decay: float,
    coefficient: float,
    dtype: torch.dtype,
) -> None:
    norm(
        sq, partials, ema, grads, table, blocks,
        buffer=buffer, decay=decay, coefficient=coefficient, dtype=dtype,
    )  # fmt: skip
    magnitudes = [grad.abs().max().to(sq.dtype) for grad in grads if grad.numel()]
    largest[buffer] = torch.stack(magnitudes).max() if magnitudes else 0.0


def _power(grad: Tensor, largest: Tensor, y: float) -> Tensor:
    """(|g| / m)^y; 0 for a zero, NaN for what is not finite. In float64, which has every quotient of float32."""
    a = grad.abs().to(largest.dtype)
    return torch.where(a > 0, (a / largest.max()).pow(y), a) + (a - a)


def norm_p(
    sq: Tensor,
    partials: Tensor,
    grads: Sequence[Tensor],
    table: Tensor,
    blocks: Tensor,
    largest: Tensor,
    *,
    q: float,
    dtype: torch.dtype,
) -> None:
    total = torch.zeros_like(sq)
    for grad in grads:
        if grad.numel():
            total += _power(grad, largest, q).sum()
    sq.copy_(total)


def dots(
    sq: Tensor,
    partials: Tensor,
    gradient: Tensor,
    grads: Sequence[Tensor],
    table: Tensor,
    blocks: Tensor,
    *,
    dtype: torch.dtype,
) -> None:
    squared, product = torch.zeros_like(sq).unbind()
    for grad, row in zip(grads, _rows(table, grads), strict=True):
        if grad.numel():
            second = _wide(grad)
            squared += second.square().sum(dtype=sq.dtype)
            if row[BACKUP]:
                product += (_wide(_slot(gradient, grad, row)) * second).sum(dtype=sq.dtype)
    sq.copy_(torch.stack([squared, product]))


def project(
    g_v: Tensor,
    sq: Tensor,
    partials: Tensor,
    gradient: Tensor,
    grads: Sequence[Tensor],
    table: Tensor,
    blocks: Tensor,
    products: Tensor,
    *,
    dtype: torch.dtype,
) -> None:
    first, second, product = products.sum(-1)
    along = (product / first).to(g_v.dtype)  # may leave the range of float32
    go = first.isfinite() & second.isfinite() & product.isfinite() & (first > 0) & along.isfinite()
    total = torch.zeros_like(sq)
    for grad, row in zip(grads, _rows(table, grads), strict=True):
        # A row without a gradient is looked at in memory order.
        like = grad if grad.numel() else g_v[row[SLOT] : row[SLOT] + row[NUMEL]]
        kept = _slot(g_v, like, row)
        direction = _wide(grad) if grad.numel() else torch.zeros_like(kept)
        if row[BACKUP]:
            direction = direction - along * _wide(_slot(gradient, like, row))
        _keep(kept, direction, go)
        total += direction.square().sum(dtype=sq.dtype)
    _keep(sq, total, go)


def combine(
    out: Tensor,
    sq: Tensor,
    partials: Tensor,
    x: Tensor,
    v: Tensor,
    grads: Sequence[Tensor],
    table: Tensor,
    blocks: Tensor,
    coefficients: Tensor,
    checks: Tensor,
    *,
    dtype: torch.dtype,
) -> None:
    go = _go(checks, bool(checks.numel()), sq)
    a, b = coefficients.to(out.dtype)
    in_place = out.data_ptr() == v.data_ptr()
    total = torch.zeros_like(sq)
    for grad, row in zip(grads, _rows(table, grads), strict=True):
        # A row without a gradient is looked at in memory order.
        like = grad if grad.numel() else v[row[SLOT] : row[SLOT] + row[NUMEL]]
        kept, combined = _slot(out, like, row), _slot(v, like, row)
        if row[BACKUP] if x.numel() else grad.numel():
            combined = b * combined + a * (_slot(x, like, row) if x.numel() else _wide(grad))
            _keep(kept, combined, go)
        elif not in_place:
            continue
        total += combined.square().sum(dtype=sq.dtype)
    _keep(sq, total, go)


def _ascend(
    params: Sequence[Tensor],
    backup: Tensor,
    gradient: Tensor,
    counters: Tensor,
    grads: Sequence[Tensor],
    table: Tensor,
    radius: Tensor,
    sq: Tensor,
    *,
    eps: float,
    skip_nonfinite: bool,
    scaled: bool,
) -> None:
    squared = sq.sum(-1)
    go = squared.isfinite().all() if skip_nonfinite else torch.ones_like(squared[-1], dtype=torch.bool)
    scales = radius[:, 0] / (squared[-1].sqrt() + eps)
    for i, (param, grad, row) in enumerate(zip(params, grads, _rows(table, params), strict=True)):
        if not _has_grad(param, grad) or (scaled and row[SCALE] == LEFT_OUT):
            continue
        w, g = _weights(param, backup, row), _wide(grad)
        if backup.numel():
            _slot(backup, param, row).copy_(w)
            table[i, BACKUP] = 1
        if gradient.numel():
            _slot(gradient, param, row).copy_(grad)
        direction = scales[row[GROUP]].to(w.dtype) * g
        if scaled and row[SCALE] == SCALED:
            t = w.abs() + radius[row[GROUP], 1].to(w.dtype)
            direction = t * (t * direction)
        _keep(param, w + direction, go)
    if counters.numel():
        counters[:2] += 1


def ascend(
    params: Sequence[Tensor],
    backup: Tensor,
    gradient: Tensor,
    counters: Tensor,
    grads: Sequence[Tensor],
    table: Tensor,
    blocks: Tensor,
    radius: Tensor,
    sq: Tensor,
    *,
    eps: float,
    skip_nonfinite: bool,
    dtype: torch.dtype,
) -> None:
    _ascend(
        params, backup, gradient, counters, grads, table, radius, sq,
        eps=eps, skip_nonfinite=skip_nonfinite, scaled=False,
    )  # fmt: skip


def ascend_scaled(
    params: Sequence[Tensor],
    backup: Tensor,
    counters: Tensor,
    grads: Sequence[Tensor],
    table: Tensor,
    blocks: Tensor,
    radius: Tensor,
    sq: Tensor,
    *,
    eps: float,
    skip_nonfinite: bool,
    dtype: torch.dtype,
) -> None:
    none = backup[:0]
    _ascend(
        params, backup, none, counters, grads, table, radius, sq,
        eps=eps, skip_nonfinite=skip_nonfinite, scaled=True,
    )  # fmt: skip


def ascend_p(
    params: Sequence[Tensor],
    backup: Tensor,
    counters: Tensor,
    grads: Sequence[Tensor],
    table: Tensor,
    blocks: Tensor,
    radius: Tensor,
    sq: Tensor,
    largest: Tensor,
    powers: Tensor,
    *,
    exponent: float,
    eps: float,
    skip_nonfinite: bool,
    dtype: torch.dtype,
) -> None:
    go = _go(sq, skip_nonfinite, sq)
    scales = radius[:, 0]
    if exponent:
        # (m / (||g||_q + eps))^(q - 1), with q = exponent + 1
        scales = scales * (powers.sum().pow(1 / (exponent + 1)) + eps / largest.max()).pow(-exponent)
    for i, (param, grad, row) in enumerate(zip(params, grads, _rows(table, params), strict=True)):
        if not _has_grad(param, grad):
            continue
        w, g = _weights(param, backup, row), _wide(grad)
        _slot(backup, param, row).copy_(w)
        table[i, BACKUP] = 1
        direction = scales[row[GROUP]] * g.sign().to(scales.dtype)
        if exponent:
            direction = direction * _power(grad, largest, exponent)
        _keep(param, w + direction.to(w.dtype), go)
    if counters.numel():
        counters[:2] += 1


def restore(params: Sequence[Tensor], backup: Tensor, table: Tensor, blocks: Tensor, *, dtype: torch.dtype) -> None:
    for param, row in zip(params, _rows(table, params), strict=True):
        if row[BACKUP]:
            param.copy_(_slot(backup, param, row))


def mix(
    coefficients: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    *,
    constant: Sequence[float],
    slope: Sequence[float],
    root: bool,
) -> None:
    x, y = numerator.sum(), denominator.sum()
    norm = y.sqrt()
    q = torch.where(norm > NORM_MIN, x.sqrt() / norm if root else x / y, 0.0)
    for i in (0, 1):
        coefficients[i] = constant[i] + slope[i] * q if slope[i] else constant[i]


def _clip(sq: Tensor, max_norm: float) -> Tensor | float:
    if math.isinf(max_norm):
        return 1.0
    return (max_norm / (sq.sum(-1)[-1].sqrt() + 1e-6)).clamp(max=1.0)


def _descents(
    params: Sequence[Tensor],
    counters: Tensor,
    grads: Sequence[Tensor],
    backup: Tensor,
    direction: Tensor,
    table: Tensor,
    sq: Tensor,
    coefficients: Tensor,
    max_norm: float,
    go: Tensor,
) -> Iterator[tuple[int, Row, Tensor, Tensor, Tensor]]:
    """(index, row, parameter, weights to step from, clip (a g + b v)) of every parameter that steps.

    The others get their backup back. Counts the skipped step.
    """
    if direction.numel() and not coefficients.numel():
        raise RuntimeError("sharpkern: a direction needs its coefficients")
    scale = _clip(sq, max_norm)
    if coefficients.numel() and not direction.numel():
        scale = scale * coefficients[0]
    for i, (param, grad, row) in enumerate(zip(params, grads, _rows(table, params), strict=True)):
        if row[BACKUP]:
            param.copy_(_slot(backup, param, row))
        if _has_grad(param, grad):
            g = _wide(grad)
            if direction.numel():
                a, b = coefficients.to(g.dtype).unbind()
                g = b * _wide(_slot(direction, param, row)) + a * g
            yield i, row, param, _weights(param, backup, row), g * scale
    if counters.numel():
        counters[2] += (~go).to(counters.dtype)


def _go(sq: Tensor, skip_nonfinite: bool, like: Tensor) -> Tensor:
    if skip_nonfinite:
        return sq.sum(-1).isfinite().all()
    return torch.ones((), dtype=torch.bool, device=like.device)


def _keep(buffer: Tensor, value: Tensor, go: Tensor) -> None:
    buffer.copy_(torch.where(go, value.to(buffer.dtype), buffer))


def _move(param: Tensor, value: Tensor, go: Tensor, backup: Tensor, row: Row) -> None:
    """New weights: into the master, too, where the backup is one."""
    _keep(param, value, go)
    if _is_master(backup, param):
        _keep(_slot(backup, param, row), value, go)


def sgd(
    params: Sequence[Tensor],
    momentum_buffer: Tensor,
    step: Tensor,
    counters: Tensor,
    grads: Sequence[Tensor],
    backup: Tensor,
    direction: Tensor,
    table: Tensor,
    blocks: Tensor,
    values: Tensor,
    sq: Tensor,
    coefficients: Tensor,
    *,
    max_norm: float,
    skip_nonfinite: bool,
    dtype: torch.dtype,
) -> None:
    go = _go(sq, skip_nonfinite, step)
    groups = values.tolist()
    descents = _descents(params, counters, grads, backup, direction, table, sq, coefficients, max_norm, go)
    for i, row, param, w, g in descents:
        v = dict(zip(SGD, groups[row[GROUP]], strict=True))
        d = _plus(-g if v["maximize"] else g, v["weight_decay"], w)
        if v["momentum"]:
            buffer = _slot(momentum_buffer, param, row)
            following = v["momentum"] * buffer + (1 - v["dampening"]) * d
            following = torch.where(step[i] == 0, d, following)
            d = d + v["momentum"] * following if v["nesterov"] else following
            _keep(buffer, following, go)
            step[i] += go.to(step.dtype)
        _move(param, w - v["lr"] * d, go, backup, row)


def _plus(total: Tensor, c: float, x: Tensor) -> Tensor:
    """total + c x. A c of 0 takes no x, as in torch.optim: 0 * inf would be NaN."""
    return total + c * x if c else total


def _one_minus_power(beta: float, t: Tensor) -> Tensor:
    """1 - beta^t, to the last bit where t is float32, too: the difference would lose half of 1 - 0.999."""
    return -torch.expm1(t * math.log(beta)) if beta else torch.ones_like(t)


def adam(
    params: Sequence[Tensor],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor,
    step: Tensor,
    counters: Tensor,
    grads: Sequence[Tensor],
    backup: Tensor,
    direction: Tensor,
    table: Tensor,
    blocks: Tensor,
    values: Tensor,
    sq: Tensor,
    coefficients: Tensor,
    *,
    max_norm: float,
    skip_nonfinite: bool,
    dtype: torch.dtype,
) -> None:
    go = _go(sq, skip_nonfinite, step)
    groups = values.tolist()
    descents = _descents(params, counters, grads, backup, direction, table, sq, coefficients, max_norm, go)
    for i, row, param, w, g in descents:
        v = dict(zip(ADAM, groups[row[GROUP]], strict=True))
        m, s = _slot(exp_avg, param, row), _slot(exp_avg_sq, param, row)
        d = -g if v["maximize"] else g
        shrink = 1.0
        if v["decoupled_weight_decay"]:
            shrink -= v["lr"] * v["weight_decay"]
        else:
            d = _plus(d, v["weight_decay"], w)
        t = step[i].to(sq.dtype) + 1
        step_size = v["lr"] / _one_minus_power(v["beta1"], t)
        correction = _one_minus_power(v["beta2"], t).sqrt()
        first = m + (1 - v["beta1"]) * (d - m)
        second = v["beta2"] * s + (1 - v["beta2"]) * d * d
        largest = second
        if v["amsgrad"]:
            peak = _slot(max_exp_avg_sq, param, row)
            largest = torch.maximum(peak, second)
            _keep(peak, largest, go)
        denominator = largest.sqrt() / correction.to(w.dtype) + v["eps"]
        _keep(m, first, go)
        _keep(s, second, go)
        _move(param, shrink * w - step_size.to(w.dtype) * (first / denominator), go, backup, row)
        step[i] += go.to(step.dtype)


def nudge_dots(
    sq: Tensor,
    along: Tensor,
    partials: Tensor,
    params: Sequence[Tensor],
    master: Tensor,
    grads: Sequence[Tensor],
    momentum_buffer: Tensor,
    step: Tensor,
    eigenvectors: Tensor,
    table: Tensor,
    blocks: Tensor,
    values: Tensor,
    *,
    dtype: torch.dtype,
) -> None:
    groups = values.tolist()
    squared, products = torch.zeros_like(sq), torch.zeros_like(along)
    for i, (param, grad, row) in enumerate(zip(params, grads, _rows(table, params), strict=True)):
        if not _has_grad(param, grad):
            continue
        v = dict(zip(NUDGED, groups[row[GROUP]], strict=True))
        g = _wide(grad)
        kept = _plus(torch.zeros_like(g), v["weight_decay"], _weights(param, master, row))
        pulled = -g if v["maximize"] else g
        if v["momentum"]:
            first, intake = step[i] == 0, 1 - v["dampening"]
            buffer = _slot(momentum_buffer, param, row)
            kept = torch.where(first, kept, v["momentum"] * buffer + intake * kept)
            pulled = torch.where(first, pulled, intake * pulled)
        squared += g.square().sum(dtype=sq.dtype)
        for k, flat in enumerate(eigenvectors):
            e = _slot(flat, param, row)
            products[2 * k] += (kept * e).sum(dtype=sq.dtype)
            products[2 * k + 1] += (pulled * e).sum(dtype=sq.dtype)
    sq.copy_(squared)
    along.copy_(products)


def nudge_sgd(
    params: Sequence[Tensor],
    master: Tensor,
    momentum_buffer: Tensor,
    step: Tensor,
    counters: Tensor,
    grads: Sequence[Tensor],
    eigenvectors: Tensor,
    table: Tensor,
    blocks: Tensor,
    values: Tensor,
    sq: Tensor,
    along: Tensor,
    *,
    max_norm: float,
    skip_nonfinite: bool,
    dtype: torch.dtype,
) -> None:
    go, clip = _go(sq, skip_nonfinite, step), _clip(sq, max_norm)
    groups = values.tolist()
    kept, pulled = along.sum(-1).view(-1, 2).unbind(-1)
    products = kept + clip * pulled
    for i, (param, grad, row) in enumerate(zip(params, grads, _rows(table, params), strict=True)):
        if master.numel() and row[BACKUP]:
            param.copy_(_slot(master, param, row))
        if not _has_grad(param, grad):
            continue
        v = dict(zip(NUDGED, groups[row[GROUP]], strict=True))
        w, g = _weights(param, master, row), _wide(grad) * clip
        d = _plus(-g if v["maximize"] else g, v["weight_decay"], w)
        if v["momentum"]:
            buffer = _slot(momentum_buffer, param, row)
            d = torch.where(step[i] == 0, d, v["momentum"] * buffer + (1 - v["dampening"]) * d)
            _keep(buffer, d, go)
            step[i] += go.to(step.dtype)
        factors = ((v["nudge"] - 1) * products).to(w.dtype)
        d = d + sum(factor * _slot(e, param, row) for factor, e in zip(factors, eigenvectors, strict=True))
        _move(param, w - v["lr"] * d, go, master, row)
    if counters.numel():
        counters[2] += (~go).to(counters.dtype)


IMPLEMENTATIONS = {
    "gather": gather,
    "norm": norm,
    "norm_scaled": norm_scaled,
    "norm_max": norm_max,
    "norm_p": norm_p,
    "dots": dots,
    "project": project,
    "combine": combine,
    "ascend": ascend,
    "ascend_scaled": ascend_scaled,
    "ascend_p": ascend_p,
    "restore": restore,
    "mix": mix,
    "sgd": sgd,
    "adam": adam,
    "nudge_dots": nudge_dots,
    "nudge_sgd": nudge_sgd,
}

for _name, _implementation in IMPLEMENTATIONS.items():
    library.impl(_name, _implementation, "CompositeExplicitAutograd")
library.impl("gather", gather_negative, "Negative")
