# SPDX-License-Identifier: Apache-2.0
"""What each module of a model took and gave in one forward: the evidence that roles are read from."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class Call:
    """One call of one module.

    Args:
        path: of the module.
        module: itself.
        number: which call of this module, from 0.
        taken: the first tensor among its inputs, or None.
        given: the first tensor of its output, or None.
        inner: calls made inside it, in order.
    """

    path: str
    module: nn.Module
    number: int
    taken: Tensor | None
    given: Tensor | None = None
    inner: "list[Call]" = field(default_factory=list)

    def walk(self) -> "Iterator[Call]":
        """Yield this call and all inside it, in the order in which they ended."""
        for call in self.inner:
            yield from call.walk()
        yield self


def tensor_in(value: Any) -> Tensor | None:
    """Return the first tensor in what a module takes or gives."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        return next((found for part in value.values() if (found := tensor_in(part)) is not None), None)
    if isinstance(value, (tuple, list)):
        return next((found for part in value if (found := tensor_in(part)) is not None), None)
    return None


class _Stack:
    """Collects calls as they nest."""

    def __init__(self) -> None:
        self.open: list[Call] = []
        self.counts: dict[str, int] = {}
        self.root: Call | None = None

    def enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        number = self.counts.get(path, 0)
        self.counts[path] = number + 1
        call = Call(path, module, number, tensor_in(args) if args else tensor_in(kwargs))
        if self.open:
            self.open[-1].inner.append(call)
        else:
            self.root = call
        self.open.append(call)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.open.pop().given = tensor_in(output)


@torch.no_grad()
def trace(module: nn.Module, forward: Callable[[], Any]) -> tuple[Call, Any]:
    """Return the calls of one forward in evaluation mode without gradient, and its output.

    Args:
        module: whose calls, and those of its parts, are noted; its training flags are restored.
        forward: calls the module; random generators are not moved.
    """
    stack = _Stack()
    handles = []
    flags = [(part, part.training) for part in module.modules()]
    for path, part in module.named_modules():
        handles.append(part.register_forward_pre_hook(partial(stack.enter, path), with_kwargs=True))
        handles.append(part.register_forward_hook(stack.leave))
    try:
        module.eval()
        with torch.random.fork_rng(devices=[]):
            output = forward()
    finally:
        for handle in handles:
            handle.remove()
        for part, training in flags:
            part.training = training
    if stack.root is None:
        raise RuntimeError("the module's forward was not called")
    return stack.root, output
