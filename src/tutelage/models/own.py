# SPDX-License-Identifier: Apache-2.0
"""The few architectures that no library carries: `tutelage:NAME`.

A family is one file of `networks/` with a class and a table `ARCHITECTURES` of constructors by name.
"""

from tutelage.core import InputSpec
from tutelage.core.error import UserError, nearest
from tutelage.models.source import Built, Wanted, by_channels, listed

#: Constructors by name, of all families.
ARCHITECTURES = listed("networks")
#: The constants that published weights of these networks were trained with; other channel counts are centred.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build(wanted: Wanted) -> Built:
    """Return a network of this library.

    Raises:
        UserError: on an unknown name or option.
    """
    name, channels = wanted.place, wanted.in_channels or 3
    if name not in ARCHITECTURES:
        raise UserError(f"unknown model 'tutelage:{name}'{nearest(name, ARCHITECTURES)}")
    if wanted.pretrained:
        raise UserError(f"tutelage:{name} comes without weights: give a file as `weights`")
    try:
        module = ARCHITECTURES[name](**wanted.options, num_classes=wanted.num_classes or 10, in_channels=channels)
    except TypeError as error:
        raise UserError(f"tutelage:{name}: {error}") from error
    mean, std = (MEAN, STD) if channels == 3 else (by_channels((0.5,), channels),) * 2
    return Built(module, InputSpec(mean=mean, std=std, channels=channels), size=(32, 32))
