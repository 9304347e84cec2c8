# SPDX-License-Identifier: Apache-2.0
"""Changes of images by name, each a function of the images and of one key a sample.

A step takes `[B, C, H, W]` (uint8, or float in [0, 1]) and keys `[B]`, and treats each row by its own key:
the same row comes out whatever the batch it is in.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core.error import UserError, nearest
from tutelage.data.photometric import HSV, Blur, MedianBlur, moves_of
from tutelage.data.samples import to_unit
from tutelage.functional.noise import keys, uniform

Step = Callable[[Tensor, Tensor], Tensor]
Size = tuple[int, int]
TRIES = 10  # rectangles drawn before the largest centred one is taken


@final
@dataclass(frozen=True)
class Pipeline:
    """Steps in order; each draws from keys of its own."""

    steps: tuple[Step, ...]

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        """Return the changed images."""
        if not len(images):  # not every operation takes an empty batch
            return images
        for number, step in enumerate(self.steps):
            images = step(images, keys(number, view))
        return images


# --- geometry --------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Resize:
    """Resize to (height, width), or the shorter side to a number; bilinear, antialiased."""

    size: int | Size

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        """Return the resized images."""
        return resized(images, self.size)


@final
@dataclass(frozen=True)
class CenterCrop:
    """Cut the middle out; smaller images are an error."""

    size: int | Size

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        """Return the middle of the images."""
        height, width = pair(self.size)
        top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
        if top < 0 or left < 0:
            raise UserError(
                f"augment.center_crop: {height}x{width} does not fit into images of "
                f"{images.shape[-2]}x{images.shape[-1]}; resize first"
            )
        return images[..., top : top + height, left : left + width]


@final
@dataclass(frozen=True)
class RandomResizedCrop:
    """Cut a rectangle of random area and shape and resize it (Szegedy et al., CVPR 2015).

    Args:
        size: of the result.
        scale: smallest and largest share of the area.
        ratio: smallest and largest width over height, drawn evenly on a logarithmic scale.
    """

    size: int | Size
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        """Return the resized rectangles."""
        rectangles = random_rectangles(images, view, self.scale, self.ratio, fallback=True)
        rows = [
            resized(images[row : row + 1, :, top : top + height, left : left + width], pair(self.size))
            for row, (top, left, height, width) in enumerate(rectangles.tolist())
        ]
        return torch.cat(rows)


@final
@dataclass(frozen=True)
class PadCrop:
    """Pad all sides and cut an image of the old size at a random place.

    Args:
        padding: pixels.
        mode: `constant` (black) or `reflect`.
    """

    padding: int = 4
    mode: str = "constant"

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        """Return the cut images."""
        _, _, height, width = images.shape
        around = self.padding
        padded = F.pad(images, (around,) * 4, mode=self.mode)
        place = (uniform(0, view, (2,)) * (2 * around + 1)).long()
        rows = place[:, :1] + torch.arange(height)
        columns = place[:, 1:] + torch.arange(width)
        batch = torch.arange(len(images))[:, None, None]
        # indexing puts the channels last
        return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@final
@dataclass(frozen=True)
class Flip:
    """Mirror left and right with a probability."""

    probability: float = 0.5

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        """Return the images, some mirrored."""
        mirrored = uniform(0, view) < self.probability
        return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


@final
@dataclass(frozen=True)
class Affine:
    """Rotate, move and scale a little; what comes in from outside is black.

    Args:
        degrees: largest rotation either way.
        translate: largest move either way, as a share of the side.
        scale: largest relative change of size either way.
    """

    degrees: float = 10.0
    translate: float = 0.1
    scale: float = 0.0

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        """Return the moved images, float in [0, 1]."""
        draw = uniform(0, view, (4,)) * 2 - 1
        angle = draw[:, 0] * math.radians(self.degrees)
        size = 1 + draw[:, 1] * self.scale
        cosine, sine = angle.cos() / size, angle.sin() / size
        _, _, height, width = images.shape
        # rows of the map from output to input places, which run from -1 to 1 on both axes
        move = draw[:, 2:] * 2 * self.translate
        theta = torch.stack(
            [
                torch.stack([cosine, sine * (height / width), move[:, 0]], dim=1),
                torch.stack([-sine * (width / height), cosine, move[:, 1]], dim=1),
            ],
            dim=1,
        )
        pixels = to_unit(images)
        grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
        return F.grid_sample(pixels, grid, align_corners=False)


@final
@dataclass(frozen=True)
class Erase:
    """Paint a rectangle over with a probability (Zhong et al., AAAI 2020).

    Args:
        probability: of a rectangle.
        scale: smallest and largest share of the area.
        ratio: smallest and largest width over height.
        value: its colour, in [0, 1].
    """

    probability: float = 0.25
    scale: tuple[float, float] = (0.02, 1 / 3)
    ratio: tuple[float, float] = (0.3, 3.3)
    value: float = 0.5

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        """Return the images, some with a rectangle painted over."""
        top, left, height, width = (
            side[:, None] for side in random_rectangles(images, view, self.scale, self.ratio, fallback=False).T
        )
        y, x = torch.arange(images.shape[-2]), torch.arange(images.shape[-1])
        inside = ((y >= top) & (y < top + height))[:, None, :, None] & ((x >= left) & (x < left + width))[:, None, None]
        inside &= (uniform(1, view) < self.probability)[:, None, None, None]
        value = round(self.value * 255) if images.dtype == torch.uint8 else self.value
        return images.masked_fill(inside, value)


# --- colour and policies: torchvision's, one sample at a time ---------------------------------------------


@final
class ByTorchvision:
    """A transform of torchvision, which draws from torch's generator: seeded by each sample's key.

    Args:
        transform: from one image `[C, H, W]` to one.
    """

    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        self.transform = transform

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        """Return the changed images."""
        with own_generator() as seed:
            changed = []
            for image, key in zip(images, view.tolist(), strict=True):
                seed(key)
                changed.append(self.transform(image))
        return torch.stack(changed)


def color_jitter(
    brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.0
) -> ByTorchvision:
    """Change brightness, contrast, saturation and hue by random factors."""
    from torchvision.transforms import v2

    return ByTorchvision(v2.ColorJitter(brightness, contrast, saturation, hue))


def hsv(hue: Any = HSV.hue, saturation: Any = HSV.saturation, value: Any = HSV.value) -> HSV:
    """Move hue, saturation and value: see `HSV`. The three moves may stand in one list, as in other tasks."""
    moves = moves_of(hue) if isinstance(hue, (list, tuple)) else None
    return HSV(*(moves or (hue, saturation, value)))


def rand_augment(num_ops: int = 2, magnitude: int = 9) -> ByTorchvision:
    """Apply some of fourteen changes at one strength (Cubuk et al., NeurIPS 2020)."""
    from torchvision.transforms import v2

    return ByTorchvision(v2.RandAugment(num_ops, magnitude))


def trivial_augment() -> ByTorchvision:
    """Apply one change at a random strength (Müller and Hutter, ICCV 2021)."""
    from torchvision.transforms import v2

    return ByTorchvision(v2.TrivialAugmentWide())


def auto_augment(policy: str = "cifar10") -> ByTorchvision:
    """Apply a learned policy: `cifar10`, `imagenet` or `svhn` (Cubuk et al., CVPR 2019)."""
    from torchvision.transforms import v2

    known = {one.value: one for one in v2.AutoAugmentPolicy}
    if policy not in known:
        raise UserError(f"augment.auto_augment: no policy {policy!r}{nearest(policy, known)}")
    return ByTorchvision(v2.AutoAugment(known[policy]))


@contextmanager
def own_generator() -> Iterator[Callable[[int], Any]]:
    """Yield a function that seeds torch's CPU generator; its state is given back afterwards."""
    before = torch.get_rng_state()
    try:
        yield torch.default_generator.manual_seed
    finally:
        torch.set_rng_state(before)


