"""The kernel report: it compiles what the ops launch, reads it right, and fails where a rule is broken."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch.utils.cpp_extension import include_paths

from bench import kernels
from bench.kernels import Access, Row, Usage
from sharpkern.ops import schema

ROOT = Path(__file__).resolve().parents[1]
GOOD = Usage(registers=40, spills=0, scalar_spills=0, stack=0, shared=0, load=Access(16, 4), store=Access(16, 4))

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def python(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: in this one kernels may be interpreted."""
    interpreting = ("TRITON_INTERPRET", "SHARPKERN_BACKEND")
    env = {name: value for name, value in os.environ.items() if name not in interpreting} | environment
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


# Reading what compilers write.

RESOURCES = """
Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _Z1aPf:
  REG:64 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:656 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function b_kernel:
  REG:24 STACK:72 SHARED:0 LOCAL:0 CONSTANT[0]:656 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
	code for sm_90
		Function : _Z1aPf
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                       /* 0x00000a00ff017b82 */
                                                                                /* 0x000fe20000000800 */
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;    /* 0x00000a00ff017b82 */
        /*0020*/               @P0 LD.E.128 R4, desc[UR4][R2.64] ;              /* 0x00000a00ff017b82 */
        /*0030*/              @!P0 LDG.E.64.STRONG.GPU R4, desc[UR4][R2.64] ;   /* 0x00000a00ff017b82 */
        /*0040*/                   LDS.128 R4, [R2] ;                           /* 0x00000a00ff017b82 */
        /*0050*/                   STS.128 [R2], R4 ;                           /* 0x00000a00ff017b82 */
        /*0060*/             @!UP0 STG.E desc[UR4][R2.64], R4 ;                 /* 0x00000a00ff017b82 */
        /*0070*/                   STG.E.U16 desc[UR4][R2.64], R4 ;             /* 0x00000a00ff017b82 */

		Function : b_kernel
        /*0000*/                   STL.128 [R1], R4 ;                           /* 0x00000a00ff017b82 */
        /*0010*/               @P1 LDL R4, [R1+0x8] ;                           /* 0x00000a00ff017b82 */
        /*0020*/                   LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64] ;    /* 0x00000a00ff017b82 */
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
---
amdhsa.kernels:
  - .agpr_count:     0
    .group_segment_fixed_size: 32
    .name:           adam_kernel
    .private_segment_fixed_size: 16
    .sgpr_count:     106
    .sgpr_spill_count: 27
    .vgpr_count:     67
    .vgpr_spill_count: 3
"""


def test_cubin_is_read() -> None:
    assert kernels.read_cubin(RESOURCES, SASS) == {
        "_Z1aPf": Usage(64, 0, 0, 0, 1024, Access(16, 2), Access(4, 1)),
        "b_kernel": Usage(24, 2, 0, 72, 0, Access(32, 1), Access()),
    }


def test_amdgcn_is_read() -> None:
    assert kernels.read_amdgcn(AMDGCN) == Usage(67, 3, 27, 16, 32, Access(16, 2), Access(8, 1))


def test_amdgcn_without_metadata_is_refused() -> None:
    with pytest.raises(RuntimeError, match="vgpr_count"):
        kernels.read_amdgcn(AMDGCN.partition("\t.amdgpu_metadata")[0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("void a::(anonymous namespace)::norm_kernel<c10::Half, true>(a::Segments, int)", ("norm<true>", "float16")),
        ("void adam_kernel<float>(Rule<float>, State<Arithmetic<float>::type>)", ("adam", "float32")),
        ("void fill<3>(double*)", ("fill<3>", "-")),
        ("clear_kernel(double*)", ("clear", "-")),
        ("clear_kernel", ("clear_kernel", "-")),
    ],
)
def test_cpp_names(name: str, expected: tuple[str, str]) -> None:
    assert kernels.name_and_dtype(name) == expected


# The rules.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"scalar_spills": 27}, []),
        ({"spills": 2}, ["spills 2"]),
        ({"stack": 72}, ["has a stack of 72 bytes"]),
        ({"load": Access(8, 9)}, ["loads 8 bytes at most"]),
        ({"store": Access(8, 9)}, ["stores 8 bytes at most"]),
        ({"store": Access()}, ["stores 0 bytes at most"]),
        ({"store": Access(16, 1)}, ["has 1 stores of 16 bytes for 2 arrays"]),
        ({"spills": 1, "stack": 4}, ["spills 1", "has a stack of 4 bytes"]),
    ],
)
def test_rules(changes: dict[str, Any], said: list[str]) -> None:
    row = Row("cuda", "ascend", "float32", "sm_90", dataclasses.replace(GOOD, **changes), 2, 2)
    assert row.broken() == [f"cuda ascend float32 sm_90 {rule}" for rule in said]
    assert ("!" in kernels.render([row])) == bool(said)


