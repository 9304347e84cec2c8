# SPDX-License-Identifier: Apache-2.0
"""An exponential moving average of a model's weights, kept beside the model."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """Weights averaged over steps: average <- (1 - share) * average + share * weights.

    The share is 1 - decay. With a ramp it begins at 1 and falls to that: of a step t > 0 it is
    decay * exp(-(1 + t) / ramp) + 1 - decay, and of the first step 1.

    Args:
        model: whose weights are followed; buffers are averaged too where they are floating.
        decay: in [0, 1).
        ramp: optimizer steps, > 0; None for none.

    Reference: the ramp is that of YOLOX (Ge et al., 2021), as MMPose trains RTMPose with it.
    """

    def __init__(self, model: nn.Module, decay: float, ramp: float | None = None) -> None:
        self.model, self.decay, self.ramp = model, decay, ramp
        self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def share(self, step: int) -> float:
        """Return the share of the model's weights at a 0-based optimizer step.

        Example:
            >>> average = Average(nn.Linear(1, 1), 0.9998, ramp=2000)
            >>> [round(average.share(step), 4) for step in (0, 1, 1999, 100_000)]
            [1.0, 0.999, 0.368, 0.0002]
        """
        if self.ramp is None:
            return 1 - self.decay
        return self.decay * math.exp(-(1 + step) / self.ramp) + 1 - self.decay if step else 1.0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move toward the model's present weights, after a 0-based optimizer step."""
        now = self.model.state_dict()
        floating = [name for name, tensor in now.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.weights[n] for n in floating], [now[n] for n in floating], self.share(step))
        for name in now.keys() - set(floating):
            self.weights[name].copy_(now[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Lend the averaged weights to the model, for evaluation and export."""
        own = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.weights)
        try:
            yield
        finally:
            self.model.load_state_dict(own)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of a checkpoint."""
        for name, tensor in weights.items():
            self.weights[name].copy_(tensor)
