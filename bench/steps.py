"""Cases of whole optimizer steps on gradients that are given, and of whole training iterations.

``step``: both passes of SAM and ASAM, of every contender, steps following one another. ``graph``: the same replayed
as a CUDA graph, which leaves the device's time. ``kind``: the family's kinds of step. ``iteration``: with forward and
backward. A contender takes turns with ours; ours with a second instance of itself: how far that ratio is from one is
the noise of the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, cached_property, partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from .baselines import BASES, RHO, Algorithm, Base, Closure, Loop, TwoStep
from .contenders import BARE, CONTENDERS, KINDS, OURS
from .measure import Case, Function, Machine, Prepared, Run, Subject, compare, on
from .models import Shape, Training, count


def step(optimizer: TwoStep) -> None:
    """What is timed: both passes, on the gradients that lie there."""
    optimizer.first_step()
    optimizer.second_step()


class Problem:
    """Weights and gradients of one set of shapes, and where steps of an algorithm must lead.

    Gradients are shared by all contenders, which only read them; every contender gets weights of its own.
    """

    def __init__(self, shapes: list[Shape], algorithm: Algorithm, base: Base, machine: Machine, dtype=torch.float32):
        self.shapes, self.algorithm, self.base, self.machine = shapes, algorithm, base, machine
        generator = torch.Generator(machine.device).manual_seed(0)
        random = partial(torch.randn, generator=generator, dtype=dtype, device=machine.device)
        self.weights, self.grads = ([random(shape).mul_(size) for shape in shapes] for size in (0.05, 0.01))

    def leaves(self) -> list[Tensor]:
        """Parameters for one contender."""
        leaves = [w.clone().requires_grad_() for w in self.weights]
        for leaf, grad in zip(leaves, self.grads, strict=True):
            leaf.grad = grad
        return leaves

    def closure(self, leaves: Sequence[Tensor]) -> Closure:
        """Gives gradients, and a loss that rises along them: no model in between."""
        smallest = min(range(len(leaves)), key=lambda i: leaves[i].numel())  # so that the loss itself takes no time
        # Others in every other pass: with the first pass's gradient LookSAM would find no direction.
        passes = [[g.flip(0) for g in self.grads], self.grads]

        @torch.no_grad()
        def closure() -> Tensor:
            passes.reverse()
            for p, g in zip(leaves, passes[0], strict=True):
                p.grad = g
            return ((leaves[smallest] - self.weights[smallest]) * self.grads[smallest]).sum()

        return closure

    def after(self, steps: int) -> list[Tensor]:
        """The weights after so many steps of the plain loop."""
        leaves = self.leaves()
        plain = Loop(leaves, self.algorithm, self.base)
        for _ in range(steps):
            step(plain)
        return [leaf.detach() for leaf in leaves]

    @cached_property
    def reference(self) -> list[Tensor]:
        return self.after(2)

    def make(self, contender: str) -> tuple[Function, list[Tensor]]:
        """A step of a contender that did nothing yet, and its parameters."""
        leaves = self.leaves()
        return partial(step, CONTENDERS[contender].make(leaves, self.algorithm, self.base)), leaves

    def build(self, contender: str, graph: bool = False) -> Function:
        """A contender's step, or its replay as a graph, that came out where the plain loop does, or WrongValues."""
        function, leaves = self.make(contender)
        if graph:
            function = self.machine.capture(function)
        function()
        function()
        expected = self.after(self.machine.WARM_UP + 2) if graph else self.reference
        compare([leaf.detach() for leaf in leaves], expected, f"{contender}, CUDA graph" if graph else contender)
        return function

    def build_kind(self, name: str) -> tuple[Function, Function]:
        """Ours and the loop's step of a kind, after two that led to the same weights, or WrongValues."""
        sides = []
        for make in (KINDS[name].ours, KINDS[name].theirs):
            leaves = self.leaves()
            function = make(leaves, self.base, self.closure(leaves))
            function()
            function()
            sides.append((function, [leaf.detach() for leaf in leaves]))
        (ours, weights), (theirs, expected) = sides
        compare(weights, expected, name)
        return ours, theirs


def _who(run: Run, names: Iterable[str]) -> Iterator[tuple[str, str, str | None]]:
    """Name in the rows, contender and backend: ours on each, its variants on the default one, the others on none."""
    for name in names:
        for i, backend in enumerate(run.backends if name == OURS else run.backends[:1]):
            yield f"{name}, {backend}" if i else name, name, backend if name.startswith(OURS) else None


def _may_run(run: Run, shape: str, algorithm: str, base: str, slow: bool = False) -> bool:
    """Whether a row takes no minutes; those that would are left out, and said so."""
    if shape in run.plan.adamw_only and base != "adamw":
        run.left_out.append("GPT-2 small is timed with AdamW only (with SGD: --every)")
    elif slow and run.compiling >= run.plan.compile_seconds:
        run.left_out.append("torch.compile: further rows, for the time that compiling takes (all rows: --every)")
    elif slow and not run.plan.compile_all and (algorithm, base) != ("sam", "sgd"):
        run.left_out.append("torch.compile takes a minute or more: timed for SAM with SGD only (all rows: --every)")
    else:
        return True
    return False


