"""Trainers themselves: with each, every optimizer ends where a plain loop does, to the bit. Of the second tier.

test_loops.py has what they do in stand-ins.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import processes
import pytest
import torch
from loops import MICRO, STEPS, Batch, Run, assert_same, data, every_way, make, mean_loss, plain
from methods import METHODS, Method, every_method, over
from models import assert_same_bits, relative_error
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader

import sharpkern as sk

pytestmark = pytest.mark.slow

SCHEDULE: Callable[[Any], Any] = lambda opt: torch.optim.lr_scheduler.StepLR(opt, 3, 0.5)  # noqa: E731
few = over([METHODS[name] for name in ("sam", "aesam", "aelooksam", "gsam")])


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What trainers write goes to a folder of the test; their own deprecations are not under test, our warnings are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # the Trainer of transformers writes to it
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "accelerate", "ignite"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=r".*(closure|first_step|gradients)")
        yield
    if "accelerate" in sys.modules:  # which is one for the process
        state = sys.modules["accelerate.state"]
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


def loader(micro: int = 1) -> Any:
    return DataLoader(data(micro), batch_size=None)


# Lightning.


def lightning_trainer(ours: bool = True, **options: Any) -> Any:
    """``ours``: with the callback of sharpkern.integrations."""
    lightning = pytest.importorskip("lightning")
    callbacks = [pytest.importorskip("sharpkern.integrations.lightning").SharpnessAware()] if ours else []
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, logger=False)
    more = {"max_epochs": 1, "accelerator": "cpu", "num_sanity_val_steps": 0, "callbacks": callbacks}
    return lightning.Trainer(**{**more, **quiet, **options})


def lightning_module(method: Method, loop: str = "automatic", **more: Any) -> Any:
    """A module with the model and the optimizer of the tests."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = loop == "automatic"
            self.model, self.opt = make(method, **more)
            self.losses: list[float] = []
            self.micro_batches: list[Batch] = []

        def training_step(self, batch: Batch, _: int) -> Tensor | None:
            if loop == "automatic":
                loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
                self.log("loss", loss)
                return loss
            return getattr(self, loop.replace(" ", "_"))(batch)

        def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
            if loop == "automatic":
                self.losses.append(float(self.trainer.callback_metrics["loss"]))
                assert self.losses[-1] / self.trainer.accumulate_grad_batches == float(outputs["loss"])

        def by_hand(self, batch: Batch) -> None:
            opt = self.optimizers()
            opt.zero_grad()
            mean_loss(self.model, [batch], self.manual_backward)
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            if opt.first_step(zero_grad=True, scaler=scaler):
                mean_loss(self.model, [batch], self.manual_backward)
            opt.second_step()
            self.lr_schedulers().step()

        def closure(self, batch: Batch) -> None:
            opt = self.optimizers()
            opt.step(closure=lambda: mean_loss(self.model, [batch], self.manual_backward))
            self.lr_schedulers().step()

        def accumulating(self, batch: Batch) -> None:
            opt = self.optimizers()

            def closure() -> Tensor:
                loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1]) / MICRO
                self.manual_backward(loss)
                return loss

            opt.accumulate(closure)
            self.micro_batches.append(batch)
            if len(self.micro_batches) == MICRO:
                opt.step()
                self.lr_schedulers().step()
                self.micro_batches.clear()

        def configure_optimizers(self) -> Any:
            return {"optimizer": self.opt, "lr_scheduler": {"scheduler": SCHEDULE(self.opt), "interval": "step"}}

    return Module()


def lightning_run(method: Method, loop: str, micro: int = 1, **options: Any) -> tuple[Any, Any]:
    module, trainer = lightning_module(method, loop), lightning_trainer(**options)
    trainer.fit(module, loader(micro))
    return module, trainer


@every_way("automatic", "closure", "accumulating", "by hand")
def test_lightning(method: Method, loop: str) -> None:
    """Steps, schedulers and logs count one a step; what is logged is the loss of the first pass."""
    micro = MICRO if loop == "accumulating" else 1
    module, trainer = lightning_run(
        method, loop, micro, ours=method.name not in ("sam", "sssam") or loop == "automatic"
    )
    assert_same((module.model, module.opt), plain(method, micro, SCHEDULE))
    assert trainer.global_step == STEPS
    if loop == "automatic":
        model, opt = make(method)
        scheduler, losses = SCHEDULE(opt), []
        for batch in data():
            losses.append(float(opt.step(lambda batch=batch: mean_loss(model, [batch]))))
            scheduler.step()
        assert module.losses == losses


def test_lightning_without_ours() -> None:
    """A closure of one batch is all that a step takes; what it logs is of the last pass."""
    method = METHODS["sam"]
    module, trainer = lightning_module(method), lightning_trainer(ours=False)
    module.on_train_batch_end = lambda *_: None
    trainer.fit(module, loader())
    assert_same((module.model, module.opt), plain(method, schedule=SCHEDULE))


@pytest.mark.parametrize("precision", ["double", "scaled"])
@every_method
def test_lightning_accumulates_and_clips(method: Method, precision: str) -> None:
    """In the passes of the optimizer, with a gradient scaler or without; the last step of an epoch may be shorter."""
    module = lightning_module(method)
    trainer = lightning_trainer(accumulate_grad_batches=MICRO, gradient_clip_val=0.3)
    if precision == "scaled":
        trainer.strategy.precision_plugin = scaled_precision()
    taken = data(MICRO)[:-1]
    trainer.fit(module, DataLoader(taken, batch_size=None))
    model, opt = make(method, max_grad_norm=0.3)
    scheduler = SCHEDULE(opt)
    for i in range(0, len(taken), MICRO):
        opt.step(functools.partial(mean_loss, model, taken[i : i + MICRO], parts=MICRO))
        scheduler.step()
    assert_same((module.model, module.opt), (model, opt))
    assert trainer.global_step == STEPS


