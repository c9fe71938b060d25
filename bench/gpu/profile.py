"""``python -m bench.gpu.profile``: every op once on each backend at 25 M parameters, for a profiler to look at."""

from __future__ import annotations

import torch

import sharpkern as sk

from .kernels import KERNELS, Buffers


def call_all(buffers: Buffers) -> None:
    for backend in sk.available_backends(buffers.flat.device):
        if backend != "reference":
            with sk.use_backend(backend):
                for kernel in KERNELS.values():
                    kernel.call(buffers)


def main() -> None:
    buffers = Buffers([(25_000_000,)], torch.float32, torch.Generator("cuda").manual_seed(0))
    call_all(buffers)  # modules load, Triton compiles
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        call_all(buffers)
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