def test_norms_need_no_wide_store() -> None:
    loads, stores = kernels.wide_accesses(kernels.CASES["norm"], "float32")
    assert (loads, stores) == (1, 0)
    assert not Row("triton", "norm", "float32", "sm_90", dataclasses.replace(GOOD, store=Access()), 1, 0).broken()


@pytest.mark.parametrize(
    ("case", "dtype", "expected"),
    [
        ("adam", "float32", (4, 3)),
        ("adam, amsgrad", "float64", (5, 4)),
        ("adam", "bfloat16", (2, 2)),
        ("sgd, no momentum", "float16", (2, 1)),
    ],
)
def test_an_access_for_each_array(case: str, dtype: str, expected: tuple[int, int]) -> None:
    assert kernels.wide_accesses(kernels.CASES[case], dtype) == expected


def test_every_op_has_its_arrays() -> None:
    assert kernels.ARRAYS.keys() == schema.SCHEMAS.keys() - {"gather"}
    for op, (*_, buffers) in kernels.ARRAYS.items():
        assert all(buffer in schema.SCHEMAS[op] for buffer in buffers)


# The Triton half.


@needs_triton
def test_report(tmp_path: Path) -> None:
    """The whole way, in an environment that asks for the interpreter."""
    out = tmp_path / "report.json"
    options = ["--only", "triton", "--kernels", "restore", "--targets", "sm_90", "--json", str(out)]
    done = python("-m", "bench.kernels", *options, TRITON_INTERPRET="1", SHARPKERN_BACKEND="triton")
    report = json.loads(out.read_text())
    assert done.returncode == bool(report["broken"]), done.stderr
    rows = [(row["kernel"], row["dtype"], row["target"]) for row in report["rows"]]
    assert rows == [("restore", dtype, "sm_90") for dtype in kernels.DTYPES]
    assert "16 x" in done.stdout


SCRIPT = """
import importlib
import json
from bench import kernels
from sharpkern.ops import triton
from sharpkern.ops.triton import walk

found = {}
for target in ("sm_90", "gfx942"):
    row = kernels.compile_case("ascend", "float32", target)
    found[target] = [row.broken(), row.usage.registers]

options = walk.options
walk.options = lambda *args: {**options(*args), "maxnreg": 24}
found["few registers"] = kernels.compile_case("ascend", "float64", "sm_90").broken()
walk.options = options

found["not compiled"] = kernels.triton_job(("restore", "float32", "sm_10"))

found["uncovered"] = kernels.uncovered()
triton.IMPLEMENTATIONS["second"] = triton.IMPLEMENTATIONS["norm"]
module = importlib.import_module("sharpkern.ops.triton.norm")
module.second_kernel = module.norm_kernel
found["new"] = kernels.uncovered()
print(json.dumps(found))
"""


@needs_triton
def test_triton_kernels() -> None:
    done = python("-c", SCRIPT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])  # Triton tells there what ptxas said
    for target in ("sm_90", "gfx942"):
        broken, registers = found[target]
        assert broken == []
        assert 8 < registers < 128
    assert [rule for rule in found["few registers"] if "spills" in rule]
    assert [rule for rule in found["few registers"] if "stack" in rule]
    rows, problems = found["not compiled"]
    assert rows == []
    assert problems[0].startswith("triton restore float32 sm_10 was not compiled: ")
    assert "Value 'sm_10' is not defined" in problems[0]
    assert found["uncovered"] == []
    assert found["new"] == [
        "triton second is not in the report: bench/kernels.py has no case of it",
        "triton second_kernel is not in the report: no case launches it",
    ]


