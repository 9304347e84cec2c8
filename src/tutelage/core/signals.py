# SPDX-License-Identifier: Apache-2.0
"""What one forward pass of one model gave."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Signals:
    """Read-only record of a forward pass.

    Args:
        output: what the model returned.
        taps: tensors by the role or path a term asked for; `logits` among them where the task has any.
        borrowed: modules of the model, by role: a teacher's as frozen copies, a student's as constants; gradients
            pass through them.
    """

    output: Any
    taps: Mapping[str, Tensor]
    borrowed: Mapping[str, nn.Module] = field(default_factory=lambda: NONE)

    def __getitem__(self, role: str) -> Tensor:
        try:
            return self.taps[role]
        except KeyError:
            raise KeyError(f"{role!r} was not recorded; recorded: {', '.join(self.taps) or 'nothing'}") from None

    @property
    def logits(self) -> Tensor:
        """The task's raw scores before any softmax."""
        return self["logits"]

    def detach(self) -> "Signals":
        """Return the same signals cut from the graph."""
        output = self.output.detach() if isinstance(self.output, Tensor) else None
        return replace(self, output=output, taps={role: tap.detach() for role, tap in self.taps.items()})
