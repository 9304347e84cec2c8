# SPDX-License-Identifier: Apache-2.0
"""What the heads of this folder have in common: a backbone by name with maps of one stride, and a second head."""

from typing import Any, final

from torch import Tensor, nn

from tutelage.core import Tap
from tutelage.core.error import UserError, nearest
from tutelage.models.detectors.pyramid import TINY, Tiny
from tutelage.models.segmenters.scores import Scores

STAGES = 4  # of a backbone, at most: its last ones


def conv(width_in: int, width: int, size: int) -> nn.Sequential:
    """Return a convolution that keeps the size of the map, a batch norm and a rectifier."""
    layer = nn.Conv2d(width_in, width, size, padding=size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(width), nn.ReLU())


@final
class Body(nn.Module):
    """A backbone whose last maps all have one stride.

    Args:
        name: of timm, with or without `timm:`; or `tiny16`, `tiny32x2` (width, blocks a stage).
        output_stride: of the last map, 8, 16 or 32.
        in_channels: of the images.
        pretrained: with timm's own weights.

    Raises:
        UserError: if there is no such backbone, it does not give maps of this stride, or its weights cannot be had.
    """

    def __init__(self, name: str, output_stride: int, in_channels: int, pretrained: bool) -> None:
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise UserError(f"output_stride is 8, 16 or 32, not {output_stride}")
        self.network: Any
        if (match := TINY.fullmatch(name)) is not None:
            if pretrained or in_channels != 3:
                raise UserError(f"backbone {name!r} comes without weights, and for images of 3 channels")
            self.network = Tiny(int(match[1]), int(match[2] or 1), {8: 2, 16: 3, 32: 4}[output_stride])
            self.widths: list[int] = self.network.widths
        else:
            self.network = _timm(name.removeprefix("timm:"), output_stride, in_channels, pretrained)
            self.widths = list(self.network.feature_info.channels())[-STAGES:]
        self.channels_last = str(getattr(self.network, "output_fmt", "")).endswith("NHWC")

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the maps of the last stages, the deepest last."""
        found = self.network(pixels)[-len(self.widths) :]
        return [one.permute(0, 3, 1, 2).contiguous() for one in found] if self.channels_last else list(found)


def _timm(name: str, output_stride: int, in_channels: int, pretrained: bool) -> nn.Module:
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise UserError(f"unknown backbone 'timm:{name}'{nearest(name.partition('.')[0], timm.list_models())}")
    stride = {} if output_stride == 32 else {"output_stride": output_stride}
    try:
        network: nn.Module = timm.create_model(
            name, features_only=True, in_chans=in_channels, pretrained=pretrained, **stride
        )
    except OSError as error:
        raise UserError(f"backbone timm:{name}: its weights cannot be had ({error})") from error
    except (RuntimeError, AttributeError, TypeError, AssertionError, NotImplementedError, ValueError) as error:
        raise UserError(f"backbone timm:{name} gives no maps of stride {output_stride}: {error}") from error
    info: Any = network.feature_info
    if max(info.reduction()) > output_stride:
        raise UserError(f"backbone timm:{name} gives no maps of stride {output_stride}; try output_stride: 32")
    return network


def second_head(body: Body, num_classes: int, dropout: float) -> nn.Module | None:
    """Return a head on the last map but one, for a loss in training; None where there is no such map."""
    if len(body.widths) < 2:
        return None
    width = max(body.widths[-2] // 4, 8)
    return nn.Sequential(conv(body.widths[-2], width, 3), nn.Dropout2d(dropout), nn.Conv2d(width, num_classes, 1))


class Headed(nn.Module):
    """A backbone, whatever a head makes of its last map, and class scores.

    A head makes `backbone`, `classifier` and `auxiliary`, one place for taps a stage as `stages`, and says in `mapped`
    what the scores are made from, which comes out of its `bottleneck`.
    """

    backbone: Body
    classifier: nn.Module
    auxiliary: nn.Module | None
    stages: nn.ModuleList

    def mapped(self, deepest: Tensor) -> Tensor:
        """Return the map that the scores are made from."""
        raise NotImplementedError

    def forward(self, pixels: Tensor) -> Tensor | Scores:
        """Return `[B, K, h, w]` scores at the output stride; in training with those of the second head."""
        maps = [stage(found) for stage, found in zip(self.stages, self.backbone(pixels), strict=True)]
        logits: Tensor = self.classifier(self.mapped(maps[-1]))
        if self.training and self.auxiliary is not None:
            return Scores(logits, self.auxiliary(maps[-2]))
        return logits

    @property
    def places(self) -> dict[str, Tap]:
        """Taps by role: `map` is what the scores are made from."""
        stages = {f"stages[{number}]": Tap(f"stages.{number}") for number in range(len(self.stages))}
        return {**stages, "map": Tap("bottleneck")}

    @property
    def lent(self) -> dict[str, str]:
        """Paths of modules by role."""
        return {"classifier": "classifier"}
