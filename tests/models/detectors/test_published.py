# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with the names and shapes of mmdetection 2, written down here by hand for a ResNet-18 and small heads."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from tutelage.core.error import UserError
from tutelage.models.detectors.exact import ExactAnchors, ExactRegions
from tutelage.models.detectors.published import is_mmdetection
from tutelage.models.detectors.pyramid import Pyramid
from tutelage.models.load import load, rebuild

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]
CLASSES, WIDTH = 3, 32


# --- names and shapes -------------------------------------------------------------------------------------------


def conv(name: str, out: int, into: int, size: int, *, bias: bool = True) -> Named:
    yield f"{name}.weight", (out, into, size, size)
    if bias:
        yield f"{name}.bias", (out,)


def norm(name: str, width: int, *, batch: bool = True) -> Named:
    for part in ("weight", "bias", *(("running_mean", "running_var") if batch else ())):
        yield f"{name}.{part}", (width,)
    if batch:
        yield f"{name}.num_batches_tracked", ()


def module(name: str, out: int, into: int, size: int, kind: str | None = None) -> Named:
    """A convolution with its norm, which takes the place of its bias."""
    yield from conv(f"{name}.conv", out, into, size, bias=kind is None)
    if kind is not None:
        yield from norm(f"{name}.{kind}", out, batch=kind == "bn")


def resnet(home: str = "backbone") -> Named:
    yield from conv(f"{home}.conv1", 64, 3, 7, bias=False)
    yield from norm(f"{home}.bn1", 64)
    into = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in (0, 1):
            name = f"{home}.layer{stage}.{block}"
            yield from conv(f"{name}.conv1", width, into, 3, bias=False)
            yield from norm(f"{name}.bn1", width)
            yield from conv(f"{name}.conv2", width, width, 3, bias=False)
            yield from norm(f"{name}.bn2", width)
            if into != width:
                yield from conv(f"{name}.downsample.0", width, into, 1, bias=False)
                yield from norm(f"{name}.downsample.1", width)
            into = width


def neck(first: int, further: int = 0, kind: str | None = None) -> Named:
    widths = (64, 128, 256, 512)[first:]
    for number, width in enumerate(widths):
        yield from module(f"neck.lateral_convs.{number}", WIDTH, width, 1, kind)
        yield from module(f"neck.fpn_convs.{number}", WIDTH, WIDTH, 3, kind)
    for number in range(2 if further else 0):
        into = further if number == 0 else WIDTH
        yield from module(f"neck.fpn_convs.{len(widths) + number}", WIDTH, into, 3, kind)


def towers(names: tuple[str, ...], depth: int, kind: str | None, home: str = "bbox_head", more: int = 0) -> Named:
    for name in names:
        for number in range(depth):
            into = WIDTH + (more if number == 0 and name == "mask" else 0)
            yield from module(f"{home}.{name}_convs.{number}", WIDTH, into, 3, kind)


def retinanet() -> Named:
    yield from resnet()
    yield from neck(1, 512)
    yield from towers(("cls", "reg"), 4, None)
    yield from conv("bbox_head.retina_cls", 9 * CLASSES, WIDTH, 3)
    yield from conv("bbox_head.retina_reg", 9 * 4, WIDTH, 3)


def fcos() -> Named:
    yield from resnet()
    yield from neck(1, WIDTH)
    yield from towers(("cls", "reg"), 4, "gn")
    yield from conv("bbox_head.conv_cls", CLASSES, WIDTH, 3)
    yield from conv("bbox_head.conv_reg", 4, WIDTH, 3)
    yield from conv("bbox_head.conv_centerness", 1, WIDTH, 3)
    yield from ((f"bbox_head.scales.{level}.scale", ()) for level in range(5))


def gfl() -> Named:
    yield from resnet()
    yield from neck(1, WIDTH)
    yield from towers(("cls", "reg"), 4, "gn")
    yield from conv("bbox_head.gfl_cls", CLASSES, WIDTH, 3)
    yield from conv("bbox_head.gfl_reg", 4 * 17, WIDTH, 3)
    yield from ((f"bbox_head.scales.{level}.scale", ()) for level in range(5))
    yield "bbox_head.integral.project", (17,)


