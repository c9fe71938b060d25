"""The package as a whole: layers, public names, a quiet import (contract 15)."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from methods import METHODS

import sharpkern as sk
from sharpkern.ops import backend

PACKAGE = Path(sk.__file__).parent
# Imports point downwards only.
LAYERS = {
    "ops": 1,
    "_C": 1,
    "_aten": 1,
    "batch_stats": 2,
    "flatten": 2,
    "memory": 3,
    "checks": 4,
    "policy": 5,
    "direction": 5,
    "distributed": 5,
    "rules": 5,
    "analysis": 5,
    "optim": 6,
    "integrations": 7,
    "__init__": 8,
    "__main__": 9,
}


def module_of(name: str) -> str:
    """Where a name of ``from . import name`` in the top folder comes from."""
    return name if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists() else "__init__"


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
            found |= {full[0]} if full else {module_of(alias.name) for alias in node.names}
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
    classes = {method.cls.__name__ for method in METHODS.values()}
    functions = {"available_backends", "build_info", "frozen_batch_stats", "frozen_buffers", "norm_layers", "replicate"}
    assert set(sk.__all__) == {*classes, *functions, "__version__", "policy", "use_backend"}
    for name in {*classes, *functions, "use_backend"}:
        assert len(getattr(sk, name).__doc__) > 80


def test_build_info() -> None:
    info = sk.build_info()
    assert info["backend"]["cpu"] == sk.available_backends()[0]
    assert info["extension"] == ("cpp" in sk.available_backends())
    if info["extension"]:
        assert "." in info["torch"]


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """In an environment like a user's, without what conftest.py sets."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("SHARPKERN_")}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, env={**clean, **variables}
    )


