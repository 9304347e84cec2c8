# SPDX-License-Identifier: Apache-2.0
"""Names of weights in published checkpoints of RTMPose and DWPose, as this library has them."""

from collections.abc import Mapping

from torch import Tensor

PARTS = ("backbone.", "head.")


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the backbone and the head of a checkpoint; the rest is left out.

    - a model of MMPose: `backbone.*`, `head.*`; normalisation constants and losses are dropped
    - a checkpoint of DWPose's distiller: `student.*`; where teacher and student are of one architecture, which is its
      second stage, the student's backbone never learned: the teacher's is taken under the student's head

    A state without such names is returned as it is.

    Args:
        state: of a file, by key.
    """
    if any(key.startswith("student.head.") for key in state):
        own = _under("student.", state)
        taught = {key: value for key, value in _under("teacher.", state).items() if key.startswith("backbone.")}
        if taught and all(key in own and own[key].shape == value.shape for key, value in taught.items()):
            own |= taught
        state = own
    kept = {key: value for key, value in state.items() if key.startswith(PARTS)}
    return kept or dict(state)


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
