"""sharpkern.analysis: against the dense Hessian of a small net in float64, and what it leaves as it was."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkern as sk

np = pytest.importorskip("numpy")
pytest.importorskip("scipy")

from sharpkern import analysis  # noqa: E402
from sharpkern.analysis.hessian import Hessian  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CE = F.cross_entropy
L2 = 0.05


class Net(nn.Module):
    """61 weights, of which 53 are used; what a batch, a random number or a mode may change."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3))
        self.unused = nn.Linear(3, 2)
        self.body[1].momentum = 0.3

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def make(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A net that has seen data, in several modes, with gradients; and batches of 16, 16 and 8 samples."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    x, y = torch.randn(40, 4, dtype=dtype), torch.randint(0, 3, (40,))
    CE(model(x), y).backward()
    model.body[2].eval()
    return model, list(zip(x.split(16), y.split(16), strict=True))


def dense(model: nn.Module, batches: Any, l2: float = 0.0, loss_fn: Callable[..., Tensor] = CE) -> tuple[Any, Tensor]:
    """The loss of all samples at once as a function of one vector of the weights that are trained; and that vector."""
    frozen = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    model = copy.deepcopy(model).eval()

    def loss(w: Tensor) -> Tensor:
        parts = w.split([p.numel() for p in trained.values()])
        weights = {name: part.view(p.shape) for (name, p), part in zip(trained.items(), parts, strict=True)}
        return loss_fn(torch.func.functional_call(model, {**frozen, **weights}, (x,)), y) + l2 / 2 * w @ w

    return loss, torch.cat([p.detach().reshape(-1) for p in trained.values()])


@pytest.fixture(params=[False, True], ids=["all", "frozen"])
def problem(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, Tensor]:
    """A net, with a frozen layer or without, its batches, and its dense Hessian with an L2 term."""
    model, batches = make()
    if request.param:
        model.body[1].requires_grad_(False)
    loss, w = dense(model, batches, L2)
    return model, batches, torch.autograd.functional.hessian(loss, w)


def snapshot(model: nn.Module) -> list[Any]:
    """Everything that an analysis has to leave alone."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    flags = [(p.requires_grad, p.grad is None, p.data_ptr()) for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    bits = [t.detach().clone().view(torch.uint8) if t.dim() else t.detach().clone() for t in tensors]
    return [flags, modes, torch.backends.cudnn.enabled, torch.get_rng_state(), *bits]


def check_untouched(model: nn.Module, before: list[Any]) -> None:
    for a, b in zip(before, snapshot(model), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with torch.device("cpu"):
        yield


# The spectrum.


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize("k", [1, 5])
def test_eigenpairs_are_those_of_the_dense_hessian(problem: Any, which: str, k: int) -> None:
    model, batches, dense_hessian = problem
    found = analysis.top_eigenvalues(model, CE, batches, k, l2=L2, which=which, tol=1e-12)
    values, vectors = torch.linalg.eigh(dense_hessian)
    order = {"LM": -values.abs(), "LA": -values, "SA": values}[which].argsort()[:k]
    order = order[values[order].argsort(descending=True)]
    torch.testing.assert_close(found.values, values[order], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-9)
    cosines = (found.vectors * vectors.T[order]).sum(1).abs()
    apart = [float((values - values[i]).abs().sort().values[1]) > 1e-3 for i in order]  # else any mixture is right
    assert (cosines[torch.tensor(apart)] > 1 - 1e-9).all()
    assert k + 1 < found.matvecs < 400
    shapes = [p.shape for p in model.parameters() if p.requires_grad]
    assert [part.shape for part in found.as_parameters(0)] == shapes
    assert torch.equal(torch.cat([part.reshape(-1) for part in found.as_parameters(0)]), found.vectors[0])


def test_every_eigenvalue_and_a_matrix_that_is_small() -> None:
    """Up to k = n, which Lanczos cannot do."""
    model, batches = nn.Linear(4, 3).double(), make()[1]
    loss, w = dense(model, batches)
    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, w))
    found = analysis.top_eigenvalues(model, CE, batches, k=15)
    torch.testing.assert_close(found.values, values.flip(0), rtol=1e-10, atol=1e-10)
    assert found.matvecs == 15
    with pytest.raises(ValueError, match=r"Invalid k: 16 \(there are 15 parameters\)"):
        analysis.top_eigenvalues(model, CE, batches, k=16)
    model, batches = make()
    found = analysis.top_eigenvalues(model, CE, batches, k=61, which="SA")
    loss, w = dense(model, batches)
    torch.testing.assert_close(found.values.flip(0), torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, w)))


def test_a_product_is_that_of_the_dense_hessian(problem: Any) -> None:
    """And its rows of frozen parameters are zero, where these are given."""
    model, batches, dense_hessian = problem
    trained = torch.cat([torch.full((p.numel(),), p.requires_grad) for p in model.parameters()])
    model.eval()
    pairs = [(CE(model(x), y), len(y)) for x, y in batches]
    hessian, v = Hessian(lambda: pairs, model.parameters(), L2), torch.randn(61, dtype=torch.float64)
    pairs = [(CE(model(x), y), float(len(y))) for x, y in batches]
    product = hessian @ v
    torch.testing.assert_close(product[trained], dense_hessian @ v[trained], rtol=1e-12, atol=1e-12)
    assert not product[~trained].any()


def test_of_one_batch_the_graph_is_kept() -> None:
    model, [batch, *_] = make()
    several = analysis.top_eigenvalues(model, CE, [batch, batch], k=3, tol=1e-10)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(0))
    for losses in (lambda: CE(model(batch[0]), batch[1]), lambda: [(CE(model(batch[0]), batch[1]), 7)]):
        calls.clear()
        model.eval()
        one = analysis.top_eigenpairs(losses, model.parameters(), 3, tol=1e-10)
        assert len(calls) == 1 < one.matvecs
        torch.testing.assert_close(one.values, several.values, rtol=1e-8, atol=1e-10)


def test_trace_and_frobenius_norm_are_their_definitions(problem: Any) -> None:
    """PyHessian's: the mean of v'Hv over signs v; the root of the mean of |Hv|^2 over normal v."""
    model, batches, h = problem
    n, options = len(h), dict(samples=50, l2=L2, seed=3)
    trace = analysis.trace(model, CE, batches, **options)
    vectors = [v for _, v in zip(range(50), hessian_of(model).random(3, normal=False), strict=False)]
    torch.testing.assert_close(trace.samples, torch.stack([v @ h @ v for v in vectors]), rtol=1e-9, atol=1e-9)
    assert all(set(v.tolist()) == {-1.0, 1.0} for v in vectors)
    assert trace.value == pytest.approx(trace.samples.mean().item())
    assert trace.standard_error == pytest.approx(trace.samples.std().item() / math.sqrt(50))
    assert abs(trace.value - h.trace()) < 4 * trace.standard_error
    norm = analysis.frobenius_norm(model, CE, batches, **options)
    vectors = [v for _, v in zip(range(50), hessian_of(model).random(3, normal=True), strict=False)]
    squares = torch.stack([(h @ v).square().sum() for v in vectors])
    torch.testing.assert_close(norm.samples, squares, rtol=1e-9, atol=1e-9)
    assert norm.value == pytest.approx(squares.mean().sqrt().item())
    assert abs(norm.value - torch.linalg.matrix_norm(h)) < 4 * norm.standard_error
    assert math.isnan(analysis.trace(model, CE, batches, samples=1).standard_error)
    assert n == sum(p.numel() for p in model.parameters() if p.requires_grad)


def hessian_of(model: nn.Module) -> Hessian:
    return Hessian(lambda: torch.zeros(()), [p for p in model.parameters() if p.requires_grad])


def test_spectral_density(problem: Any) -> None:
    """With as many steps as parameters the quadrature is exact for every power; smoothed it is a density."""
    model, batches, h = problem
    found = analysis.spectral_density(model, CE, batches, samples=2, steps=1000, l2=L2, points=4000)
    vectors = [v for _, v in zip(range(2), hessian_of(model).random(0, normal=False), strict=False)]
    for power in range(5):
        expected = sum(v @ torch.linalg.matrix_power(h, power) @ v for v in vectors) / 2 / len(h)
        assert found.weights @ found.nodes**power == pytest.approx(expected.item(), rel=1e-8)
    values = torch.linalg.eigvalsh(h)
    assert found.nodes.max().item() == pytest.approx(values[-1].item(), rel=1e-8)
    assert torch.trapezoid(found.density, found.grid).item() == pytest.approx(1, abs=1e-4)
    assert (found.standard_error >= 0).all()
    sigma = (found.grid[-1] - found.grid[0]).item() / 110
    bells = torch.exp(-(((found.grid[:, None] - found.nodes) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
    torch.testing.assert_close(found.density, bells @ found.weights)


def test_a_loss_without_curvature() -> None:
    """Linear in the weights: the Hessian is zero, whichever way it is looked at."""
    model, batches = nn.Linear(30, 1), [(torch.randn(3, 30), torch.randn(3))]

    def mean(output: Tensor, target: Tensor) -> Tensor:
        return output.mean()

    found = analysis.top_eigenvalues(model, mean, batches, k=3)
    assert torch.equal(found.values, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(3))
    assert analysis.trace(model, mean, batches, samples=2).value == 0
    assert analysis.frobenius_norm(model, mean, batches, samples=2)[:2] == (0, 0)
    assert torch.equal(analysis.spectral_density(model, mean, batches).nodes, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Products in the parameters' dtype; vectors in float32 from there up."""
    model, batches = make()
    exact = analysis.top_eigenvalues(model, CE, batches, k=2)
    model, batches = model.to(dtype), [(x.to(dtype), y) for x, y in batches]
    found = analysis.top_eigenvalues(model, CE, batches, k=2, tol=1e-4 if dtype == torch.float32 else 1e-1)
    assert found.vectors.dtype == torch.float32
    torch.testing.assert_close(found.values, exact.values, rtol=1e-4 if dtype == torch.float32 else 0.1, atol=0)
    mixed = make()[0].float()
    mixed.body[4].double()
    cast = nn.Sequential(*mixed.body[:4], Cast(), mixed.body[4])
    found = analysis.top_eigenvalues(cast, CE, [(x.float(), y) for x, y in batches], k=2)
    assert found.vectors.dtype == torch.float64
    torch.testing.assert_close(found.values, exact.values, rtol=1e-2, atol=0)


class Cast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


class Sequence(nn.Module):
    """Layers whose fast kernels have no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(4, 6, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.recurrent(x)[0]
        return self.head((h + self.attention(h, h, h, need_weights=False)[0])[:, -1])


def test_attention_and_recurrence() -> None:
    torch.manual_seed(0)
    model, batches = Sequence().double(), [(torch.randn(8, 5, 4, dtype=torch.float64), torch.randint(0, 3, (8,)))]
    found = analysis.top_eigenvalues(model, CE, batches, k=1, tol=1e-8)
    [(x, y)], e, eps = batches, found.as_parameters(0), 1e-5

    def gradient(by: float) -> Tensor:
        weights = {n: p + by * v for (n, p), v in zip(model.named_parameters(), e, strict=True)}
        loss = CE(torch.func.functional_call(model, weights, (x,)), y)
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])

    product = (gradient(eps) - gradient(-eps)) / (2 * eps)
    torch.testing.assert_close(product, found.values[0] * found.vectors[0], rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    """The same as on the CPU, from batches that lie there; the device's generator is what it was."""
    model, batches = make()
    expected = {name: CALLS[name](model, CE, batches, l2=L2) for name in CALLS}
    model.cuda()
    for name, call in CALLS.items():
        before = torch.cuda.get_rng_state()
        found, exact = call(model, CE, batches, l2=L2), expected[name]
        assert torch.equal(before, torch.cuda.get_rng_state())
        if name == "top_eigenvalues":
            assert found.vectors.is_cuda
            found, exact = found.values, exact.values
        torch.testing.assert_close(found, exact, check_device=False, rtol=1e-6, atol=1e-8, equal_nan=True)
    top = analysis.top_eigenvalues(Sequence().cuda(), CE, [(torch.randn(8, 5, 4), torch.randint(0, 3, (8,)))])
    assert top.values.isfinite().all()


# What a pass sees.


def test_a_shuffling_and_augmenting_loader_gives_the_same_in_every_pass() -> None:
    model, batches = make()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    own, seen = torch.Generator().manual_seed(5), []

    def augmented(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        a, b = (torch.stack(parts) for parts in zip(*samples, strict=True))
        seen.append(a + torch.randn_like(a))
        return seen[-1], b

    data = torch.utils.data.TensorDataset(x, y)
    for generator in (None, own):
        loader = torch.utils.data.DataLoader(data, 16, shuffle=True, generator=generator, collate_fn=augmented)
        seen.clear()
        before, state = snapshot(model), own.get_state()
        found = analysis.top_eigenvalues(model, CE, loader, k=1, tol=1e-10)
        assert len(seen) == 3 * found.matvecs
        assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[-3:], strict=True))
        assert not torch.equal(seen[0][:8], seen[1][:8])
        check_untouched(model, before)
        assert torch.equal(state, own.get_state())


