"""The kernel report: it compiles what the ops launch, reads it right, and fails where a rule is broken."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from bench import kernels
from bench.kernels import CASES, Access, Row, Usage
from sharpkern.ops import schema

ROOT = Path(__file__).resolve().parents[1]
GOOD = Usage(registers=40, spills=0, sspills=0, stack=0, shared=0, load=Access(16, 4), store=Access(16, 4))

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def python(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: in this one kernels may be interpreted."""
    env = {**os.environ, "TRITON_INTERPRET": "", "SHARPKERN_BACKEND": "", **environment}
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


# Reading what compilers write.

DUMP = """
Resource usage:
 Function void a_kernel<float>(float*):
  REG:64 STACK:0 SHARED:1024 LOCAL:0
 Function b_kernel:
  REG:24 STACK:72 SHARED:0 LOCAL:0
	code for sm_90
		Function : void a_kernel<float>(float*)
        /*0000*/   LDC R1, c[0x0][0x28] ;
        /*0008*/   ACQBULK ;
        /*0010*/   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/   @P0 LD.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/   @!P0 LDG.E.64.STRONG.GPU R4, desc[UR4][R2.64] ;
        /*0040*/   LDS.128 R4, [R2] ;
        /*0050*/   STS.128 [R2], R4 ;
        /*0060*/   @!UP0 STG.E desc[UR4][R2.64], R4 ;
		Function : b_kernel
        /*0000*/   STL.128 [R1], R4 ;
        /*0010*/   @P1 LDL R4, [R1+0x8] ;
        /*0020*/   LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64] ;
        /*0030*/   ACQBULK ;

Resource usage:
 Function b_kernel:
  REG:30 STACK:0 SHARED:0 LOCAL:8
	code for sm_100
		Function : b_kernel
        /*0070*/   STG.E.U16 desc[UR4][R2.64], R4 ;
"""
AMDGCN = """
	s_load_dwordx16 s[4:19], s[0:1], 0x0
	global_load_dwordx2 v[2:3], v0, s[4:5]
	buffer_load_dwordx4 v[4:7], v0, s[8:11], 0 offen
	flat_load_dwordx4 v[4:7], v[0:1]
	global_load_ushort v0, v1, s[4:5]
	global_store_short_d16_hi v0, v1, s[4:5]
	global_store_b64 v0, v[2:3], s[4:5]
	global_atomic_add_x2 v0, v[2:3], s[4:5]
	.amdgpu_metadata
    .group_segment_fixed_size: 32
    .name:           adam_kernel
  - .private_segment_fixed_size: 16
    .sgpr_spill_count: 27
    .vgpr_count:     67
    .vgpr_spill_count: 3
"""


def test_cubins_are_read() -> None:
    assert list(kernels.read_cubins(DUMP)) == [
        ("sm_90", "void a_kernel<float>(float*)", Usage(64, 0, 0, 0, 1024, Access(16, 2), Access(4, 1)), True),
        ("sm_90", "b_kernel", Usage(24, 2, 0, 72, 0, Access(32, 1), Access()), False),
        ("sm_100", "b_kernel", Usage(30, 0, 0, 8, 0, Access(), Access(4, 1)), False),
    ]


def test_amdgcn_is_read() -> None:
    assert kernels.read_amdgcn(AMDGCN) == Usage(67, 3, 27, 16, 32, Access(16, 2), Access(8, 1))
    with pytest.raises(KeyError, match="vgpr_count"):
        kernels.read_amdgcn(AMDGCN.partition("\t.amdgpu_metadata")[0])


# The rules.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"sspills": 27}, []),
        ({"spills": 2}, ["spills 2"]),
        ({"stack": 72}, ["has a stack of 72 bytes"]),
        ({"load": Access(8, 9)}, ["loads 8 bytes at most"]),
        ({"store": Access()}, ["stores 0 bytes at most"]),
        ({"store": Access(16, 1)}, ["has 1 stores of 16 bytes for 2 arrays"]),
        ({"spills": 1, "stack": 4}, ["spills 1", "has a stack of 4 bytes"]),
    ],
)
def test_rules(changes: dict[str, Any], said: list[str]) -> None:
    row = Row("cuda", "ascend", "float32", "sm_90", GOOD._replace(**changes), 2, 2)
    assert row.broken() == [f"cuda ascend float32 sm_90 {rule}" for rule in said]
    assert ("!" in kernels.render([row])) == bool(said)


def test_an_access_for_each_array() -> None:
    """Of a norm no wide store; of half types beside state that state's alone."""
    assert not Row("triton", "norm", "float32", "sm_90", GOOD._replace(store=Access()), 1, 0).broken()
    assert kernels.ARRAYS.keys() == schema.SCHEMAS.keys() - {"gather"}
    for op, arrays in kernels.ARRAYS.items():
        assert all(f" {array}" in schema.SCHEMAS[op].replace("(", " ") for array in set.union(*arrays))
    asked = {name: (case.accesses(), case.accesses(beside_state=True)) for name, case in CASES.items()}
    assert asked["norm"] == ((1, 0), (1, 0))
    assert asked["adam"] == ((5, 4), (3, 3))
    assert asked["adam, no max_exp_avg_sq"] == ((4, 3), (2, 2))
    assert asked["sgd, along v"] == ((4, 2), (2, 1))
    assert asked["sgd, along a narrow v"] == ((4, 2), (1, 1))
    assert asked["sgd, no momentum_buffer"] == ((2, 1), (2, 1))
    # Beside masters, which are float32 as state is.
    assert asked["ascend, master"] == ((2, 1), (1, 0))
    assert asked["sgd, master"] == ((3, 3), (2, 2))
    assert asked["nudge_sgd, master"] == ((4, 3), (3, 2))
    assert asked["restore, master"] == ((1, 1), (1, 0))


