"""The CUDA kernels without a GPU: the very sources of csrc/cuda, run on the CPU by tests/emulation.

The emulation is built here, and the tests of the ops and of the optimizers' contract run through it, in processes of
their own, in which it takes the place of the CPU kernels; so do the tests of emulation/on_device.py. The contract runs
on a layout as a device has it, besides: tables go up, and marks come from the kernels (remote.py).
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import emulation
import pytest

HERE = Path(__file__).parent
# Of the contract what a kernel has a say in.
SAID = ("corners", "errors", "gradients", "masters", "moves", "nudged", "passes", "trajectory")
CONTRACT = [f"test_{name}.py" for name in SAID]
# The reference and Triton are no part of this.
OURS = "not reference and not triton"
# Of the contract: classes whose kernels differ.
CLASSES = f"{OURS} and not adaptive and not sssam and not aelooksam and not part"
# The rules' own kernels are held to their trajectories; all else is the same for every rule.
ONE_RULE = "not adamw and not wrapped"
# In the first tier fewer, where marks and tables have a say, with one rule.
MARKED = f"{CLASSES} and not friendlysam and not wsam and momentum and not flat and (moved_between or some_passes " \
    "or exception or interrupt or groups or by_hand or dtype or frozen or restore or cleared)"  # fmt: skip


@pytest.fixture(scope="module")
def library() -> Path:
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler")
    (emulation.ROOT / "build").mkdir(exist_ok=True)
    with open(emulation.ROOT / "build/emulation.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process builds, the others find it built
        return emulation.build()


def pytest_through(library: Path, *arguments: str, **variables: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHARPKERN_")}
    environment |= {"SHARPKERN_EMULATED": str(library), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


def test_some_ops(library: Path) -> None:
    pytest_through(library, "tests/test_ops.py", "-k", f"{OURS} and addresses and not big", "-m", "not slow")


@pytest.mark.slow
def test_ops(library: Path) -> None:
    pytest_through(library, "tests/test_ops.py", "-k", OURS)


def test_what_is_particular_to_a_device(library: Path) -> None:
    pytest_through(library, "tests/emulation/on_device.py")


def test_some_of_the_contract_as_on_a_device(library: Path) -> None:
    files = [f"tests/contract/{file}" for file in CONTRACT]
    pytest_through(library, *files, "-k", MARKED, "-m", "not slow", SHARPKERN_TEST_REMOTE="1")


@pytest.mark.slow
@pytest.mark.parametrize("file", CONTRACT)
def test_the_contract_as_on_a_device(library: Path, file: str) -> None:
    chosen = f"{CLASSES} and {'not float32' if file == 'test_trajectory.py' else ONE_RULE}"
    pytest_through(library, f"tests/contract/{file}", "-k", chosen, "-m", "not slow", SHARPKERN_TEST_REMOTE="1")


@pytest.mark.slow
def test_trajectories(library: Path) -> None:
    """On a table that kernels read where it is: those of the first tier, and steps in half precision."""
    chosen = f"{CLASSES} and not wrapped and (float32 or half)"
    pytest_through(library, "tests/contract/test_trajectory.py", "-k", chosen, "-m", "not slow")


# Whether the emulation notices what it is there to notice.

CHECK = """
#include <cstdio>
#include "cuda_runtime.h"

__global__ void broadcast(int* out, int wrong) {
  __shared__ int shared;
  cudaGridDependencySynchronize();
  for (int i = 0; i < 8; ++i) {
    if (threadIdx.x == 0) shared = i;
    if (wrong != 1) __syncthreads();
    out[i] += shared == i;
    if (wrong != 2) __syncthreads();
  }
}

__global__ void sum(int* out, int wrong) {
  int x = 1;
  cudaGridDependencySynchronize();
  for (int d = 16; d > 0; d /= 2) x += __shfl_down_sync(wrong == 1 ? 0xffffu : 0xffffffffu, x, d);
  if (wrong == 2 && threadIdx.x > 7) return;
  __syncthreads();
  if (wrong == 3 && threadIdx.x % 2) __syncthreads(); else __syncthreads();
  if (threadIdx.x % 32 == 0) *out += x;
}

__global__ void early(int* out, int wrong) {
  if (wrong == 2) __isGlobal(out);
  if (wrong == 3) __ldcg(out);
  if (wrong == 4) atomicAdd(out, 0);
  if (wrong != 1) cudaGridDependencySynchronize();
}

int main() {
  cudaLaunchConfig_t config = {dim3(3), dim3(64)};
  for (int wrong = 0; wrong < 3; ++wrong) {
    int out[8] = {}, right = 0;
    cudaError_t error = cudaLaunchKernelEx(&config, broadcast, out, wrong);
    for (int x : out) right += x == 3 * 64;
    printf("%d %d\\n", error, right);
  }
  for (int wrong = 0; wrong < 4; ++wrong) {
    int out = 0;
    cudaError_t error = cudaLaunchKernelEx(&config, sum, &out, wrong);
    printf("%d %d\\n", error, out);
  }
  for (int wrong = 0; wrong < 5; ++wrong) {
    int out = 0;
    printf("%d %d\\n", cudaLaunchKernelEx(&config, early, &out, wrong), 0);
  }
}
"""


def test_emulation_notices_missing_and_divergent_barriers(tmp_path: Path) -> None:
    cxx = emulation.compiler()
    if cxx is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "check.cpp"
    source.write_text(CHECK)
    program = str(tmp_path / "check")
    here = emulation.HERE
    command = [*cxx, "-std=c++20", "-O1", f"-I{here}", str(source), str(here / "runtime.cpp"), "-o", program]
    subprocess.run(command, check=True)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    got = [tuple(map(int, line.split())) for line in lines]
    assert got[0] == (0, 8)
    assert all(error == 0 and right < 8 for error, right in got[1:3])  # some read the wrong number
    assert got[3] == (0, 3 * 2 * 32)
    assert all(error != 0 for error, _ in got[4:7])
    assert [error != 0 for error, _ in got[7:]] == [False, True, True, True, True]