def test_a_sampler_with_a_generator_of_its_own_draws_the_same_in_every_pass() -> None:
    """As it lies in a loader, in its batch sampler or there in a sampler; it is left as it was. So with what torch's
    own generator draws while the batches are made."""
    model, batches = make()

    def augmented(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        x, y = (torch.stack(parts) for parts in zip(*samples, strict=True))
        return x + torch.randn_like(x), y

    data = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    for within in (False, True):
        own = torch.Generator().manual_seed(5)
        sampler = torch.utils.data.WeightedRandomSampler([1.0] * len(data), len(data), generator=own)
        whole = torch.utils.data.BatchSampler(sampler, 16, drop_last=False)
        given: dict[str, Any] = {"batch_sampler": whole} if within else {"batch_size": 16, "sampler": sampler}
        loader = torch.utils.data.DataLoader(data, collate_fn=augmented, **given)
        state, of_torch = own.get_state(), torch.get_rng_state()
        drawn = list(loader)
        own.set_state(state)
        for m in (None, 6):
            torch.set_rng_state(of_torch)
            found = analysis.sharpness(model, CE, loader, 0.3, m=m)
            assert found == pytest.approx(analysis.sharpness(model, CE, drawn, 0.3, m=m), rel=1e-12)
            assert torch.equal(state, own.get_state())


def test_the_modes_of_training() -> None:
    """Without ``eval_mode`` norm layers take the batch's statistics, and what dropout drops is the same all along."""
    model, batches = make()
    model.train()
    before = snapshot(model)
    first, second = (analysis.top_eigenvalues(model, CE, batches, k=3, eval_mode=False, tol=1e-9) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors)
    check_untouched(model, before)
    residuals = []
    for i in range(3):
        torch.set_rng_state(before[3])
        product = (
            Hessian(lambda: [(CE(model(x), y), len(y)) for x, y in batches], model.parameters()) @ first.vectors[i]
        )
        residuals.append((product - first.values[i] * first.vectors[i]).norm().item())
    assert max(residuals) < 1e-7
    assert abs(first.values[0] - analysis.top_eigenvalues(model, CE, batches, k=3).values[0]) > 1e-2


def test_forward_is_for_batches_that_are_no_pairs() -> None:
    model, batches = make()
    dicts = [{"x": x, "y": y} for x, y in batches]
    found = analysis.top_eigenvalues(model, CE, dicts, k=2, forward=lambda m, b: (m(b["x"]), b["y"]))
    assert torch.equal(found.values, analysis.top_eigenvalues(model, CE, batches, k=2).values)
    found = analysis.top_eigenvalues(
        model, lambda loss, _: loss, dicts, k=2, forward=lambda m, b: (CE(m(b["x"]), b["y"]), b["y"])
    )
    assert torch.equal(found.values, analysis.top_eigenvalues(model, CE, batches, k=2).values)


# Nothing is touched.

CALLS: dict[str, Callable[..., Any]] = {
    "top_eigenvalues": lambda *a, **o: analysis.top_eigenvalues(*a, 2, **o),
    "trace": lambda *a, **o: analysis.trace(*a, samples=2, **o),
    "frobenius_norm": lambda *a, **o: analysis.frobenius_norm(*a, samples=2, **o),
    "spectral_density": lambda *a, **o: analysis.spectral_density(*a, samples=1, steps=3, **o),
    "sharpness": lambda *a, **o: analysis.sharpness(*a, 0.1, steps=2, **o),
    "m-sharpness": lambda *a, **o: analysis.sharpness(*a, 0.1, m=4, p=math.inf, adaptive=True, **o),
    "loss_along": lambda *a, **o: analysis.loss_along(*a, torch.ones(61) / 61**0.5, [0.5, 1], **o),
    "sgd_step_along": lambda *a, **o: analysis.sgd_step_along(*a, torch.ones(61) / 61**0.5, 0.1, **o),
}


@pytest.mark.parametrize("name", CALLS)
def test_everything_is_as_it_was(name: str) -> None:
    """To the bit, and after an exception in any evaluation; and a seed gives the same again."""
    model, batches = make()
    calls = [0]

    def counted(output: Tensor, target: Tensor, limit: float) -> Tensor:
        torch.rand(3)
        calls[0] += 1
        if calls[0] > limit:
            raise KeyboardInterrupt
        return CE(output, target)

    before = snapshot(model)
    results = []
    for eval_mode in (True, True, False):
        for grad_mode in (torch.enable_grad(), torch.no_grad()):
            with grad_mode:
                results.append(CALLS[name](model, CE, batches, eval_mode=eval_mode, l2=L2))
            check_untouched(model, before)
    assert repr(results[0]) == repr(results[1]) == repr(results[2])
    assert repr(results[0]) != repr(results[-1])
    CALLS[name](model, lambda o, t: counted(o, t, math.inf), batches)
    total = calls[0]
    for limit in {0, 1, 3, total - 1} & set(range(total)):
        calls[0] = 0
        with pytest.raises(KeyboardInterrupt):
            CALLS[name](model, lambda o, t, limit=limit: counted(o, t, limit), batches)
        check_untouched(model, before)


@pytest.mark.parametrize("name", CALLS)
def test_a_perturbed_model_is_refused(name: str) -> None:
    model, batches = make()
    other = make()[0]
    opt = sk.SAM(model.parameters(), lr=0.1)
    CE(model(batches[0][0]), batches[0][1]).backward()
    assert opt.first_step()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="the weights are perturbed"):
        CALLS[name](model, CE, batches)
    check_untouched(model, before)
    CALLS[name](other, CE, batches)
    opt.second_step()
    CALLS[name](model, CE, batches)


