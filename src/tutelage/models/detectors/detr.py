# SPDX-License-Identifier: Apache-2.0
"""Detectors of transformers: RT-DETR, D-FINE, Deformable DETR and their kin, which tell a set of boxes.

Their losses match boxes to queries, and some show the network noisy boxes to restore: they are given the targets when
gradients are wanted, and only then. What the loss is made of is kept until it is asked for, of all images or of some.

Reference: Carion et al., End-to-End Object Detection with Transformers, ECCV 2020.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tutelage.core import InputSpec, Tap
from tutelage.core.error import UserError, nearest
from tutelage.functional.precision import full_precision
from tutelage.models.detectors.dense import Targets, clipped, picked, top

#: Types that see which pixels are padding, and whose boxes are shares of the image without it.
MASKED = ("detr", "conditional_detr", "deformable_detr", "dab-detr", "table-transformer")
#: Types whose scores are a softmax with a last class for nothing; the others' are sigmoids.
SOFTMAX = ("detr", "table-transformer", "yolos")
#: Types that take pixels in [0, 1] as they are.
PLAIN = ("rt_detr", "rt_detr_v2", "d_fine")
IMAGENET = InputSpec(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
WHOLE = 4  # dimensions of the answers of all layers
#: Words by which a backbone is named, which a configuration turns into others.
BACKBONE = ("backbone", "use_timm_backbone", "use_pretrained_backbone", "backbone_kwargs")
#: Where the maps of several sizes go into encoder or decoder, whichever a type has.
MAPS = ("decoder_input_proj", "encoder_input_proj", "input_proj")
#: Where the one map goes in of those that see no other.
MAP = "input_projection"


@final
@dataclass(frozen=True)
class Asked:
    """What the network's own loss is called with: answers of the last layer and of those before it.

    Args:
        function: of transformers; its first answer is the loss.
        given: logits `[B, Q, K]`, targets, device, boxes, configuration, and the same of all layers: `[L, B, Q, ...]`,
            or `[B, L, Q, ...]` with more in `named`.
        named: more of this, of the queries with noise too.
    """

    function: Callable[..., Any]
    given: tuple[Any, ...]
    named: Mapping[str, Any]

    def rows(self, rows: Sequence[int]) -> "Asked":
        """Return the same of some images."""
        device = self.given[0].device
        place = torch.tensor(rows, device=device)
        layers = 0 if "enc_topk_logits" in self.named else 1  # where images stand in answers of all layers

        def some(part: Any) -> Any:
            if isinstance(part, Tensor):
                return part.index_select(layers if part.ndim == WHOLE else 0, place)
            if isinstance(part, list):
                return [part[row] for row in rows]
            return part

        named = {name: some(part) for name, part in self.named.items()}
        noise = named.get("denoising_meta_values")
        if noise is not None:
            own = noise["dn_positive_idx"]
            named["denoising_meta_values"] = {**noise, "dn_positive_idx": [own[row] for row in rows]}
        return Asked(self.function, tuple(map(some, self.given)), named)

    def loss(self) -> Tensor:
        """Return the loss, a mean over boxes."""
        found: Tensor = full_precision(self.function)(*self.given, **self.named)[0]
        return found


@final
@dataclass(frozen=True)
class Answers:
    """What the network said of a batch.

    Args:
        logits: `[B, Q, K]`, with a class for nothing where `softmax` is set.
        shares: `[B, Q, 4]` centre, width and height, as shares of `sides`.
        sides: `[B, 4]` width, height, width, height in pixels.
        image_size: `[B, 2]` height and width without padding.
        softmax: how logits become scores.
        asked: what the loss is made of, or None where no targets were given.
        most: boxes an image.
    """

    logits: Tensor
    shares: Tensor
    sides: Tensor
    image_size: Tensor
    softmax: bool
    asked: Asked | None
    most: int

    def rows(self, rows: Sequence[int]) -> "Answers":
        """Return the answers for some images."""
        place = torch.tensor(rows, device=self.logits.device)
        parts = {name: getattr(self, name)[place] for name in ("logits", "shares", "sides", "image_size")}
        return replace(self, asked=None if self.asked is None else self.asked.rows(rows), **parts)

    def losses(self, targets: Targets) -> dict[str, Tensor]:
        """Return the network's own loss: of classes, boxes and overlaps over all layers, as its type weighs them.

        Args:
            targets: those that the network was called with.

        Raises:
            UserError: if it was called without.
        """
        if self.asked is None:
            raise UserError("a detector of transformers is given its targets when it is called: pass targets=...")
        return {"matching": self.asked.loss()}

    def candidates_of(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes `[B, N, 4]`, scores and labels `[B, N]`, best first."""
        scores = self.logits.float()
        scores = scores.softmax(dim=2)[..., :-1] if self.softmax else scores.sigmoid()
        best, place, labels = top(scores, self.most, 0.0)
        shares = picked(self.shares.float(), place)
        half = shares[..., 2:] / 2
        boxes = torch.cat([shares[..., :2] - half, shares[..., :2] + half], dim=2) * self.sides[:, None]
        return clipped(boxes, self.image_size), best, labels

    def detections(self) -> list[dict[str, Tensor]]:
        """Return what was found in each image, best first, in the pixels of the batch."""
        rows = zip(*self.candidates_of(), strict=True)
        return [{"boxes": boxes, "scores": scores, "labels": labels} for boxes, scores, labels in rows]