def run(code: str, **variables: str) -> str:
    done = python("-c", code, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_import_is_quiet_and_makes_no_cuda_context() -> None:
    out = run("import sharpkern, torch; assert not torch.cuda.is_initialized()")
    assert out == ""


def test_import_pulls_in_nothing_but_itself() -> None:
    code = "import torch, sys; a = set(sys.modules); import sharpkern; print(*sorted(set(sys.modules) - a))"
    for imported in ("import sharpkern", "import sharpkern.integrations"):
        new = {name.split(".")[0] for name in run(code.replace("import sharpkern", imported)).split()}
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


def test_a_source_tree_without_the_extension_says_so(tmp_path: Path) -> None:
    """A clone in which a command runs comes before what pip installed from it."""
    shutil.copytree(PACKAGE, tmp_path / "sharpkern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "setup.py").touch()
    code = "import sharpkern; print(sharpkern.build_info()['error'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "This is the source tree" in done.stdout, done.stderr


def test_an_editable_install_is_found_beside_a_clone(tmp_path: Path) -> None:
    """A script lies in the folder into which sharpkern was cloned: that folder of the same name is not the package."""
    clone, root = tmp_path / "sharpkern", PACKAGE.parent
    shutil.copytree(PACKAGE, clone / "sharpkern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, clone)
    environment = {**os.environ, "SHARPKERN_EXT": "0"}
    wheels = tmp_path / "wheels"
    command = [sys.executable, "setup.py", "--quiet", "editable_wheel", "--dist-dir", str(wheels)]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = f"import site; site.addsitedir({str(tmp_path / 'site')!r}); import sharpkern; print(sharpkern.__file__)"
    plain = [path for path in sys.path if path not in ("", str(root)) and "__editable__" not in path]
    environment["PYTHONPATH"] = os.pathsep.join(plain)
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert Path(done.stdout.strip()) == clone / "sharpkern" / "__init__.py", done.stderr


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
    host = [layout.table._status for layout in opt._step.layouts]
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append(self) or tolist(self))
    for name in ("__bool__", "__float__", "__int__", "item", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, name=name: pytest.fail(f"{name} reads on the host"))
    opt.first_step()
    opt.second_step()
    assert all(any(t is h for h in host) for t in read)


# Which backend runs.


def test_info_tells_what_runs_and_why_not() -> None:
    done = python("-m", "sharpkern", "info")
    assert done.returncode == 0, done.stderr
    assert f"cpu: {sk.available_backends('cpu')[0]}" in done.stdout
    assert "TRITON_INTERPRET" in done.stdout or "Triton is not installed" in done.stdout
    assert python("-m", "sharpkern", "nonsense").returncode == 2


def test_the_environment_chooses() -> None:
    code = "import sharpkern as sk; print(sk.build_info()['backend']['cpu'])"
    assert run(code, SHARPKERN_BACKEND="reference") == "reference\n"
    done = python("-c", code, SHARPKERN_BACKEND="opencl")
    assert done.returncode != 0
    assert "ValueError: Invalid SHARPKERN_BACKEND: 'opencl'" in done.stderr
    # One that cannot run on a device leaves it its default.
    assert run(code, SHARPKERN_BACKEND="triton") == f"{sk.available_backends('cpu')[0]}\n"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_on_the_cpu_is_for_its_interpreter() -> None:
    choose = "import sharpkern as sk\nwith sk.use_backend('triton'): print(sk.ops.current_backend())"
    if not torch.cuda.is_available():
        assert "only in its interpreter" in python("-c", choose).stderr
    assert run(choose, TRITON_INTERPRET="1") == "triton\n"
    # Never by itself.
    default = "import sharpkern as sk; print(sk.ops.current_backend())"
    assert run(default, TRITON_INTERPRET="1") == f"{sk.available_backends('cpu')[0]}\n"


def test_without_the_extension_a_device_gets_triton_where_it_is_installed() -> None:
    code = (
        "import sys; sys.modules['sharpkern._C'] = None\n"
        "import sharpkern as sk, torch\n"
        "print(sk.available_backends('cuda'), sk.available_backends('xpu'), sk.available_backends('mps'))\n"
        "print(torch._C._dispatch_has_kernel_for_dispatch_key('sharpkern::adam', 'CUDA'))\n"
        "print('triton' in sys.modules)\n"
    )
    triton = importlib.util.find_spec("triton") is not None
    here = ["triton", "reference"] if triton else ["reference"]
    assert run(code) == f"{here} {here} ['reference']\n{triton}\nFalse\n"
    without = code.replace("import sys;", "import sys, importlib.util as u; find = u.find_spec; "
                           "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a);")  # fmt: skip
    assert run(without) == "['reference'] ['reference'] ['reference']\nFalse\nFalse\n"


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("8.0 9.0 10.0+PTX", (8, 0), True),
        ("8.0 9.0 10.0+PTX", (8, 9), True),  # machine code of the same major version
        ("8.0 9.0 10.0+PTX", (7, 5), False),
        ("8.0 9.0 10.0+PTX", (12, 0), True),  # from PTX
        ("8.0 9.0 10.0", (12, 0), False),
        ("8.6", (8, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("10.0a", (10, 3), False),
        ("10.0f", (10, 3), True),
        ("10.0f+PTX", (12, 0), False),
        ("9.0+PTX", (8, 0), False),
    ],
)
def test_which_device_runs_what_was_built(built: str, capability: tuple[int, int], runs: bool) -> None:
    reason = backend._misses(built, capability)
    assert (reason is None) == runs
    if reason:
        assert built in reason


@pytest.fixture
def a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As if a CUDA device were there, of a capability that the test sets; outside of Triton's interpreter."""
    if importlib.util.find_spec("triton") is None or not sk.build_info().get("cuda_architectures"):
        pytest.skip("needs Triton and CUDA kernels")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "_capabilities", set())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    yield monkeypatch
    monkeypatch.undo()
    backend._select(None)


@pytest.mark.parametrize(
    ("capability", "runs", "why"),
    [
        ((9, 0), "cpp", ""),
        ((7, 5), "triton", "this device is 7.5"),
        ((6, 0), "reference", "this device is 6.0"),
    ],
)
def test_a_device_gets_what_can_run_on_it(
    capability: tuple[int, int], runs: str, why: str, a_device: pytest.MonkeyPatch
) -> None:
    a_device.setitem(backend._built, "cuda_architectures", "8.0 9.0")
    a_device.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert backend.current_backend("cuda:0") == runs
    assert backend.available_backends("cuda")[0] == runs
    assert why in (backend.why_not("cpp", "cuda") or "")
    assert backend.current_backend("cpu") == "cpp"
    a_device.setattr(backend, "_noticed", set())
    if runs == "reference":
        with pytest.warns(UserWarning, match="reference on cuda.*6.0.*7.0"):
            backend.prepare(torch.device("cuda", 0))
    else:
        backend.prepare(torch.device("cuda", 0))


def test_rocm_runs_no_cuda_kernels(a_device: pytest.MonkeyPatch) -> None:
    a_device.setattr(torch.version, "hip", "7.0")
    a_device.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    assert backend.available_backends("cuda") == ["triton", "reference"]
    assert "ROCm" in str(backend.why_not("cpp", "cuda"))


def test_the_version_is_the_same_everywhere() -> None:
    root = Path(__file__).resolve().parents[1]
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    released = re.search(r"^date-released: (\S+)$", citation, re.MULTILINE)
    version = re.search(r"^version: (\S+)$", citation, re.MULTILINE)
    assert version is not None
    assert released is not None
    assert version[1] == sk.__version__
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {version[1]} ({released[1]})\n" in changes