# Sharpness and slices.


def quadratic() -> tuple[nn.Module, list[tuple[Tensor, Tensor]], Tensor]:
    """Two weights w and per-sample losses |A w - b|^2 / 2."""
    torch.manual_seed(1)
    model = nn.Linear(2, 1, bias=False).double()
    x, y = torch.randn(6, 2, dtype=torch.float64) * torch.tensor([1, 3]), torch.randn(6, 1, dtype=torch.float64)
    return model, [(x[:4], y[:4]), (x[4:], y[4:])], model.weight.detach().flatten()


def half_mse(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean() / 2


def circle(p: float, points: int = 20001) -> Tensor:
    """The sphere of a p-norm in the plane."""
    angle = torch.linspace(0, 2 * math.pi, points, dtype=torch.float64)
    way = torch.stack([angle.cos(), angle.sin()], dim=1)
    return way / torch.linalg.vector_norm(way, p, dim=1, keepdim=True)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("p", [1.2, 2.0, 3.0, math.inf])
def test_sharpness_of_a_quadratic(p: float, adaptive: bool) -> None:
    """One step goes where the loss's linear part is largest on the sphere; many find where the loss is."""
    model, batches, w = quadratic()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    sphere = 0.4 * circle(p) * (w.abs() if adaptive else 1)

    def loss(points: Tensor) -> Tensor:
        return (points @ x.T - y.T).square().mean(1) / 2

    rise = loss(w + sphere) - loss(w[None])
    slope = (w @ x.T - y.T) @ x / len(x) @ sphere.T
    one = analysis.sharpness(model, half_mse, batches, 0.4, p=p, adaptive=adaptive)
    assert one == pytest.approx(rise[slope.argmax()].item(), rel=1e-2 if p != 2 else 1e-3)
    many = analysis.sharpness(model, half_mse, batches, 0.4, p=p, adaptive=adaptive, steps=50)
    assert many == pytest.approx(rise.max().item(), rel=1e-3)
    assert analysis.sharpness(model, half_mse, batches, 0.0, p=p, steps=3) == 0
    assert torch.equal(model.weight.detach().flatten(), w)


def test_sharpness_over_the_whole_set_and_over_m_samples() -> None:
    model, batches = make()

    def one_step(part: Any, l2: float) -> float:
        loss, w = dense(model, part, l2)
        g = torch.func.grad(loss)(w)
        return (loss(w + 0.3 * g / g.norm()) - loss(w)).item()

    assert analysis.sharpness(model, CE, batches, 0.3, l2=L2) == pytest.approx(one_step(batches, L2), rel=1e-9)
    parts = [(a, b) for x, y in batches for a, b in zip(x.split(6), y.split(6), strict=True)]
    assert [len(b) for _, b in parts] == [6, 6, 4, 6, 6, 4, 6, 2]
    expected = sum(len(part[1]) * one_step([part], 0) for part in parts) / 40
    assert analysis.sharpness(model, CE, batches, 0.3, m=6) == pytest.approx(expected, rel=1e-9)


def test_sharpness_under_autocast_sees_the_weights_move() -> None:
    """Autocast keeps copies of them from the pass before."""
    model, batches = make(torch.float32)
    exact = analysis.sharpness(model, CE, batches, 1.0, steps=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert analysis.sharpness(model, CE, batches, 1.0, steps=3) == pytest.approx(exact, rel=0.05)


def test_sharpness_meets_large_powers() -> None:
    """p close to 1 has a dual norm of a thousandth power; a gradient of zero leads nowhere."""
    model, batches, _ = quadratic()
    limit = analysis.sharpness(model, half_mse, batches, 0.1, p=1.001)
    assert limit == pytest.approx(analysis.sharpness(model, half_mse, batches, 0.1, p=1.0001), rel=1e-2)
    near = analysis.sharpness(model, half_mse, batches, 0.1, p=1000)
    assert near == pytest.approx(analysis.sharpness(model, half_mse, batches, 0.1, p=math.inf), rel=1e-2)
    assert analysis.sharpness(model, lambda o, t: 0 * half_mse(o, t), batches, 0.1, steps=2) == 0


def test_loss_along_a_line_and_in_a_plane(problem: Any) -> None:
    model, batches, _ = problem
    loss, w = dense(model, batches, L2)
    d = torch.randn(2, len(w), dtype=torch.float64)
    alphas, betas = [-0.5, 0.0, 1.0], torch.tensor([0.25, 2.0])
    line = analysis.loss_along(model, CE, batches, d[0], alphas, l2=L2)
    torch.testing.assert_close(line, torch.stack([loss(w + a * d[0]) for a in alphas]), rtol=1e-12, atol=0)
    expected = torch.stack([torch.stack([loss(w + a * d[0] + b * d[1]) for b in betas]) for a in alphas])
    for directions in (d, list(d)):
        plane = analysis.loss_along(model, CE, batches, directions, alphas, betas, l2=L2)
        torch.testing.assert_close(plane, expected, rtol=1e-12, atol=0)
    assert analysis.loss_along(model, CE, batches, d, alphas).shape == (3, 3)
    far = analysis.loss_along(model, CE, batches, d[0], [1.0, 1e308], l2=L2)
    assert far.isfinite().tolist() == [True, False]


def test_filter_normalized() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4)).double()
    with torch.no_grad():
        model[3].weight[1] = 0
    d = analysis.filter_normalized(model, seed=4)
    assert torch.equal(d, analysis.filter_normalized(model, seed=4))
    assert not torch.equal(d, analysis.filter_normalized(model, seed=5))
    for part, p in zip(d.split([p.numel() for p in model.parameters()]), model.parameters(), strict=True):
        rows = part.view(len(p), -1)
        norms = p.detach().flatten(1).norm(dim=1) if p.dim() > 1 else torch.zeros(len(p), dtype=torch.float64)
        torch.testing.assert_close(rows.norm(dim=1), norms)
    assert torch.equal(analysis.filter_normalized(model, 4, model[0].parameters()), d[:57])


