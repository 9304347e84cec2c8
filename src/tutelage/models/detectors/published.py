# SPDX-License-Identifier: Apache-2.0
"""Names of weights in checkpoints of mmdetection 2, as the detectors of this folder have them.

The names and what they stand for were taken from its documented models; no file of it is here. What its detectors do
otherwise than these, each file of this folder lists under `MMDETECTION` as the options that such a checkpoint wants.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

#: A pattern, and what stands in its place.
Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]
#: Beginnings of names that only such checkpoints have.
MARKS = ("neck.", "bbox_head.", "rpn_head.", "roi_head.", "mask_head.")
STUDENT = "student."  # before the names of checkpoints that FGD and MGD write
#: Of a tower's layers, each of so many modules: the convolution, its norm, a ReLU.
LAYERS = {"conv": 0, "gn": 1, "bn": 1}
#: Of YOLOX, whose backbone and neck have names of their own.
YOLOX: Rules = (
    (r"backbone\.stem\.", "backbone.backbone.stem."),
    (r"backbone\.stage(\d)\.", lambda m: f"backbone.backbone.dark{int(m[1]) + 1}."),
    (r"neck\.reduce_layers\.0\.", "backbone.lateral_conv0."),
    (r"neck\.reduce_layers\.1\.", "backbone.reduce_conv1."),
    (r"neck\.top_down_blocks\.0\.", "backbone.C3_p4."),
    (r"neck\.top_down_blocks\.1\.", "backbone.C3_p3."),
    (r"neck\.downsamples\.0\.", "backbone.bu_conv2."),
    (r"neck\.downsamples\.1\.", "backbone.bu_conv1."),
    (r"neck\.bottom_up_blocks\.0\.", "backbone.C3_n3."),
    (r"neck\.bottom_up_blocks\.1\.", "backbone.C3_n4."),
    (r"neck\.out_convs\.", "head.stems."),
    (r"bbox_head\.multi_level_(cls|reg)_convs\.", r"head.\1_convs."),
    (r"bbox_head\.multi_level_conv_(cls|reg|obj)\.", r"head.\1_preds."),
)
PARTS: Rules = (
    (r"\.main_conv\.", ".conv1."),
    (r"\.short_conv\.", ".conv2."),
    (r"\.final_conv\.", ".conv3."),
    (r"\.blocks\.", ".m."),
    (r"\.depthwise_conv\.", ".dconv."),
    (r"\.pointwise_conv\.", ".pconv."),
)
#: Of heads, as torchvision names them; towers apart.
HEADS: Rules = (
    (r"bbox_head\.(?:retina_cls|conv_cls)\.", "head.classification_head.cls_logits."),
    (r"bbox_head\.(?:retina_reg|conv_reg)\.", "head.regression_head.bbox_reg."),
    (r"bbox_head\.conv_centerness\.", "head.regression_head.bbox_ctrness."),
    (r"bbox_head\.gfl_(cls|reg)\.", lambda m: f"head.{'cls' if m[1] == 'cls' else 'box'}.3."),
    (r"bbox_head\.reppoints_pts_init_conv\.", "head.first.0."),
    (r"bbox_head\.reppoints_pts_init_out\.", "head.first.2."),
    (r"bbox_head\.reppoints_cls_conv\.", "head.cls_look."),
    (r"bbox_head\.reppoints_cls_out\.", "head.cls."),
    (r"bbox_head\.reppoints_pts_refine_conv\.", "head.box_look."),
    (r"bbox_head\.reppoints_pts_refine_out\.", "head.box."),
    (r"bbox_head\.moment_transfer$", "head.moment"),
    (r"mask_head\.conv_cls\.", "head.cls."),
    (r"mask_head\.conv_mask_list\.", "head.masks."),
    (r"rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
    (r"rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
    (r"rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
)
#: Of what looks at regions.
REGIONS: Rules = (
    (r"bbox_head\.shared_fcs\.(\d)\.", lambda m: f"box_head.fc{int(m[1]) + 6}."),
    (r"bbox_head\.fc_cls\.", "box_predictor.cls_score."),
    (r"bbox_head\.fc_reg\.", "box_predictor.bbox_pred."),
    (r"mask_head\.convs\.(\d)\.conv\.", r"mask_head.\1.0."),
    (r"mask_head\.upsample\.", "mask_predictor.conv5_mask."),
    (r"mask_head\.conv_logits\.", "mask_predictor.mask_fcn_logits."),
)
#: What a checkpoint may hold that is no weight of a detector.
LEFT_OUT = re.compile(r".*num_batches_tracked|bbox_head\.integral\.project|(?:ema_|backbone\.fc\.).*")


def is_mmdetection(state: Mapping[str, Tensor]) -> bool:
    """Return whether weights are named as in mmdetection 2, perhaps by a distiller that holds a student."""
    names = [key.removeprefix(STUDENT) for key in state]
    return any(key.startswith(MARKS) for key in names) and any(key.startswith("backbone.") for key in names)


def renamed(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint under the names of a detector, or of its own where none is known.

    - a class for nothing stands first here and last there
    - where there is one box for all classes, or no mask for nothing, what is missing is 0
    - convolutions before a norm have a bias in torchvision's towers: 0

    Args:
        state: of the checkpoint, by key.
        own: of the detector, by key.
    """
    root = "first." if any(key.startswith("first.") for key in own) else ""
    if any(key.startswith(STUDENT) for key in state):
        state = {key.removeprefix(STUDENT): value for key, value in state.items() if key.startswith(STUDENT)}
    rest = {key: value for key, value in state.items() if not LEFT_OUT.fullmatch(key)}
    yolox = any(key.startswith("backbone.backbone.dark2.") for key in own)
    names = {key: _yolox(key) if yolox else _name(key, own, root) for key in rest}
    found = {names[key]: _moved(names[key], value, own) for key, value in rest.items()}
    for key, value in own.items():
        if key.endswith(".bias") and key not in found and _bare(key, found):
            found[key] = torch.zeros_like(value)
    return found


