"""``python -m sharpkern info``: which backend runs on each device, and why another one does not."""

from __future__ import annotations

import argparse

import torch

from . import __version__, build_info
from .ops import scan
from .ops.backend import NAMES, current_backend, why_not


def info() -> str:
    """The report, a line each."""
    build = build_info()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    lines = [f"sharpkern {__version__}, torch {torch.__version__}"]
    if build["extension"]:
        cuda = f"CUDA {build['cuda']} for {build['cuda_architectures']}" if build["cuda_architectures"] else "no CUDA"
        lines.append(f"extension: {build['compiler']}, built with torch {build['torch']}, {cuda}")
    found = {
        "aten": "by a part of the extension that is of this torch alone",
        "dlpack": "through DLPack: slower where a model has many",
        "op": "by an op: slower still where a model has many",
    }
    lines.append(f"parameters and gradients are found {found[scan.path()]}")
    for device in dict.fromkeys(["cpu", "cuda", *([accelerator.type] if accelerator else [])]):
        running = current_backend(device)
        here = device == "cpu" or (accelerator is not None and accelerator.type == device)
        lines.append(f"{device}: {running}{'' if here else ', if there were such a device'}")
        for name in NAMES:
            reason = why_not(name, device)
            if name != running:
                lines.append(f"    {name}: {'available' if reason is None else reason}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sharpkern", description=__doc__)
    parser.add_argument("command", choices=["info"])
    parser.parse_args()
    print(info())


if __name__ == "__main__":
    main()