def test_sgd_step_along(problem: Any) -> None:
    model, batches, _ = problem
    e = F.normalize(torch.randn(len(dense(model, batches)[1]), dtype=torch.float64), dim=0)
    slopes = []
    for batch in batches:
        loss, w = dense(model, [batch], L2)
        slopes.append((torch.func.grad(loss)(w) @ e).item())
    sizes = [16, 16, 8]
    length = 0.1 * np.average(np.abs(slopes), weights=sizes)
    step = analysis.sgd_step_along(model, CE, batches, e, 0.1, l2=L2)
    torch.testing.assert_close(step, -np.sign(np.average(slopes, weights=sizes)) * length * e, rtol=1e-10, atol=0)


# Wrong input.


def generator() -> Iterator[Any]:
    yield from make()[1]


def wrong(loss: Callable[[Tensor], Any]) -> dict[str, Any]:
    return {"loss_fn": lambda output, target: loss(CE(output, target))}


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": CE}, TypeError, "model should be a torch.nn.Module"),
    ({"loss_fn": None}, TypeError, "loss_fn should be callable"),
    ({"forward": 3}, TypeError, "forward should be callable"),
    ({"batches": generator()}, TypeError, "again and again .* but got a generator"),
    ({"batches": 3}, TypeError, "again and again .* but got a int"),
    ({"batches": []}, ValueError, "there are no batches"),
    ({"batches": [torch.randn(3, 4)]}, TypeError, "a batch should be a pair"),
    ({"forward": lambda m, b: (m(b[0]).sum(), 3)}, TypeError, "the target should have an entry for each sample"),
    ({"params": []}, ValueError, "none of params requires a gradient"),
    ({"params": torch.ones(3)}, TypeError, "params should be an iterable of tensors"),
    ({"params": ["weight"]}, TypeError, "parameter 0 should be a tensor, but got str"),
    ({"params": [torch.ones(3, dtype=torch.complex64)]}, TypeError, "dense and real"),
    ({"params": [torch.ones(3, requires_grad=True)]}, ValueError, "does not depend on params"),
    ({"l2": -1.0}, ValueError, "Invalid l2: -1.0"),
    (wrong(lambda loss: loss.item()), TypeError, "the loss should be a tensor, but got float"),
    (wrong(lambda loss: loss.detach()), ValueError, "the loss does not depend on params"),
    (wrong(lambda loss: loss.expand(3)), ValueError, r"a real scalar, but it is torch.float64 of shape \[3\]"),
    (wrong(lambda loss: loss * math.nan), ValueError, "the loss should be finite, but it is nan"),
    (wrong(lambda loss: loss / 0), ValueError, "the loss should be finite, but it is inf"),
]


