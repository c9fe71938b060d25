"""Sharpness over a training: records now and then, on disk at once, and the figure of them."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checks import check_count, check_number, type_name
from .hessian import top_eigenvalues
from .loss import Loss
from .sharpness import sharpness

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]


class SharpnessMonitor:
    r"""Records what sharpness is about, every so many steps of a training.

    A record has, of what there is to look at:

    - ``step``: steps so far;
    - ``loss``: the mean loss over ``batches``;
    - ``eigenvalues``: the k largest in magnitude of the Hessian of the mean loss over ``batches``, in descending order;
    - ``sharpness``: :math:`L(w + \rho\, g / \|g\|_2) - L(w)` of that loss, see :func:`sharpness`;
    - ``grad_norm``: of the optimizer's last step, or of the gradients that are there;
    - ``second_pass``, whether that step took a second pass (with an adaptive policy its decision), and
      ``second_pass_share``, the share of all steps that did;
    - ``skipped_steps`` so far;
    - ``threshold``, ``ema_mean``, ``ema_var`` of an adaptive policy; ``lr_scale`` and ``salr_sharpness`` of SALR;
    - whatever ``metrics`` returns.

    What is not there, or not finite, is left out.

    Every record is on disk before the training goes on: a killed run keeps what was recorded. The model, its gradients,
    buffers and random generators are left as they were.

    Args:
        opt: an optimizer of torch or of this package. After each of its steps the monitor counts one. Without,
            call :meth:`step`.
        model, loss_fn, batches: the loss whose curvature is recorded, as in :func:`top_eigenvalues`; without them only
            what the optimizer knows.
        every: steps from one record to the next.
        k: how many eigenvalues; 0: none.
        rho: radius of ``sharpness``; 0: none.
        metrics: called for each record; returns further numbers by name, such as an accuracy.
        path: write ``<path>.jsonl``, a record a line, and ``<path>.csv``.
        resume: go on with the records that are at ``path``; after ``load_state_dict`` those of later steps than its
            own are dropped.
        tensorboard: a folder for ``torch.utils.tensorboard.SummaryWriter``, or such a writer.
        params, forward, eval_mode, l2: as in :func:`top_eigenvalues`.

    Raises:
        ValueError, TypeError: for arguments out of range.
        FileExistsError: when there are records at ``path``, without ``resume``.

    Example::

        with SharpnessMonitor(opt=opt, model=model, loss_fn=loss_fn, batches=batches, every=100, path="run") as monitor:
            train()
        monitor.plot("run.png")
    """

    def __init__(
        self,
        *,
        opt: torch.optim.Optimizer | None = None,
        model: nn.Module | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
        batches: Iterable[Any] | None = None,
        every: int = 100,
        k: int = 5,
        rho: float = 0.05,
        metrics: Callable[[], Mapping[str, float]] | None = None,
        path: str | os.PathLike[str] | None = None,
        resume: bool = False,
        tensorboard: Any = None,
        params: Iterable[Tensor] | None = None,
        forward: Callable[[nn.Module, Any], tuple[Any, Any]] | None = None,
        eval_mode: bool = True,
        l2: float = 0.0,
    ) -> None:
        check_count(every, "every")
        if k != 0:
            check_count(k, "k")
        check_number(rho, "rho")
        if opt is None and model is None:
            raise TypeError("SharpnessMonitor needs opt=, model=, or both")
        if len({model is None, loss_fn is None, batches is None}) > 1:
            raise TypeError("model=, loss_fn= and batches= say together which loss is looked at: give all or none")
        if not hasattr(opt, "_optimizer_step_post_hooks"):
            opt = getattr(opt, "optimizer", opt)  # of Accelerate's, which calls no hooks
        self.opt, self.model, self.loss_fn, self.batches = opt, model, loss_fn, batches
        params = None if params is None else list(params)
        options: dict[str, Any] = dict(params=params, forward=forward, eval_mode=eval_mode, l2=l2)
        if opt is not None and not isinstance(opt, torch.optim.Optimizer):
            raise TypeError(f"opt should be a torch.optim.Optimizer, but got {type_name(opt)}")
        if model is not None:
            Loss(model, loss_fn, batches, **options)  # type: ignore[arg-type]  # raises for wrong ones
        self.every, self.k, self.rho, self.metrics, self.options = int(every), int(k), float(rho), metrics, options
        self.steps = 0
        self.records: list[Record] = []
        self._second_passes: Tensor | None = None  # before the step that is recorded next
        self._path = None if path is None else Path(path)
        if self._path is not None:
            self._open(resume)
        if isinstance(tensorboard, (str, os.PathLike)):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(f"tensorboard= needs a package that is not there: {error}") from None
            tensorboard = SummaryWriter(os.fspath(tensorboard))
        self._writer = tensorboard
        self._note_second_passes()
        self._hooks: list[Any] = []
        if opt is not None:
            self._hooks = [
                opt.register_step_post_hook(self._stepped),
                opt.register_load_state_dict_post_hook(lambda _: self._note_second_passes()),
            ]

    # Recording.

    def step(self) -> Record | None:
        """Count a step. An optimizer's are counted by itself.

        Returns:
            The record, when one was due.
        """
        self.steps += 1
        record = self.record() if self.steps % self.every == 0 else None
        self._note_second_passes()
        return record

    def _stepped(self, *_: Any) -> None:
        self.step()

    def record(self) -> Record:
        """Make a record now, also before the first step. Another one of the same step takes the place of the first."""
        record: Record = {"step": self.steps}
        if self.model is not None:
            assert self.loss_fn is not None
            assert self.batches is not None
            given = (self.model, self.loss_fn, self.batches)
            loss = Loss(*given, **self.options)
            with loss.held():
                record["loss"] = loss.value(finite=False)
            # A training that diverges is recorded, not ended.
            if self.k and math.isfinite(record["loss"]):
                record["eigenvalues"] = top_eigenvalues(*given, self.k, **self.options).values.tolist()
            if self.rho and math.isfinite(record["loss"]):
                record["sharpness"] = sharpness(*given, self.rho, **self.options)
        record |= self._of_optimizer()
        if self.metrics is not None:
            more = {name: float(value) for name, value in self.metrics().items()}
            if taken := sorted(more.keys() & {*record, "eigenvalues"}):
                raise ValueError(f"metrics() returns {', '.join(taken)}, which are names of the record's own")
            record |= more
        # JSON has neither NaN, which is what was not measured, nor infinities.
        record = {name: x for name, x in record.items() if not (isinstance(x, float) and not math.isfinite(x))}
        self.records = [*(old for old in self.records if old["step"] != self.steps), record]
        self._write()
        if self._writer is not None:
            for name, value in _columns(record).items():
                self._writer.add_scalar(f"sharpness/{name}", value, self.steps)
            self._writer.flush()
        return record

    # What there is to record.

    def _stats(self) -> dict[str, Tensor]:
        return dict(getattr(self.opt, "stats", {}))

    def _note_second_passes(self) -> None:
        """Before the step that is recorded next: whether that takes one is the difference."""
        if (self.steps + 1) % self.every == 0:
            self._second_passes = self._stats().get("second_passes")

    def _of_optimizer(self) -> Record:
        stats, before = self._stats(), self._second_passes
        if not stats or not int(stats["steps"] + stats["base_steps"]):  # it has measured nothing yet
            return {"grad_norm": self._grad_norm()}
        counts = {name: int(stats.pop(name)) for name in ("steps", "second_passes", "skipped_steps", "base_steps")}
        record: Record = {"salr_sharpness" if name == "sharpness" else name: float(x) for name, x in stats.items()}
        if before is not None and self.steps % self.every == 0:
            record["second_pass"] = counts["second_passes"] - int(before)
        steps = counts["steps"] + counts["base_steps"]
        record["skipped_steps"] = counts["skipped_steps"]
        return record | {"second_pass_share": counts["second_passes"] / steps}

    def _grad_norm(self) -> float:
        """Of the gradients that are there; NaN without any."""
        if self.opt is not None:
            params = [p for group in self.opt.param_groups for p in group["params"]]
        else:
            assert self.model is not None
            params = list(self.model.parameters())
        grads = [p.grad for p in params if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads)) if grads else math.nan

    # On disk.

    def _open(self, resume: bool) -> None:
        """Take the records that are there: whole lines, for the last one may have been cut."""
        lines = self._lines.read_text(encoding="utf-8").splitlines(keepends=True) if self._lines.exists() else []
        if lines and not resume:
            raise FileExistsError(f"{self._lines} has records of another run: give resume=True to go on with them")
        self.records = [json.loads(line) for line in lines if line.endswith("\n")]
        self.steps = self.records[-1]["step"] if self.records else 0
        self._lines.parent.mkdir(parents=True, exist_ok=True)

    @property
    def _lines(self) -> Path:
        assert self._path is not None
        return self._path.with_name(self._path.name + ".jsonl")

    def _write(self) -> None:
        """Both files as the records are now. Neither is ever half written."""
        if self._path is None:
            return
        _replace(self._lines, "".join(json.dumps(record) + "\n" for record in self.records))
        rows = [_columns(record) for record in self.records]
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, names)
        table.writeheader()
        table.writerows(rows)
        _replace(self._path.with_name(self._path.name + ".csv"), text.getvalue())

    def state_dict(self) -> dict[str, Any]:
        """The number of steps: to be saved beside the model's and the optimizer's."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after that many steps. Records of later steps are those of a run that was not saved: they are
        dropped."""
        check_count(state["steps"] + 1, "steps + 1")
        self.steps = int(state["steps"])
        self.records = [record for record in self.records if record["step"] <= self.steps]
        self._note_second_passes()

    # Looking.

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """The evolution of the eigenvalues over the steps, the positive ones, on a logarithmic scale.

        Args:
            path: where to save the picture, in the format of its ending.

        Raises:
            ValueError: when no positive eigenvalue was recorded.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("plot() needs matplotlib: pip install matplotlib") from None
        curves = [
            [(r["step"], r["eigenvalues"][i]) for r in self.records if r.get("eigenvalues", [])[i : i + 1] > [0]]
            for i in range(self.k)
        ]
        if not any(curves):
            raise ValueError("there is no record of a positive eigenvalue to plot")
        figure = Figure(figsize=(7, 4), layout="constrained")
        axis = figure.subplots()
        for i, curve in enumerate(curves):
            if curve:
                axis.plot(*zip(*curve, strict=True), color=f"C{i}", label=f"$\\lambda_{{{i + 1}}}$")
        axis.set(yscale="log", xlabel="steps", ylabel="largest eigenvalues of the Hessian")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
        if path is not None:
            figure.savefig(path)
        return figure

    def close(self) -> None:
        """Count the optimizer's steps no more. The records stay."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> SharpnessMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _columns(record: Record) -> Record:
    """One number a name: an eigenvalue each."""
    values = record.get("eigenvalues", [])
    rest = {name: value for name, value in record.items() if name != "eigenvalues"}
    return rest | {f"eigenvalue_{i + 1}": value for i, value in enumerate(values)}


def _replace(path: Path, text: str) -> None:
    """Write a file so that whoever reads it, and whatever is killed, finds the old one or the new one."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
