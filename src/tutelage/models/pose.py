# SPDX-License-Identifier: Apache-2.0
"""Pose models: RTMPose in five sizes, its head on a backbone of timm, an ONNX file, or a user's function.

`tutelage:NAME` finds NAME in a table `ARCHITECTURES` of a file of `poses/`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tutelage.core import InputSpec, Model, Tap
from tutelage.core.error import UserError, nearest
from tutelage.core.model import Outputs
from tutelage.models import weights
from tutelage.models.own import MEAN, STD
from tutelage.models.poses.published import renamed
from tutelage.models.poses.rtmpose import RTMPose
from tutelage.models.poses.timm import TimmMaps
from tutelage.models.source import Wanted, by_channels, listed

#: Words of a mapping that are not the constructor's.
WORDS = ("model", "weights", "backbone", "roles", "input", "num_classes", "in_channels", "class_names", "head")
#: Words of the head.
HEAD = ("split", "hidden", "s", "expansion", "kernel")


def load(kind: str, place: str, given: Mapping[str, Any], facts: Mapping[str, Any], seed: int | None = None) -> Model:
    """Return a pose model with its roles.

    - `stages[i]`, `map`: maps of the backbone; `head`: the module; `logits.x`, `logits.y`: of both axes
    - a call gives `(x [B, K, Wx], y [B, K, Wy])`, raw logits

    Args:
        kind: `tutelage`, `timm` or `python`.
        place: `rtmpose_t`, `_s`, `_m`, `_l`, `_x` or `onnx`; a backbone's name; a file and its function, called with
            `num_keypoints` and `image_size`.
        given: the mapping of a recipe: `weights` (of all of it), `backbone` (a file with weights of the backbone
            alone), `roles`, `input` and options of the constructor.
        facts: of the data: `num_keypoints`, `image_size` (height, width), `in_channels`.
        seed: of the initial weights; None draws them from torch's generator.

    Raises:
        UserError: if the model cannot be had, or was made for other keypoints.

    Example:
        >>> facts = {"num_keypoints": 17, "image_size": (64, 64), "in_channels": 3}
        >>> model = load("tutelage", "rtmpose_t", {"widen": 0.125}, facts, seed=0)
        >>> [tuple(one.shape) for one in model(torch.zeros(2, 3, 64, 64))]
        [(2, 17, 128), (2, 17, 128)]
    """
    size = facts.get("image_size")
    if size is None or not facts.get("num_keypoints"):
        raise UserError(f"model '{kind}:{place}': the head needs the crops' size and the number of keypoints")
    options = {word: value for word, value in given.items() if word not in WORDS}
    channels = facts.get("in_channels") or 3
    known = {"num_keypoints": facts["num_keypoints"], "image_size": (int(size[0]), int(size[1]))}
    if seed is None:
        module = _build(kind, place, given, known, channels, options)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            module = _build(kind, place, given, known, channels, options)
    if given.get("backbone") is not None:
        _fit_backbone(module, given["backbone"])
    file = given.get("weights")
    if file not in (None, "pretrained"):
        _fit(module, file, facts["num_keypoints"])
    mean, std = (MEAN, STD) if channels == 3 else (by_channels((0.5,), channels),) * 2
    said = {word: tuple(v) if isinstance(v, list) else v for word, v in (given.get("input") or {}).items()}
    words: dict[str, Any] = {"mean": mean, "std": std, "channels": channels, **said}
    try:
        pixels = InputSpec(**words)
    except TypeError:
        raise UserError(f"model '{kind}:{place}': input knows size, mean, std, channels and bgr") from None
    taps = {**_roles(module), **{role: Tap.parse(tap) for role, tap in (given.get("roles") or {}).items()}}
    lent = {name: name for name, _ in module.named_children() if name in ("backbone", "head")}
    # weights of the backbone alone are first weights: a run's student is built without them
    kept = {word: value for word, value in given.items() if word not in ("weights", "backbone")}
    outputs = Outputs(("simcc_x", "simcc_y"))
    return Model(module, taps, lent, pixels, source={"model": kept}, outputs=outputs)


def _build(
    kind: str, place: str, given: Mapping[str, Any], known: Mapping[str, Any], channels: int, options: dict[str, Any]
) -> nn.Module:
    pretrained = given.get("weights") == "pretrained"
    if kind == "timm":
        head = {word: options.pop(word) for word in HEAD if word in options}
        return RTMPose(
            TimmMaps(place, pretrained=pretrained, in_channels=channels, options=options),
            **known,
            in_channels=channels,
            **head,
        )
    if pretrained:
        raise UserError(f"'{kind}:{place}' comes without weights: give a file as `weights`")
    if kind == "python":
        from tutelage.models.python import build

        return build(Wanted(place, options={**known, **options})).module
    if kind != "tutelage":
        raise UserError(f"model '{kind}:{place}' is no pose model: tutelage:, timm: (a backbone), python: and run: are")
    found = listed("poses")
    if place not in found:
        raise UserError(f"unknown pose model 'tutelage:{place}'{nearest(place, found)}")
    make: Callable[..., nn.Module] = found[place]
    try:
        return make(**known, in_channels=channels, **options)
    except TypeError as error:
        raise UserError(f"tutelage:{place}: {error}") from error


def _fit(module: nn.Module, file: Any, num_keypoints: int) -> None:
    """Load a checkpoint; one for other keypoints is named."""
    state = renamed(weights.read(file))
    last = state.get("head.final_layer.weight")
    if last is not None and len(last) != num_keypoints:
        raise UserError(
            f"weights: {file} are for {len(last)} keypoints, and the data has {num_keypoints}; "
            "`backbone: FILE` takes the backbone alone"
        )
    weights.fit(module, state, file)


def _fit_backbone(module: nn.Module, file: Any) -> None:
    state = renamed(weights.read(file))
    own = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    weights.fit(module.get_submodule("backbone"), own or state, file)


def _roles(module: nn.Module) -> dict[str, Tap]:
    if not isinstance(module, RTMPose):
        return {}
    logits = {"logits.x": Tap("head.cls_x"), "logits.y": Tap("head.cls_y")}
    if isinstance(module.backbone, TimmMaps):
        count = len(module.backbone.channels)
        stages = {f"stages[{number}]": Tap("backbone", key=number) for number in range(count)}
        return {**stages, "map": Tap("backbone", key=count - 1), **logits}
    names = sorted(name for name, _ in module.backbone.named_children() if name.startswith("stage"))
    stages = {f"stages[{number}]": Tap(f"backbone.{name}") for number, name in enumerate(names)}
    return {"stem": Tap("backbone.stem"), **stages, "map": Tap(f"backbone.{names[-1]}"), **logits}
