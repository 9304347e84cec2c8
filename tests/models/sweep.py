# SPDX-License-Identifier: Apache-2.0
"""Every network of timm and transformers by name, and what is wrong with its roles.

Networks are built on the meta device where they can be: shapes alone, no weights.
"""

import warnings
from collections.abc import Iterator
from math import gcd
from typing import Any
from zlib import crc32

import timm
import torch
from torch import Tensor, nn

from tutelage.core import Model
from tutelage.core.bridge import across
from tutelage.core.tap import Recorder
from tutelage.models import roles, transformers
from tutelage.models.roles import Roles
from tutelage.models.source import Built, Wanted
from tutelage.models.timm import describe

#: Networks whose constructor or forward reads numbers, which the meta device has not: built small.
SMALL: dict[str, dict[str, Any]] = {
    "hf:perceiver": {
        "num_latents": 8,
        "d_latents": 32,
        "d_model": 32,
        "num_blocks": 1,
        "num_self_attends_per_block": 1,
    },
    "backbone:lw_detr_vit": {
        **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64},
        "window_block_indices": [0],
    },
}
#: What a configuration needs beside its own defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "backbone:timm_backbone": {"backbone": "resnet18"},
    **{
        f"backbone:{name}": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}
        for name in ("convnext", "convnextv2")
    },
    "backbone:focalnet": {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 48], "embed_dim": 16},
}


def names() -> list[str]:
    """Return every network, in an order that a fixed key decides: `timm:`, `hf:` (classifiers), `backbone:`."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_BACKBONE_MAPPING_NAMES as BACKBONES,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
    )

    found = [f"timm:{name}" for name in timm.list_models()]
    found += [f"hf:{name}" for name in CLASSIFIERS] + [f"backbone:{name}" for name in BACKBONES]
    return sorted(found, key=lambda name: crc32(name.encode()))


def complaint(name: str) -> str:
    """Return what is wrong with a network's roles, or an empty string."""
    with torch.device("cpu" if name in SMALL else "meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            built = build(name)
            encoder = name.startswith("backbone:") or name.endswith("_enc")  # it gives maps or tokens, and no classes
            return "; ".join(complaints(built, *seen(built), classifies=not encoder))
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def build(name: str) -> Built:
    """Return a network of `names()`, without weights."""
    kind, _, place = name.partition(":")
    options = OPTIONS.get(name) or SMALL.get(name) or {}
    if kind == "timm":
        module = timm.create_model(place)
        return describe(module if module.num_classes else timm.create_model(place, num_classes=10))
    if kind == "hf":
        return transformers.build(Wanted(place, options=options))
    from transformers import AutoBackbone, AutoConfig

    return transformers.describe(AutoBackbone.from_config(AutoConfig.for_model(place, **options)), None, False)


def seen(built: Built) -> tuple[Roles, dict[str, Tensor]]:
    """Return the roles of a network, and what each of them reads."""
    assert built.input is not None
    device = next(built.module.parameters()).device
    images = torch.zeros(1, built.input.channels, *built.size, device=device)
    found = roles.find(
        built.module,
        images,
        call=built.call,
        prefix=built.prefix,
        classifier=built.classifier,
        stages=built.stages,
        channels_last=built.channels_last,
    )
    model = Model(built.module, found.taps, found.modules, call=built.call)
    recorder = Recorder(built.module.eval(), found.taps)
    with torch.no_grad(), recorder:
        model(images)
    recorder.close()
    return found, recorder.release()


def complaints(built: Built, found: Roles, taps: dict[str, Tensor], *, classifies: bool) -> Iterator[str]:
    """Yield what a network's roles lack, a line each."""
    if classifies and "classifier" not in found.modules:
        yield "no classifier"
    if classifies and "pooled" not in found.taps:
        yield "no pooled"
    if {"classifier", "pooled"} <= found.modules.keys() | found.taps.keys():
        head: Any = built.module.get_submodule(found.modules["classifier"])
        wanted = head.in_features if isinstance(head, nn.Linear) else getattr(head, "in_channels", None)
        if wanted is not None and taps["pooled"].shape != (1, wanted):
            yield f"pooled is {list(taps['pooled'].shape)}, and the classifier takes {wanted}"
    if not {"map", "tokens"} & found.taps.keys():
        yield "neither map nor tokens"
    yield from _bridges(built, taps)
    yield from _stages(built, taps)


def _bridges(built: Built, taps: dict[str, Tensor]) -> Iterator[str]:
    """Bridge to and from another network's map and tokens, whose grid has the image's proportions."""
    height, width = (3 * side // gcd(*built.size) for side in built.size)
    others = [(1, 24, height, width), *([(1, 36, 40)] if height == width else [])]
    for role in {"map", "tokens"} & taps.keys():
        own = taps[role]
        if own.ndim != (4 if role == "map" else 3):
            yield f"{role} is {list(own.shape)}"
            continue
        for shape in others:
            other = torch.zeros(shape, device=own.device)
            for one, goal in ((own, other), (other, own)):
                if (given := across(one, goal)(one).shape) != goal.shape:
                    yield f"a bridge from {list(one.shape)} to {list(goal.shape)} gives {list(given)}"


def _stages(built: Built, taps: dict[str, Tensor]) -> Iterator[str]:
    count = sum(1 for role in taps if role.startswith("stages[") and role.endswith("]"))
    maps = [taps[f"stages[{number}]"] for number in range(count)]
    if any(one.ndim != 4 for one in maps):
        yield f"stages are {[list(one.shape) for one in maps]}"
        return
    cells = [one.shape[2] * one.shape[3] for one in maps]
    if cells != sorted(cells, reverse=True):
        yield f"stages grow finer: {cells}"
    if "map" in taps and maps and maps[-1].shape != taps["map"].shape and not built.stages:
        yield f"the last stage is {list(maps[-1].shape)}, the map {list(taps['map'].shape)}"
