"""Whether an optimizer's lists and dictionaries are what they were: asked several times a step."""

from __future__ import annotations

import operator
from typing import Any

try:
    from sharpkern._C import count_entries as count_entries
    from sharpkern._C import identical as identical
except ImportError:  # built without the extension, or for another torch or Python

    def identical(one: list[Any], other: list[Any]) -> bool:
        """Whether two lists hold the same objects in the same order."""
        return len(one) == len(other) and all(map(operator.is_, one, other))

    def count_entries(state: dict[Any, Any]) -> int:
        """How many entries the dictionaries have that are values of this one."""
        return sum(len(entry) for entry in state.values() if isinstance(entry, dict))
