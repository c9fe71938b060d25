"""The contenders: how each one is made, and the bytes of memory traffic a float32 parameter costs it.

Bytes are counted from the operations: 4 for every element of every operand that an operation reads and every
result that it writes, as if nothing stayed in the cache from one operation to the next. Biases and norm layers
(unscaled in ASAM) are counted like the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor

import sharpkern

from .baselines import (
    BASES,
    PERTURB_EPS,
    RHO,
    Algorithm,
    Base,
    Foreach,
    ForeachFused,
    Loop,
    TwoStep,
    make_compiled,
    make_pytorch_optimizer,
)

Make = Callable[[Sequence[Tensor], Algorithm, Base], TwoStep]


@dataclass(frozen=True)
class Contender:
    """One column of the table.

    Args:
        make: builds it on parameters.
        first: bytes of the first pass, by algorithm.
        second: bytes of the second pass, by base rule.
        slow_start: minutes of compilation for some shapes.
    """

    make: Make
    first: Mapping[Algorithm, int]
    second: Mapping[Base, int]
    slow_start: bool = False

    def bytes_per_param(self, algorithm: Algorithm, base: Base) -> int | None:
        """None where this contender has no such algorithm."""
        return self.first[algorithm] + self.second[base] if algorithm in self.first else None


def _ours(params: Sequence[Tensor], algorithm: Algorithm, base: Base, **kwargs: Any) -> TwoStep:
    cls, options = BASES[base]
    make = sharpkern.SAM if algorithm == "sam" else sharpkern.ASAM
    return cast(TwoStep, make(params, cls, rho=RHO[algorithm], perturb_eps=PERTURB_EPS, **options, **kwargs))


# torch.optim one operation at a time, with a loop or with foreach.
# SGD: g + wd w 12, buf *= m 8, buf += g 12, w -= lr buf 12.
# AdamW: decay 8, lerp 12, v *= b 8, addcmul 12, sqrt 8, divide 8, add eps 8, addcdiv 16.
_TORCH = {"sgd": 44, "adamw": 80}
# torch.optim with fused=True: reads w, g and the state, writes w and the state.
_TORCH_FUSED = {"sgd": 20, "adamw": 28}

# SAM: 1.0 * g 8, its norm 4; 1.0 * g 8, times scale 8, clone 8, add 12. ASAM: |w| + eta 16, times g 12, norm 4;
# again |w| + eta 16, square 8, times g 12, times scale 8, clone 8, add 12. The restore swaps a pointer.
_LOOP = {"sam": 48, "asam": 96}

# SAM: norm 4, backup 8, add with scale 12. ASAM: |w| + eta 16, times g 12, norm 4, times T 12, backup 8, add 12.
_FOREACH = {"sam": 24, "asam": 64}
# Restore 8; SGD: buf *= m 8, += g 12, += wd w 12, w -= lr buf 12; AdamW as torch's without the division.
_FOREACH_STEP = {"sgd": 52, "adamw": 80}

# Inductor fuses everything but the norm, which stays aten's: SAM 4 + (reads w, g, writes w, backup) 16; ASAM
# writes T g for it, 12 more. The second pass is one kernel: reads backup, g, state, writes w, state.
_COMPILED = {"sam": 20, "asam": 32}

CONTENDERS: dict[str, Contender] = {
    # norm: g 4, ASAM w too; ascend: reads w, g, writes w, backup 16; the check reads g again; then one kernel.
    "ours": Contender(_ours, {"sam": 24, "asam": 28}, {"sgd": 20, "adamw": 28}),
    "ours, no check": Contender(
        partial(_ours, skip_nonfinite=False), {"sam": 20, "asam": 24}, {"sgd": 20, "adamw": 28}
    ),
    "loop": Contender(Loop, _LOOP, _TORCH),
    "loop, fused base": Contender(partial(Loop, fused=True), _LOOP, _TORCH_FUSED),
    "foreach": Contender(Foreach, _FOREACH, _FOREACH_STEP),
    "compile": Contender(make_compiled, _COMPILED, _TORCH_FUSED, slow_start=True),
    # Norm 4, 1.0 * g 8, times scale 8, clone 8, add 12, restore by copy 8.
    "pytorch_optimizer": Contender(make_pytorch_optimizer, {"sam": 48}, _TORCH),
    # Norm 4, g * scale 8, clone 8, add 12, restore by copy 8.
    "pytorch_optimizer, foreach": Contender(partial(make_pytorch_optimizer, foreach=True), {"sam": 40}, _TORCH),
}
OURS = "ours"

# On a GPU the foreach forms keep the scale on the device, which costs a pass of its own: times scale 8.
_FOREACH_GPU = {"sam": 32, "asam": 72}
GPU_CONTENDERS: dict[str, Contender] = {
    **{name: CONTENDERS[name] for name in ("ours", "ours, no check", "loop", "loop, fused base")},
    "foreach": Contender(Foreach, _FOREACH_GPU, _FOREACH_STEP),
    # Restore 8.
    "foreach, fused base": Contender(ForeachFused, _FOREACH_GPU, {"sgd": 28, "adamw": 36}),
    "compile": CONTENDERS["compile"],
}