@pytest.mark.parametrize("name", ["top_eigenvalues", "trace", "sharpness", "sgd_step_along"])
@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_wrong_losses(name: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    model, batches = make()
    before = snapshot(model)
    arguments = {"model": model, "loss_fn": CE, "batches": batches, **change}
    options = {key: value for key, value in arguments.items() if key not in ("model", "loss_fn", "batches")}
    if name == "sgd_step_along" and isinstance(options.get("params"), list) and error is ValueError:
        options["params"] = [*options["params"], *[torch.zeros(58)] * bool(options["params"])]
    with pytest.raises(error, match=message):
        CALLS[name](arguments["model"], arguments["loss_fn"], arguments["batches"], **options)
    check_untouched(model, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *a: analysis.top_eigenvalues(*a, k=0), "Invalid k: 0"),
        (lambda *a: analysis.top_eigenvalues(*a, k=62), r"Invalid k: 62 \(there are 61"),
        (lambda *a: analysis.top_eigenvalues(*a, which="BE"), "Invalid which: 'BE'"),
        (lambda *a: analysis.top_eigenvalues(*a, tol=-1), "Invalid tol: -1"),
        (lambda *a: analysis.top_eigenvalues(*a, params=[a[0].body[0].weight] * 2), "more than once"),
        (lambda *a: analysis.trace(*a, samples=0), "Invalid samples: 0"),
        (lambda *a: analysis.spectral_density(*a, steps=0), "Invalid steps: 0"),
        (lambda *a: analysis.spectral_density(*a, sigma=0.0), "Invalid sigma: 0.0"),
        (lambda *a: analysis.sharpness(*a, -0.1), "Invalid rho: -0.1"),
        (lambda *a: analysis.sharpness(*a, 0.1, p=1), "Invalid p: 1"),
        (lambda *a: analysis.sharpness(*a, 0.1, p=math.nan), "Invalid p: nan"),
        (lambda *a: analysis.sharpness(*a, 0.1, steps=0), "Invalid steps: 0"),
        (lambda *a: analysis.sharpness(*a, 0.1, m=0), "Invalid m: 0"),
        (lambda *a: analysis.sharpness(*a[:2], [], 0.1, m=1), "there are no batches"),
        (lambda *a: analysis.loss_along(*a, torch.ones(60), [1.0]), "61 elements, but got shape"),
        (lambda *a: analysis.loss_along(*a, torch.ones(3, 61), [1.0]), "one direction or two, but got 3"),
        (lambda *a: analysis.loss_along(*a, torch.ones(61), [1.0], [1.0]), "betas are for a second direction"),
        (lambda *a: analysis.loss_along(*a, torch.full((61,), math.inf), [1.0]), "a finite vector"),
        (lambda *a: analysis.loss_along(*a, torch.ones(61) / 61**0.5, 1.0), "of one dimension"),
        (lambda *a: analysis.sgd_step_along(*a, torch.ones(61) / 61**0.5, -1.0), "Invalid lr: -1.0"),
        (lambda *a: analysis.top_eigenpairs(lambda: [], a[0].parameters()), "there are no batches"),
        (lambda *a: analysis.top_eigenpairs(lambda: [(torch.ones(()), 0)], a[0].parameters()), "Invalid weight of a"),
        # The root of zero: its value is finite, its derivatives are not.
        (lambda *a: analysis.trace(a[0], lambda o, _: (0 * o).norm() ** 0.5, a[2]), "the Hessian is not finite"),
    ],
)  # fmt: skip
def test_wrong_arguments(call: Callable[..., Any], message: str) -> None:
    model, batches = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        call(model, CE, batches)
    check_untouched(model, before)


