# SPDX-License-Identifier: Apache-2.0
"""What Mask2Former answers while it trains: class scores by pixel, and the loss of its queries.

Reference: Cheng et al., Masked-attention Mask Transformer for Universal Image Segmentation, CVPR 2022.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

OUTSIDE = -30.0  # logit of a pixel that is in no mask: its loss and its gradient vanish


@final
@dataclass(frozen=True)
class Queries:
    """Queries of one forward.

    Args:
        logits: `[B, K, h, w]` class scores by pixel.
        module: the model, whose criterion matches queries and classes.
        classes: `[B, Q, K + 1]`.
        masks: `[B, Q, h, w]`.
        earlier: the same after each earlier layer.
    """

    logits: Tensor
    module: Any
    classes: Tensor
    masks: Tensor
    earlier: Sequence[Mapping[str, Tensor]]

    def losses(self, target: Tensor) -> dict[str, Tensor]:
        """Return the losses of matched queries: `class`, `mask` and `dice`, with the model's own weights.

        Matching is done on the host, as in the model's library. Each class of an image is one mask. Ignored pixels
        are in none of them, and every query is made to agree; images without a class take no part.

        Args:
            target: `[B, H, W]` int64, -1 where ignored.
        """
        rows = (target >= 0).flatten(1).any(1).nonzero().flatten()
        if not len(rows):
            nothing = self.logits.sum() * 0.0
            return {"class": nothing, "mask": nothing, "dice": nothing}
        known = target[rows]
        kinds = [kind[kind >= 0] for kind in (one.unique() for one in known)]
        masks = [(one == kind[:, None, None]).float() for one, kind in zip(known, kinds, strict=True)]

        def settled(answers: Tensor) -> Tensor:
            whole = F.interpolate(answers[rows].float(), known.shape[1:], mode="bilinear", align_corners=False)
            return whole.masked_fill(known[:, None] < 0, OUTSIDE)

        earlier = [
            {
                "masks_queries_logits": settled(one["masks_queries_logits"]),
                "class_queries_logits": one["class_queries_logits"][rows],
            }
            for one in self.earlier
        ]
        losses = self.module.get_loss_dict(settled(self.masks), self.classes[rows], masks, kinds, earlier)
        parts: dict[str, Tensor] = {}
        for name, word in (("class", "loss_cross_entropy"), ("mask", "loss_mask"), ("dice", "loss_dice")):
            parts[name] = torch.stack([loss for key, loss in losses.items() if word in key]).sum()
        return parts
