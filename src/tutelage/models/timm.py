# SPDX-License-Identifier: Apache-2.0
"""Models of timm, with what it says of them: stages, prefix tokens, classifier, normalization.

A distilled transformer (`deit_*_distilled_*`) has two heads; its output is the mean of both, also in
training, unless its `set_distilled_training` is switched on.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import nn

from tutelage.core import InputSpec
from tutelage.core.error import UserError, nearest
from tutelage.models.source import Built, Wanted, by_channels


def build(wanted: Wanted) -> Built:
    """Return a model of timm.

    Raises:
        UserError: on an unknown name or option, or if its weights cannot be had.
    """
    import timm

    name = wanted.place
    hosted = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if hosted and not name.startswith("local-dir:") and not wanted.pretrained:
        raise UserError(f"timm:{name} lies on the hub; `weights: pretrained` fetches it from there")
    if not hosted and not timm.is_model(name.partition(".")[0]):
        raise UserError(f"unknown model 'timm:{name}'{nearest(name.partition('.')[0], timm.list_models())}")
    options = dict(wanted.options)
    if wanted.num_classes is not None:
        options["num_classes"] = wanted.num_classes
    if wanted.in_channels is not None:
        options["in_chans"] = wanted.in_channels
    try:
        module = timm.create_model(name, pretrained=wanted.pretrained, **options)
    except (TypeError, RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"timm:{name}: {error}") from error
    except OSError as error:
        raise UserError(f"timm:{name}: its weights cannot be had ({error}); give a file as `weights`") from error
    built = describe(module, wanted.in_channels, options.get("img_size"))
    return replace(built, again=_again(module, options)) if hosted else built


def _again(module: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return how to build a model of the hub from timm alone."""
    known: dict[str, Any] = dict(getattr(module, "pretrained_cfg", None) or {})
    own = {word: value for word, value in options.items() if word not in ("num_classes", "in_chans")}
    place = f"timm:{known['architecture']}"
    return {"model": place, "num_classes": module.num_classes, **(known.get("model_args") or {}), **own}


def describe(module: nn.Module, in_channels: int | None = None, img_size: Any = None) -> Built:
    """Return what timm's metadata says of one of its models.

    Args:
        module: of timm.
        in_channels: of the images, if other than those of its configuration.
        img_size: it was built for, if other than that of its configuration.
    """
    known: dict[str, Any] = dict(getattr(module, "pretrained_cfg", None) or {})
    channels, *size = known.get("input_size", (3, 224, 224))
    channels = in_channels or channels
    built_for = (img_size, img_size) if isinstance(img_size, int) else img_size
    native = _grid(module) or tuple(built_for or size)
    fixed = bool(known.get("fixed_input_size"))
    mean, std = (by_channels(known.get(word, (0.5,) * 3), channels) for word in ("mean", "std"))
    classifier = known.get("classifier")
    return Built(
        module,
        InputSpec(native if fixed else None, mean, std, channels),
        size=native,
        prefix=getattr(module, "num_prefix_tokens", None),
        classifier=classifier[0] if isinstance(classifier, (tuple, list)) else classifier,
        stages=_stages(module),
        channels_last=str(getattr(module, "output_fmt", "")).endswith("NHWC"),
    )


def _grid(module: nn.Module) -> tuple[int, int] | None:
    """Return the image size a patch embedding was built for."""
    sizes = (getattr(part, "img_size", None) for part in module.modules())
    size = next((found for found in sizes if isinstance(found, (tuple, list))), None)
    return (int(size[0]), int(size[1])) if size else None


def _stages(module: nn.Module) -> list[str]:
    """Return the modules that end a stage, where timm names one for each of a growing row of strides."""
    found = getattr(module, "feature_info", None)
    if found is None:
        return []
    info = found.info if hasattr(found, "info") else found
    strides = [part.get("reduction", 0) for part in info]
    places = dict(module.named_modules())
    grows = all(a < b for a, b in pairwise(strides))
    return (
        [part["module"] for part in info]
        if grows and all(p.get("module") and p["module"] in places for p in info)
        else []
    )
