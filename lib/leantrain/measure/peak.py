"""The most memory that a computation holds at once, counted tensor by tensor."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["peak_bytes"]


class _Watch(TorchDispatchMode):
    """Follows the storages that operations make, from their birth to the death of their last tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: Counter[int] = Counter()
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0

    def _gone(self, key: int) -> None:
        self.alive[key] -= 1
        if not self.alive[key]:
            del self.alive[key]
            self.now -= self.sizes.pop(key)

    def known(self, given: Any) -> set[int]:
        return {t.untyped_storage()._cdata for t in tree_leaves(given) if isinstance(t, Tensor)}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A view of something that was there before the watch began is nobody's new memory.
        old = self.known((args, kwargs)) - set(self.alive)
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in old:
                continue
            if key not in self.alive:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
            self.alive[key] += 1
            weakref.finalize(tensor, self._gone, key)
        return out


def peak_bytes(fn: Callable[[], object]) -> int:
    """The most bytes that the tensors a function makes hold at the same time.

    Inputs that exist before do not count; what the function returns does. Nothing is computed if it works on the meta
    device, so that shapes can be counted that no memory would hold. Workspaces inside PyTorch's own routines are not
    seen.

    Args:
        fn: Called once, under ``torch.no_grad``.

    Returns:
        Bytes.

    Example:
        >>> x = torch.empty(1000, 10, device="meta")
        >>> peak_bytes(lambda: (x * 2 + 1).sum())  # x * 2 and x * 2 + 1, 40,000 bytes each
        80000
    """
    with torch.no_grad(), _Watch() as watch:
        fn()
    return watch.most
