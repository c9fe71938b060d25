"""The compiled kernels; importing the module registers them with torch."""

from typing import Any

from torch import Tensor

def build_info() -> dict[str, str]: ...

class Scan:
    def __init__(
        self, exchange: Any, params: list[Tensor], like: Tensor, param_layouts: int, grad_layouts: int, width: int
    ) -> None: ...
    def unmoved(self, addresses: int) -> bool: ...
    def gather(self, column: int, step: int) -> tuple[int, int, bool]: ...