@final
class Transformer(nn.Module):
    """A detector of transformers, called as the others are.

    Args:
        net: an `AutoModelForObjectDetection`.
        most: boxes an image.
    """

    #: it is called with the targets where gradients are wanted
    takes_targets = True

    def __init__(self, net: Any, most: int = 100) -> None:
        super().__init__()
        self.net, self.most = net, most
        self.kind = str(net.config.model_type)
        self.pixels = InputSpec() if self.kind in PLAIN else IMAGENET
        decoder = getattr(getattr(net, "model", None), "decoder", None)
        self.layers = [f"net.model.decoder.layers.{layer}" for layer in range(len(decoder.layers))] if decoder else []
        # with the targets some types are also asked to restore noisy boxes, by queries that stand before the others:
        # what the layers said is kept for the length of a forward and tapped behind the cut
        self.noisy = hasattr(net.config, "num_denoising")
        self.hidden = nn.ModuleList([nn.Identity() for _ in self.layers if self.noisy])
        self.kept: list[Tensor] = []
        for path in self.layers if self.noisy else ():
            self.get_submodule(path).register_forward_hook(self._keep)
        self.own_loss: Callable[..., Any] = net.loss_function
        self.asked: Asked | None = None
        net.loss_function = self._ask

    def _ask(self, *given: Any, **named: Any) -> tuple[Tensor, dict[str, Tensor], None]:
        """Keep what the loss is made of; return what the network expects of it."""
        self.asked = Asked(self.own_loss, given, named)
        return given[0].new_zeros(()), {}, None

    def _keep(self, module: nn.Module, given: Any, found: Any) -> None:
        self.kept.append(found if isinstance(found, Tensor) else found[0])

    def forward(self, pixels: Tensor, image_size: Tensor | None = None, targets: Targets | None = None) -> Answers:
        """Return the answers of all queries.

        Args:
            pixels: `[B, 3, H, W]`, as the type wants them.
            image_size: `[B, 2]` height and width without padding; without it nothing is padded.
            targets: what the loss holds the answers against.

        Raises:
            UserError: if a norm has a single position to look at.
        """
        whole = pixels.new_tensor(pixels.shape[-2:]).expand(len(pixels), 2)
        size = whole if image_size is None else image_size.to(pixels.dtype)
        sides = (size if self.kind in MASKED else whole).flip(1).repeat(1, 2)
        more: dict[str, Any] = {}
        if self.kind in MASKED:
            rows, columns = (
                torch.arange(side, device=pixels.device) < size[:, which, None]
                for which, side in enumerate(pixels.shape[-2:])
            )
            more["pixel_mask"] = (rows[:, :, None] & columns[:, None]).long()
        if targets is not None:
            more["labels"] = [
                {"class_labels": one["labels"], "boxes": _shares(one["boxes"], side)}
                for one, side in zip(targets, sides, strict=True)
            ]
        self.kept = []
        # of queries that score alike the first are chosen, as ONNX has it
        ordered = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        try:
            with _Ordered() if ordered else nullcontext():
                said = self.net(pixels, **more)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            height, width = pixels.shape[-2:]
            raise UserError(
                f"images of {width} x {height} are too small for hf:{self.kind}, whose coarsest map would be a single "
                "position: give larger ones"
            ) from error
        (kept, self.kept), (asked, self.asked) = (self.kept, []), (self.asked, None)
        extra = getattr(said, "denoising_meta_values", None)
        own = slice(int(extra["dn_num_split"][0]) if extra else 0, None)
        for place, one in zip(self.hidden, kept, strict=True):
            place(one[:, own])
        logits, shares = said.logits[:, own], said.pred_boxes[:, own]
        return Answers(logits, shares, sides, size, self.kind in SOFTMAX, asked, self.most)

    def roles(self) -> dict[str, Tap]:
        """Return the places of the maps and of the decoder's layers, where a type has any."""
        home, found = getattr(self.net, "model", None), {}
        maps = next((name for name in MAPS if isinstance(getattr(home, name, None), nn.ModuleList)), None)
        if maps is not None:
            for level in range(len(getattr(home, maps))):
                found[f"fpn[{level}]"] = Tap(f"net.model.{maps}.{level}")
        elif isinstance(getattr(home, MAP, None), nn.Conv2d):
            found["fpn[0]"] = Tap(f"net.model.{MAP}")
        for number, path in enumerate(self.layers):
            found[f"hidden[{number}]"] = Tap(f"hidden.{number}" if self.noisy else path)
        return found