def reppoints() -> Named:
    yield from resnet()
    yield from neck(1, 512, "gn")
    yield from towers(("cls", "reg"), 3, "gn")
    yield from conv("bbox_head.reppoints_cls_conv", WIDTH, WIDTH, 3, bias=False)
    yield from conv("bbox_head.reppoints_cls_out", CLASSES, WIDTH, 1)
    yield from conv("bbox_head.reppoints_pts_init_conv", WIDTH, WIDTH, 3)
    yield from conv("bbox_head.reppoints_pts_init_out", 18, WIDTH, 1)
    yield from conv("bbox_head.reppoints_pts_refine_conv", WIDTH, WIDTH, 3, bias=False)
    yield from conv("bbox_head.reppoints_pts_refine_out", 18, WIDTH, 1)
    yield "bbox_head.moment_transfer", (2,)


def solo() -> Named:
    yield from resnet()
    yield from neck(0)
    yield from towers(("mask", "cls"), 7, "gn", "mask_head", 2)
    for level, grid in enumerate((40, 36, 24, 16, 12)):
        yield from conv(f"mask_head.conv_mask_list.{level}", grid * grid, WIDTH, 1)
    yield from conv("mask_head.conv_cls", CLASSES, WIDTH, 3)


def region(home: str, boxes: int) -> Named:
    yield f"{home}.shared_fcs.0.weight", (16, WIDTH * 49)
    yield f"{home}.shared_fcs.0.bias", (16,)
    yield f"{home}.shared_fcs.1.weight", (16, 16)
    yield f"{home}.shared_fcs.1.bias", (16,)
    yield f"{home}.fc_cls.weight", (CLASSES + 1, 16)
    yield f"{home}.fc_cls.bias", (CLASSES + 1,)
    yield f"{home}.fc_reg.weight", (boxes, 16)
    yield f"{home}.fc_reg.bias", (boxes,)


def mask(home: str) -> Named:
    for number in range(4):
        yield from conv(f"{home}.convs.{number}.conv", WIDTH, WIDTH, 3)
    yield from conv(f"{home}.upsample", WIDTH, WIDTH, 2)
    yield from conv(f"{home}.conv_logits", CLASSES, WIDTH, 1)


def proposals() -> Named:
    yield from resnet()
    yield from neck(0)
    yield from conv("rpn_head.rpn_conv", WIDTH, WIDTH, 3)
    yield from conv("rpn_head.rpn_cls", 3, WIDTH, 1)
    yield from conv("rpn_head.rpn_reg", 12, WIDTH, 1)


def faster_rcnn() -> Named:
    yield from proposals()
    yield from region("roi_head.bbox_head", 4 * CLASSES)


def mask_rcnn() -> Named:
    yield from faster_rcnn()
    yield from mask("roi_head.mask_head")


def cascade_rcnn() -> Named:
    yield from proposals()
    for number in range(3):
        yield from region(f"roi_head.bbox_head.{number}", 4)


def cascade_mask_rcnn() -> Named:
    yield from cascade_rcnn()
    for number in range(3):
        yield from mask(f"roi_head.mask_head.{number}")


