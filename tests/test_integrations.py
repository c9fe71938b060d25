"""Trainers themselves: with each, every optimizer ends where a plain loop does, to the bit. Of the second tier.

test_loops.py has what they do in stand-ins.
"""

from __future__ import annotations

import itertools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import MICRO, STEPS, Batch, Run, assert_same, data, every_way, make, mean_loss, plain
from methods import BY_HAND, CLIPPED, METHODS, Method, every_method, over
from models import relative_error
from torch import Tensor, nn
from torch.utils.data import DataLoader

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


def lightning_trainer(**options: Any) -> Any:
    lightning = pytest.importorskip("lightning")
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, logger=False)
    return lightning.Trainer(**{"max_epochs": 1, "accelerator": "cpu", "num_sanity_val_steps": 0, **quiet, **options})


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
                if method.one_gradient or not self.optimizers().is_perturbed:
                    self.log("loss", loss)
                return loss
            return getattr(self, loop.replace(" ", "_"))(batch)

        def on_train_batch_end(self, *_: Any) -> None:
            if loop == "automatic":
                self.losses.append(float(self.trainer.callback_metrics["loss"]))

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
            self.micro_batches.append(batch)
            if len(self.micro_batches) == MICRO:
                opt = self.optimizers()
                opt.step(lambda: mean_loss(self.model, self.micro_batches, self.manual_backward))
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
    module, trainer = lightning_run(method, loop, micro)
    assert_same((module.model, module.opt), plain(method, micro, SCHEDULE))
    assert trainer.global_step == STEPS
    if loop == "automatic":
        model, opt = make(method)
        scheduler, losses = SCHEDULE(opt), []
        for batch in data():
            losses.append(float(opt.step(lambda batch=batch: mean_loss(model, [batch]))))
            scheduler.step()
        assert module.losses == losses


