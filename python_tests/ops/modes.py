"""A look at every operation of torch that runs."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Watched(TorchDispatchMode):
    """Gives each function that has run to `see`, with the tensors that it made."""

    def __init__(self, see: Callable[[Any, list[Tensor]], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        parts = result if isinstance(result, tuple | list) else [result]
        self.see(function, [part for part in parts if isinstance(part, Tensor)])
        return result