def test_wrong_types() -> None:
    model, batches = make()
    with pytest.raises(TypeError, match="losses should be something to iterate over again and again"):
        analysis.top_eigenpairs(iter([(torch.ones(()), 1)]), model.parameters())
    with pytest.raises(TypeError, match="takes apart batches that are tuples of tensors"):
        analysis.sharpness(model, CE, [{"x": batches[0][0]}], 0.1, m=2)
    embedding = nn.Sequential(nn.Embedding(9, 2, sparse=True), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(TypeError, match="sparse=False"):
        analysis.trace(embedding, CE, [(torch.ones(3, 2).long(), torch.ones(3).long())])


# The extra.


@pytest.mark.parametrize("missing", ["numpy", "scipy.linalg"])
def test_an_extra_that_is_not_installed(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("sharpkern.analysis")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError) as raised:
        importlib.import_module("sharpkern.analysis")
    package = missing.partition(".")[0]
    assert str(raised.value) == f'sharpkern.analysis needs {package}: pip install "sharpkern[analysis]"'


def test_the_extra_brings_no_torch() -> None:
    """Nothing that it needs needs torch: installing it leaves the torch that is there."""
    tomllib = pytest.importorskip("tomllib")
    requirements = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    queue, seen = list(project["optional-dependencies"]["analysis"]), set()
    while queue:
        requirement = requirements.Requirement(queue.pop())
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name not in seen:
            seen.add(name)
            queue += importlib.metadata.requires(name) or []
    assert {"numpy", "scipy"} <= seen
    assert not {name for name in seen if "torch" in name or name.startswith(("nvidia", "triton"))}


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    progress, (model, batches) = pytest.importorskip("rich.progress"), make()
    steps: list[int] = []
    monkeypatch.setattr(progress.Progress, "advance", lambda *_: steps.append(0))
    found = analysis.top_eigenvalues(model, CE, batches, progress=True)
    assert len(steps) == found.matvecs
    for call in CALLS.values():
        steps.clear()
        call(model, CE, batches, progress=True)
        assert steps
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ModuleNotFoundError, match=r'progress=True needs rich: pip install "sharpkern\[analysis\]"'):
        analysis.trace(model, CE, batches, progress=True)


def test_power_iteration_takes_more_products() -> None:
    """PyHessian's way to the same eigenvalues; what the benchmark counts."""
    pytest.importorskip("sklearn")
    from bench.eigenvalues import power_iteration

    model, batches = make()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    model.eval()
    params = list(model.parameters())
    hessian = Hessian(lambda: CE(model(x), y), params)
    slow = power_iteration(hessian, 3, tol=1e-9, steps=2000)
    found = analysis.top_eigenpairs(lambda: CE(model(x), y), params, 3, tol=1e-6)
    torch.testing.assert_close(found.values, slow, rtol=1e-4, atol=0)
    assert found.matvecs < hessian.products / 2