# The Triton half.


@needs_triton
def test_report() -> None:
    """The whole way, in an environment that asks for the interpreter."""
    options = ["--only", "triton", "--kernels", "restore", "--targets", "sm_90"]
    done = python("-m", "bench.kernels", *options, TRITON_INTERPRET="1", SHARPKERN_BACKEND="triton")
    _, *rows, _, verdict = done.stdout.splitlines()
    plain = [["triton", "restore", dtype, "sm_90"] for dtype in kernels.DTYPES]
    masters = [["triton", "restore,", "master", dtype] for dtype in ("bfloat16", "float16")]
    assert [row.split()[:4] for row in rows] == plain + masters
    assert all("16 x" in row for row in rows)
    assert verdict == "6 kernels: nothing spilled, no stack, 16 bytes wide."
    assert done.returncode == 0


SCRIPT = """
import json
from bench import kernels
from sharpkern.ops import triton
from sharpkern.ops.triton import norm, walk

found = {target: kernels.compile_case("ascend", "float32", target).broken() for target in ("sm_90", "gfx942")}
options = walk.options
walk.options = lambda *args: {**options(*args), "maxnreg": 24}
found["few registers"] = " ".join(kernels.compile_case("ascend", "float64", "sm_90").broken())
walk.options = options
found["not compiled"] = kernels.triton_job(("restore", "float32", "sm_10"))
found["uncovered"] = kernels.uncovered()
triton.IMPLEMENTATIONS["second"] = triton.IMPLEMENTATIONS["norm"]
norm.second_kernel = norm.norm_kernel
found["new"] = kernels.uncovered()
print(json.dumps(found))
"""


@needs_triton
def test_triton_kernels() -> None:
    done = python("-c", SCRIPT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])  # Triton tells there what ptxas said
    assert found["sm_90"] == found["gfx942"] == found["uncovered"] == []
    assert " spills " in found["few registers"]
    assert " stack " in found["few registers"]
    assert found["not compiled"].startswith("triton restore float32 sm_10 was not compiled: ")
    assert "Value 'sm_10' is not defined" in found["not compiled"]
    assert [line.split()[1] for line in found["new"]] == ["second", "second_kernel"]


# The CUDA half.


@pytest.mark.slow
def test_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the package: as it was built with them, or compiled here."""
    monkeypatch.syspath_prepend(ROOT)
    extension = sys.modules.get("sharpkern._C")
    if extension is not None and "9.0" in extension.build_info()["cuda_architectures"].split():
        lines = list(kernels.read_object(extension.__file__, list(kernels.ARRAYS), "--gpu-architecture", "sm_90"))
    else:
        lines = list(kernels.cuda_half(["sm_90"], list(kernels.ARRAYS)))
    if not lines:
        pytest.skip("nvcc was not found")
    assert [line if isinstance(line, str) else line.broken() for line in lines] == [[]] * len(lines)


def test_without_nvcc(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("shutil.which", return_value=None), mock.patch.dict(os.environ) as environment:
        for name in ("CUDA_HOME", "CUDA_PATH"):
            environment.pop(name, None)
        assert list(kernels.cuda_half(["sm_90"], ["restore"])) == []
    assert "nvcc was not found: the CUDA files are left out." in capsys.readouterr().err


CUDA = """
#include "../../csrc/math.h"
template <class T, bool B, class W> __global__ void norm_kernel(W* x) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  float4* y = (float4*)x;
  y[1] = y[0];
}
template __global__ void norm_kernel<float, true, float>(float*);
template __global__ void norm_kernel<double, false, double>(double*);
template __global__ void norm_kernel<double, true, float>(float*);
__global__ void restore_kernel(float* x, const int* at) {
  float kept[64];
  for (int i = 0; i < 64; ++i) kept[i] = x[i * 32];
  for (int i = 0; i < 64; ++i) kept[at[i]] += kept[i];
  for (int i = 0; i < 64; ++i) x[i * 32] = kept[i];
}
__global__ void new_kernel(float* x) { x[0] = 1; }
"""


def test_cuda_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ones in place of csrc/cuda: what they have is read, and what is wrong with them told."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    folder = tmp_path / "csrc/cuda"
    folder.mkdir(parents=True)
    (tmp_path / "csrc/math.h").touch()
    (folder / "a.cu").write_text(CUDA)
    (folder / "b.cu").write_text("")
    lines = list(kernels.cuda_half(["sm_90"], ["norm", "norm_scaled", "restore"]))
    if not lines:
        pytest.skip("nvcc was not found")
    good, scaled, master, bad = sorted(line for line in lines if isinstance(line, Row))
    assert good[:4] == ("cuda", "norm<false>", "float64", "sm_90")
    assert good.broken() == []
    assert scaled[:4] == ("cuda", "norm<true>", "float32", "sm_90")
    assert scaled.broken() == ["cuda norm<true> float32 sm_90 has 1 loads of 16 bytes for 2 arrays"]
    assert master[:4] == ("cuda", "norm<true>, master", "float64", "sm_90")
    assert [rule.split()[4] for rule in bad.broken()] == ["spills", "has", "accesses", "loads", "stores"]
    new, empty = (line for line in lines if isinstance(line, str))
    assert new == "cuda new - sm_90 is not in the report: its arrays are not known"
    assert empty.endswith(" has no kernels")
    (folder / "b.cu").write_text("syntax")
    (problem,) = kernels.cuda_half(["sm_90"], ["restore"])
    assert isinstance(problem, str)
    assert "nvcc could not compile csrc/cuda/b.cu" in problem