def csp(name: str, out: int, into: int, depth: int) -> Named:
    yield from module(f"{name}.main_conv", out // 2, into, 1, "bn")
    yield from module(f"{name}.short_conv", out // 2, into, 1, "bn")
    yield from module(f"{name}.final_conv", out, out, 1, "bn")
    for number in range(depth):
        yield from module(f"{name}.blocks.{number}.conv1", out // 2, out // 2, 1, "bn")
        yield from module(f"{name}.blocks.{number}.conv2", out // 2, out // 2, 3, "bn")


def yolox() -> Named:
    yield from module("backbone.stem.conv", 8, 12, 3, "bn")
    for stage, (out, depth) in enumerate(((16, 1), (32, 3), (64, 3), (128, 1)), start=1):
        yield from module(f"backbone.stage{stage}.0", out, out // 2, 3, "bn")
        if stage == 4:
            yield from module("backbone.stage4.1.conv1", out // 2, out, 1, "bn")
            yield from module("backbone.stage4.1.conv2", out, 2 * out, 1, "bn")
        yield from csp(f"backbone.stage{stage}.{2 if stage == 4 else 1}", out, out, depth)
    yield from module("neck.reduce_layers.0", 64, 128, 1, "bn")
    yield from module("neck.reduce_layers.1", 32, 64, 1, "bn")
    yield from csp("neck.top_down_blocks.0", 64, 128, 1)
    yield from csp("neck.top_down_blocks.1", 32, 64, 1)
    yield from module("neck.downsamples.0", 32, 32, 3, "bn")
    yield from module("neck.downsamples.1", 64, 64, 3, "bn")
    yield from csp("neck.bottom_up_blocks.0", 64, 64, 1)
    yield from csp("neck.bottom_up_blocks.1", 128, 128, 1)
    for level, width in enumerate((32, 64, 128)):
        yield from module(f"neck.out_convs.{level}", 32, width, 1, "bn")
        for side in ("cls", "reg"):
            for number in (0, 1):
                yield from module(f"bbox_head.multi_level_{side}_convs.{level}.{number}", 32, 32, 3, "bn")
        yield from conv(f"bbox_head.multi_level_conv_cls.{level}", CLASSES, 32, 1)
        yield from conv(f"bbox_head.multi_level_conv_reg.{level}", 4, 32, 1)
        yield from conv(f"bbox_head.multi_level_conv_obj.{level}", 1, 32, 1)


RESNET: dict[str, Any] = {"backbone": "torchvision:resnet18", "width": WIDTH}
SMALL: dict[str, Any] = {**RESNET, "head_width": 16}
KINDS: dict[str, tuple[Callable[[], Named], dict[str, Any]]] = {
    "retinanet": (retinanet, RESNET),
    "fcos": (fcos, RESNET),
    "gfl": (gfl, RESNET),
    "reppoints": (reppoints, RESNET),
    "solo": (solo, {**RESNET, "hidden": WIDTH}),
    "faster_rcnn": (faster_rcnn, SMALL),
    "mask_rcnn": (mask_rcnn, SMALL),
    "cascade_rcnn": (cascade_rcnn, SMALL),
    "cascade_mask_rcnn": (cascade_mask_rcnn, SMALL),
    "yolox": (yolox, {"depth": 0.33, "width": 0.125}),
}


def checkpoint(name: str) -> dict[str, Tensor]:
    """Weights of these names and shapes; each ends with a number that no other has."""
    draw, found = torch.Generator().manual_seed(0), {}
    for number, (key, shape) in enumerate(KINDS[name][0](), start=1):
        large = key.startswith("backbone") or max(shape, default=0) > 1000
        found[key] = torch.zeros(shape) if large else torch.randn(shape, generator=draw) * 0.02
        found[key].view(-1)[-1] = number * 1e-4
        if key.endswith("running_var"):
            found[key] = found[key] + 1
    return found


def loaded(name: str, file: Path, prefix: str = "", **more: Any) -> Any:
    state = checkpoint(name)
    torch.save({"meta": {"epoch": 12}, "state_dict": {prefix + key: value for key, value in state.items()}}, file)
    spec = {"model": f"tutelage:{name}", **KINDS[name][1], "weights": str(file), **more}
    return load(spec, task="detection", num_classes=CLASSES), state


@pytest.mark.parametrize("name", list(KINDS))
def test_every_weight_has_its_place(name: str, tmp_path: Path) -> None:
    model, state = loaded(name, tmp_path / "epoch_12.pth")
    own = model.module.state_dict()
    places = {value.view(-1)[-1].item(): key for key, value in own.items() if value.numel()}
    theirs = {key: value for key, value in state.items() if "num_batches" not in key and "integral" not in key}
    met = {places[value.view(-1)[-1].item()] for key, value in theirs.items() if "fc_cls" not in key}
    assert len(met) == len(theirs) - sum("fc_cls" in key for key in theirs)
    with torch.no_grad():
        answers = model.module.eval()(torch.rand(1, 3, 160, 160)).detections()
    assert all(value.isfinite().all() for value in answers[0].values())
    again = rebuild(model.source)  # as a run's student is: without those weights, with what they want
    again.module.load_state_dict(own)


def test_which_weight_lies_where(tmp_path: Path) -> None:
    model, state = loaded("retinanet", tmp_path / "a.pth")
    own = model.module.state_dict()
    for here, there in (
        ("backbone.body.layer2.0.downsample.1.running_mean", "backbone.layer2.0.downsample.1.running_mean"),
        ("backbone.fpn.inner_blocks.2.0.weight", "neck.lateral_convs.2.conv.weight"),
        ("backbone.fpn.extra_blocks.p6.weight", "neck.fpn_convs.3.conv.weight"),
        ("backbone.fpn.extra_blocks.p7.bias", "neck.fpn_convs.4.conv.bias"),
        ("head.regression_head.conv.3.0.weight", "bbox_head.reg_convs.3.conv.weight"),
    ):
        assert torch.equal(own[here], state[there]), here
    model, state = loaded("yolox", tmp_path / "b.pth")
    own = model.module.state_dict()
    for here, there in (
        ("backbone.backbone.dark5.2.conv2.conv.weight", "backbone.stage4.2.short_conv.conv.weight"),
        ("backbone.C3_n3.conv3.bn.bias", "neck.bottom_up_blocks.0.final_conv.bn.bias"),
        ("backbone.bu_conv1.conv.weight", "neck.downsamples.1.conv.weight"),
        ("head.obj_preds.2.bias", "bbox_head.multi_level_conv_obj.2.bias"),
    ):
        assert torch.equal(own[here], state[there]), here
    model, state = loaded("gfl", tmp_path / "c.pth")
    own = model.module.state_dict()
    assert torch.equal(own["head.box.1.weight"], state["bbox_head.reg_convs.3.gn.weight"])
    assert torch.equal(own["head.scales.4.weight"], state["bbox_head.scales.4.scale"])


def test_nothing_stands_first_here_and_last_there(tmp_path: Path) -> None:
    model, state = loaded("mask_rcnn", tmp_path / "a.pth")
    own = {key: value for key, value in model.module.state_dict().items() if "roi_heads" in key}
    scores, boxes = (own[f"roi_heads.box_predictor.{name}.weight"] for name in ("cls_score", "bbox_pred"))
    assert torch.equal(scores[0], state["roi_head.bbox_head.fc_cls.weight"][CLASSES])
    assert torch.equal(scores[1:], state["roi_head.bbox_head.fc_cls.weight"][:CLASSES])
    assert not boxes[:4].any()
    assert torch.equal(boxes[4:], state["roi_head.bbox_head.fc_reg.weight"])
    masks = own["roi_heads.mask_predictor.mask_fcn_logits.bias"]
    assert torch.equal(masks[1:], state["roi_head.mask_head.conv_logits.bias"])
    model, state = loaded("cascade_rcnn", tmp_path / "b.pth")
    last = model.module.further[1]
    assert torch.equal(last.box_predictor.bbox_pred.weight, state["roi_head.bbox_head.2.fc_reg.weight"])
    assert last.box_coder.weights == pytest.approx((1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067))


def test_a_distillers_checkpoint_holds_a_student(tmp_path: Path) -> None:
    model, state = loaded("retinanet", tmp_path / "a.pth", prefix="student.")
    found = model.module.head.classification_head.cls_logits.bias
    assert torch.equal(found, state["bbox_head.retina_cls.bias"])


def test_other_classes_want_a_fresh_head(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    loaded("faster_rcnn", file)
    spec = {"model": "tutelage:faster_rcnn", **SMALL, "weights": str(file)}
    with pytest.raises(UserError, match="are for other classes than the data's"):
        load(spec, task="detection", num_classes=2)
    load({**spec, "head": "fresh"}, task="detection", num_classes=2)


def test_options_that_are_said_hold(tmp_path: Path) -> None:
    model, _ = loaded("retinanet", tmp_path / "a.pth", exact=False)
    assert not isinstance(model.module.anchor_generator, ExactAnchors)
    assert not is_mmdetection(model.module.state_dict())


# --- what is otherwise there ------------------------------------------------------------------------------------


def test_anchors_are_not_rounded_and_lie_a_stride_apart() -> None:
    anchors = ExactAnchors([[10.0, 12.5]], [0.5, 2.0], [8])
    [found] = anchors([torch.zeros(1)], [torch.zeros(1, 1, 2, 3)])
    expected = []
    for row in range(2):
        for column in range(3):
            for ratio in (0.5, 2.0):
                for side in (10.0, 12.5):
                    wide, tall = side / ratio**0.5, side * ratio**0.5
                    x, y = 8 * column, 8 * row
                    expected.append([x - wide / 2, y - tall / 2, x + wide / 2, y + tall / 2])
    torch.testing.assert_close(found, torch.tensor(expected))


def test_regions_are_read_at_their_level_around_the_middles_of_pixels() -> None:
    maps = {str(level): torch.randn(2, 3, 64 // 2**level, 64 // 2**level) for level in range(3)}
    boxes = [
        torch.tensor([[3.0, 5.0, 60.5, 80.25], [0.0, 0.0, 200.0, 240.0]]),
        torch.tensor([[9.0, 9.0, 140.0, 130.0]]),
    ]
    pool = ExactRegions((4, 8, 16), 7)
    found = pool(maps, boxes)
    rows = [(0, boxes[0][0]), (0, boxes[0][1]), (1, boxes[1][0])]
    for number, (image, box) in enumerate(rows):
        side = float(((box[2] - box[0]) * (box[3] - box[1])) ** 0.5)
        level = 0 if side < 112 else 1 if side < 224 else 2
        own = maps[str(level)][image : image + 1]
        expected = roi_align(own, [box[None]], 7, 1 / 4 / 2**level, 0, aligned=True)
        torch.testing.assert_close(found[number], expected[0])
    assert pool(maps, [boxes[0][:0]] * 2).shape == (0, 3, 7, 7)


def test_what_stands_between_the_further_levels() -> None:
    options: dict[str, Any] = {"width": 16, "levels": (8, 16), "extra": "p6p7_backbone", "norm": "group"}
    pixels = torch.randn(2, 3, 64, 64)
    for between in ("relu", "nothing", "norm"):
        torch.manual_seed(0)
        pyramid = Pyramid("tiny8", between=between, **options).eval()
        *_, first, second = pyramid(pixels)
        further = pyramid.fpn.extra_blocks
        coarse = pyramid.body(pixels)[pyramid.places[-1]]
        if between == "norm":
            expected = F.conv2d(coarse, further.p6[0].weight, stride=2, padding=1)
            torch.testing.assert_close(first, F.group_norm(expected, 16, further.p6[1].weight, further.p6[1].bias))
            assert [pyramid.roles("net")[f"fpn[{level}]"].where for level in (1, 2, 3)] == [
                "net.fpn.layer_blocks.1.0",
                "net.fpn.extra_blocks.p6.0",
                "net.fpn.extra_blocks.p7.0",
            ]
        else:
            torch.testing.assert_close(first, further.p6(coarse))
            torch.testing.assert_close(second, further.p7(first.relu() if between == "relu" else first))
    with pytest.raises(UserError, match="between: norm is the pyramid's, and it has none"):
        Pyramid("tiny8", between="norm")
    with pytest.raises(UserError, match="between 'norn' is not known; did you mean norm"):
        Pyramid("tiny8", between="norn")  # type: ignore[arg-type]


def test_the_stride_of_a_bottleneck_may_come_first() -> None:
    plain, first = (Pyramid("torchvision:resnet50", width=16, stride_first=way) for way in (False, True))
    block: Any = first.body.get_submodule("layer2.0")
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))
    other: Any = plain.body.get_submodule("layer2.0")
    assert (other.conv1.stride, other.conv2.stride) == ((1, 1), (2, 2))
    with pytest.raises(UserError, match="stride_first: backbone 'tiny8' has no bottlenecks"):
        Pyramid("tiny8", stride_first=True)


def test_the_first_form_of_fcos_tells_logarithms_of_pixels(tmp_path: Path) -> None:
    model, _ = loaded("fcos", tmp_path / "a.pth")
    net = model.module.eval()
    with torch.no_grad():
        pixels = torch.rand(1, 3, 160, 160)
        answers, maps = net(pixels), net.backbone(pixels)
        kinds, places = net.head.classification_head, net.head.regression_head
        start = 0
        for level, (one, stride) in enumerate(zip(maps, (8, 16, 32, 64, 128), strict=True)):
            far = (net.scales[level].weight * places.bbox_reg(places.conv(one))).exp()
            centred = places.bbox_ctrness(kinds.conv(one))
            rows = range(one.shape[2] * one.shape[3])
            for row in rows:
                y, x = divmod(row, one.shape[3])
                square = [x * stride, y * stride, (x + 1) * stride, (y + 1) * stride]  # its middle is the position
                assert answers.squares[start + row].tolist() == square
                torch.testing.assert_close(answers.distances[0, start + row] * stride, far[0, :, y, x])
                torch.testing.assert_close(answers.centreness[0, start + row], centred[0, 0, y, x])
            start += len(rows)