def _bare(key: str, found: Mapping[str, Tensor]) -> bool:
    """Whether a bias belongs to a convolution that has none in a checkpoint: before a norm, or at displaced places."""
    tower = re.fullmatch(r"(head\.(?:classification|regression)_head\.conv)\.\d+\.bias", key)
    return (tower is not None or "_look." in key) and f"{key.removesuffix('bias')}weight" in found


def _replaced(key: str, rules: Rules) -> str | None:
    """Return a name by the first rule that fits its beginning, or None."""
    for pattern, to in rules:
        name, count = re.subn(rf"\A(?:{pattern})", to, key)
        if count:
            return name
    return None


def _yolox(key: str) -> str:
    name = _replaced(key, YOLOX) or key
    for pattern, to in PARTS:
        name = re.sub(pattern, to, name)
    return name


def _name(key: str, own: Mapping[str, Tensor], root: str) -> str:
    if key.startswith("backbone."):
        inner = (
            f"{root}backbone.body.network." if any(".body.network." in one for one in own) else f"{root}backbone.body."
        )
        return inner + key.removeprefix("backbone.").replace(".conv_offset.", ".offset.")
    if key.startswith("neck."):
        return _neck(key, own, root)
    regions = re.match(r"roi_head\.(bbox_head|mask_head)\.(?:(\d)\.)?", key)
    if regions is not None:
        inner = f"{regions[1]}.{key[regions.end() :]}"
        number = int(regions[2] or 0)
        home = f"{root}roi_heads." if number == 0 else f"further.{number - 1}."
        return home + (_replaced(inner, REGIONS) or inner)
    tower = re.match(r"(?:bbox|mask)_head\.(cls|reg|mask)_convs\.(\d+)\.(conv|gn|bn)\.(.*)", key)
    if tower is not None:
        return _tower(tower[1], int(tower[2]), tower[3], tower[4], own)
    scale = re.match(r"bbox_head\.scales\.(\d+)\.scale", key)
    if scale is not None:
        return f"{'head.' if any(one.startswith('head.scales.') for one in own) else ''}scales.{scale[1]}.weight"
    name = _replaced(key, HEADS)
    if name is None:
        return key
    return root + name if name.startswith("rpn.") else name


def _neck(key: str, own: Mapping[str, Tensor], root: str) -> str:
    place = re.match(r"neck\.(lateral_convs|fpn_convs)\.(\d+)\.(conv|gn|bn)\.(.*)", key)
    if place is None:
        return key
    home, number, layer = f"{root}backbone.fpn.", int(place[2]), LAYERS[place[3]]
    count = len({one.split(".inner_blocks.")[1].split(".")[0] for one in own if ".fpn.inner_blocks." in one})
    if place[1] == "lateral_convs":
        return f"{home}inner_blocks.{number}.{layer}.{place[4]}"
    if number < count:
        return f"{home}layer_blocks.{number}.{layer}.{place[4]}"
    further = f"{home}extra_blocks.p{6 + number - count}."
    return further + (f"{layer}.{place[4]}" if f"{further}0.weight" in own else place[4])


def _tower(side: str, number: int, part: str, rest: str, own: Mapping[str, Tensor]) -> str:
    """Return the name of a tower's layer: torchvision's, in a row of three modules a layer, or split before its end."""
    plain = {"cls": "head.classification_head.conv", "reg": "head.regression_head.conv"}.get(side, "")
    layer = LAYERS[part]
    if f"{plain}.0.0.weight" in own:
        return f"{plain}.{number}.{layer}.{rest}"
    if f"{plain}.0.weight" in own:
        return f"{plain}.{3 * number + layer}.{rest}"
    word = {"cls": "cls", "reg": "box", "mask": "mask"}[side]
    name = f"head.{word}_tower.{3 * number + layer}.{rest}"
    return name if name in own else f"head.{word}.{layer}.{rest}"


def _moved(name: str, value: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """Return a weight with the rows that a detector here has."""
    if "box_predictor.cls_score." in name:
        return torch.cat([value[-1:], value[:-1]])
    if name in own and value.ndim and len(own[name]) > len(value):
        more = {"box_predictor.bbox_pred.": 4, "mask_predictor.mask_fcn_logits.": 1}
        rows = next((count for part, count in more.items() if part in name), 0)
        return torch.cat([value.new_zeros(rows, *value.shape[1:]), value])
    return value