@pytest.mark.parametrize(
    ("option", "name", "said"),
    [
        ("--kernels", "nothing", "no nothing; there are adam, "),
        ("--targets", "h100", "h100 is neither sm_NN nor gfxNNN"),
        ("--targets", "", "no targets"),
    ],
)
def test_unknown_names(option: str, name: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(sys, "argv", ["kernels", option, name]), pytest.raises(SystemExit):
        kernels.main()
    assert said in capsys.readouterr().err


# The CUDA half.


def needs_nvcc() -> Any:
    toolkit = kernels.find_toolkit()
    if toolkit is None:
        pytest.skip("nvcc was not found")
    if kernels.find_cuobjdump() is None:
        pytest.skip("there is no cuobjdump")
    return toolkit


def test_without_nvcc(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        mock.patch.object(kernels, "find_toolkit", return_value=None),
        mock.patch.object(sys, "argv", ["kernels", "--only", "cuda"]),
        mock.patch.dict(os.environ),  # main changes it
    ):
        assert kernels.main() == 0
    assert "nvcc was not found: the CUDA files were left out." in capsys.readouterr().out


def test_flags_are_those_of_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = kernels.load_setup()
    toolkit = object.__new__(setup.Toolkit)
    toolkit.nvcc, toolkit.version, toolkit.architectures = "nvcc", "13.0", ["9.0"]
    built: list[list[str]] = []

    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        built.append(command)
        Path(command[command.index("-o") + 1]).touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setup.subprocess, "run", run)
    setup.compile_cuda(toolkit, tmp_path, include_paths())
    assert {Path(command[command.index("-c") + 1]).name for command in built} == {
        path.name for path in (ROOT / "csrc/cuda").glob("*.cu")
    }
    for command in built:
        at = command.index("-c")
        ours = kernels.nvcc_command(toolkit, "sm_90", Path(command[at + 1]), Path("out"))
        assert ours[: ours.index("-cubin")] == command[:at]


def test_cuda_file() -> None:
    rows, problems = kernels.cuda_job(needs_nvcc(), ("sm_90", ROOT / "csrc/cuda/restore.cu"))
    assert problems == []
    assert [row.dtype for row in rows] == list(kernels.DTYPES)
    assert {row.kernel for row in rows} == {"restore"}
    for row in rows:
        assert row.broken() == []


BAD = """
__global__ void bad_kernel(float* x, const int* at) {
  float kept[64];
  for (int i = 0; i < 64; ++i) kept[i] = x[i * 32];
  for (int i = 0; i < 64; ++i) kept[at[i]] += kept[i];
  for (int i = 0; i < 64; ++i) x[i * 32] = kept[i];
}
"""


def test_a_bad_cuda_file_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit = needs_nvcc()
    monkeypatch.setattr(kernels, "CUBINS", tmp_path)
    source = tmp_path / "restore.cu"
    source.write_text(BAD)
    (row,), problems = kernels.cuda_job(toolkit, ("sm_90", source))
    assert problems == []
    assert [rule.split()[-4:] for rule in row.broken() if "stack" in rule]
    assert [rule for rule in row.broken() if "spills" in rule]
    assert "cuda bad - sm_90 loads 4 bytes at most" in row.broken()
    source.write_text("syntax")
    rows, (problem,) = kernels.cuda_job(toolkit, ("sm_90", source))
    assert rows == []
    assert problem.startswith("cuda restore.cu sm_90 was not compiled: ")
    assert "error:" in problem
    source.write_text("")
    assert kernels.cuda_job(toolkit, ("sm_90", source)) == ([], ["cuda restore.cu sm_90 has no kernels"])
    source = source.rename(tmp_path / "new.cu")
    _, (problem,) = kernels.cuda_job(toolkit, ("sm_90", source))
    assert problem == "cuda new.cu is not in the report: bench/kernels.py does not know its arrays"


def test_what_did_not_change_is_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit = mock.Mock(nvcc="nvcc", version="13.0", flags=["-O3"])
    compiled = []

    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        compiled.append(command)
        Path(command[command.index("-o") + 1]).write_bytes(b"cubin")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(kernels, "CUBINS", tmp_path / "cubins")
    monkeypatch.setattr(subprocess, "run", run)
    source = tmp_path / "restore.cu"
    source.write_text("one")
    first = kernels.compile_cubin(toolkit, "sm_90", source)
    assert kernels.compile_cubin(toolkit, "sm_90", source) == first
    assert len(compiled) == 1
    source.write_text("two")
    second = kernels.compile_cubin(toolkit, "sm_90", source)
    assert len(compiled) == 2
    assert [*second.parent.iterdir()] == [second]