@few
def test_lightning_resumes(method: Method, tmp_path: Path) -> None:
    """From its own checkpoint, after half of the steps."""
    half, path = data(MICRO)[: STEPS * MICRO // 2], str(tmp_path / "half.ckpt")
    options = {"accumulate_grad_batches": MICRO}
    trainer = lightning_trainer(**options)
    trainer.fit(lightning_module(method), DataLoader(half, batch_size=None))
    trainer.save_checkpoint(path)
    module = lightning_module(method)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    rest = DataLoader(data(MICRO)[STEPS * MICRO // 2 :], batch_size=None)
    lightning_trainer(max_epochs=2, **options).fit(module, rest, ckpt_path=path, weights_only=True)
    assert_same((module.model, module.opt), plain(method, MICRO, SCHEDULE))


def test_lightning_says_what_it_does_not_support() -> None:
    """Without the callback: gradients that it accumulates before step(closure), and steps under a gradient scaler."""
    sam = METHODS["sam"]
    with pytest.warns(UserWarning, match="those that were there are not used"):
        module, trainer = lightning_module(sam), lightning_trainer(ours=False, accumulate_grad_batches=MICRO)
        module.on_train_batch_end = lambda *_: None
        trainer.fit(module, loader(MICRO))
    module, trainer = lightning_module(sam), lightning_trainer(ours=False)
    trainer.strategy.precision_plugin = scaled_precision()
    with pytest.warns(UserWarning, match="is a step of SGD alone"):
        trainer.fit(module, loader())
    assert int(module.opt.stats["base_steps"]) == STEPS


def test_the_callback_refuses_what_it_cannot_do_right() -> None:
    sam = METHODS["sam"]
    with pytest.raises(RuntimeError, match="clips by norm"):
        lightning_run(sam, "automatic", gradient_clip_val=1.0, gradient_clip_algorithm="value")
    module = lightning_module(sam)
    type(module).configure_gradient_clipping = lambda *_, **__: None
    with pytest.raises(RuntimeError, match="calls no configure_gradient_clipping"):
        lightning_trainer().fit(module, loader())
    module = lightning_module(sam)
    type(module).training_step = lambda self, dataloader_iter: None
    with pytest.raises(RuntimeError, match=r"does not support training_step\(dataloader_iter\)"):
        lightning_trainer().fit(module, loader())
    module = lightning_module(sam)
    module.opt = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="there is none"):
        lightning_trainer().fit(module, loader())
    trainer = lightning_trainer()
    type(trainer.strategy).handles_gradient_accumulation, before = (
        True,
        type(trainer.strategy).handles_gradient_accumulation,
    )
    try:
        with pytest.raises(RuntimeError, match="does not support"):
            trainer.fit(lightning_module(sam), loader())
    finally:
        type(trainer.strategy).handles_gradient_accumulation = before
    module = lightning_module(METHODS["momentumsam"])
    type(module).validation_step = lambda *_: None
    trainer = lightning_trainer(accumulate_grad_batches=MICRO, val_check_interval=STEPS * MICRO // 2 + 1)
    with pytest.raises(RuntimeError, match="validation in the middle of a step"):
        trainer.fit(module, loader(MICRO), loader())
    assert not module.opt.is_perturbed


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("micro", [1, MICRO])
@over([METHODS["sam"], METHODS["momentumsam"]])
def test_lightning_shows_the_first_gradient(method: Method, micro: int, scaled: bool) -> None:
    """Unscaled, to on_before_optimizer_step; where it belongs to one pass of two it is not to be changed there."""
    seen: list[Tensor] = []
    norm = lambda model: nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])  # noqa: E731

    def train(hook: Callable[..., None]) -> Any:
        module, trainer = lightning_module(method), lightning_trainer(accumulate_grad_batches=micro)
        type(module).on_before_optimizer_step = hook
        if scaled:
            trainer.strategy.precision_plugin = scaled_precision()
        try:
            trainer.fit(module, loader(micro))
        finally:
            assert not module.opt._step.micro_batches
        return module

    train(lambda module, _: seen.append(norm(module.model)))
    model, _ = make(method)
    mean_loss(model, data(micro)[:micro])
    assert len(seen) == STEPS
    torch.testing.assert_close(seen[0], norm(model))
    for i, _ in enumerate(model.parameters()):
        refused = pytest.raises(RuntimeError, match="changed the gradients of the first pass")
        with contextlib.nullcontext() if method.one_gradient else refused:
            train(lambda module, _, i=i: list(module.model.parameters())[i].grad.zero_())


def test_lightning_gives_the_clipping_back() -> None:
    module = lightning_module(METHODS["sam"])
    lightning_trainer(gradient_clip_val=0.3).fit(module, loader())
    assert module.opt.max_grad_norm is None
    type(module).on_before_optimizer_step = lambda *_: 1 / 0
    trainer = lightning_trainer(gradient_clip_val=0.3)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, loader())
    assert module.opt.max_grad_norm is None
    assert "optimizer_step" not in vars(trainer.strategy.precision_plugin)