@few
def test_lightning_resumes(method: Method, tmp_path: Path) -> None:
    """From its own checkpoint, after half of the steps."""
    half, path = data()[: STEPS // 2], str(tmp_path / "half.ckpt")
    trainer = lightning_trainer()
    trainer.fit(lightning_module(method), DataLoader(half, batch_size=None))
    trainer.save_checkpoint(path)
    module = lightning_module(method)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    rest = DataLoader(data()[STEPS // 2 :], batch_size=None)
    lightning_trainer(max_epochs=2).fit(module, rest, ckpt_path=path, weights_only=True)
    assert_same((module.model, module.opt), plain(method, schedule=SCHEDULE))


def test_lightning_says_what_it_does_not_support() -> None:
    """Gradients that it accumulates before step(closure), and steps without a closure under a gradient scaler."""
    sam = METHODS["sam"]
    with pytest.warns(UserWarning, match="those that were there are not used"):
        lightning_run(sam, "automatic", MICRO, accumulate_grad_batches=MICRO)
    module, trainer = lightning_module(sam), lightning_trainer()
    trainer.strategy.precision_plugin = scaled_precision()
    with pytest.warns(UserWarning, match="is a step of SGD alone"):
        trainer.fit(module, loader())
    assert int(module.opt.stats["base_steps"]) == STEPS


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


@over([METHODS[name] for name in ("sam", "aesam", "gsam")])
def test_lightning_with_a_scaler_by_hand(method: Method) -> None:
    """Which does not step after an overflow, in the last pass of the third step: second_step() ends that step."""
    module, trainer = lightning_module(method, "by hand"), lightning_trainer()
    model, opt = make(method)
    call = 5 if method.always else 4
    overflowing(module.model, call)
    overflowing(model, call)
    trainer.strategy.precision_plugin = scaled_precision()
    trainer.fit(module, loader())
    scheduler = SCHEDULE(opt)
    for batch in data():
        opt.step(lambda batch=batch: mean_loss(model, [batch]))
        scheduler.step()
    assert int(module.opt.stats["skipped_steps"]) == 0
    assert int(opt.stats["skipped_steps"]) == 1
    assert relative_error(module.model, model) < 1e-9


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


def accelerated(method: Method, micro: int = 1) -> tuple[Any, ...]:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=micro)
    model, opt = make(method)
    return (model, opt), accelerator, *accelerator.prepare(model, opt, loader(micro), SCHEDULE(opt))


@every_way("closure", "by hand")
def test_accelerate(method: Method, loop: str) -> None:
    run, accelerator, model, opt, batches, scheduler = accelerated(method)
    for batch in batches:
        backward = lambda batch=batch: mean_loss(model, [batch], accelerator.backward)  # noqa: E731
        if loop == "by hand":
            backward()
            if opt.optimizer.first_step(zero_grad=True):
                backward()
            opt.step()
            opt.zero_grad()
        else:
            opt.step(backward)
        scheduler.step()
    assert_same(run, plain(method, schedule=SCHEDULE))


@every_method
def test_accelerate_accumulates(method: Method) -> None:
    """The loss of a micro-batch is divided by Accelerate."""
    run, accelerator, model, opt, batches, scheduler = accelerated(method, MICRO)
    micro_batches: list[Batch] = []

    def accumulate() -> Tensor:
        losses = []
        for x, y in micro_batches:
            losses.append(nn.functional.cross_entropy(model(x), y))
            accelerator.backward(losses[-1])
        return sum(loss.detach() / MICRO for loss in losses)

    for batch in batches:
        with accelerator.accumulate(model):
            micro_batches.append(batch)
            opt.step(accumulate)
            scheduler.step()
            if accelerator.sync_gradients:
                micro_batches.clear()
    assert_same(run, plain(method, MICRO, SCHEDULE))


@few
def test_accelerate_resumes(method: Method, tmp_path: Path) -> None:
    for part in (data()[: STEPS // 2], data()[STEPS // 2 :]):
        run, accelerator, model, opt, _, scheduler = accelerated(method)
        if (tmp_path / "state").exists():
            accelerator.load_state(str(tmp_path / "state"))
        for batch in part:
            opt.step(lambda batch=batch, model=model: mean_loss(model, [batch]))
            scheduler.step()
        accelerator.save_state(str(tmp_path / "state"))
    assert_same(run, plain(method, schedule=SCHEDULE))


# The Trainer of transformers.


class Examples(nn.Module):
    """The model of the tests as the Trainer calls one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.model(x), labels)}


def transformers_trainer(method: Method, recipe: bool = True, micro: int = 1, **options: Any) -> tuple[Run, Any]:
    transformers = pytest.importorskip("transformers")

    class Ordered(transformers.Trainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class TwoPasses(Ordered):
        """The recipe of docs/loops/transformers.md."""

        micro_batches: tuple[Any, ...] = ()

        def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.micro_batches += (inputs,)
            if self.accelerator.sync_gradients:
                if self.optimizer.optimizer.first_step(zero_grad=True):
                    for inputs in self.micro_batches:
                        super().training_step(model, inputs, num_items_in_batch)
                self.micro_batches = ()
            return loss

    model, opt = make(method)
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
    trainer = (TwoPasses if recipe else Ordered)(
        model=Examples(model),
        args=arguments,
        train_dataset=[{"x": x, "labels": y} for x, y in data(micro)],
        data_collator=lambda one: one[0],  # every example is a batch
        optimizers=(opt, SCHEDULE(opt)),
    )
    return (model, opt), trainer


@pytest.mark.parametrize("micro", [1, MICRO])
@over(BY_HAND)
def test_transformers(method: Method, micro: int) -> None:
    run, trainer = transformers_trainer(method, micro=micro)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert_same(run, plain(method, micro, SCHEDULE))


@over(CLIPPED)
def test_transformers_clips(method: Method) -> None:
    """The gradient of the last pass."""
    run, trainer = transformers_trainer(method, max_grad_norm=0.1)
    trainer.train()
    expected = plain(method, schedule=SCHEDULE, max_grad_norm=0.1)
    assert relative_error(run[0], expected[0]) < 1e-12
    assert run[1].stats["second_passes"] == expected[1].stats["second_passes"]


@few
def test_transformers_resumes(method: Method) -> None:
    _, trainer = transformers_trainer(method, save_strategy="steps", save_steps=STEPS // 2)
    trainer.train()
    run, trainer = transformers_trainer(method)
    with torch.no_grad():
        for p in run[0].parameters():
            p.zero_()
    trainer.train(resume_from_checkpoint=f"trainer/checkpoint-{STEPS // 2}")
    assert_same(run, plain(method, schedule=SCHEDULE))


def test_a_trainer_of_transformers_without_the_recipe_is_told() -> None:
    (_, opt), trainer = transformers_trainer(METHODS["sam"], recipe=False)
    with pytest.warns(UserWarning, match="is a step of SGD alone"):
        trainer.train()
    assert int(opt.stats["base_steps"]) == STEPS


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


def test_ignites_own_process_function_is_told() -> None:
    engine = pytest.importorskip("ignite.engine")
    model, opt = make(METHODS["sam"])
    with pytest.warns(UserWarning, match="is a step of SGD alone"):
        engine.create_supervised_trainer(model, opt, nn.functional.cross_entropy).run(data())
    assert int(opt.stats["base_steps"]) == STEPS


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
