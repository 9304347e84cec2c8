# SPDX-License-Identifier: Apache-2.0
"""How much memory a computation holds at once, counted tensor by tensor: the same on every machine."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Ledger(TorchDispatchMode):
    """Counts the bytes of storages made inside, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now: int = 0
        self.most: int = 0
        self.known: set[int] = set()

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and id_of(tensor) not in self.known | given:
                storage = tensor.untyped_storage()
                self.known.add(id_of(tensor))
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._free, id_of(tensor), storage.nbytes())
        return out


def id_of(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def peak(work: Callable[[], Any]) -> int:
    """Return the most bytes that tensors made by `work` held at once, what it returns included."""
    with _Ledger() as ledger:
        work()
    return int(ledger.most)