@over([METHODS["sam"], METHODS["momentumsam"]])
def test_lightning_drops_a_step_that_is_not_done(method: Method) -> None:
    """At the end of a fit and after an exception; the next fit has nothing of it."""
    lightning, weights = pytest.importorskip("lightning"), []

    class Stop(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx < MICRO:
                before.append({name: p.clone() for name, p in module.model.named_parameters()})
                return
            assert module.opt.is_perturbed == method.one_gradient
            trainer.should_stop = True
            if fails:
                raise ZeroDivisionError

    for fails in (False, True):
        module, trainer = lightning_module(method), lightning_trainer(accumulate_grad_batches=MICRO)
        before: list[Any] = []
        trainer.callbacks.append(Stop())
        try:
            trainer.fit(module, loader(MICRO))
        except ZeroDivisionError:
            assert fails
        assert not module.opt.is_perturbed
        assert not module.opt._step.micro_batches
        assert_same_bits(before[-1], dict(module.model.named_parameters()))
        module.opt.accumulate(functools.partial(mean_loss, module.model, data()[:1]))
        type(module).validation_step = lambda *_: None
        lightning_trainer(accumulate_grad_batches=MICRO, num_sanity_val_steps=1, limit_val_batches=1).fit(
            module, loader(MICRO), loader()
        )
        weights.append(module)
    assert_same_bits(*(dict(module.model.named_parameters()) for module in weights))


@pytest.mark.parametrize("loop", ["closure", "accumulating"])
def test_lightning_logs_the_first_pass_in_manual_optimization(loop: str) -> None:
    module, first = lightning_module(METHODS["sam"], loop), []

    def backward(loss: Tensor) -> None:
        if not module.opt.is_perturbed:
            first.append(float(loss))
        module.log("loss", loss)
        type(module).manual_backward(module, loss)

    module.manual_backward = backward
    type(module).on_train_batch_end = lambda self, *_: self.losses.append(float(self.trainer.callback_metrics["loss"]))
    lightning_trainer().fit(module, loader(MICRO))
    assert module.losses == first


def passes_of(module: Any) -> list[tuple[int, bool]]:
    """Of a Lightning module under training: batch and whether the weights are perturbed, of every pass."""
    passes: list[tuple[int, bool]] = []

    def training_step(self: Any, batch: Batch, batch_idx: int) -> Tensor:
        passes.append((batch_idx, self.opt.is_perturbed))
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    type(module).training_step = training_step
    type(module).on_train_batch_end = lambda *_: None
    return passes


def test_lightning_finds_a_learning_rate_with_every_pass_of_all_batches(tmp_path: Path) -> None:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    ours = pytest.importorskip("sharpkern.integrations.lightning").SharpnessAware()
    finder = callbacks.LearningRateFinder(num_training_steps=2, update_attr=False, early_stop_threshold=None)
    module = lightning_module(METHODS["sam"])
    passes = passes_of(module)
    trainer = lightning_trainer(
        callbacks=[finder, ours], accumulate_grad_batches=MICRO, default_root_dir=str(tmp_path), max_steps=1
    )
    trainer.fit(module, loader(MICRO))
    window = [(i, perturbed) for perturbed in (False, True) for i in range(MICRO)]
    assert passes[: len(window)] == window
    assert passes[-len(window) :] == window


@over([METHODS["sam"], METHODS["momentumsam"]])
def test_lightning_averages_weights_and_looks_at_norm_layers_once(method: Method) -> None:
    """After the last epoch, every batch once and at the averaged weights."""
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    module, trainer = lightning_module(method), lightning_trainer(max_epochs=3)
    trainer.callbacks.append(callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1))
    passes = passes_of(module)
    module.configure_optimizers = lambda: module.opt
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Swapping scheduler")
        trainer.fit(module, loader())
    assert passes[-STEPS:] == [(i, False) for i in range(STEPS)]
    assert len(passes) == STEPS * (3 * method.calls + 1)
    twin = copy.deepcopy(module.model)
    for module_ in twin.modules():
        if isinstance(module_, nn.BatchNorm2d):
            module_.reset_running_stats()
            module_.momentum = None  # of a simple average
    for x, _ in data():
        twin(x)
    torch.testing.assert_close(module.model.bn.running_mean, twin.bn.running_mean)


def test_lightning_steps_may_take_things_out_of_a_batch() -> None:
    module = lightning_module(METHODS["sam"])

    def training_step(self: Any, batch: Any, _: int) -> Tensor:
        y = batch.pop("y")
        loss = nn.functional.cross_entropy(self.model(batch["x"]), y)
        self.log("loss", loss)
        return loss

    type(module).training_step = training_step
    lightning_trainer().fit(module, DataLoader([{"x": x, "y": y} for x, y in data()], batch_size=None))
    assert_same((module.model, module.opt), plain(METHODS["sam"], schedule=SCHEDULE))


def scaled_precision(init_scale: float = 2.0**10) -> Any:
    """Lightning's "16-mixed" without float16, which has no place in a comparison to the bit."""
    plugins = pytest.importorskip("lightning.pytorch.plugins.precision")

    class Scaled(plugins.MixedPrecision):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))

        def autocast_context_manager(self) -> Any:
            return torch.autocast("cpu", enabled=False)

    return Scaled()


def overflowing(model: nn.Module, call: int) -> None:
    """Make one backward pass of the model's, by its number, leave a gradient that is infinite."""
    calls = itertools.count()
    model.out.bias.register_hook(lambda g: g * torch.inf if next(calls) == call else g)


@pytest.mark.parametrize("loop", ["automatic", "closure", "by hand"])
@over([METHODS[name] for name in ("sam", "aesam", "gsam")])
def test_lightning_with_a_scaler(method: Method, loop: str) -> None:
    """An overflow in the last pass of the third step: it is skipped, and the scale is lowered."""
    module, trainer = lightning_module(method, loop), lightning_trainer()
    model, opt = make(method)
    call = 5 if method.always else 4
    overflowing(module.model, call)
    overflowing(model, call)
    trainer.strategy.precision_plugin = scaled_precision()
    trainer.fit(module, loader())
    assert trainer.strategy.precision_plugin.scaler.get_scale() == 2.0**9
    assert not module.opt.is_perturbed
    scheduler = SCHEDULE(opt)
    for batch in data():
        opt.step(lambda batch=batch: mean_loss(model, [batch]))
        scheduler.step()
    assert int(module.opt.stats["skipped_steps"]) == (loop != "by hand")  # the scaler does not step then
    assert int(opt.stats["skipped_steps"]) == 1
    assert relative_error(module.model, model) < 1e-9


def test_fabric_with_a_scaler() -> None:
    """Micro-batches, and a closure."""
    lightning = pytest.importorskip("lightning")
    ours = pytest.importorskip("sharpkern.integrations.lightning")
    fabric, sam = lightning.Fabric(accelerator="cpu", devices=1), METHODS["sam"]
    model, opt = make(sam)
    module, wrapped = fabric.setup(model, opt)
    fabric.strategy.precision.scaler = scaler = scaler_of()
    for i in range(STEPS):
        taken = data(MICRO)[i * MICRO : (i + 1) * MICRO]
        backward = functools.partial(scaled_backward, scaler)
        if i % 2:
            ours.fabric_step(fabric, wrapped, functools.partial(mean_loss, module, taken, backward))
            continue
        for x, y in taken:

            def closure(x: Tensor = x, y: Tensor = y, backward: Any = backward) -> None:
                backward(nn.functional.cross_entropy(module(x), y) / MICRO)

            wrapped.accumulate(closure)
        ours.fabric_step(fabric, wrapped)
    assert_same((model, opt), plain(sam, MICRO))


