"""Digests of weights, state and statistics after 50 steps, for every class, rule, dtype and way of stepping.

    python tests/hashes.py record before.json      on one commit
    python tests/hashes.py compare before.json     on another one, on the same machine

A change of the inside must leave every digest as it was. Digests depend on the compiler and the processor, so none is
kept here.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from models import batches, make_net, train, train_by_hand, weights

import sharpkern as sk

STEPS = 50
CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sam": (sk.SAM, {}),
    "sam-adaptive": (sk.SAM, {"rho": 2.0, "adaptive": True}),
    "asam": (sk.ASAM, {}),
    "sssam": (sk.SSSAM, {"p": 0.4, "seed": 7}),
    "aesam": (sk.AESAM, {"total_steps": STEPS}),
    "looksam": (sk.LookSAM, {"k": 3, "alpha": 0.4}),
    "aelooksam": (sk.AELookSAM, {"total_steps": STEPS, "alpha": 0.4}),
    "sam-part": (sk.SAM, {"perturb": lambda name, p: p.dim() < 4}),
    "esam": (sk.ESAM, {"beta": 0.3, "gamma": 1.0, "seed": 5}),
    "salr": (sk.SALR, {"n_ascent": 2, "n_descent": 3}),
}
RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}),
    "sgd-clipped": (torch.optim.SGD, {"lr": 0.05, "max_grad_norm": 0.3}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
    "adam-amsgrad": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-3, "max_grad_norm": 0.3}),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
WAYS = {"closure": train, "by hand": train_by_hand}


def digest(tensors: dict[str, Any]) -> str:
    """Of names, dtypes and bits, whatever the order of the names."""
    out = hashlib.sha256()
    for name in sorted(tensors):
        t = torch.as_tensor(tensors[name]).detach().cpu().contiguous()
        out.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        out.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return out.hexdigest()[:16]


def run(method: str, rule: str, dtype: torch.dtype, way: str) -> dict[str, str]:
    cls, own = CLASSES[method]
    base, options = RULES[rule]
    torch.manual_seed(0)
    model = make_net(dtype)
    named = list(model.named_parameters())
    groups = [{"params": named[:2]}, {"params": named[2:], "weight_decay": 0.02}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # half precision
        opt = cls(groups, base, model=model, **{**options, **own})
    WAYS[way](model, opt, batches(STEPS, dtype))
    state = {f"{name}.{key}": value for name, p in named for key, value in opt.state.get(p, {}).items()}
    return {"weights": digest(weights(model)), "state": digest(state), "stats": digest(dict(opt.stats))}


def all_digests() -> dict[str, dict[str, str]]:
    torch.set_num_threads(1)
    return {
        f"{method} {rule} {name} {way}": run(method, rule, dtype, way)
        for method in CLASSES
        for rule in RULES
        for name, dtype in DTYPES.items()
        for way in WAYS
        if (method, way) != ("salr", "by hand")
    }


def main() -> None:
    command, path = sys.argv[1], Path(sys.argv[2])
    now = all_digests()
    if command == "record":
        path.write_text(json.dumps(now, indent=1))
        print(f"{len(now)} runs recorded")
        return
    before = json.loads(path.read_text())
    changed = [
        f"{run}: {what}" for run in before for what in before[run] if now.get(run, {}).get(what) != before[run][what]
    ]
    print(*changed, f"{len(before)} runs, {len(changed)} digests differ", sep="\n")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
