"""An installed sharpkern, without pytest: `python tests/smoke.py`, from any folder. `make wheel` runs it.

Trainings by the extension's kernels end where those by the plain PyTorch reference do, and the same holds for a resumed
one. `--path dlpack` insists on who finds the tensors, see `python -m sharpkern info`.
"""

import argparse
import copy
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import sharpkern as sk
from sharpkern.ops import scan

OPTIMIZERS = {
    "SAM": dict(cls=sk.SAM, base_optimizer=torch.optim.SGD, lr=0.1, momentum=0.9, max_grad_norm=1.0),
    "ASAM": dict(cls=sk.ASAM, base_optimizer=torch.optim.AdamW, lr=1e-2),
    "AESAM": dict(cls=sk.AESAM, base_optimizer=torch.optim.Adam, lr=1e-2, total_steps=10),
    "LookSAM": dict(cls=sk.LookSAM, base_optimizer=torch.optim.RMSprop, k=2, lr=1e-3),
}


def make(cls: type, **options: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 50, bias=False), nn.BatchNorm1d(50), nn.Tanh(), nn.Linear(50, 3))
    return model, cls(model.parameters(), model=model, **options)


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(64, 20, generator=torch.Generator().manual_seed(step))

        def closure(x=x):
            loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
            loss.backward()
            return loss

        opt.step(closure)


def check(name: str, options: dict) -> None:
    model, opt = make(**options)
    train(model, opt, range(10))

    with sk.use_backend("reference"):
        reference, slow = make(**options)
        train(reference, slow, range(10))
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)

    half, before = make(**options)
    train(half, before, range(5))
    resumed, after = make(**options)
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(resumed, after, range(5, 10))
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), f"{name}: a resumed training ends elsewhere"
    print(f"{name}: as the reference, and to the bit when resumed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", choices=["aten", "dlpack", "op"], help="who has to find the tensors")
    expected = parser.parse_args().path
    subprocess.run([sys.executable, "-m", "sharpkern", "info"], check=True)
    folder = Path(sk.__file__).resolve().parents[1]
    assert folder != Path(__file__).resolve().parents[1], "this is the source tree, not what was installed"
    print(f"in {folder}")
    assert sk.build_info()["extension"], sk.build_info()
    assert sk.available_backends("cpu")[0] == "cpp", sk.available_backends("cpu")
    assert expected in (None, scan.path()), f"{scan.path()} finds the tensors, not {expected}"
    for name, options in OPTIMIZERS.items():
        check(name, options)


if __name__ == "__main__":
    main()
