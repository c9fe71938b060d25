"""Layer 3: how to move. The base rule turns the last gradient of a step into new weights.

``torch.optim.SGD``, ``Adam`` and ``AdamW`` (exactly these) are fused: one launch that steps from the backup, so that
undoing the perturbation costs nothing. Any other optimizer class is wrapped: a fused restore, then its own ``step``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from .fused import FUSED, FusedRule
from .wrapped import WrappedRule

Rule = FusedRule | WrappedRule

__all__ = ["FusedRule", "Rule", "WrappedRule", "make_rule"]


def make_rule(base_optimizer: Any, kwargs: dict[str, Any], own: Sequence[str], owner: str) -> Rule:
    """The rule for a base optimizer class.

    Raises:
        TypeError: when ``base_optimizer`` is no optimizer class, or does not know a keyword.
        ValueError: when it has an option that is called like one of ours (``own``), needs a closure or sparse
            gradients, or does not take a value.
    """
    if isinstance(base_optimizer, Optimizer):
        raise TypeError(
            f"base_optimizer should be an optimizer class, such as torch.optim.SGD, but got an instance of "
            f"{type(base_optimizer).__name__}; pass the class and its options by keyword"
        )
    if not (inspect.isclass(base_optimizer) and issubclass(base_optimizer, Optimizer)):
        raise TypeError(
            f"base_optimizer should be an optimizer class, such as torch.optim.SGD, but got {base_optimizer!r}"
        )
    if hasattr(base_optimizer, "second_step"):
        raise ValueError(f"{base_optimizer.__name__} cannot be the base optimizer: it takes two passes itself")
    if issubclass(base_optimizer, torch.optim.SparseAdam):
        raise ValueError(
            f"{base_optimizer.__name__} cannot be the base optimizer: it needs sparse gradients, which {owner} does "
            "not support; take torch.optim.Adam and nn.Embedding(sparse=False)"
        )
    rule = FUSED.get(base_optimizer, WrappedRule)(base_optimizer, kwargs)
    known = {*inspect.signature(base_optimizer.__init__).parameters, *rule.defaults}
    for key in own:
        if key in known:
            raise ValueError(
                f"{base_optimizer.__name__} has an option {key!r} of its own, which collides with {owner}'s {key!r}; "
                f"it cannot be the base optimizer of {owner}"
            )
    return rule
