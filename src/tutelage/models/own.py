# SPDX-License-Identifier: Apache-2.0
"""The few architectures that no library carries: `tutelage:NAME`.

A family is one file of this folder with a class and a table `ARCHITECTURES` of constructors by name.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from tutelage.core import InputSpec
from tutelage.core.error import UserError, nearest
from tutelage.models import cifar

#: Constructors by name, of all families.
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {**cifar.ARCHITECTURES}
#: What the published weights were trained with; other channel counts are centred.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build(name: str, *, num_classes: int, in_channels: int, **options: Any) -> tuple[nn.Module, InputSpec]:
    """Return a network and the pixels it wants.

    Raises:
        UserError: on an unknown name or option.
    """
    if name not in ARCHITECTURES:
        raise UserError(f"unknown model 'tutelage:{name}'{nearest(name, ARCHITECTURES)}")
    try:
        module = ARCHITECTURES[name](**options, num_classes=num_classes, in_channels=in_channels)
    except TypeError as error:
        raise UserError(f"tutelage:{name}: {error}") from error
    rgb = in_channels == 3
    mean, std = (MEAN, STD) if rgb else ((0.5,) * in_channels, (0.5,) * in_channels)
    return module, InputSpec(mean=mean, std=std, channels=in_channels)
