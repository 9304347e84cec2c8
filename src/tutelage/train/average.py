# SPDX-License-Identifier: Apache-2.0
"""An exponential moving average of a model's weights, kept beside the model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """Weights averaged over steps: average <- decay * average + (1 - decay) * weights.

    Args:
        model: whose weights are followed; buffers are averaged too where they are floating.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move toward the model's present weights."""
        now = self.model.state_dict()
        floating = [name for name, tensor in now.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.weights[n] for n in floating], [now[n] for n in floating], 1 - self.decay)
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