@every_way("closure", "by hand")
def test_fabric(method: Method, loop: str, tmp_path: Path) -> None:
    """Half of the steps before its checkpoint, half after it."""
    fabric = pytest.importorskip("lightning").Fabric(accelerator="cpu", devices=1)
    for part in (data()[: STEPS // 2], data()[STEPS // 2 :]):
        model, opt = make(method)
        module, wrapped = fabric.setup(model, opt)
        if (tmp_path / "half.ckpt").exists():
            fabric.load(tmp_path / "half.ckpt", {"model": module, "opt": wrapped})
        for batch in part:
            backward = lambda batch=batch, module=module: mean_loss(module, [batch], fabric.backward)  # noqa: E731
            if loop == "by hand":
                wrapped.zero_grad()
                backward()
                if wrapped.first_step(zero_grad=True):
                    backward()
                wrapped.second_step()
            else:
                wrapped.step(backward)
        fabric.save(tmp_path / "half.ckpt", {"model": module, "opt": wrapped})
    assert_same((model, opt), plain(method))


# Accelerate.


def accelerated(method: Method, micro: int = 1, ours: bool = True, **more: Any) -> tuple[Any, ...]:
    """A model and its optimizer, and what ``prepare`` makes of them: of sharpkern.integrations, or of Accelerate."""
    accelerate = pytest.importorskip("accelerate")
    if ours:
        accelerate = pytest.importorskip("sharpkern.integrations.accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=micro)
    accelerator.scaler = more.pop("scaler", None)
    model, opt = make(method, **more)
    return (model, opt), accelerator, *accelerator.prepare(model, opt, loader(micro), SCHEDULE(opt))


@pytest.mark.parametrize("ours", [False, True])
@every_way("closure", "by hand")
def test_accelerate(method: Method, loop: str, ours: bool) -> None:
    run, accelerator, model, opt, batches, scheduler = accelerated(method, ours=ours)
    for batch in batches:
        backward = lambda batch=batch: mean_loss(model, [batch], accelerator.backward)  # noqa: E731
        if loop == "by hand":
            backward()
            if (opt if ours else opt.optimizer).first_step(zero_grad=True):
                backward()
            opt.step()
            opt.zero_grad()
        else:
            opt.step(backward)
        scheduler.step()
    assert_same(run, plain(method, schedule=SCHEDULE))


def accelerated_closure(accelerator: Any, model: Any, batch: Batch) -> Tensor:
    """Of a micro-batch: Accelerate divides the loss for the backward."""
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    accelerator.backward(loss)
    return loss / MICRO


@every_method
def test_accelerate_accumulates(method: Method) -> None:
    """In steps of a closure a micro-batch; and, with gradients clipped, in the passes of the optimizer."""
    run, accelerator, model, opt, batches, scheduler = accelerated(method, MICRO, max_grad_norm=0.5)
    losses = []
    for batch in batches:
        with accelerator.accumulate(model):
            losses.append(opt.step(functools.partial(accelerated_closure, accelerator, model, batch)))
            scheduler.step()
            opt.zero_grad()
    expected = plain(method, MICRO, SCHEDULE, max_grad_norm=0.5)
    assert_same(run, expected)
    first = mean_loss(make(method)[0], data(MICRO)[:MICRO])
    if not method.one_gradient:
        torch.testing.assert_close(losses[MICRO - 1].detach(), first)


@pytest.mark.parametrize("seedable", [False, True])
def test_accelerate_with_a_monitor_over_the_loader_of_the_training(seedable: bool) -> None:
    """Which is in the middle of it: no batch is lost, and the last one of an epoch takes its step."""
    utils = pytest.importorskip("accelerate.utils")
    ours, analysis = pytest.importorskip("sharpkern.integrations.accelerate"), pytest.importorskip("sharpkern.analysis")
    ends, parts = [], [torch.cat(parts) for parts in zip(*data(), strict=True)]
    for recorded in (False, True):
        torch.manual_seed(0)
        accelerator = ours.Accelerator(
            cpu=True,
            gradient_accumulation_steps=2,
            dataloader_config=utils.DataLoaderConfiguration(use_seedable_sampler=seedable),
        )
        whole = DataLoader(torch.utils.data.TensorDataset(*parts), 16, shuffle=True)
        run = make(METHODS["sam"])
        model, opt, batches = accelerator.prepare(*run, whole)
        monitor = analysis.SharpnessMonitor(
            opt=opt, model=model, loss_fn=nn.functional.cross_entropy, batches=batches, every=2 if recorded else 99, k=1
        )
        for _ in range(3):
            for batch in batches:
                with accelerator.accumulate(model):
                    opt.step(functools.partial(accelerated_closure, accelerator, model, batch))
        assert bool(monitor.records) == recorded
        ends.append(run)
    assert_same(*ends)
    assert int(ends[0][1].stats["steps"]) == 3 * -(-len(batches) // 2)
    for _ in batches:
        with pytest.raises(ValueError, match="should be finite"):
            analysis.sharpness(model, lambda *_: torch.tensor(float("nan")), batches, 0.1)
        assert accelerator.gradient_state.active_dataloader is batches


def test_a_variable_of_the_loop_is_refused() -> None:
    """Its value would be that of the last micro-batch in every other pass."""
    _, accelerator, model, opt, batches, _ = accelerated(METHODS["sam"], MICRO)
    with pytest.raises(RuntimeError, match="reads 'batch', which has another value"):
        for batch in batches:
            with accelerator.accumulate(model):
                opt.step(lambda: accelerated_closure(accelerator, model, batch))  # noqa: B023


def test_accelerate_refuses_a_second_pass_of_the_last_batch() -> None:
    _, accelerator, model, opt, batches, _ = accelerated(METHODS["sam"], MICRO)
    with pytest.raises(RuntimeError, match=r"Call step\(closure\)"):
        for batch in batches:
            with accelerator.accumulate(model):
                accelerated_closure(accelerator, model, batch)
                opt.first_step()


def test_accelerate_saves_no_perturbed_weights(tmp_path: Path) -> None:
    run, accelerator, model, opt, batches, _ = accelerated(METHODS["momentumsam"], MICRO)
    for batch in itertools.islice(batches, MICRO + 1):
        with accelerator.accumulate(model):
            opt.step(functools.partial(accelerated_closure, accelerator, model, batch))
    assert opt.is_perturbed
    for save in (accelerator.save_state, functools.partial(accelerator.save_model, model)):
        with pytest.raises(RuntimeError, match="the weights are perturbed"):
            save(str(tmp_path / "state"))
    opt.restore()
    assert not run[1].is_perturbed
    accelerator.save_state(str(tmp_path / "state"))


def scaled_backward(scaler: Any, loss: Tensor) -> None:
    scaler.scale(loss).backward()


def scaler_of(scale: float = 2.0**10) -> Any:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4)


@pytest.mark.parametrize("loop", ["closure", "by hand"])
@over([METHODS[name] for name in ("sam", "aesam", "gsam")])
def test_accelerate_with_a_scaler(method: Method, loop: str) -> None:
    """It skips the third step, which overflows in its last pass; nor does the scheduler step there."""
    micro, scaler, plain_scaler = MICRO if loop == "closure" else 1, scaler_of(), scaler_of()
    run, accelerator, model, opt, batches, scheduler = accelerated(method, micro, scaler=scaler, **method.every)
    twin, other = make(method, **method.every)
    expected = SCHEDULE(other)
    for net in (run[0], twin):
        overflowing(net, 6 * micro - 1)
    for batch in batches:
        with accelerator.accumulate(model):
            closure = functools.partial(accelerated_closure, accelerator, model, batch)
            if loop == "closure":
                opt.step(closure)
            else:
                closure()
                if opt.first_step(zero_grad=True):
                    closure()
                opt.step()
            scheduler.step()
            opt.zero_grad()
        assert not run[1].is_perturbed
    for i in range(STEPS):
        taken = data(micro)[i * micro : (i + 1) * micro]
        backward = functools.partial(scaled_backward, plain_scaler)
        other.step(functools.partial(mean_loss, twin, taken, backward), scaler=plain_scaler)
        plain_scaler.update()
        if i != 2:
            expected.step()
    assert_same_bits(dict(run[0].state_dict()), dict(twin.state_dict()))
    assert scheduler.scheduler.state_dict()["last_epoch"] == STEPS - 1
    assert scaler.get_scale() == plain_scaler.get_scale()


def test_accelerates_own_scaler_refuses_micro_batches() -> None:
    """Of an optimizer that Accelerate prepared without sharpkern.integrations."""
    _, accelerator, model, opt, batches, _ = accelerated(METHODS["sam"], ours=False, scaler=scaler_of())
    opt.optimizer.accumulate(functools.partial(accelerated_closure, accelerator, model, next(iter(batches))))
    with pytest.raises(RuntimeError, match=r"call step\(scaler=scaler\)"):
        opt.step()


@few
def test_accelerate_resumes(method: Method, tmp_path: Path) -> None:
    for part in (data(MICRO)[: STEPS * MICRO // 2], data(MICRO)[STEPS * MICRO // 2 :]):
        run, accelerator, model, opt, _, scheduler = accelerated(method, MICRO)
        if (tmp_path / "state").exists():
            accelerator.load_state(str(tmp_path / "state"))
        for i, batch in enumerate(part):
            accelerator.gradient_state._set_sync_gradients((i + 1) % MICRO == 0)
            opt.step(functools.partial(accelerated_closure, accelerator, model, batch))
            scheduler.step()
        accelerator.save_state(str(tmp_path / "state"))
    assert_same(run, plain(method, MICRO, SCHEDULE))


def test_accelerate_prepares_other_optimizers_as_ever() -> None:
    module = pytest.importorskip("sharpkern.integrations.accelerate")
    accelerator, model = module.Accelerator(cpu=True), nn.Linear(2, 1)
    assert not isinstance(accelerator.prepare(torch.optim.SGD(model.parameters())), module.PreparedOptimizer)
    with pytest.raises(RuntimeError, match="takes its steps itself"):
        module.adopt(
            SimpleNamespace(optimizer=make(METHODS["sam"])[1]), SimpleNamespace(distributed_type=module.REFUSED[0])
        )


# The Trainer of transformers.


class Examples(nn.Module):
    """The model of the tests as the Trainer calls one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.model(x)
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


def transformers_trainer(
    method: Method, ours: bool = True, micro: int = 1, own: dict[str, Any] | None = None, **options: Any
) -> tuple[Run, Any]:
    """``own``: arguments of the optimizer."""
    transformers = pytest.importorskip("transformers")
    base = transformers.Trainer
    if ours:
        base = pytest.importorskip("sharpkern.integrations.transformers").SharpnessAwareTrainer

    class Ordered(base):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model, opt = make(method, **(own or {}))
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": "trainer",
            "use_cpu": True,
            "per_device_train_batch_size": 1,
            "num_train_epochs": 1,
            "gradient_accumulation_steps": micro,
            "max_grad_norm": 0.0,
            "report_to": [],
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            **options,
        }
    )
    trainer = Ordered(
        model=Examples(model),
        args=arguments,
        train_dataset=[{"x": x, "labels": y} for x, y in data(micro)],
        data_collator=lambda one: one[0],  # every example is a batch
        optimizers=(opt, SCHEDULE(opt)),
    )
    return (model, opt), trainer


@every_method
def test_transformers(method: Method) -> None:
    """The gradient of the last pass is clipped, where it is to be."""
    micro, max_grad_norm = (1, 0.0) if method in list(METHODS.values())[::4] else (MICRO, 0.1)
    run, trainer = transformers_trainer(method, micro=micro, max_grad_norm=max_grad_norm)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert_same(run, plain(method, micro, SCHEDULE, max_grad_norm=max_grad_norm or None))


def test_transformers_logs_the_first_pass() -> None:
    """Its loss and its gradient's norm; the optimizer's own clipping stays."""
    run, trainer = transformers_trainer(
        METHODS["sam"],
        micro=MICRO,
        own={"max_grad_norm": 0.1},
        max_grad_norm=1.0,
        logging_strategy="steps",
        logging_steps=1,
    )
    trainer.train()
    model, opt = make(METHODS["sam"], max_grad_norm=0.1)
    scheduler = SCHEDULE(opt)
    for i, log in zip(range(STEPS), trainer.state.log_history, strict=False):
        taken = data(MICRO)[i * MICRO : (i + 1) * MICRO]
        loss = opt.step(lambda taken=taken: mean_loss(model, taken))
        scheduler.step()
        assert log["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert log["grad_norm"] == pytest.approx(float(opt.stats["grad_norm"]), rel=1e-5)
    assert_same(run, (model, opt))


def test_transformers_smooths_labels() -> None:
    """Its loss takes the labels out of the inputs, which the second pass needs, too."""
    run, trainer = transformers_trainer(METHODS["sam"])
    trainer.label_smoother = pytest.importorskip("transformers.trainer_pt_utils").LabelSmoother(0.1)
    trainer.train()
    model, opt = make(METHODS["sam"])
    scheduler = SCHEDULE(opt)
    for x, y in data():

        def closure(x: Tensor = x, y: Tensor = y) -> None:
            nn.functional.cross_entropy(model(x), y, label_smoothing=0.1).backward()

        opt.step(closure)
        scheduler.step()
    assert relative_error(run[0], model) < 1e-6  # it sums in float32
    assert relative_error(run[0], plain(METHODS["sam"], schedule=SCHEDULE)[0]) > 1e-4


@over([METHODS[name] for name in ("sam", "aesam", "gsam")])
def test_transformers_with_a_scaler(method: Method) -> None:
    """As with fp16, without float16: the gradients of all passes are unscaled, then clipped."""
    run, trainer = transformers_trainer(method, micro=MICRO, max_grad_norm=0.1)
    trainer.accelerator.scaler = scaler_of()
    trainer.train()
    assert_same(run, plain(method, MICRO, SCHEDULE, max_grad_norm=0.1))
    assert trainer.accelerator.scaler.get_scale() == 2.0**13


@few
def test_transformers_resumes(method: Method) -> None:
    _, trainer = transformers_trainer(method, micro=MICRO, save_strategy="steps", save_steps=STEPS // 2)
    trainer.train()
    run, trainer = transformers_trainer(method, micro=MICRO)
    with torch.no_grad():
        for p in run[0].parameters():
            p.zero_()
    trainer.train(resume_from_checkpoint=f"trainer/checkpoint-{STEPS // 2}")
    assert_same(run, plain(method, MICRO, SCHEDULE))


def test_transformers_gives_the_clipping_back() -> None:
    for fails in (False, True):
        (model, opt), trainer = transformers_trainer(METHODS["sam"], max_grad_norm=0.1)
        if fails:
            calls = itertools.count()
            model.register_forward_hook(lambda *_: 1 / (next(calls) - 5) and None)  # noqa: B023
        with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
            trainer.train()
        assert opt.max_grad_norm is None


def test_transformers_refuses_changes_of_one_gradient() -> None:
    callback = pytest.importorskip("transformers").TrainerCallback
    for i, _ in enumerate(make(METHODS["sam"])[0].parameters()):

        class Change(callback):  # type: ignore[misc, valid-type]
            def on_pre_optimizer_step(self, *_: Any, model: Any, i: int = i, **__: Any) -> None:
                list(model.parameters())[i].grad.zero_()

        _, trainer = transformers_trainer(METHODS["sam"])
        trainer.add_callback(Change())
        with pytest.raises(RuntimeError, match="gradients were changed"):
            trainer.train()


def test_transformers_refuses_a_training_step_around_ours() -> None:
    transformers = pytest.importorskip("transformers")
    ours = pytest.importorskip("sharpkern.integrations.transformers")
    own = {"training_step": lambda self, *args: super(type(self), self).training_step(*args)}
    for bases in ((ours.SharpnessAwareTrainer,), (ours.SharpnessAware, transformers.Trainer)):
        with pytest.raises(TypeError, match=r"training_step\(\) of Mine would run in the first pass only"):
            type("Mine", bases, own)
    with pytest.raises(TypeError, match=r"training_step\(\) of Trainer"):
        type("Mine", (transformers.Trainer, ours.SharpnessAware), {})
    type("Mine", (ours.SharpnessAware, type("Theirs", (transformers.Trainer,), own)), {})


@over([METHODS["sam"], METHODS["momentumsam"]])
def test_transformers_drops_a_step_that_is_not_done(method: Method) -> None:
    """An epoch that stops between two micro-batches is saved, and ends, at the model's own weights."""
    callback = pytest.importorskip("transformers").TrainerCallback
    seen: list[Any] = []

    class Stop(callback):  # type: ignore[misc, valid-type]
        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                return
            control.should_training_stop = control.should_save = True
            if method.one_gradient:
                with pytest.raises(RuntimeError, match="evaluate between steps"):
                    trainer.evaluate(trainer.train_dataset)

        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            seen.append({name: p.clone() for name, p in model.named_parameters()})

        on_save = on_step_end

    (_, opt), trainer = transformers_trainer(method, micro=MICRO)
    trainer.add_callback(Stop())
    trainer.train()
    assert not opt.is_perturbed
    assert not opt._step.micro_batches
    after_step, saved = seen
    assert_same_bits(after_step, saved)
    assert_same_bits(after_step, dict(trainer.model.named_parameters()))


@pytest.mark.parametrize("model", ["the trainer's", None])
def test_transformers_gives_the_optimizer_its_model(model: Any) -> None:
    """Statistics are then those of the first pass."""
    _, trainer = transformers_trainer(METHODS["sam"])
    own = {} if model else {"model": None}
    trainer.optimizer, trainer.lr_scheduler = None, None
    trainer.optimizer_cls_and_kwargs = sk.SAM, {"base_optimizer": torch.optim.SGD, "lr": 0.1, **own}
    trainer.train()
    assert int(trainer.model.model.bn.num_batches_tracked) == (STEPS if model else 2 * STEPS)
    assert ("model" in trainer.optimizer_cls_and_kwargs[1]) == (model is None)


def test_a_trainer_of_transformers_without_ours_is_told() -> None:
    (_, opt), trainer = transformers_trainer(METHODS["sam"], ours=False)
    with pytest.warns(UserWarning, match="is a step of SGD alone"):
        trainer.train()
    assert int(opt.stats["base_steps"]) == STEPS


def test_ours_takes_our_optimizers_only() -> None:
    _, trainer = transformers_trainer(METHODS["sam"])
    trainer.optimizer, trainer.lr_scheduler = torch.optim.SGD(trainer.model.parameters()), None
    with pytest.raises(TypeError, match="one of sharpkern"):
        trainer.train()


# ignite.


@every_way("closure", "by hand")
def test_ignite(method: Method, loop: str) -> None:
    """The output of an iteration is the loss of the first pass."""
    engine = pytest.importorskip("ignite.engine")
    (model, opt), losses = make(method), []
    scheduler = SCHEDULE(opt)

    def update(_: Any, batch: Batch) -> float:
        model.train()
        if loop == "closure":
            return float(opt.step(lambda: mean_loss(model, [batch])))
        opt.zero_grad()
        loss = mean_loss(model, [batch])
        if opt.first_step(zero_grad=True):
            mean_loss(model, [batch])
        opt.second_step()
        return float(loss)

    trainer = engine.Engine(update)
    trainer.add_event_handler(engine.Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output))
    trainer.add_event_handler(engine.Events.ITERATION_COMPLETED, lambda: scheduler.step())
    trainer.run(data())
    assert_same((model, opt), plain(method, schedule=SCHEDULE))
    assert len(losses) == STEPS


@pytest.mark.parametrize("scaled", [False, True])
@every_method
def test_ignite_supervised(method: Method, scaled: bool) -> None:
    """With gradients accumulated, and the scaler of a float16 training; outputs are those of the first pass."""
    ours, engine = pytest.importorskip("sharpkern.integrations.ignite"), pytest.importorskip("ignite.engine")
    (model, opt), losses = make(method), []
    scheduler, scaler = SCHEDULE(opt), scaler_of() if scaled else None
    trainer = ours.create_supervised_trainer(
        model, opt, nn.functional.cross_entropy, gradient_accumulation_steps=MICRO, scaler=scaler
    )
    trainer.add_event_handler(engine.Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output))
    trainer.add_event_handler(engine.Events.ITERATION_COMPLETED(every=MICRO), lambda: scheduler.step())
    trainer.run(data(MICRO))
    assert_same((model, opt), plain(method, MICRO, SCHEDULE))
    assert len(losses) == STEPS * MICRO
    if not method.one_gradient:
        twin, (x, y) = make(method)[0], data(MICRO)[0]
        assert losses[0] == float(nn.functional.cross_entropy(twin(x), y))
    if scaler is not None:
        assert scaler.get_scale() == 2.0**13
    with pytest.raises(ValueError, match="Invalid gradient_accumulation_steps: 0"):
        ours.create_supervised_trainer(model, opt, None, gradient_accumulation_steps=0)
    assert type(ours.create_supervised_trainer(model, opt, None, deterministic=True)) is engine.DeterministicEngine


@over([METHODS["sam"], METHODS["momentumsam"]])
def test_ignite_drops_a_step_that_is_not_done(method: Method) -> None:
    """At the end of a run and after an exception; an epoch ends at the model's own weights."""
    ours, engine = pytest.importorskip("sharpkern.integrations.ignite"), pytest.importorskip("ignite.engine")
    for handled in (None, False, True):
        model, opt = make(method)
        seen: list[bool] = []
        trainer = ours.create_supervised_trainer(
            model, opt, nn.functional.cross_entropy, gradient_accumulation_steps=MICRO
        )
        trainer.add_event_handler(engine.Events.EPOCH_COMPLETED, lambda: seen.append(opt.is_perturbed))  # noqa: B023
        if handled is not None:
            trainer.add_event_handler(engine.Events.ITERATION_COMPLETED, lambda: 1 / 0)
        if handled:
            trainer.add_event_handler(engine.Events.EXCEPTION_RAISED, lambda _: seen.append(False))  # noqa: B023
        with pytest.raises(ZeroDivisionError) if handled is False else contextlib.nullcontext():
            trainer.run(data(MICRO)[: MICRO + 1], max_epochs=2)
        assert not any(seen)
        assert bool(seen) == (handled is not False)
        assert not opt.is_perturbed
        assert not opt._step.micro_batches


def test_ignite_takes_our_optimizers_only() -> None:
    ours = pytest.importorskip("sharpkern.integrations.ignite")
    model = make(METHODS["sam"])[0]
    with pytest.raises(TypeError, match="one of sharpkern"):
        ours.create_supervised_trainer(model, torch.optim.SGD(model.parameters()), nn.functional.cross_entropy)


def test_ignites_own_process_function_is_told() -> None:
    engine = pytest.importorskip("ignite.engine")
    model, opt = make(METHODS["sam"])
    with pytest.warns(UserWarning, match="is a step of SGD alone"):
        engine.create_supervised_trainer(model, opt, nn.functional.cross_entropy).run(data())
    assert int(opt.stats["base_steps"]) == STEPS


# skorch.


def skorch_net(method: Method, **options: Any) -> Any:
    skorch = pytest.importorskip("skorch")
    ours = pytest.importorskip("sharpkern.integrations.skorch")
    made: list[Any] = []

    class Net(ours.SharpnessAware, skorch.NeuralNet):  # type: ignore[misc, name-defined]
        def initialize_module(self, *_: Any, **__: Any) -> Any:
            self.module_, opt = make(method)
            made.append(opt)
            return self

        def initialize_optimizer(self, *_: Any, **__: Any) -> Any:
            self.optimizer_ = made[-1]
            return self

    more = {"train_split": None, "max_epochs": 1, "batch_size": 8, "verbose": 0, "iterator_train__shuffle": False}
    return Net(nn.Module, criterion=nn.CrossEntropyLoss, **{**more, **options})


@every_method
def test_skorch(method: Method) -> None:
    """Batches are accumulated, the last step of an epoch takes what is left."""
    taken = data(MICRO)[:-1]
    net = skorch_net(method, gradient_accumulation_steps=MICRO)
    x, y = (torch.cat(parts) for parts in zip(*taken, strict=True))
    net.fit(x, y)
    model, opt = make(method)
    for i in range(0, len(taken), MICRO):
        opt.step(functools.partial(mean_loss, model, taken[i : i + MICRO], parts=MICRO))
    assert_same((net.module_, net.optimizer_), (model, opt))
    assert len(net.history[0, "batches", :, "train_loss"]) == len(taken)


def test_skorch_divides_the_loss_of_a_net_of_ones_own() -> None:
    """A penalty, say; what is recorded is the whole of it."""
    taken = data(MICRO)[:MICRO]
    net = skorch_net(METHODS["sam"], gradient_accumulation_steps=MICRO)

    class Penalized(type(net)):  # type: ignore[misc]
        def get_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = super().get_loss(*args, **kwargs)
            return loss + self.module_.out.weight.square().sum()

    net.__class__ = Penalized
    net.fit(*(torch.cat(parts) for parts in zip(*taken, strict=True)))
    model, opt = make(METHODS["sam"])
    losses = []

    def closure() -> None:
        for x, y in taken:
            losses.append(nn.functional.cross_entropy(model(x), y) + model.out.weight.square().sum())
            (losses[-1] / MICRO).backward()

    opt.step(closure)
    assert_same((net.module_, net.optimizer_), (model, opt))
    recorded = net.history[0, "batches", :, "train_loss"]
    assert recorded == pytest.approx([float(loss.detach()) for loss in losses[:MICRO]], rel=1e-12)
    net.optimizer_.zero_grad()
    net.train_step_single = lambda batch, **_: {"loss": mean_loss(net.module_, [batch])}
    with pytest.raises(RuntimeError, match="called no get_loss"):
        net.partial_fit(*(torch.cat(parts) for parts in zip(*taken, strict=True)))


def test_skorch_sets_any_option_of_an_optimizer_that_is_there() -> None:
    skorch = pytest.importorskip("skorch")
    ours = pytest.importorskip("sharpkern.integrations.skorch")

    class Net(ours.SharpnessAware, skorch.NeuralNet):  # type: ignore[misc, name-defined]
        pass

    x, y = (torch.cat(parts).float() for parts in zip(*data(), strict=True))
    ends = []
    for later in (False, True):
        torch.manual_seed(0)
        net = Net(
            nn.Linear(x[0].numel(), 3),
            criterion=nn.CrossEntropyLoss,
            optimizer=sk.LookSAM,
            optimizer__momentum=0.9,
            lr=0.1,
            batch_size=8,
            max_epochs=1,
            train_split=None,
            verbose=0,
            iterator_train__shuffle=False,
        )
        net.partial_fit(x.flatten(1), y.long())
        options = {"alpha": 0.1, "k": 1, "max_grad_norm": 0.5, "rho": 0.2}
        if later:
            held, known = net.optimizer_, net.get_params(deep=False)
            for wrong in ({"k": 0}, {"kk": 1}):
                with pytest.raises((ValueError, TypeError)):
                    net.set_params(**{f"optimizer__{name}": value for name, value in wrong.items()})
            assert net.optimizer_ is held
            assert net.get_params(deep=False) == known
            net.set_params(**{f"optimizer__{name}": value for name, value in options.items()})
            assert net.get_params()["optimizer__k"] == 1
        else:
            opt = sk.LookSAM(net.module_.parameters(), lr=0.1, momentum=0.9, **options)
            opt.load_state_dict(net.optimizer_.state_dict())
            opt.param_groups[0]["rho"] = 0.2
            net.optimizer_ = opt
            opt.zero_grad()
        net.partial_fit(x.flatten(1), y.long())
        ends.append((net.module_, net.optimizer_))
    assert_same(*ends)


def test_skorch_refuses_what_it_cannot_do_right() -> None:
    skorch = pytest.importorskip("skorch")
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    net = skorch_net(METHODS["sam"], callbacks=[skorch.callbacks.GradientNormClipping(1.0)])
    with pytest.raises(RuntimeError, match="would clip in every pass"):
        net.fit(x, y)
    net = skorch_net(METHODS["sam"])
    net.initialize_optimizer = lambda: setattr(net, "optimizer_", torch.optim.SGD(net.module_.parameters()))
    with pytest.raises(TypeError, match="one of sharpkern"):
        net.fit(x, y)


def test_skorch_begins_anew_with_a_new_optimizer() -> None:
    """Whatever was taken before."""
    net = skorch_net(METHODS["sam"], gradient_accumulation_steps=MICRO)
    del type(net).initialize_optimizer
    net.set_params(optimizer=sk.SAM, optimizer__base_optimizer=torch.optim.SGD)
    net.initialize()
    x, y = data()[0]
    net.train_step((x, y))
    net.initialize()
    for i in range(MICRO):
        assert int(net.optimizer_.stats["steps"]) == 0, i
        net.train_step((x, y))
    assert int(net.optimizer_.stats["steps"]) == 1


# Several processes.


def plain_net() -> nn.Module:
    """Without batch norm, whose statistics are those of a process's own batch."""
    model = make(METHODS["sam"])[0]
    model.bn = nn.Identity()
    return model


def half(batches: list[Batch], rank: int) -> list[Batch]:
    return [(x[rank::2], y[rank::2]) for x, y in batches]


def _process(rank: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    warnings.simplefilter("ignore")
    for name in ("sam", "aelooksam", "momentumsam", "salr"):
        method = METHODS[name]
        options = dict(lambda_start=2.0, lambda_end=0.0) if method.triggered else {}
        expected = plain_net()
        opt = method.make(expected.named_parameters(), "momentum", STEPS, **options)
        for i in range(STEPS):
            taken = data(MICRO)[i * MICRO : (i + 1) * MICRO]
            opt.step(functools.partial(mean_loss, expected, taken))
        for train in (_with_lightning, _with_accelerate):
            model = plain_net()
            train(model, method.make(model.named_parameters(), "momentum", STEPS, **options), rank)
            assert relative_error(model, expected) < 1e-9, f"{method}, {train.__name__}"


def _with_lightning(model: nn.Module, opt: Any, rank: int) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Batch) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return opt

    options = {"accumulate_grad_batches": MICRO, "use_distributed_sampler": False}
    trainer = lightning_trainer(devices=2, strategy="ddp", **options)
    trainer.fit(Module(), DataLoader(half(data(MICRO), rank), batch_size=None))


def _with_accelerate(model: nn.Module, opt: Any, rank: int) -> None:
    from sharpkern.integrations.accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
    parallel, prepared = accelerator.prepare(model, opt)
    assert isinstance(parallel, nn.parallel.DistributedDataParallel)
    passes = []
    parallel.register_comm_hook(passes, lambda _, bucket: passes.append(bucket) or allreduce_hook(None, bucket))
    for batch in half(data(MICRO), rank):
        with accelerator.accumulate(parallel):
            prepared.step(functools.partial(accelerated_closure, accelerator, parallel, batch))
    accelerator.free_memory()
    if type(opt) is sk.SAM:
        assert len(passes) == 2 * STEPS


def test_data_parallel(tmp_path: Path) -> None:
    """Two processes with half of each batch are as one with all of it; gradients are exchanged once a pass."""
    pytest.importorskip("lightning")
    pytest.importorskip("accelerate")
    (tmp_path / "store").mkdir()
    processes.run(_process, tmp_path / "store")


# bfloat16: autocast around the forward pass.


def in_float32(batches: list[Batch]) -> Any:
    return DataLoader([(x.float(), y) for x, y in batches], batch_size=None)


def with_lightning(method: Method) -> Run:
    module = lightning_module(method)
    module.model.float()
    lightning_trainer(precision="bf16-mixed").fit(module, in_float32(data()))
    return module.model, module.opt


def with_accelerate(method: Method) -> Run:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    run = make(method)
    run[0].float()
    model, opt, batches, scheduler = accelerator.prepare(*run, in_float32(data()), SCHEDULE(run[1]))
    for x, y in batches:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            with accelerator.autocast():
                loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            return loss

        opt.step(closure)
        scheduler.step()
    return run


def with_transformers(method: Method) -> Run:
    run, trainer = transformers_trainer(method, bf16=True)
    run[0].float()
    trainer.train_dataset = [{"x": x.float(), "labels": y} for x, y in data()]
    trainer.train()
    return run


@pytest.mark.parametrize("train", [with_lightning, with_accelerate, with_transformers])
@few
def test_bfloat16(method: Method, train: Callable[[Method], Run]) -> None:
    model, opt = make(method)
    model.float()
    scheduler = SCHEDULE(opt)
    for x, y in in_float32(data()):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        opt.step(closure)
        scheduler.step()
    run = train(method)
    assert_same(run, (model, opt))
    assert relative_error(run[0].double(), plain(method, schedule=SCHEDULE)[0]) > 1e-4
