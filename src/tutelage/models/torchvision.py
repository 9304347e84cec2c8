# SPDX-License-Identifier: Apache-2.0
"""Classification models of torchvision."""

from typing import Any

from torch import nn

from tutelage.core import InputSpec
from tutelage.core.error import UserError, nearest
from tutelage.models import roles
from tutelage.models.adapt import blank
from tutelage.models.source import Built, Wanted


def build(wanted: Wanted) -> Built:
    """Return a model of torchvision; one-channel images are repeated to its three.

    With pretrained weights and another number of classes, the last layer is a new one.

    Raises:
        UserError: on an unknown name or option, other channels than 1 or 3, or if its weights cannot be had.
    """
    import torchvision

    name = wanted.place
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise UserError(f"unknown model 'torchvision:{name}'{nearest(name, names)}")
    if wanted.in_channels not in (None, 1, 3):
        raise UserError(f"torchvision:{name} takes 3 channels, the images have {wanted.in_channels}")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    options: dict[str, Any] = dict(wanted.options)
    if name in ("googlenet", "inception_v3"):
        options.setdefault("init_weights", True)  # else a warning about a default that will change
    if wanted.num_classes is not None and not wanted.pretrained:
        options["num_classes"] = wanted.num_classes
    try:
        module = torchvision.models.get_model(name, weights=weights if wanted.pretrained else None, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"torchvision:{name}: {error}") from error
    except OSError as error:
        raise UserError(f"torchvision:{name}: its weights cannot be had ({error}); give a file as `weights`") from error
    seen = weights.transforms()
    native = (options.get("image_size", seen.crop_size[0]),) * 2
    pixels = InputSpec(native if hasattr(module, "image_size") else None, tuple(seen.mean), tuple(seen.std))
    if wanted.pretrained and wanted.num_classes is not None:
        refit(module, wanted.num_classes, blank(module, pixels, native))
    return Built(module, pixels, native)


def refit(module: nn.Module, num_classes: int, image: Any) -> None:
    """Replace the last layer by a new one, unless it has that many outputs."""
    path = roles.find(module, image).modules["classifier"]
    old = module.get_submodule(path)
    new: nn.Module
    if isinstance(old, nn.Linear):
        if old.out_features == num_classes:
            return
        new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    else:
        assert isinstance(old, nn.Conv2d)
        if old.out_channels == num_classes:
            return
        new = nn.Conv2d(old.in_channels, num_classes, 1, bias=old.bias is not None)
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, new)
