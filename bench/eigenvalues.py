"""``python -m bench.eigenvalues``: how many Hessian-vector products the top eigenvalues take.

sharpkern.analysis against power iteration with deflation, as PyHessian has it, on one net and its loss: the counts of
products do not depend on the machine's speed, the errors are against eigenvalues in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data import load_data
from experiments.models import mlp_bn
from sharpkern import analysis
from sharpkern.analysis.hessian import Hessian

K = 5


def power_iteration(hessian: Hessian, k: int, tol: float, steps: int, seed: int = 0) -> Tensor:
    """PyHessian's ``eigenvalues``: one after the other, orthogonal to those before, until a value changes by less
    than ``tol`` of itself."""
    values: list[float] = []
    vectors: list[Tensor] = []
    for _, start in zip(range(k), hessian.random(seed, normal=True), strict=False):
        v, value = start / start.norm(), None
        for _ in range(steps):
            for e in vectors:
                v = v - (v @ e) * e
            v = v / v.norm()
            product = hessian.on_host(v)
            now = (product @ v).item()
            v = product / product.norm()
            if value is not None and abs(value - now) < tol * (abs(value) + 1e-6):
                break
            value = now
        values.append(value or 0.0)
        vectors.append(v)
    return torch.tensor(values, dtype=torch.float64).sort(descending=True).values


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """The comparison study's net for digits after three epochs of SGD, and 500 of its training images."""
    data = load_data("digits", None, None, torch.device("cpu"))
    torch.manual_seed(0)
    model = mlp_bn()
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for x, y in zip(data.train_x.split(64), data.train_y.split(64), strict=True):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
    return model.eval(), data.train_x[:500], data.train_y[:500]


def rows() -> Iterator[tuple[str, int, float]]:
    """What found them, products, and the largest error of a value, relative to that value."""
    model, x, y = trained()
    params = list(model.parameters())

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    found = []
    for tol in (1e-1, 1e-4):
        pairs = analysis.top_eigenpairs(loss, params, K, tol=tol)
        found.append((f"sharpkern.analysis, tol={tol:g}", pairs.matvecs, pairs.values))
    for tol, steps in ((1e-3, 100), (1e-6, 1000)):
        hessian = Hessian(loss, params)
        values = power_iteration(hessian, K, tol, steps)
        found.append((f"power iteration, tol={tol:g}, at most {steps} each", hessian.products, values))
    model, x = model.double(), x.double()
    exact = analysis.top_eigenpairs(loss, params, K, tol=1e-10).values
    for name, products, values in found:
        yield name, products, ((values - exact) / exact).abs().max().item()


def main() -> None:
    print(
        f"| {K} eigenvalues of largest magnitude | Hessian-vector products | largest relative error |\n|---|---:|---:|"
    )
    for name, products, error in rows():
        print(f"| {name} | {products} | {error:.1e} |")


if __name__ == "__main__":
    main()
