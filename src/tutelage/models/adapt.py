# SPDX-License-Identifier: Apache-2.0
"""Any module, made a Model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.core import InputSpec, Model, Tap
from tutelage.models import roles as places


def adapt(
    module: nn.Module,
    sample_inputs: Tensor | None = None,
    *,
    roles: Mapping[str, str | Mapping[str, Any] | Tap] | None = None,
    input: InputSpec | None = None,  # noqa: A002 - the field's name
    class_names: Sequence[str] = (),
    call: Callable[[nn.Module, Any], Any] | None = None,
    prefix: int | None = None,
    classifier: str | None = None,
    stages: Sequence[str] = (),
    channels_last: bool = False,
) -> Model:
    """Return a module as a Model with the roles that one forward shows.

    Args:
        module: the network; its weights, buffers, mode and the random generators stay as they are.
        sample_inputs: images `[B, C, H, W]` for the forward; None looks for no roles.
        roles: places by role, above what is found; a module path, or a mapping of `Tap`'s fields.
        input: pixels the model wants.
        class_names: of its outputs, in order.
        call: how to call it, where `module(inputs)` is not enough.
        prefix: number of class and register tokens, if known.
        classifier: path of the layer that gives the logits, if known.
        stages: paths of the modules that end a stage, if known.
        channels_last: of maps that are cubes, whose shape does not say.

    Raises:
        UserError: if a place is written with an unknown word.

    Example:
        >>> body = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        >>> model = adapt(nn.Sequential(*body, nn.Linear(4, 2)), torch.zeros(1, 1, 8, 8))
        >>> model.roles["map"].name, model.roles["pooled"].name, model.modules["classifier"]
        ('1', '4:input', '4')
    """
    found = places.Roles()
    if sample_inputs is not None:
        found = places.find(
            module,
            sample_inputs,
            call=call,
            prefix=prefix,
            classifier=classifier,
            stages=stages,
            channels_last=channels_last,
        )
    given = {role: Tap.parse(place) for role, place in (roles or {}).items()}
    lent = {role: tap.where for role, tap in given.items() if role == "classifier" or role.endswith(".norm")}
    modules = {**found.modules, **lent}
    taps = {**found.taps, **{role: tap for role, tap in given.items() if role not in lent}}
    return Model(module, taps, modules, input, tuple(class_names), call)


def blank(module: nn.Module, input: InputSpec, size: tuple[int, int]) -> Tensor:  # noqa: A002
    """Return a black image for a dry run, where the module's parameters lie."""
    parameter = next(module.parameters(), torch.zeros(0))
    height, width = input.size or size
    return torch.zeros(1, input.channels, height, width, device=parameter.device, dtype=parameter.dtype)