# --- shared ----------------------------------------------------------------------------------------------


def pair(size: int | Sequence[int]) -> Size:
    """Return (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def resized(images: Tensor, size: int | Size) -> Tensor:
    """Return images of (height, width), or with the shorter side so long."""
    from torchvision.transforms.v2 import functional

    whole = [size] if isinstance(size, int) else list(size)
    return functional.resize(images, whole, antialias=True)  # type: ignore[no-any-return]


def random_rectangles(
    images: Tensor, view: Tensor, scale: tuple[float, float], ratio: tuple[float, float], *, fallback: bool
) -> Tensor:
    """Return `[B, 4]` top, left, height, width: the first of ten drawn rectangles that fits.

    Where none fits: the largest centred one of a permitted shape, or, without `fallback`, an empty one.
    """
    height, width = images.shape[-2:]
    draw = uniform(0, view, (TRIES, 4))
    area = (scale[0] + draw[..., 0] * (scale[1] - scale[0])) * height * width
    shape = (math.log(ratio[0]) + draw[..., 1] * (math.log(ratio[1]) - math.log(ratio[0]))).exp()
    tall, wide = (area / shape).sqrt().round().long(), (area * shape).sqrt().round().long()
    fits = (tall > 0) & (wide > 0) & (tall <= height) & (wide <= width)
    first = fits.int().argmax(1, keepdim=True)
    tall, wide = tall.gather(1, first)[:, 0], wide.gather(1, first)[:, 0]
    place = draw[torch.arange(len(draw)), first[:, 0], 2:]
    top = (place[:, 0] * (height - tall + 1)).long()
    left = (place[:, 1] * (width - wide + 1)).long()
    found = torch.stack([top, left, tall, wide], dim=1)
    other = _centred(height, width, ratio) if fallback else (0, 0, 0, 0)
    return found.where(fits.any(1, keepdim=True), torch.tensor(other))


def _centred(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    tall, wide = height, width
    if width / height < ratio[0]:
        tall = round(width / ratio[0])
    elif width / height > ratio[1]:
        wide = round(height * ratio[1])
    return (height - tall) // 2, (width - wide) // 2, tall, wide


#: Steps by name: classes and functions whose arguments are the step's options.
STEPS: dict[str, Callable[..., Step]] = {
    "affine": Affine,
    "auto_augment": auto_augment,
    "blur": Blur,
    "center_crop": CenterCrop,
    "color_jitter": color_jitter,
    "erase": Erase,
    "flip": Flip,
    "hsv": hsv,
    "median_blur": MedianBlur,
    "pad_crop": PadCrop,
    "rand_augment": rand_augment,
    "random_resized_crop": RandomResizedCrop,
    "resize": Resize,
    "trivial_augment": trivial_augment,
}
#: What a single word stands for, in training.
PRESETS: dict[str, list[Any]] = {
    "none": [],
    "digits": ["affine"],
    "cifar": [{"pad_crop": 4}, "flip"],
    "imagenet": ["random_resized_crop", "flip"],
}
#: Steps whose size is the section's `image_size` where they name none.
SIZED = ("resize", "center_crop", "random_resized_crop")
CROPS = ("center_crop", "random_resized_crop")


def build(spec: Any, *, train: bool, size: int | Sequence[int] | None = None) -> Pipeline | None:
    """Return the steps of a recipe's `augment`, or None if there are none.

    - a word: a preset (`none`, `digits`, `cifar`, `imagenet`)
    - a list of steps for training: a name, or `{name: value}`, or `{name: {option: value}}`
    - a mapping `{train: ..., evaluation: ...}` of these

    With `size`, images that the steps do not crop to it are brought to it first: the shorter side is resized,
    the middle cut out. That alone is done in evaluation, unless the mapping says otherwise.

    Args:
        spec: as above, or None.
        train: for training; else for evaluation.
        size: of the images a model gets; None leaves it.

    Raises:
        UserError: on an unknown step or option, naming the nearest.

    Example:
        >>> crop = build([{"pad_crop": 2}, "flip"], train=True)
        >>> crop(torch.zeros(4, 3, 32, 32), torch.arange(4)).shape
        torch.Size([4, 3, 32, 32])
    """
    whole = None if size is None else pair(size)
    if isinstance(spec, Mapping):
        for word in spec:
            if word not in ("train", "evaluation"):
                raise UserError(
                    f"augment.{word} is not known: a mapping has `train` and `evaluation`; "
                    "steps are a list, [{pad_crop: 4}, flip]"
                )
        found = spec.get("train" if train else "evaluation")
    else:
        found = spec if train else None
    named = _listed(found)
    if whole is not None and not any(name in CROPS for name, _ in named):
        named = [
            ("resize", {"size": min(whole) if whole[0] == whole[1] else whole}),
            ("center_crop", {"size": whole}),
            *named,
        ]
    steps = tuple(_step(name, options, whole) for name, options in named)
    return Pipeline(steps) if steps else None


def _listed(found: Any) -> list[tuple[str, Any]]:
    """Return steps as pairs of name and options."""
    if found is None:
        return []
    if isinstance(found, str) and found in PRESETS:
        found = PRESETS[found]
    if not isinstance(found, (list, tuple)):
        raise UserError(f"augment: {found!r} is neither a list of steps nor a preset{nearest(str(found), PRESETS)}")
    named = []
    for step in found:
        if isinstance(step, Mapping) and len(step) == 1:
            named.append(next(iter(step.items())))
        elif isinstance(step, str):
            named.append((step, {}))
        else:
            raise UserError(f"augment: {step!r} is no step: write a name, or {{name: options}}")
    return named


def _step(name: str, given: Any, size: Size | None) -> Step:
    if name not in STEPS:
        raise UserError(f"augment: no step {name!r}{nearest(name, STEPS)}")
    make = STEPS[name]
    words = list(inspect.signature(make).parameters)
    if not isinstance(given, Mapping):
        if not words:
            raise UserError(f"augment.{name} takes no option")
        given = {words[0]: given}
    for word in given:
        if word not in words:
            raise UserError(f"augment.{name}.{word} is not known{nearest(str(word), words)}")
    options = {word: tuple(value) if isinstance(value, list) else value for word, value in given.items()}
    if name in SIZED and "size" not in options:
        if size is None:
            raise UserError(f"augment.{name} needs a size: give it, or data.image_size")
        options["size"] = size
    return make(**options)