class _Ordered(TorchFunctionMode):
    """Among equals the largest are those that come first, which `topk` does not promise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.topk, Tensor.topk):
            return func(*args, **(kwargs or {}))
        given = {**dict(zip(("input", "k", "dim"), args, strict=False)), **(kwargs or {})}
        values, count, dim = given["input"], given["k"], given.get("dim", -1)
        best, place = values.sort(dim=dim, descending=True, stable=True)
        return torch.return_types.topk((best.narrow(dim, 0, count), place.narrow(dim, 0, count)))


def _shares(boxes: Tensor, sides: Tensor) -> Tensor:
    """Return boxes as centre, width and height in shares of an image's sides."""
    edges = boxes / sides
    return torch.cat([(edges[:, :2] + edges[:, 2:]) / 2, edges[:, 2:] - edges[:, :2]], dim=1)


def build(
    place: str, options: Mapping[str, Any], num_classes: int | None, pretrained: bool, *, fresh: bool = False
) -> Transformer:
    """Return a detector of transformers; nothing is fetched unless `pretrained` asks for it.

    Args:
        place: a type (`rt_detr`, `d_fine`, `deformable_detr`, ...), a folder, or a name of the hub.
        options: of the configuration, and `most`.
        num_classes: K.
        pretrained: fetch weights by name.
        fresh: weights for other classes: what answers for classes starts anew.

    Raises:
        UserError: if transformers is not there, the type or an option is not known, or weights cannot be had.
    """
    try:
        from transformers import AutoConfig, AutoModelForObjectDetection
        from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES as TYPES
    except ImportError as error:
        raise UserError("hf: models need transformers: pip install 'tutelage[hf]'") from error
    given = dict(options)
    most = int(given.pop("most", 100))
    folder = Path(place)
    if not folder.is_dir() and not pretrained and place not in TYPES:
        hint = "; `weights: pretrained` fetches it from the hub" if "/" in place else nearest(place, TYPES)
        raise UserError(f"'hf:{place}' is neither a folder nor a type of detector{hint}")
    count = {} if num_classes is None else {"num_labels": num_classes}
    try:
        if pretrained or _whole(folder):
            more = {"ignore_mismatched_sizes": True} if fresh else {}
            net = AutoModelForObjectDetection.from_pretrained(
                place, local_files_only=folder.is_dir(), **(count if fresh else {}), **given, **more
            )
        else:
            net = AutoModelForObjectDetection.from_config(_configuration(AutoConfig, folder, place, {**count, **given}))
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"hf:{place}: {str(error).splitlines()[0]}") from error
    if num_classes is not None and net.config.num_labels != num_classes:
        raise UserError(
            f"hf:{place} tells {net.config.num_labels} classes apart, the data has {num_classes}; `head: fresh` keeps "
            "the rest and starts what answers for classes anew"
        )
    return Transformer(net, most)


def _configuration(auto: Any, folder: Path, place: str, options: Mapping[str, Any]) -> Any:
    if folder.is_dir():
        return auto.from_pretrained(folder, local_files_only=True, **options)
    valid: Sequence[str] = [*auto.for_model(place).to_dict(), "num_labels", *BACKBONE]
    for word in options:
        if word not in valid:
            raise ValueError(f"it has no option {word!r}{nearest(word, valid)}")
    known = {"use_pretrained_backbone": False} if "backbone" in options else {}
    return auto.for_model(place, **{**known, **options})


def _whole(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
