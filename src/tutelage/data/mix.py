# SPDX-License-Identifier: Apache-2.0
"""Mixup and CutMix: pairs of labelled images and of their labels, before any model sees them.

Reference: Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018; Yun et al., CutMix, ICCV 2019.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch
from tutelage.core.error import UserError


@final
@dataclass(frozen=True)
class Mix:
    """Mixes each labelled row with another; unlabelled rows stay as they are.

    The share of a batch is drawn from Beta(alpha, alpha). Targets become soft, `[B, K]`: the same share of
    both classes, zeros where unlabelled.

    Args:
        num_classes: K.
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none; with both, each batch takes one or the other, evenly.

    Raises:
        UserError: if an alpha is negative or both are 0.
    """

    num_classes: int
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for word in ("mixup", "cutmix"):
            if getattr(self, word) < 0:
                raise UserError(
                    f"data.{word} is the alpha of a Beta distribution, at least 0; not {getattr(self, word)}"
                )
        if not (self.mixup or self.cutmix):
            raise UserError("nothing to mix: give data.mixup or data.cutmix")

    def __call__(self, batch: Batch, key: int) -> Batch:
        """Return the mixed batch; a function of batch and key.

        Raises:
            UserError: if the targets are neither classes nor soft labels.
        """
        if not isinstance(batch.target, Tensor) or not isinstance(batch.inputs, Tensor):
            raise UserError("mixup and cutmix need images and one class an image")
        draw = np.random.Generator(np.random.Philox(key))
        labelled = batch.labelled.nonzero().flatten()
        partner = torch.arange(len(batch))
        partner[labelled] = labelled[torch.from_numpy(draw.permutation(len(labelled)))]
        cut = self.cutmix > 0 and (not self.mixup or draw.random() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        share = float(draw.beta(alpha, alpha))
        if cut:
            mask, share = patch(batch.inputs.shape[-2:], share, draw)  # type: ignore[arg-type]

            def change(images: Tensor) -> Tensor:
                return images.where(mask, images[partner])
        else:

            def change(images: Tensor) -> Tensor:
                return images.lerp(images[partner], 1 - share)

        soft = self._soft(batch)
        return replace(
            batch,
            inputs=self._only(change, batch.inputs, batch.labelled),
            target=soft * share + soft[partner] * (1 - share),
            views={name: self._only(change, images, batch.labelled) for name, images in batch.views.items()},
        )

    def _soft(self, batch: Batch) -> Tensor:
        if batch.target.ndim == 2:
            return batch.target  # type: ignore[no-any-return]
        one = F.one_hot(batch.target.clamp(min=0), self.num_classes).float()
        return one * batch.labelled[:, None]

    @staticmethod
    def _only(change: Callable[[Tensor], Tensor], images: Tensor, labelled: Tensor) -> Tensor:
        return change(images).where(labelled[:, None, None, None], images)


def patch(size: tuple[int, int], share: float, draw: np.random.Generator) -> tuple[Tensor, float]:
    """Return which pixels `[H, W]` stay when a rectangle at a random place is cut, and their share."""
    height, width = size
    side = (1 - share) ** 0.5
    tall, wide = round(height * side), round(width * side)
    middle_y, middle_x = int(draw.integers(height)), int(draw.integers(width))
    stays = torch.ones(height, width, dtype=torch.bool)
    top, left = max(middle_y - tall // 2, 0), max(middle_x - wide // 2, 0)
    stays[top : middle_y - tall // 2 + tall, left : middle_x - wide // 2 + wide] = False
    return stays, float(stays.float().mean())
