# SPDX-License-Identifier: Apache-2.0
"""What a segmenter answers while it trains."""

from typing import NamedTuple

from torch import Tensor


class Scores(NamedTuple):
    """Class scores of a segmenter with a second head; in evaluation it gives the first alone.

    Args:
        logits: `[B, K, h, w]`.
        auxiliary: `[B, K, h', w']` of a head on an earlier map.
    """

    logits: Tensor
    auxiliary: Tensor
