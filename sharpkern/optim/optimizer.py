"""The part that every two-pass optimizer shares: passes, policy of errors, state, checkpoints.

An algorithm is a subclass that says what it measures in the first pass and where it perturbs; see ``sam.py``.
"""

from __future__ import annotations

import itertools
import math
import numbers
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..batch_stats import frozen_batch_stats
from ..flat import SUPPORTED_DTYPES, FlatBuffers, GroupTable, is_capturing, is_dense, overlaps
from ..ops.schema import NORM_MIN, scalar_dtype
from ..policy import Always, Policy
from ..rules import FusedRule, Group, WrappedRule, make_rule

FIRST, LAST = 0, 1  # rows of the norms: the pass that measures, the pass that moves

# State of any algorithm of ours: one that does not know it leaves it out when it loads.
_FAMILY_STATE = ("g_v",)

_COUNTERS = ("steps", "second_passes", "skipped_steps")


class TwoPassOptimizer(Optimizer):
    """Base class of the optimizers that may look at the gradient twice a step.

    Args:
        params: iterable of tensors, of dicts, or of (name, tensor) pairs, as in torch.
        base_optimizer: the class of the rule that moves the weights.
        own: this algorithm's group options and their defaults.
        policy: which steps take the second pass.
        perturb_eps: added to the norm in the radius.
        model: when given, its batch-norm statistics are frozen in every pass but the first.
        max_grad_norm: clip the gradient of the last pass to this norm, as ``clip_grad_norm_`` does.
        skip_nonfinite: leave everything alone in a step with a gradient that is not finite.
        flatten: move parameters and gradients into flat buffers.
        base_kwargs: the base optimizer's options.
    """

    # Rows of the norms' matrix; an algorithm may have more of its own.
    _norm_rows = 2
    # Tensors under the key ``sharpkern`` of a state dict, and their shapes; None: of any size.
    _statistics_shapes: Mapping[str, tuple[int | None, ...]] = {"counters": (len(_COUNTERS),), "squared_norm": ()}
    # Names in ``opt.state[p]`` that are the algorithm's, not the rule's.
    _own_state: tuple[str, ...] = ()

    def __init__(
        self,
        params: Any,
        base_optimizer: Any,
        own: dict[str, Any],
        *,
        policy: Policy | None = None,
        perturb_eps: float,
        model: nn.Module | None,
        max_grad_norm: float | None,
        skip_nonfinite: bool,
        flatten: bool,
        base_kwargs: dict[str, Any],
    ) -> None:
        _check_number("perturb_eps", perturb_eps, positive=True)  # 0 would make a zero gradient NaN
        if max_grad_norm is not None:
            _check_number("max_grad_norm", max_grad_norm, positive=True)
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model should be a torch.nn.Module, but got {torch.typename(model)}")
        self._rule = make_rule(base_optimizer, base_kwargs, tuple(own), type(self).__name__)
        self._check_options(own)
        self._policy = Always() if policy is None else policy
        # First passes so far, and those of them after which no second one was wanted. Both are the host's, which
        # knows of every decision.
        self._t = 0
        self._plain_steps = 0
        self._perturb_eps = float(perturb_eps)
        self._model = model
        self._max_norm = math.inf if max_grad_norm is None else float(max_grad_norm)
        self._skip_nonfinite = bool(skip_nonfinite)
        self._flatten = bool(flatten)
        self._counters = torch.zeros(len(_COUNTERS), dtype=torch.int64, device="cpu")
        self._measured = torch.zeros((), dtype=torch.float64, device="cpu")
        self._loading: dict[str, Any] | None = None
        self._reset()
        super().__init__(params, {**self._rule.defaults, **own})
        _warn_half(self.param_groups)
        self._share()
        if self._flatten:
            self._lay_out()

    def _reset(self) -> None:
        """What is derived from parameters, and rebuilt when needed."""
        self._flat: list[FlatBuffers] = []
        self._idle: list[Tensor] = []
        self._members: list[list[Tensor]] = []
        self._laid_out = False
        self._seen_state = (0, 0, 0)
        self._norms: dict[torch.device, Tensor] = {}
        self._scaled_for: tuple[Any, ...] = ()
        self._tables: dict[tuple[str, torch.device], GroupTable] = {}
        self._pending: str | None = None
        # Whether the row FIRST holds the norm of this step's first gradients, although they do not perturb; and
        # whether nobody comes in between, so that the gradients of the first pass are those of the last one.
        self._measured_first = False
        self._unchanged = False
        self._frozen: ExitStack | None = None

    # What an algorithm says.

    def _check_options(self, group: Mapping[str, Any]) -> None:
        """Raise for an option of ours that is out of range."""
        raise NotImplementedError

    def _is_scaled(self, group: Group, name: str | None, param: Tensor) -> bool:
        """Whether the elementwise scale T_w = abs(w) + eta applies to a parameter."""
        return False

    def _decide(self) -> bool:
        """Whether this step, whose gradients are collected, takes a second pass; the norm is measured then."""
        if not self._policy.second_pass(self._t):
            return False
        self._measure_first()
        return True

    def _measure(self, flat: FlatBuffers, sq: Tensor, buffer: int) -> None:
        """Write the squared norm that sets the radius, of one layout, into its element of a row of the norms."""
        self._measure_plain(flat, sq, buffer)

    def _measure_plain(self, flat: FlatBuffers, sq: Tensor, buffer: int) -> None:
        torch.ops.sharpkern.norm.default(
            sq,
            flat.partials,
            flat.empty,
            flat.lists[1],
            flat.rows,
            flat.blocks,
            buffer=buffer,
            decay=0.0,
            coefficient=0.0,
            dtype=flat.dtype,
        )

    def _perturb(self, flat: FlatBuffers, sq: Tensor, counters: Tensor) -> None:
        """Keep the weights in the backup and move them to where the second gradient is taken."""
        raise NotImplementedError

    def _mixed(self, flat: FlatBuffers) -> tuple[Tensor, Tensor, float]:
        """(g_v, its squared norm, alpha): the direction that the rule adds to a layout's gradient, or none."""
        return flat.empty, flat.empty, 0.0

    def _effective_lr(self, group: Group) -> Any:
        """The learning rate of this step; the group's own stays the user's and the scheduler's."""
        return group["lr"]

    # Parameters.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch.

        Raises:
            ValueError, TypeError: for options out of range and parameters that cannot be optimized, before
                anything changed.
            RuntimeError: while the weights are perturbed.
        """
        if self._pending:
            raise RuntimeError("add_param_group() between two passes of a step: call second_step() or restore() first")
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        if "params" not in param_group:
            raise ValueError("param_group has no 'params'")
        group = dict(param_group)
        if not isinstance(group["params"], (Tensor, set)):
            group["params"] = list(group["params"])
        full = {**self.defaults, **group}
        self._check_options(full)
        self._rule.check(full)
        self._check_params(group["params"], len(self.param_groups))
        super().add_param_group(group)
        self._laid_out = False

    def _check_params(self, params: Any, index: int) -> None:
        seen: set[Tensor] = {p for group in self.param_groups for p in group["params"]}
        entries = [params] if isinstance(params, Tensor) else params
        trainable = [(p, label) for p, _, _, label in self._entries() if p.requires_grad and not p.is_meta]
        for i, entry in enumerate(entries):
            named = isinstance(entry, tuple) and len(entry) == 2
            param = entry[1] if named else entry
            if not isinstance(param, Tensor):
                continue  # torch names the type
            name = f"parameter {entry[0]!r}" if named else f"parameter {i} of group {index}"
            if param in seen:
                raise ValueError(f"{name} appears more than once among the parameters")
            seen.add(param)
            if is_lazy(param):
                raise ValueError(f"{name} is not initialized: run a forward pass of its lazy module first")
            if param.is_meta:
                raise ValueError(f"{name} is on the meta device: it has no data to optimize")
            if not param.requires_grad:
                continue  # only a trainable parameter is ever touched
            if param.layout != torch.strided:
                raise TypeError(f"{name} should be a dense tensor, but its layout is {param.layout}")
            if is_traceable_wrapper_subclass(param):
                raise TypeError(f"{name} is a {torch.typename(param)}: tensor subclasses are not supported")
            if param.dtype not in SUPPORTED_DTYPES:
                raise TypeError(
                    f"{name} has dtype {param.dtype}; supported are "
                    + ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES)
                )
            if overlaps(param):
                raise ValueError(f"{name} has elements that share memory (an expanded tensor?)")
            trainable.append((param, name))
        _check_aliases(trainable)

    def _entries(self) -> Iterable[tuple[Tensor, int, str | None, str]]:
        """(parameter, group index, its name or None, what errors call it)."""
        for g, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for i, p in enumerate(group["params"]):
                name = names[i] if names else None
                yield p, g, name, f"parameter {name!r}" if name else f"parameter {i} of group {g}"

    # Layouts.

    def _lay_out(self) -> None:
        """Lay out the parameters afresh and take the state over, from wherever it lies now."""
        members: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, int, str | None, str]]] = {}
        idle = []
        # Parameters whose weights are in a backup, and where; they have a slot whatever became of them.
        backups = {
            p: (flat, i)
            for flat in (self._flat if self._pending == "perturbed" else [])
            for i, (p, perturbed) in enumerate(zip(flat.params, flat.perturbed(), strict=True))
            if perturbed
        }
        for entry in self._entries():
            p = entry[0]
            if p.requires_grad or p.grad is not None or p in backups:
                if p.is_meta or p.dtype not in SUPPORTED_DTYPES or p.layout != torch.strided:
                    raise TypeError(f"{entry[3]} became {p.dtype}, {p.layout}, on {p.device}: it cannot be optimized")
                members.setdefault((p.device, p.dtype), []).append(entry)
            else:
                idle.append(p)
        if any(is_capturing(device) for device, _ in members):
            raise RuntimeError(
                "take one step before the capture of a CUDA graph: buffers cannot be laid out while it is captured"
            )
        laid = [(p, label) for entries in members.values() for p, _, _, label in entries]
        _check_aliases(laid)
        for p, label in laid if self._flatten else []:
            if not is_dense(p):
                raise ValueError(f"flatten=True needs parameters without gaps in memory, but {label} has some")
        flats = [
            FlatBuffers(
                [p for p, _, _, _ in entries],
                [label for _, _, _, label in entries],
                [g for _, g, _, _ in entries],
                [self._is_scaled(self.param_groups[g], name, p) for p, g, name, _ in entries],
                flatten=self._flatten,
            )
            for entries in members.values()
        ]
        for flat in flats:
            for i, p in enumerate(flat.params):
                if p in backups:
                    flat.take_over(i, *backups[p])
        self._keep_statistics()
        self._flat, self._idle = flats, idle
        self._laid_out = False  # until the state has been taken over
        self._members = [list(group["params"]) for group in self.param_groups]
        self._scaled_for = self._scaled_key()
        self._tables = {}
        self._norms = {
            device: torch.zeros(self._norm_rows, len(flats), dtype=scalar_dtype(device), device=device)
            for device in {flat.device for flat in flats}
        }
        self._take_state()
        self._laid_out = True

    def _take_state(self) -> None:
        """Take over whatever ``self.state`` and the loaded statistics hold now."""
        for flat in self._flat:
            flat.forget_state()
            if isinstance(self._rule, FusedRule):
                self._rule.attach(flat, self.state, self.param_groups)
        for norms in self._norms.values():
            norms.zero_()
            norms[FIRST, 0] = self._measured
        if self._flat:
            self._counters = self._counters.to(self._flat[0].device)
        self._seen_state = self._state_key()

    @property
    def _owns_state(self) -> bool:
        """Whether any state lies in flat buffers."""
        return isinstance(self._rule, FusedRule) or bool(self._own_state)

    def _state_key(self) -> tuple[int, int, int]:
        """Changes when the user clears or replaces state, or a part of it."""
        return id(self.state), len(self.state), sum(map(len, self.state.values()))

    def _scaled_key(self) -> tuple[Any, ...]:
        return ()

    def _members_changed(self) -> bool:
        groups = self.param_groups
        return (
            len(groups) != len(self._members)
            or not all(
                len(group["params"]) == len(members) and all(map(operator.is_, group["params"], members))
                for group, members in zip(groups, self._members, strict=True)
            )
            or self._scaled_for != self._scaled_key()
            or any(p.requires_grad or p.grad is not None for p in self._idle)
        )

    def _ready(self) -> None:
        """Notice whatever the user moved, froze, loaded or added since the last pass."""
        # Between two passes the members stay: whatever was perturbed has to be found again.
        stale = not self._laid_out or (self._pending is None and self._members_changed())
        attached = [flat.attached() for flat in self._flat]
        if stale or not all(attached):
            self._lay_out()
        elif self._pending is None and self._seen_state != self._state_key() and self._owns_state:
            self._keep_statistics()
            self._take_state()
        elif self._pending is not None and self._seen_state != self._state_key():
            for flat in self._flat:  # cleared between two passes: the views come back with the step
                flat.forget_exposed()
        self._share()

    def _share(self) -> None:
        """Let a wrapped optimizer have our groups and its state."""
        if isinstance(self._rule, WrappedRule) and not self._rule.shares(self):
            with ExitStack() as stack:
                self._hide_own_state(stack)
                self._rule.share(self)

    # Passes.

    def _collect(self) -> None:
        for flat in self._flat:
            flat.collect(self._bad_gradient, fresh=not self.is_perturbed)

    def _bad_gradient(self, name: str, grad: Tensor) -> Exception:
        if grad.layout != torch.strided:
            return RuntimeError(
                f"{type(self).__name__} does not support sparse gradients, but that of {name} is {grad.layout}"
            )
        return RuntimeError(f"the gradient of {name} has shape {tuple(grad.size())}, unlike the parameter")

    def _share_norms(self, row: int) -> None:
        """Every device gets the parts of a norm that were summed on the others."""
        for device, norms in self._norms.items():
            for i, flat in enumerate(self._flat):
                if flat.device != device:
                    norms[row, i].copy_(self._norms[flat.device][row, i], non_blocking=True)

    def _group_table(self, name: str, rows: list[list[float | Tensor]], device: torch.device) -> Tensor:
        """The table of group values ``name`` on a device."""
        table = self._tables.get((name, device))
        if table is None:
            table = self._tables[name, device] = GroupTable((len(rows), len(rows[0])), device)
        return table.update(rows)

    def _counters_for(self, flat: FlatBuffers) -> Tensor:
        """The counters for one layout of a step, so that each step counts once; nothing for the others."""
        return self._counters if flat is self._flat[0] else self._counters[:0]

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are those of the second pass: between ``first_step`` and ``second_step``."""
        return self._pending == "perturbed"

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> bool:
        """After the first backward: measure the gradient and perturb the weights, where the policy wants it.

        When it returns False the gradients may still be changed (clipped, averaged) before ``second_step``, which
        measures them once more.

        Args:
            zero_grad: reset the gradients afterwards, when a second backward is wanted.

        Returns:
            True when the weights are perturbed and a second backward is wanted; False when ``second_step`` is to
            use the gradients that are there.

        Raises:
            RuntimeError: when a first pass is pending already, or for a sparse gradient; nothing changed.
        """
        if self._pending:
            raise RuntimeError("first_step() was called twice: call second_step(), step() or restore() in between")
        self._ready()
        self._collect()
        if not self._decide():
            self._pending = "plain"
            self._t += 1
            self._plain_steps += 1
            for flat in self._flat if not self._unchanged else ():
                flat.grads = []
            return False
        # Before anything moves: an interrupt may come right after a kernel, and restore() must know then.
        self._pending = "perturbed"
        self._t += 1
        for flat in self._flat:
            flat.ascending()
            self._perturb(flat, self._norms[flat.device][FIRST : FIRST + 1], self._counters_for(flat))
            flat.ascended()
            flat.grads = []
        # An autocast region around both passes keeps low-precision copies of the weights.
        torch.clear_autocast_cache()
        self._freeze()
        if zero_grad:
            self.zero_grad()
        return True

    def _measure_first(self) -> None:
        for i, flat in enumerate(self._flat):
            self._measure(flat, self._norms[flat.device][FIRST], i)
        self._share_norms(FIRST)

    def second_step(self, zero_grad: bool = False) -> None:
        """After the second backward: the base update, from the unperturbed weights. Runs through ``step()``.

        Args:
            zero_grad: reset the gradients afterwards.

        Raises:
            RuntimeError: without a ``first_step`` before it.
        """
        if not self._pending:
            raise RuntimeError("second_step() was called before first_step()")
        self.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step.

        Args:
            closure: computes the loss, calls backward and returns the loss. It is called once a pass, with
                gradients reset before each call.

        Returns:
            The loss of the first call; None without a closure. Without one, a pending step is finished; when
            none is pending this is a plain step of the base optimizer.

        Raises:
            RuntimeError: with a closure while a step is pending, or for a sparse gradient.
        """
        if closure is None:
            with torch.no_grad():
                self._last_pass()
            return None
        if self._pending:
            raise RuntimeError("step(closure) while a first_step() is pending: call second_step() or restore() first")
        return self._step_closure(torch.enable_grad()(closure))

    def _step_closure(self, evaluate: Callable[[], Any]) -> Any:
        self.zero_grad()
        loss = evaluate()
        try:
            self._unchanged = True
            if self.first_step(zero_grad=True):
                self._unchanged = False
                evaluate()
            with torch.no_grad():
                self._last_pass()
        except BaseException:
            self.restore()
            raise
        return loss

    def _last_pass(self) -> None:
        """The base update with the gradients that lie there now, from the backup where there is one."""
        if not self._unchanged:
            self._ready()
            self._collect()
        row = self._measure_last()
        first = FIRST if self.is_perturbed and self._skip_nonfinite else row
        if isinstance(self._rule, FusedRule):
            self._descend(self._rule, slice(first, row + 1))
        else:
            self._restore_and_step(self._rule, slice(first, row + 1))
        self._finish()

    def _measure_last(self) -> int:
        """Measure the gradient that the rule takes, where anybody asks. Returns its row of the norms."""
        if self._unchanged and self._measured_first:
            return FIRST
        if self._skip_nonfinite or not math.isinf(self._max_norm) or any(self._mixed(f)[2] for f in self._flat):
            for i, flat in enumerate(self._flat):
                self._measure_plain(flat, self._norms[flat.device][LAST], i)
            self._share_norms(LAST)
        return LAST

    def _descend(self, rule: FusedRule, passes: slice) -> None:
        rows = [rule.values({**group, "lr": self._effective_lr(group)}) for group in self.param_groups]
        for flat in self._flat:
            rule.expose(flat, self.state, self.param_groups)
            direction, g_v_sq, alpha = self._mixed(flat)
            norms = self._norms[flat.device][passes]
            coefficients = flat.empty
            if direction.numel():
                coefficients = flat.coefficients
                torch.ops.sharpkern.mix.default(
                    coefficients, norms[-1], g_v_sq[0], constant=(1.0, 0.0), slope=(0.0, alpha), root=True
                )
            rule.step(
                flat,
                self._counters_for(flat),
                flat.buffer("backup") if self._pending == "perturbed" else flat.empty,
                direction,
                flat.rows,
                flat.blocks,
                self._group_table("values", rows, flat.device),
                norms,
                coefficients,
                max_norm=self._max_norm,
                skip_nonfinite=self._skip_nonfinite,
                dtype=flat.dtype,
            )
            flat.written()
        self._seen_state = self._state_key()

    def _restore_and_step(self, rule: WrappedRule, passes: slice) -> None:
        mixed = [self._mixed(flat) for flat in self._flat]
        self._put_back()
        if self._flat:
            squares = self._norms[self._flat[0].device][passes].sum(-1)
            if self._skip_nonfinite and not bool(squares.isfinite().all()):
                self._counters[2] += 1
                return
        with ExitStack() as stack:
            for flat, (_, g_v_sq, alpha) in zip(self._flat, mixed, strict=True):
                squared = self._norms[flat.device][passes].sum(-1)[-1]
                if alpha:
                    norm = g_v_sq.sum().sqrt()
                    factor = torch.where(norm > NORM_MIN, alpha * (squared.sqrt() / norm), 0.0)
                    self._add_g_v(stack, flat, factor)
                grads = [p.grad for p in flat.params if p.grad is not None]
                if grads and not math.isinf(self._max_norm):
                    clip = (self._max_norm / (squared.sqrt() + 1e-6)).clamp(max=1.0)
                    torch._foreach_mul_(grads, clip.to(flat.dtype))
            self._lend_groups(stack)
            rule.step()
        self._seen_state = self._state_key()

    def _add_g_v(self, stack: ExitStack, flat: FlatBuffers, factor: Tensor) -> None:
        """Put g + factor g_v into ``p.grad`` until the stack closes."""
        for i, p in enumerate(flat.params):
            grad = p.grad
            if grad is not None:
                stack.callback(setattr, p, "grad", grad)
                p.grad = (grad + factor.to(flat.state_dtype) * flat.view("g_v", i)).to(grad.dtype)

    def _lend_groups(self, stack: ExitStack) -> None:
        """Show a wrapped optimizer this step's learning rates, and no state but its own, until the stack closes."""
        for group in self.param_groups:
            lr = self._effective_lr(group) if "lr" in group else None
            if lr is not None and lr is not group["lr"]:
                stack.callback(_take_back_lr, group, group["lr"], lr)
                group["lr"] = lr
        self._hide_own_state(stack)

    def _hide_own_state(self, stack: ExitStack) -> None:
        # Some make their state when a parameter has none, and look for it when there is any.
        for name in self._own_state:
            for p in [p for p, entry in self.state.items() if name in entry]:
                stack.callback(self._show_own_state, p, name, self.state[p][name])
                del self.state[p][name]
                if not self.state[p]:
                    del self.state[p]

    def _show_own_state(self, p: Tensor, name: str, value: Tensor) -> None:
        self.state[p][name] = value

    def _restore_weights(self) -> None:
        for flat in self._flat:
            params, _ = flat.lists
            torch.ops.sharpkern.restore.default(params, flat.buffer("backup"), flat.rows, flat.blocks, dtype=flat.dtype)
            flat.written()

    def _put_back(self) -> None:
        if self._pending == "perturbed":
            self._restore_weights()
            for flat in self._flat:
                flat.finish()
            self._pending = None
        self._thaw()  # whatever a wrapped optimizer does next

    def _finish(self) -> None:
        self._pending = None
        self._measured_first = self._unchanged = False
        for flat in self._flat:
            flat.finish()
        self._thaw()
        torch.clear_autocast_cache()

    def _freeze(self) -> None:
        """No pass from here on counts in the statistics of the model's norm layers."""
        if self._model is not None:
            self._frozen = ExitStack()
            self._frozen.enter_context(frozen_batch_stats(self._model))

    def _thaw(self) -> None:
        if self._frozen is not None:
            self._frozen.close()
            self._frozen = None

    @torch.no_grad()
    def restore(self) -> None:
        """Give the unperturbed weights back and cancel the pending step. Does nothing when none is pending."""
        if self._pending == "perturbed":
            self._ready()
            self._put_back()
        self._finish()

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as in torch. With ``flatten=True`` they stay views of the flat buffer, of zeros."""
        if not self._flatten or not self._flat:
            super().zero_grad(set_to_none)
            return
        self._ready()  # a moved parameter takes its gradient along
        for flat in self._flat:
            flat.zero_grads()

    def unflatten(self) -> None:
        """Undo ``flatten=True``: every parameter and gradient gets memory of its own again."""
        for flat in self._flat:
            flat.unflatten()
        self._flatten = False

    @property
    def base_optimizer(self) -> TwoPassOptimizer:
        """This optimizer: scripts that hand ``opt.base_optimizer`` to a scheduler find the groups here."""
        return self

    # Statistics and checkpoints.

    @property
    def stats(self) -> dict[str, Tensor]:
        """0-d tensors on the device of the parameters, read without waiting for it.

        ``grad_norm``: the norm of the last first pass that was measured; ``steps``: first passes; ``second_passes``;
        ``skipped_steps``: steps that met a gradient that was not finite.
        """
        self._keep_statistics()
        counters = dict(zip(_COUNTERS, self._counters.clone().unbind(), strict=True))
        counters["steps"] += self._plain_steps
        return {"grad_norm": self._measured.sqrt(), **counters}

    def _refuse_perturbed(self, what: str) -> None:
        if self.is_perturbed:
            raise RuntimeError(f"{what} while the weights are perturbed: call second_step() or restore() first")

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, with one more top-level key ``sharpkern``: statistics of the step.

        Raises:
            RuntimeError: while the weights are perturbed.
        """
        self._refuse_perturbed("state_dict()")
        state = super().state_dict()
        if self._owns_state:
            # Views of flat buffers: whoever pickles them one by one would pickle the whole buffer each time.
            state["state"] = {i: _cloned(entry) for i, entry in state["state"].items()}
        self._keep_statistics()
        state["sharpkern"] = {
            "version": 1,
            "counters": self._counters.clone(),
            "squared_norm": self._measured.clone(),
            "t": self._t,
            "plain_steps": self._plain_steps,
            **self._own_statistics(),
        }
        return state

    def _keep_statistics(self) -> None:
        """Take over what lies with the layouts: the first pass's squared norm."""
        self._measured = self._sum_over_layouts(FIRST, self._measured)

    def _sum_over_layouts(self, row: int, default: Tensor) -> Tensor:
        for norms in self._norms.values():
            return norms[row].sum()
        return default

    def _own_statistics(self) -> dict[str, Any]:
        """What an algorithm adds to the key ``sharpkern`` of a state dict: numbers, and tensors of its own."""
        return {}

    def _load_statistics(self, own: Mapping[str, Any]) -> None:
        """The way back; a key may be missing in another algorithm's state dict."""

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of the base optimizer.

        Options that it lacks keep their values; state is copied and never cast down.

        Raises:
            ValueError: when it does not fit the parameters, before anything changed.
            RuntimeError: while a step is pending.
        """
        if self._pending:
            raise RuntimeError("load_state_dict() between two passes of a step: call second_step() or restore() first")
        # The last of the pre-hooks: it sees the dict as the user's hooks left it.
        handle = self.register_load_state_dict_pre_hook(lambda _, loaded: self._check_loaded(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict["param_groups"]
        ours = [p for group in self.param_groups for p in group["params"]]
        ids = [i for group in groups for i in group["params"]]
        labels = [label for _, _, _, label in self._entries()]
        for i, p, label in zip(ids, ours, labels, strict=False):
            for key, value in state_dict["state"].get(i, {}).items():
                if (
                    key in (*self._own_state, *(self._rule.buffers if isinstance(self._rule, FusedRule) else ()))
                    and value is not None
                    and value.size() != p.size()
                ):
                    raise ValueError(
                        f"loaded state dict has {key} of shape {tuple(value.size())} for {label} "
                        f"of shape {tuple(p.size())}"
                    )
        own = state_dict.get("sharpkern")
        if own is not None:
            if own.get("version") != 1:
                raise ValueError(f"loaded state dict has sharpkern version {own.get('version')}, this one reads 1")
            if not {"counters", "squared_norm"} <= own.keys():
                raise ValueError(
                    f"loaded state dict has sharpkern statistics {sorted(own)}, expected counters, squared_norm"
                )
            for key, shape in self._statistics_shapes.items():
                value = own.get(key, torch.empty([n or 0 for n in shape], device="cpu"))
                if (
                    not isinstance(value, Tensor)
                    or value.dim() != len(shape)
                    or any(n not in (None, size) for n, size in zip(shape, value.size(), strict=True))
                ):
                    raise ValueError(f"loaded state dict has {key} {value!r}, expected a tensor of shape {shape}")
            if own["counters"].dtype != torch.int64:
                raise ValueError(f"loaded state dict has counters of {own['counters'].dtype}, expected torch.int64")
        self._loading = state_dict

    def __setstate__(self, state: dict[str, Any]) -> None:
        loading = self.__dict__.get("_loading")
        if loading is None:  # unpickled
            super().__setstate__(state)
            self._loading = None
            self._reset()
            return
        for old, new in zip(self.param_groups, state["param_groups"], strict=True):
            for key, value in old.items():
                new.setdefault(key, value)
        # torch casts floating-point state to the parameter's dtype; ours keeps the loaded one's.
        ids = [i for group in loading["param_groups"] for i in group["params"]]
        params = [p for group in state["param_groups"] for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            for key, value in loading["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    kept = isinstance(self._rule, FusedRule) or key in ("step", *self._own_state)
                    state["state"][p][key] = (value if kept else state["state"][p][key]).clone()
        for p in [p for p, entry in state["state"].items() if any(n in entry for n in _FAMILY_STATE)]:
            for name in _FAMILY_STATE:
                if name not in self._own_state:
                    state["state"][p].pop(name, None)
            if not state["state"][p]:
                del state["state"][p]
        own = loading.get("sharpkern")
        if own is None:
            self._keep_statistics()
        else:
            self._counters = own["counters"].clone()
            self._measured = own["squared_norm"].clone()
            self._plain_steps = own.get("plain_steps", 0)
            self._t = own.get("t", int(self._counters[0]) + self._plain_steps)
        self._load_statistics(own or {})
        super().__setstate__(state)
        self._share()
        if self._laid_out and all(flat.attached() for flat in self._flat):
            self._take_state()
        else:
            self._norms = {}
            self._lay_out()

    # Attributes that a copy keeps; the rest is rebuilt.
    _kept_tensors: tuple[str, ...] = ("_counters", "_measured")
    _kept: tuple[str, ...] = (
        "_rule",
        "_policy",
        "_t",
        "_plain_steps",
        "_perturb_eps",
        "_model",
        "_max_norm",
        "_skip_nonfinite",
        "_flatten",
    )

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_perturbed("copying or pickling an optimizer")
        self._keep_statistics()
        state = super().__getstate__()
        if self._owns_state:
            # Views of one flat buffer: pickled as they are, each would carry the whole buffer along.
            clones: dict[Tensor, Any] = type(self.state)(dict)
            for p, entry in self.state.items():
                clones[p] = _cloned(entry)
            state["state"] = clones
        state.update({name: getattr(self, name) for name in self._kept})
        state.update({name: getattr(self, name).clone() for name in self._kept_tensors})
        return state


def _take_back_lr(group: Group, lr: Any, lent: Any) -> None:
    """A wrapped optimizer may have changed the lent learning rate: by the same factor, then."""
    if group["lr"] is lent:
        group["lr"] = lr
    elif lent != 0:
        group["lr"] = group["lr"] * (lr / lent)


def _cloned(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in entry.items()}


def _check_number(name: str, value: Any, positive: bool = False) -> None:
    """A finite number >= 0 (> 0), or torch's kind of error."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} should be a number, but got {value!r}")
    if not (math.isfinite(value) and float(value) >= 0) or (positive and value == 0):
        raise ValueError(f"Invalid {name}: {value}")


def _check_aliases(params: list[tuple[Tensor, str]]) -> None:
    """Two parameters over the same memory would be written by two threads at once."""
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name)
        for p, name in params
        if p.numel() and is_dense(p)  # one with gaps is written by torch, one at a time
    )
    for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            raise ValueError(f"{name} and {other} share memory; register one tensor in both places instead")


_warned_half = False


def _warn_half(groups: list[Group]) -> None:
    global _warned_half
    half = any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for g in groups for p in g["params"])
    if half and not _warned_half:
        _warned_half = True
        warnings.warn(
            "half-precision parameters round a perturbation of the usual radius away: most weights do not move, "
            "and the direction is lost. Keep float32 parameters and use torch.autocast.",
            UserWarning,
            stacklevel=4,
        )
