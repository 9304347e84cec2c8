# SPDX-License-Identifier: Apache-2.0
"""The maps of a backbone of timm, for a head on top of them."""

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor, nn

from tutelage.core.error import UserError, nearest


@final
class TimmMaps(nn.Module):
    """A backbone of timm that gives a map for each of its stages.

    Args:
        name: of timm.
        pretrained: with timm's own weights.
        in_channels: of the images.
        options: of its constructor.

    Raises:
        UserError: on an unknown name or option, or if the model has no maps.
    """

    def __init__(
        self, name: str, *, pretrained: bool = False, in_channels: int = 3, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        import timm

        if not timm.is_model(name.partition(".")[0]):
            raise UserError(f"unknown model 'timm:{name}'{nearest(name.partition('.')[0], timm.list_models())}")
        try:
            self.maps = timm.create_model(
                name, pretrained=pretrained, in_chans=in_channels, features_only=True, **(options or {})
            )
        except (TypeError, RuntimeError, ValueError, AssertionError, AttributeError) as error:
            raise UserError(f"timm:{name}: {error}") from error
        except OSError as error:
            raise UserError(f"timm:{name}: its weights cannot be had ({error}); give a file as `backbone`") from error
        self.channels: tuple[int, ...] = tuple(self.maps.feature_info.channels())

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return maps `[B, C, h, w]`, the smallest last."""
        found = self.maps(x)
        return [
            one if one.shape[1] == width else one.permute(0, 3, 1, 2)
            for one, width in zip(found, self.channels, strict=True)
        ]