def steps(run: Run) -> Iterator[Case]:
    """Every shape, algorithm, base rule and contender."""
    for (shape, shapes), algorithm, base in product(run.plan.steps.items(), RHO, BASES):
        problem = cache(partial(Problem, shapes, algorithm, base, run.machine))
        for name, key, backend in _who(run, CONTENDERS):
            contender = CONTENDERS[key]
            if _may_run(run, shape, algorithm, base, contender.slow_start):
                size = contender.bytes_per_param(algorithm, base, run.machine.device.type)
                for kind in ("step", *["graph"] * (run.cuda and base in contender.captured)):
                    labels = {"kind": kind, "shape": shape, "method": algorithm, "base": base, "contender": name}
                    prepare = partial(_step, run, problem, key, backend, kind == "graph")
                    yield Case(labels, count(shapes), size, prepare)


def _step(run: Run, make_problem: Callable[[], Problem], contender: str, backend: str | None, graph: bool) -> Prepared:
    problem, start, host = make_problem(), time.perf_counter(), None
    with on(backend):
        function = problem.build(contender, graph)
        if CONTENDERS[contender].slow_start:  # for its host time it would have to be compiled again
            run.compiling += time.perf_counter() - start
        else:
            # As many tensors of one element each: the work around the kernels.
            ones = Problem([(1,) * len(s) for s in problem.shapes], problem.algorithm, problem.base, run.machine)
            host = 1e6 * run.machine.until_return(function if graph else ones.make(contender)[0], 20)
    beside: dict[str, Subject] = {}
    with run.attempt(OURS, f"beside {contender}"), on(run.backends[0]):  # without ours there is nothing to relate to
        beside[OURS] = (problem.build(OURS, graph), run.backends[0])
    return (function, backend), beside, {"tensors": len(problem.shapes), "host_us": host}


def kinds(run: Run) -> Iterator[Case]:
    """Every kind of step, beside the loop's and beside the base rule's step alone."""
    backend = run.backends[0]

    def prepare(make_problem: Callable[[], Problem], method: str) -> Prepared:
        problem = make_problem()
        with on(backend):
            (ours, theirs), (bare, _) = problem.build_kind(method), problem.build_kind(BARE)
        beside = {"loop": (theirs, None), BARE: (bare, backend)}
        return (ours, backend), beside, {"tensors": len(problem.shapes)}

    for shape, base in product(run.plan.kinds, BASES):
        if _may_run(run, shape, "sam", base):
            problem = cache(partial(Problem, run.plan.steps[shape], "sam", base, run.machine))
            for method, kind in KINDS.items():
                if base not in kind.bases:
                    continue
                labels = {"kind": "kind", "shape": shape, "method": method, "base": base, "contender": OURS}
                params, size = count(run.plan.steps[shape]), kind.bytes_per_param(base)
                yield Case(labels, params, size, partial(prepare, problem, method))


def iterations(run: Run) -> Iterator[Case]:
    """Every model: a SAM iteration beside two plain forward and backward passes; one would be for free."""
    # As whoever trains on images of one size does.
    torch.backends.cudnn.benchmark = True
    for model, training in run.plan.iterations.items():
        with torch.device("meta"):
            params = count([p.size() for p in training.make().parameters()])
        for name, contender, backend in _who(run, (OURS, *run.plan.others)):
            labels = {"kind": "iteration", "shape": model, "method": "sam", "base": training.base, "contender": name}
            yield Case(labels, params, None, partial(_iteration, run, training, contender, backend))


def _iteration(run: Run, training: Training, contender: str, backend: str | None) -> Prepared:
    torch.manual_seed(0)
    device = run.machine.device
    order = torch.channels_last if training.channels_last else torch.contiguous_format
    model = training.make().to(device).to(memory_format=order)
    images = torch.randn(training.batch, 3, training.size, training.size, device=device).contiguous(memory_format=order)
    targets = torch.randint(10, (training.batch,), device=device)
    losses: list[Tensor] = []

    def evaluate() -> None:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=training.autocast):
            loss = F.cross_entropy(model(images), targets)
        loss.backward()
        losses[:] = [loss.detach()]

    def plain() -> None:
        evaluate()
        evaluate()

    def sam() -> None:
        evaluate()
        optimizer.first_step()
        evaluate()
        optimizer.second_step()

    copy = 8 * run.plan.copy  # bytes that lie there beside the model
    plain()
    memory = {"plain_peak_gib": max(0, run.machine.peak_bytes(plain) - copy) / 2**30}
    with on(backend):
        optimizer = CONTENDERS[contender].make(list(model.parameters()), "sam", training.base)
        sam()
        memory["peak_gib"] = max(0, run.machine.peak_bytes(sam) - copy) / 2**30
    info = {"batch": training.batch, "finite": bool(losses[0].isfinite()), **(memory if training.autocast else {})}
    return (sam, backend), {"plain": (plain, None)}, info
