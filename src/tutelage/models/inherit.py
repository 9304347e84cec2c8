# SPDX-License-Identifier: Apache-2.0
"""Weights taken over from another model, part by part, by name and shape."""

from collections.abc import Mapping

import torch
from torch import nn

from tutelage.core.error import UserError, nearest

SHOWN = 3  # tensors a report names


@torch.no_grad()
def inherit(student: nn.Module, places: Mapping[str, str], sources: Mapping[str, nn.Module]) -> list[str]:
    """Copy parts of other models into a student, parameters and buffers alike.

    Args:
        student: changed in place.
        places: for a module of the student (an empty path is all of it) where its weights come from:
            `SOURCE` or `SOURCE.path.to.module`.
        sources: models by name.

    Returns:
        A line a part: how many of its tensors were copied, and which were not.

    Raises:
        UserError: if a source or module does not exist, or nothing of a part fits.

    Example:
        >>> old, new = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 2))
        >>> inherit(new, {"0": "teacher.0"}, {"teacher": old})
        ['0: 2 of 2 tensors from teacher.0']
    """
    said = []
    for place, where in places.items():
        name, _, path = where.partition(".")
        if name not in sources:
            raise UserError(f"inherit.{place}: no source {name!r}{nearest(name, sources)}")
        own = module_at(student, place, f"inherit.{place}").state_dict()
        found = module_at(sources[name], path, f"inherit.{place}: {where}").state_dict()
        fits = [key for key, value in own.items() if key in found and found[key].shape == value.shape]
        if not fits:
            raise UserError(f"inherit.{place}: nothing of {where} fits: no tensor has the same name and shape")
        for key in fits:
            own[key].copy_(found[key])
        left = [key for key in own if key not in fits]
        more = f", {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        rest = f"; not {', '.join(left[:SHOWN])}{more}" if left else ""
        said.append(f"{place or 'all'}: {len(fits)} of {len(own)} tensors from {where}{rest}")
    return said


def freeze(student: nn.Module, places: tuple[str, ...]) -> list[nn.Parameter]:
    """Switch off the training of modules by path; return the parameters that were trained until now.

    Raises:
        UserError: if there is no such module.
    """
    parameters = [p for place in places for p in module_at(student, place, f"freeze: {place}").parameters()]
    changed = [p for p in dict.fromkeys(parameters) if p.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    return changed


def module_at(model: nn.Module, path: str, where: str) -> nn.Module:
    """Return the module at a path.

    Raises:
        UserError: naming the place in the recipe and the nearest module.
    """
    try:
        return model.get_submodule(path)
    except AttributeError:
        known = [name for name, _ in model.named_modules() if name]
        raise UserError(f"{where}: {type(model).__name__} has no module {path!r}{nearest(path, known)}") from None
