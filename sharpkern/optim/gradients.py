"""The gradients of a pass: taken as autograd left them, and looked after where the caller's would be lost unnoticed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from ..checks import warn
from ..memory.layouts import Layouts
from ..memory.scalars import Scalars
from ..memory.shards import left_behind, local
from ..memory.transfer import is_capturing
from ..rules import Rule

DISCARDED = (
    "step(closure) resets the gradients before it calls the closure: those that were there are not used. Accumulate "
    "inside of the closure, with accumulate(), or by hand with first_step() and second_step(). Where another loss left "
    "them (a GAN, two optimizers) it does no harm: zero_grad() before this step says so"
)


class Gradients:
    """The gradients of an optimizer's parameters.

    Args:
        owner: the name of the optimizer's class.
        rule: its base rule.
        layouts: where its parameters lie.
        scalars: the numbers of the step.
        model: that has the parameters, as far as the user tells.
    """

    def __init__(
        self, owner: str, rule: Rule, layouts: Layouts, scalars: Scalars, model: nn.Module | None = None
    ) -> None:
        self._model = model
        self._unseen = True  # no pass with gradients yet
        self.rule, self.layouts, self.scalars, self._owner = rule, layouts, scalars, owner
        self._warned: set[str] = set()
        # A parameter that had a gradient, and what that was when a step or zero_grad() left it.
        self._witness: Tensor | None = None
        self._noted: _Mark | None = None
        self._watch: RemovableHandle | None = None  # on the witness, while a step by hand is open
        self._added: list[bool] = []  # backward passes that it saw where none was wanted
        self._made: list[bool] = []  # and where another was
        self._before: _Mark | None = None  # of the pass before that
        self._resets = 3  # steps by hand in which it is looked at whether the gradients are reset
        self._accumulated: Marks = {}  # after the last micro-batch
        self._looks = 3  # at the values of gradients that were there before a closure: each waits for the device

    @property
    def has_gradients(self) -> bool:
        """Whether any parameter has a gradient in this pass."""
        return any(layout.has_gradients for layout in self.layouts)

    def collect(self) -> None:
        """Take the gradients that are there now; nothing of the parameters changes."""
        for layout in self.layouts:
            layout.collect(self._bad_gradient, fresh=not self.layouts.away)

    def _bad_gradient(self, name: str, grad: Tensor) -> Exception:
        if grad.layout != torch.strided:
            return RuntimeError(f"{self._owner} does not support sparse gradients, but that of {name} is {grad.layout}")
        if grad.numel() and not grad.data_ptr():
            return RuntimeError(f"the gradient of {name} has no memory behind it (was its storage resized?)")
        return RuntimeError(f"the gradient of {name} has shape {tuple(grad.size())}, unlike the parameter")

    def release(self) -> None:
        """Hold no gradient of the last pass while the caller makes another one."""
        for layout in self.layouts:
            layout.grads = []

    def copy_gradients(self) -> dict[Tensor, Tensor]:
        """The gradients by parameter. Copies: a closure may have its gradients written to the same memory always."""
        grads = {p: p.grad for layout in self.layouts for p in layout.params if p.grad is not None}
        copies = [torch.empty_like(grad) for grad in grads.values()]
        torch._foreach_copy_(list(map(local, copies)), list(map(local, grads.values())))
        return dict(zip(grads, copies, strict=True))

    def put_gradients(self, grads: Mapping[Tensor, Tensor]) -> None:
        """Give parameters the gradients that they had in the first pass."""
        for layout in self.layouts:
            for p in layout.params:
                p.grad = grads.get(p)
        self.collect()

    def _params(self) -> Iterator[Tensor]:
        return (p for group in self.layouts.param_groups for p in group["params"])

    def _any_nonzero(self) -> bool:
        """Whether a gradient that is there, or what this process has of it, is not zero, read on the host."""
        grads = [grad for p in self._params() if p.grad is not None and (grad := local(p.grad)).numel()]
        return any(grad.layout != torch.strided for grad in grads) or bool(
            nn.utils.get_total_norm(grads, math.inf) != 0
        )

    def _any_nonzero_anywhere(self) -> bool:
        """The same, whatever process has it."""
        here, scope = self._any_nonzero(), self.layouts.scope
        return (
            here
            if scope is None
            else bool(scope.here.all_reduce(torch.tensor(float(here), device="cpu"), largest=True))
        )

    def note_gradient(self) -> None:
        """The gradients that are there are of a step, or were reset: no news to the next one."""
        self._noted = None if self._witness is None else _mark(self._witness)

    def choose_witness(self) -> None:
        """Let a parameter that has a gradient tell whether the caller made others after this step."""
        if self._witness is None or self._witness.grad is None:
            self._witness = next((p for p in self._params() if p.grad is not None), None)
        self.note_gradient()

    def warn_of_discarded_gradients(self, message: str = DISCARDED) -> None:
        """Warn, once, of gradients that the caller made and a step that begins does not use."""
        if self._witness is None:
            self._witness = next((p for p in self._params() if p.grad is not None), None)
        witness = self._witness
        if witness is None or witness.grad is None or not self._looks or is_capturing(witness.device):
            return
        mark = _mark(witness)
        if mark and self._noted and (mark == self._noted or mark[0] != self._noted[0]):
            return  # the same, or moved together with its parameter
        self._looks -= 1
        if self._any_nonzero():
            self._looks = 0
            self.warn_once(message)

    def marks(self) -> Marks:
        """Of every parameter's gradient."""
        return {p: _mark(p) for p in self._params()}

    def changed_since(self, marks: Marks) -> bool:
        """Whether any gradient is another one now, or was written to; through ``.data`` nobody sees it."""
        for p in self._params():
            mark, noted = _mark(p), marks.get(p)
            if mark != noted and not (mark and noted and mark[0] != noted[0]):  # moved together with its parameter
                return True
        return False

    def note_accumulated(self, first: bool) -> None:
        """The gradients that are there are the sum of the micro-batches so far. Warn, once, where those of the ones
        before seem not to be in it: autograd adds in place, but to a graph of gradients, and
        DistributedDataParallel may put a view of its bucket there.

        Args:
            first: whether this is the first one of its step.
        """
        before, self._accumulated = {} if first else self._accumulated, self.marks()
        for p, noted in before.items():
            now = self._accumulated.get(p)
            moved = now is not None and noted is not None and now[0] != noted[0]
            kept = p.grad is not None and (p.grad.requires_grad or p.grad._is_view())
            if noted and not (moved or kept) and (now is None or now[1] != noted[1]):
                self.warn_once(
                    "the closure of a micro-batch dropped the gradients of the ones before it, or put others in their "
                    "place: leave model.zero_grad() out of what accumulate() calls"
                )
                return

    def check_unchanged(self) -> None:
        """Raise where they are not those that were noted: another pass's would not be changed in that way."""
        if self.changed_since(self._accumulated):
            raise RuntimeError(
                "the gradients were changed after accumulate(), which another pass would not see: max_grad_norm= clips "
                "and step(scaler=scaler) unscales, in each pass as it should be; restore() drops what was accumulated"
            )

    def warn_without_gradients(self, message: str) -> None:
        """Warn, once, of a pass that left none."""
        if not self.has_gradients:
            self._refuse_left_behind()
            self.warn_once(message)
        elif self._unseen:
            self._unseen = False
            if self._model is not None:
                self._refuse_left_behind()

    def _refuse_left_behind(self) -> None:
        """Raise RuntimeError for parameters without a gradient in whose place a model has DTensors."""
        if left_behind((p for p in self._params() if p.requires_grad and p.grad is None), self._model):
            raise RuntimeError(
                f"{self._owner} was made before the model was sharded: parameters of it are none of the model's any "
                "more, and get no gradient. Call fully_shard or parallelize_module first, then make the optimizer"
            )

    def watch(self) -> None:
        """Notice a backward from here to the end of the step: it would add to gradients that are the step's."""
        self.choose_witness()
        p, seen = self._witness, self._added
        if p is not None and p.requires_grad:
            self._watch = p.register_post_accumulate_grad_hook(lambda _: seen.append(True))

    def watch_reset(self) -> None:
        """Notice, in the first steps by hand, a backward that adds to the gradients of the pass before."""
        if not self._resets:
            return
        self.choose_witness()
        p, made = self._witness, self._made
        if p is not None and p.grad is not None and p.requires_grad and not is_capturing(p.device):
            self._resets -= 1
            self._before = _mark(p)
            self._watch = p.register_post_accumulate_grad_hook(lambda _: made.append(True))

    def unwatch(self) -> None:
        """Notice none any more."""
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        self._before = None
        self._added.clear()
        self._made.clear()

    def warn_of_added_gradients(self) -> None:
        """Warn, once, of a second backward where ``first_step`` said that none is wanted."""
        if self._added:
            self.warn_once(
                "first_step() returned False: second_step() uses the gradients that were there, and another backward "
                "added to them. Write `if opt.first_step(zero_grad=True):` before it"
            )

    def warn_of_kept_gradients(self) -> None:
        """Warn, once, of a second backward that added to the gradients of the first: nobody else wrote to them."""
        before, now = self._before, None if self._witness is None else _mark(self._witness)
        if before is None or now is None or before[2] is None or now[2] is None or not self._made:
            return
        if now[:2] == before[:2] and now[2] == before[2] + len(self._made):
            self.warn_once(
                "the backward after first_step() added to the gradients that were there, and the step is along the "
                "sum: reset them in between, with first_step(zero_grad=True) or zero_grad()"
            )

    def count_base_step(self) -> None:
        """Count a step of the base rule alone, and say so once; not one by which a tool makes the state."""
        if not self.has_gradients:
            return
        rates = [group.get("lr") for group in self.layouts.param_groups]
        on_host = all(not isinstance(lr, Tensor) or lr.device.type == "cpu" for lr in rates)
        readable = on_host and not any(map(is_capturing, self.layouts.devices))
        if readable and all(lr == 0 for lr in rates) and not self._any_nonzero_anywhere():
            return
        self.warn_once(
            f"step() without a closure, and without first_step() before it, is a step of {self.rule.base.__name__} "
            f"alone: {self._owner} did not look at the sharpness. Pass a closure, or step by hand: first_step(), "
            "second_step(). For a trainer see sharpkern.integrations"
        )
        self.scalars["base_steps"] += 1  # a warning may be an error, and then no step follows

    def warn_once(self, message: str) -> None:
        """A warning at the user's line, the first time."""
        if message not in self._warned:
            self._warned.add(message)
            warn(message)


# Memory of a parameter, memory of its gradient, and the version of that. Not addresses, which are used again; not weak
# references to the tensors, of which torch swaps none (torch.__future__.set_swap_module_params_on_conversion).
_Mark = tuple[StorageWeakRef, StorageWeakRef, int | None]
Marks = dict[Tensor, _Mark | None]


def _mark(p: Tensor) -> _Mark | None:
    """What tells a gradient from another one, or from a later value of it; None for one without such memory."""
    grad = p.grad
    if grad is None or not p.layout == grad.layout == torch.strided:
        return None
    p, grad = local(p), local(grad)
    version = None if grad.is_inference() else grad._version
    return StorageWeakRef(p.untyped_storage()), StorageWeakRef(grad.untyped_storage()), version
