"""The package as a whole: layers, public names, a quiet import (contract 15)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sharpkern as sk

PACKAGE = Path(sk.__file__).parent
# Imports point downwards only.
LAYERS = {"ops": 1, "_C": 1, "flat": 2, "rules": 2, "batch_stats": 2, "optim": 3}


def imported_modules(path: Path) -> set[str]:
    """First component below ``sharpkern`` of every module that a file imports."""
    found = set()
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level]) if node.level else []
            names = (node.module or "").split(".") if node.module else []
            if not node.level and names[:1] != ["sharpkern"]:
                continue
            full = base + (names if node.level else names[1:])
            found |= {full[0]} if full else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("sharpkern.")}
    return found


def test_imports_point_downwards() -> None:
    files = [p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py"]
    assert len(files) > 8
    for path in files:
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for name in imported_modules(path):
            assert name == own or LAYERS[name] <= LAYERS[own], f"{path.name} imports {name}"
            assert not (LAYERS[own] == 1 and LAYERS[name] > 1)


def test_public_names() -> None:
    assert set(sk.__all__) == {
        "ASAM", "SAM", "__version__", "available_backends", "build_info", "frozen_batch_stats", "use_backend",
    }  # fmt: skip
    for name in sk.__all__:
        assert hasattr(sk, name)
    for name in ("SAM", "ASAM", "frozen_batch_stats", "use_backend"):
        doc = getattr(sk, name).__doc__
        assert doc
        assert len(doc) > 80


def test_build_info() -> None:
    info = sk.build_info()
    assert info["backend"]["cpu"] == sk.available_backends()[0]
    assert info["extension"] == ("cpp" in sk.available_backends())
    if info["extension"]:
        assert "." in info["torch"]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout + done.stderr


def test_import_is_quiet_and_makes_no_cuda_context() -> None:
    out = run("import sharpkern, torch; assert not torch.cuda.is_initialized()")
    assert out == ""


def test_import_pulls_in_nothing_but_itself() -> None:
    code = "import torch, sys; a = set(sys.modules); import sharpkern; print(*sorted(set(sys.modules) - a))"
    new = {name.split(".")[0] for name in run(code).split()}
    assert new - set(sys.stdlib_module_names) == {"sharpkern"}


@pytest.mark.skipif("cpp" not in sk.available_backends(), reason="built without the extension")
def test_works_without_the_extension() -> None:
    """A broken or missing extension leaves the reference, and says why."""
    code = (
        "import sys; sys.modules['sharpkern._C'] = None\n"
        "import torch, sharpkern as sk\n"
        "assert sk.available_backends() == ['reference'], sk.available_backends()\n"
        "assert not sk.build_info()['extension'] and sk.build_info()['error']\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2):\n"
        "        opt = sk.SAM([p], lr=0.05); opt.first_step(); opt.second_step()\n"
        "assert len(seen) == 1 and 'reference on cpu' in str(seen[0].message), seen\n"
        "torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))\n"
        "try: sk.use_backend('cpp').__enter__()\n"
        "except ValueError as e: assert 'could not be imported' in str(e)\n"
    )
    assert run(code) == ""


def test_no_host_read_in_a_fused_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the step's data is read on the host: a skip is decided where the norm lies."""
    p = torch.nn.Parameter(torch.ones(100))
    opt = sk.SAM([p], torch.optim.AdamW, lr=0.1, max_grad_norm=1.0)
    for _ in range(2):
        p.grad = torch.ones(100)
        opt.first_step()
        opt.second_step()
    read: list[torch.Tensor] = []
    # The layout check's own counters are host memory, whatever the device.
    host = [flat._status for flat in opt._flat]
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append(self) or tolist(self))
    for name in ("__bool__", "__float__", "__int__", "item", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, name=name: pytest.fail(f"{name} reads on the host"))
    opt.first_step()
    opt.second_step()
    assert read
    assert all(any(t is h for h in host) for t in read)
