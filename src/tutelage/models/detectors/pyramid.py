# SPDX-License-Identifier: Apache-2.0
"""A backbone by name and the feature pyramid over it: what every detector of this folder stands on.

Names of parameters are torchvision's (`body`, `fpn.inner_blocks`, `fpn.layer_blocks`, `fpn.extra_blocks`), so that
published weights of its detectors fit.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from tutelage.core import Tap
from tutelage.core.error import UserError, nearest
from tutelage.models.detectors.deformable import deform
from tutelage.models.detectors.towers import Norm, normalization

#: What follows the levels of the pyramid: two strided convolutions (on its last map, or on the backbone's), one
#: subsampling, or nothing.
Extra = Literal["p6p7", "p6p7_backbone", "pool", "none"]
#: What stands between the two strided convolutions: a ReLU, nothing, or the pyramid's norm behind each of them.
Between = Literal["relu", "nothing", "norm"]
STRIDES = (4, 8, 16, 32)
TINY = re.compile(r"tiny(\d+)(?:x(\d+))?")


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, width, H / stride, W / stride]`."""
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


@final
class Tiny(nn.Module):
    """A small residual network for small pictures: maps of strides 4, 8, 16 and 32.

    Args:
        width: channels of the first stage; each stage has twice as many as the one before.
        depth: blocks a stage.
        stages: how many of the four there are.
    """

    def __init__(self, width: int = 16, depth: int = 1, stages: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.widths = [width * 2**number for number in range(stages)]
        self.ends = [f"layer{number + 1}" for number in range(stages)]
        for number, (before, own) in enumerate(pairwise([width, *self.widths])):
            blocks = [Block(before, own, 2), *(Block(own, own, 1) for _ in range(depth - 1))]
            setattr(self, self.ends[number], nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the map of each stage."""
        x, found = self.stem(x), []
        for name in self.ends:
            x = getattr(self, name)(x)
            found.append(x)
        return found


@final
class Rows(nn.ModuleDict):
    """The children of a network that run one after the other, up to the last map that is wanted.

    Args:
        network: of torchvision: a classifier whose children, or whose `features`, form a row.
        strides: of the wanted maps; those that it has none of are left out.
    """

    def __init__(self, network: nn.Module, strides: Sequence[int] = STRIDES) -> None:
        inner = getattr(network, "features", None)
        row = inner if isinstance(inner, nn.Sequential) else network
        ends: dict[int, tuple[str, int]] = {}
        image = torch.zeros(1, 3, 64, 64)
        was = row.training
        row.eval()
        with torch.no_grad():
            for name, child in row.named_children():
                try:
                    image = child(image)
                except (RuntimeError, NotImplementedError):
                    break  # the head, which takes no map
                if image.ndim != 4 or image.shape[-1] < 2:
                    break
                ends[64 // image.shape[-1]] = (name, image.shape[1])
        row.train(was)
        found = {stride: ends[stride] for stride in strides if stride in ends}
        self.strides = tuple(found)
        self.ends, self.widths = [name for name, _ in found.values()], [width for _, width in found.values()]
        names = [name for name, _ in row.named_children()]
        kept = names[: names.index(self.ends[-1]) + 1] if found else []
        super().__init__(OrderedDict((name, child) for name, child in row.named_children() if name in kept))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the wanted maps."""
        found = []
        for name, child in self.items():
            x = child(x)
            if name in self.ends:
                found.append(x)
        return found


class Further(LastLevelP6P7):
    """Two strided convolutions behind a pyramid.

    Args:
        width_in: channels of the map they follow.
        width: of the pyramid.
        between: see `Between`.
        layer: makes the norm.
    """

    def __init__(
        self, width_in: int, width: int, between: Between, layer: Callable[[int], nn.Module] | None = None
    ) -> None:
        super().__init__(width_in, width)
        self.between = between
        if between == "norm" and layer is not None:
            self.p6, self.p7 = (
                nn.Sequential(nn.Conv2d(own, width, 3, 2, 1, bias=False), layer(width)) for own in (width_in, width)
            )

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Return the maps with two more."""
        first = self.p6(p[-1] if self.use_P5 else c[-1])
        second = self.p7(F.relu(first) if self.between == "relu" else first)
        return [*p, first, second], [*names, "p6", "p7"]


@final
class Pyramid(nn.Module):
    """Backbone and feature pyramid: pixels to maps of one width, from the finest to the coarsest.

    Args:
        backbone: `tiny16`, `tiny32x2` (width, blocks a stage), `torchvision:NAME` or `timm:NAME`.
        width: channels of every map of the pyramid.
        levels: strides of the backbone's maps that the pyramid takes.
        extra: what follows the last of them; see `Extra`.
        between: what stands between the convolutions of `extra`; see `Between`.
        norm: `batch` or `group`: what normalises behind the pyramid's convolutions; nothing by default.
        pretrained: with the library's own weights of the backbone.
        frozen_norm: batch norms of the backbone are constants: neither statistics nor scales move.
        norm_eps: added to the variances in the backbone's batch norms; their own where None.
        frozen_stages: so many stages, the stem first, are not trained; 0 trains all.
        deformable: strides of the backbone's stages whose 3x3 convolutions learn where to look.
        stride_first: the first convolution of a bottleneck has its stride, and not the second: as in Caffe's networks.

    Attributes:
        strides: of the maps, by level.
        width: their channels.

    Raises:
        UserError: on an unknown backbone, stride or option, or if its weights cannot be had.

    Example:
        >>> pyramid = Pyramid("tiny8", width=16, levels=(8, 16, 32), extra="p6p7")
        >>> [tuple(one.shape[1:]) for one in pyramid(torch.zeros(1, 3, 128, 128))]
        [(16, 16, 16), (16, 8, 8), (16, 4, 4), (16, 2, 2), (16, 1, 1)]
        >>> pyramid.strides, list(pyramid.roles())[-1]
        ((8, 16, 32, 64, 128), 'fpn[4]')
    """

    def __init__(
        self,
        backbone: str = "tiny16",
        *,
        width: int = 256,
        levels: Sequence[int] = (8, 16, 32),
        extra: Extra = "p6p7",
        between: Between = "relu",
        norm: Norm | None = None,
        pretrained: bool = False,
        frozen_norm: bool = False,
        frozen_stages: int = 0,
        norm_eps: float | None = None,
        deformable: Sequence[int] = (),
        stride_first: bool = False,
    ) -> None:
        super().__init__()
        if extra not in get_args(Extra):
            raise UserError(f"extra {extra!r} is not known{nearest(str(extra), get_args(Extra))}")
        if between not in get_args(Between):
            raise UserError(f"between {between!r} is not known{nearest(str(between), get_args(Between))}")
        if between == "norm" and norm in (None, "none"):
            raise UserError("between: norm is the pyramid's, and it has none: give `norm`")
        body, strides, widths = _body(backbone, max(levels, default=0), pretrained)
        for stride in levels:
            if stride not in strides:
                raise UserError(f"backbone {backbone!r} has maps of strides {list(strides)}, none of {stride}")
        ends: Sequence[str] = getattr(body, "ends", ())
        for stride in deformable:
            if stride not in strides or not deform(body.get_submodule(ends[strides.index(stride)])):
                raise UserError(
                    f"deformable: backbone {backbone!r} has no 3x3 convolutions that end at stride {stride}"
                )
        if stride_first and not _strides_first(body):
            raise UserError(f"stride_first: backbone {backbone!r} has no bottlenecks of three convolutions")
        if list(levels) != sorted(set(levels)) or not levels:
            raise UserError(f"levels are strides in ascending order, not {list(levels)}")
        self.body, self.width = body, width
        self.places = [strides.index(stride) for stride in levels]
        taken = [widths[place] for place in self.places]
        more: nn.Module | None = None
        count = {"p6p7": 2, "p6p7_backbone": 2, "pool": 1, "none": 0}[extra]
        layer = normalization(norm or "none", "norm")
        if count == 2:
            more = Further(width if extra == "p6p7" else taken[-1], width, between, layer)
            more.use_P5 = extra == "p6p7"
        elif count == 1:
            more = LastLevelMaxPool()
        self.normed = layer is not None
        self.fpn = FeaturePyramidNetwork(taken, width, more, layer)
        self.strides = (*levels, *(levels[-1] * 2**step for step in range(1, count + 1)))
        # taps stand on identities: some maps are made by no module of their own
        self.stages = nn.ModuleList([nn.Identity() for _ in strides])
        self.levels = nn.ModuleList([nn.Identity() for _ in self.strides])
        for part in self.body.modules():
            if isinstance(part, nn.BatchNorm2d) and norm_eps is not None:
                part.eps = norm_eps
        if frozen_norm:
            freeze_norms(self.body)
        if frozen_stages:
            _freeze(self.body, frozen_stages, backbone)

    def forward(self, pixels: Tensor, image_size: Tensor | None = None) -> list[Tensor]:
        """Return one `[B, width, H / stride, W / stride]` a level.

        Args:
            pixels: `[B, 3, H, W]`, normalised.
            image_size: `[B, 2]` height and width without padding; what is padded is set to 0, as published
                detectors see it.
        """
        if image_size is not None:
            pixels = blacked(pixels, image_size)
        maps = [stage(found) for stage, found in zip(self.stages, self.body(pixels), strict=True)]
        taken = OrderedDict((str(place), maps[place]) for place in self.places)
        return [level(found) for level, found in zip(self.levels, self.fpn(taken).values(), strict=True)]

    def roles(self, path: str = "backbone") -> dict[str, Tap]:
        """Return the taps `stages[i]` and `fpn[i]`, where the pyramid lies at a path of its model.

        Where a norm follows the pyramid's convolutions, `fpn[i]` lies before it.
        """
        found = {f"stages[{number}]": Tap(f"{path}.stages.{number}") for number in range(len(self.stages))}
        found["map"] = found[f"stages[{len(self.stages) - 1}]"]
        levels = {f"fpn[{number}]": Tap(f"{path}.levels.{number}") for number in range(len(self.levels))}
        if self.normed:
            blocks = range(len(self.places))
            levels |= {f"fpn[{number}]": Tap(f"{path}.fpn.layer_blocks.{number}.0") for number in blocks}
        if isinstance(getattr(self.fpn.extra_blocks, "p6", None), nn.Sequential):
            first = len(self.places)
            levels |= {f"fpn[{first + step}]": Tap(f"{path}.fpn.extra_blocks.p{6 + step}.0") for step in (0, 1)}
        return found | levels


def blacked(pixels: Tensor, image_size: Tensor) -> Tensor:
    """Return pixels that are 0 outside each image.

    Args:
        pixels: `[B, C, H, W]`.
        image_size: `[B, 2]` height and width without padding.

    Example:
        >>> blacked(torch.ones(1, 1, 2, 2), torch.tensor([[2, 1]])).tolist()
        [[[[1.0, 0.0], [1.0, 0.0]]]]
    """
    rows, columns = (
        torch.arange(side, device=pixels.device) < image_size[:, which, None]
        for which, side in enumerate(pixels.shape[-2:])
    )
    return pixels * (rows[:, None, :, None] & columns[:, None, None, :])


def freeze_norms(module: nn.Module) -> None:
    """Replace the batch norms within a module by constants with their statistics and scales."""
    from timm.layers import freeze_batch_norm_2d

    for name, child in module.named_children():
        frozen = freeze_batch_norm_2d(child)
        if frozen is not child:
            setattr(module, name, frozen)


def _body(name: str, coarsest: int, pretrained: bool) -> tuple[nn.Module, tuple[int, ...], list[int]]:
    """Return a backbone that gives a list of maps, their strides and widths."""
    kind, _, place = name.partition(":")
    if (match := TINY.fullmatch(name)) is not None:
        if pretrained:
            raise UserError(f"backbone {name!r} comes without weights")
        count = len([stride for stride in STRIDES if stride <= coarsest])
        tiny = Tiny(int(match[1]), int(match[2] or 1), max(count, 1))
        return tiny, STRIDES[: len(tiny.widths)], tiny.widths
    if kind == "torchvision" and place:
        return _torchvision(place, pretrained)
    if kind == "timm" and place:
        return _timm(place, pretrained)
    raise UserError(f"backbone {name!r} is not known: write timm:NAME, torchvision:NAME, or tiny16 (its width)")


def _torchvision(name: str, pretrained: bool) -> tuple[nn.Module, tuple[int, ...], list[int]]:
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise UserError(f"unknown backbone 'torchvision:{name}'{nearest(name, names)}")
    try:
        network = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
    except OSError as error:
        raise UserError(f"backbone torchvision:{name}: its weights cannot be had ({error})") from error
    rows = Rows(network)
    if not rows.strides:
        raise UserError(f"backbone torchvision:{name} gives no row of maps; a timm: backbone may")
    return rows, rows.strides, rows.widths


class _Maps(nn.Module):
    """A feature extractor of timm whose maps come with channels first."""

    def __init__(self, network: Any, channels_last: bool) -> None:
        super().__init__()
        self.network, self.channels_last = network, channels_last
        places = dict(network.named_modules())
        names = network.feature_info.module_name()
        self.ends = [f"network.{name if name in places else name.replace('.', '_')}" for name in names]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps."""
        found = self.network(x)
        return [one.permute(0, 3, 1, 2).contiguous() for one in found] if self.channels_last else list(found)


def _timm(name: str, pretrained: bool) -> tuple[nn.Module, tuple[int, ...], list[int]]:
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise UserError(f"unknown backbone 'timm:{name}'{nearest(name.partition('.')[0], timm.list_models())}")
    try:
        network: Any = timm.create_model(name, features_only=True, pretrained=pretrained)
        info = network.feature_info
        strides: list[int] = info.reduction()
        wanted = [number for number, stride in enumerate(strides) if stride in STRIDES]
        if wanted != [*range(len(strides))]:
            network = timm.create_model(name, features_only=True, pretrained=pretrained, out_indices=wanted)
            info = network.feature_info
    except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
        raise UserError(f"backbone timm:{name} gives no maps of several strides: {error}") from error
    except OSError as error:
        raise UserError(f"backbone timm:{name}: its weights cannot be had ({error})") from error
    channels_last = str(getattr(network, "output_fmt", "")).endswith("NHWC")
    return _Maps(network, channels_last), tuple(info.reduction()), list(info.channels())


def _strides_first(body: nn.Module) -> int:
    """Give the stride of each bottleneck to its first convolution; return how many bottlenecks there are."""
    count = 0
    for part in body.modules():
        first, second = (getattr(part, name, None) for name in ("conv1", "conv2"))
        if isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d) and hasattr(part, "conv3"):
            first.stride, second.stride = second.stride, first.stride
            count += 1
    return count


def _freeze(body: nn.Module, stages: int, name: str) -> None:
    """Freeze the first stages with everything before them, in the order in which it is registered."""
    ends: Any = body.ends
    if not 0 < stages <= len(ends):
        raise UserError(f"frozen_stages: backbone {name!r} has {len(ends)} stages, not {stages}")
    parameters = list(body.named_parameters())
    end = f"{ends[stages - 1]}."
    inside = [number for number, (path, _) in enumerate(parameters) if path.startswith(end)]
    if not inside:
        raise UserError(f"frozen_stages: backbone {name!r} does not say which of its layers are a stage")
    for _, parameter in parameters[: inside[-1] + 1]:
        parameter.requires_grad_(False)
