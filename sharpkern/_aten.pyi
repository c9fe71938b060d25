"""Where tensors lie, by torch's own C++ classes: for one version of torch."""

from torch import Tensor

torch_version: str

def increment_version(tensors: list[Tensor]) -> None: ...

class Scan:
    def __init__(
        self, params: list[Tensor], like: Tensor, param_layouts: int, grad_layouts: int, width: int
    ) -> None: ...
    def unmoved(self, addresses: int) -> bool: ...
    def gather(self, column: int, step: int) -> tuple[int, int, bool]: ...
