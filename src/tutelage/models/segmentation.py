# SPDX-License-Identifier: Apache-2.0
"""Segmenters: this library's, torchvision's, transformers', PSPNet over any backbone of timm, or a user's function.

All answer with class scores at the resolution of their head; the task enlarges them. torchvision's and UPerNet's
own forwards enlarge too, and Mask2Former gives masks by query: here their parts are called instead, and the module
itself stays as its library made it. `tutelage:NAME` finds NAME in a table `ARCHITECTURES` of a file of `segmenters/`.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.core import InputSpec, Model, Tap
from tutelage.core.error import UserError, nearest
from tutelage.models import weights
from tutelage.models.own import MEAN, STD
from tutelage.models.segmenters.scores import Scores
from tutelage.models.source import Built, Wanted, by_channels, listed

#: Words of a mapping that are not the constructor's.
WORDS = ("model", "weights", "roles", "input", "num_classes", "in_channels", "class_names", "head", "outputs")
#: What may stand on a backbone of timm.
DECODERS = ("deeplabv3", "pspnet")
SMALLEST = torch.finfo(torch.float32).tiny


def load(kind: str, place: str, given: Mapping[str, Any], facts: Mapping[str, Any], seed: int | None = None) -> Model:
    """Return a segmenter with its roles.

    - `stages[i]`: maps of the backbone; `map`: what the scores are made from, before any dropout
    - `blocks[i]`, `patch_embed[i]`: tokens of SegFormer's blocks over all stages, and of what begins each stage;
      `patch_embed[i].pre`: what that is given
    - `classifier`: the module that gives the scores

    Args:
        kind: `tutelage`, `timm` (a backbone, under a PSPNet or a DeepLabV3), `torchvision`, `hf` or `python`.
        place: what stands after the colon.
        given: the mapping of a recipe: `weights`, `head: fresh`, `roles`, `input`, `outputs` (the model gives
            scores of more classes than the data has, and so many of them count, the first ones) and options of the
            constructor.
        facts: of the data: `num_classes`, `in_channels`, `class_names`.
        seed: of the initial weights; None draws them from torch's generator.

    Raises:
        UserError: if the model cannot be had.
        OtherClassesError: if its weights are for other classes, and its head is not to start anew.

    Example:
        >>> facts = {"num_classes": 5, "in_channels": 3}
        >>> model = load("tutelage", "pspnet", {"backbone": "tiny8", "width": 16}, facts, seed=0)
        >>> _ = model.module.eval()
        >>> model(torch.zeros(2, 3, 64, 64)).shape, model.roles["map"].where
        (torch.Size([2, 5, 8, 8]), 'bottleneck')
    """
    wanted = Wanted(
        place,
        facts.get("num_classes"),
        facts.get("in_channels"),
        tuple(facts.get("class_names") or ()),
        given.get("weights") == "pretrained",
        {word: value for word, value in given.items() if word not in WORDS},
    )
    fresh = given.get("head") == "fresh"
    if seed is None:
        built, taps, lent = _build(kind, wanted, fresh)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            built, taps, lent = _build(kind, wanted, fresh)
    file = given.get("weights")
    if file is not None and not wanted.pretrained:
        state = weights.read(file)
        weights.fit(built.module, state, file, num_classes=wanted.num_classes, fresh_head=fresh)
    said = {role: Tap.parse(tap) for role, tap in (given.get("roles") or {}).items()}
    lent |= {role: tap.where for role, tap in said.items() if role == "classifier"}
    named = {role: tap for role, tap in said.items() if role != "classifier"}
    call = built.call
    if given.get("outputs") is not None:
        call = partial(first_outputs, call=call, outputs=_outputs(given["outputs"], wanted))
    return Model(
        built.module, {**taps, **named}, lent, _pixels(built.input, given.get("input")), built.class_names, call
    )


def _outputs(given: Any, wanted: Wanted) -> int:
    if not isinstance(given, int) or not 0 < given <= (wanted.num_classes or given):
        raise UserError(f"outputs counts the first classes of a model with {wanted.num_classes}, not {given!r}")
    return given


def _pixels(found: InputSpec | None, given: Mapping[str, Any] | None) -> InputSpec | None:
    """Return what pixels a model wants, with what a recipe says of it."""
    words = [part.name for part in fields(InputSpec)]
    for word in given or {}:
        if word not in words:
            raise UserError(f"input.{word} is not known{nearest(str(word), words)}")
    if not given:
        return found
    said: dict[str, Any] = {word: tuple(v) if isinstance(v, list) else v for word, v in given.items()}
    if isinstance(said.get("size"), int):
        said["size"] = (said["size"], said["size"])
    known = {word: getattr(found, word) for word in words} if found is not None else {}
    return InputSpec(**{**known, **said})


# --- how they are called ---------------------------------------------------------------------------------


def first_outputs(module: nn.Module, inputs: Tensor, *, call: Callable[..., Any] | None, outputs: int) -> Tensor:
    """Return the scores of the first classes alone."""
    found = call(module, inputs) if call else module(inputs)
    logits: Tensor = found if isinstance(found, Tensor) else found.logits
    return logits[:, :outputs]


def call_torchvision(module: Any, inputs: Tensor) -> Tensor | Scores:
    """Return the scores of a model of torchvision before it enlarges them; in training those of its second head too."""
    maps = module.backbone(inputs)
    head = module.classifier
    # the light head takes two of the maps, the others the last
    logits: Tensor = head(maps) if "low" in maps else head(maps["out"])
    second = getattr(module, "aux_classifier", None)
    return Scores(logits, second(maps["aux"])) if module.training and second is not None else logits


def call_transformers(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return the scores of a segmenter of transformers."""
    logits: Tensor = module(pixel_values=inputs).logits
    return logits


def call_upernet(module: Any, inputs: Tensor) -> Tensor | Scores:
    """Return the scores of UPerNet before it enlarges them; in training those of its second head too."""
    maps = module.backbone(inputs).feature_maps
    logits: Tensor = module.decode_head(maps)
    second = module.auxiliary_head
    return Scores(logits, second(maps)) if module.training and second is not None else logits


def call_mask2former(module: nn.Module, inputs: Tensor) -> Any:
    """Return class scores of Mask2Former by pixel; in training with the loss of its own.

    A pixel's score for a class is the logarithm of the sum over queries of the query's probability of the class
    times the probability that the pixel is in its mask: what the model is evaluated by, as logits.
    """
    from tutelage.models.segmenters.mask2former import Queries

    found = module(pixel_values=inputs, output_auxiliary_logits=True)
    classes, masks = found.class_queries_logits, found.masks_queries_logits
    shares = torch.einsum("bqk,bqhw->bkhw", classes.float().softmax(-1)[..., :-1], masks.float().sigmoid())
    logits = shares.clamp(min=SMALLEST).log()
    if not module.training:
        return logits
    return Queries(logits, module, classes, masks, found.auxiliary_logits)


# --- sources ---------------------------------------------------------------------------------------------

Places = tuple[Built, dict[str, Tap], dict[str, str]]


def _build(kind: str, wanted: Wanted, fresh: bool) -> Places:
    if kind == "torchvision":
        return _torchvision(wanted, fresh)
    if kind == "hf":
        return _transformers(wanted, fresh)
    if kind == "python":
        from tutelage.models.python import build

        made = build(wanted)
        return made, {}, {}
    return _own(kind, wanted)


def _own(kind: str, wanted: Wanted) -> Places:
    """Return a network of this library; a backbone of timm stands under a PSPNet, or what `decoder` names."""
    known: dict[str, Any] = {"num_classes": wanted.num_classes or 21, "in_channels": wanted.in_channels or 3}
    mean, std = (MEAN, STD) if known["in_channels"] == 3 else (by_channels((0.5,), known["in_channels"]),) * 2
    name, table = wanted.place, listed("segmenters")
    options = dict(wanted.options)
    if kind == "timm":
        known |= {"backbone": f"timm:{name}", "pretrained": wanted.pretrained}
        decoder = str(options.pop("decoder", "pspnet"))
        if decoder not in DECODERS:
            raise UserError(f"timm:{name}: decoder {decoder!r} is not known{nearest(decoder, DECODERS)}")
        make: Callable[..., nn.Module] = table[decoder]
    elif name not in table:
        raise UserError(f"unknown segmenter 'tutelage:{name}'{nearest(name, table)}")
    elif wanted.pretrained:
        raise UserError(f"tutelage:{name} comes without weights: give a file as `weights`")
    else:
        make = table[name]
    try:
        module: Any = make(**known, **options)
    except UserError as error:
        raise UserError(f"{kind}:{name}: {error}") from error
    except TypeError as error:
        raise UserError(f"{kind}:{name}: {error}") from error
    body: Any = getattr(getattr(module, "backbone", None), "network", None)
    if body is not None and hasattr(body, "pretrained_cfg"):
        seen = body.pretrained_cfg
        mean, std = (by_channels(seen.get(word, (0.5,) * 3), known["in_channels"]) for word in ("mean", "std"))
    return Built(module, InputSpec(None, mean, std, known["in_channels"])), dict(module.places), dict(module.lent)


def _require_classes(source: str, known: int, wanted: Wanted, fresh: bool) -> None:
    """Refuse weights for other classes, whose head would be a random one.

    Raises:
        OtherClassesError: naming both numbers.
    """
    if not fresh and wanted.num_classes not in (None, known):
        raise weights.OtherClassesError(
            f"weights: {source} are for {known} classes, and {wanted.num_classes} are wanted; "
            "`head: fresh` keeps the rest and starts the last layer anew"
        )


def _torchvision(wanted: Wanted, fresh: bool) -> Places:
    import torchvision

    name = wanted.place
    home = torchvision.models.segmentation
    names = torchvision.models.list_models(module=home)
    if name not in names:
        raise UserError(f"unknown segmenter 'torchvision:{name}'{nearest(name, names)}")
    if wanted.in_channels not in (None, 1, 3):
        raise UserError(f"torchvision:{name} takes 3 channels, the images have {wanted.in_channels}")
    published = torchvision.models.get_model_weights(name).DEFAULT
    # without `weights_backbone` torchvision would fetch those of the backbone
    options: dict[str, Any] = {"weights_backbone": None, **wanted.options}
    if not name.startswith("lraspp"):
        options.setdefault("aux_loss", True)
    if wanted.pretrained:
        _require_classes(f"torchvision:{name}", len(published.meta["categories"]), wanted, fresh)
    else:
        options["num_classes"] = wanted.num_classes
    try:
        module = torchvision.models.get_model(name, weights=published if wanted.pretrained else None, **options)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"torchvision:{name}: {error}") from error
    except OSError as error:
        raise UserError(f"torchvision:{name}: its weights cannot be had ({error}); give a file as `weights`") from error
    if wanted.pretrained and wanted.num_classes is not None:
        _other_classes(module, wanted.num_classes)
    seen = published.transforms()
    return (
        Built(module, InputSpec(None, tuple(seen.mean), tuple(seen.std)), call=call_torchvision),
        _torchvision_taps(module, name),
        {"classifier": "classifier.high_classifier" if name.startswith("lraspp") else "classifier.4"},
    )


def _other_classes(module: nn.Module, num_classes: int) -> None:
    """Replace the last layers of all heads by new ones, unless they have that many outputs."""
    last = {"classifier.4", "aux_classifier.4", "classifier.low_classifier", "classifier.high_classifier"}
    for path in sorted(last & dict(module.named_modules()).keys()):
        old = module.get_submodule(path)
        assert isinstance(old, nn.Conv2d)
        if old.out_channels != num_classes:
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, nn.Conv2d(old.in_channels, num_classes, 1))


def _torchvision_taps(module: Any, name: str) -> dict[str, Tap]:
    children = [path for path, _ in module.backbone.named_children()]
    if name.startswith("lraspp"):
        ends = [path for path, role in module.backbone.return_layers.items() if role in ("low", "high")]
    elif "layer4" in children:
        ends = [f"layer{number}" for number in (1, 2, 3, 4)]
    else:  # MobileNetV3: where the second head looks, and the last
        ends = [path for path, role in module.backbone.return_layers.items() if role in ("aux", "out")]
        ends = sorted(ends, key=children.index)
    stages = {f"stages[{number}]": Tap(f"backbone.{end}") for number, end in enumerate(ends)}
    before = {"lraspp": "classifier.cbr", "fcn": "classifier.2", "deeplabv3": "classifier.3"}
    return {**stages, "map": Tap(before[name.partition("_")[0]])}


def _transformers(wanted: Wanted, fresh: bool) -> Places:
    try:
        from transformers import (
            AutoConfig,
            AutoModelForSemanticSegmentation,
            AutoModelForUniversalSegmentation,
        )
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES as SEMANTIC,
        )
    except ImportError as error:
        raise UserError("hf: models need transformers: pip install 'tutelage[hf]'") from error
    from tutelage.models.transformers import _labels, describe

    name, folder = wanted.place, Path(wanted.place)
    kinds = [*SEMANTIC, "mask2former"]
    here = folder.is_dir()
    if not here and not wanted.pretrained and name not in kinds:
        hint = "; `weights: pretrained` fetches it from the hub" if "/" in name else nearest(name, kinds)
        raise UserError(f"'hf:{name}' is neither a folder nor a type of segmenter{hint}")
    options: dict[str, Any] = {**wanted.options}
    if wanted.num_classes is not None:
        options |= _labels(wanted)
    whole = wanted.pretrained or any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    if isinstance(backbone := options.get("backbone_config"), Mapping):
        options["backbone_config"] = _backbone_config(backbone)
    try:
        if here or wanted.pretrained:
            config: Any = AutoConfig.from_pretrained(name, local_files_only=here)
        else:
            config = AutoConfig.for_model(name, **options)
        if config.model_type not in kinds:
            raise UserError(f"hf:{name}: {config.model_type} is no segmenter known here{nearest(name, kinds)}")
        auto = (
            AutoModelForUniversalSegmentation
            if config.model_type == "mask2former"
            else (AutoModelForSemanticSegmentation)
        )
        if whole:
            _require_classes(f"hf:{name}", config.num_labels, wanted, fresh)
            module = auto.from_pretrained(name, ignore_mismatched_sizes=fresh, local_files_only=here, **options)
        else:
            module = auto.from_config(AutoConfig.from_pretrained(name, **options) if here else config)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"hf:{name}: {str(error).splitlines()[0]}") from error
    module.eval()
    seen = describe(module, name if whole else None, here)
    pixels = seen.input
    if pixels is not None:
        pixels = InputSpec(None, pixels.mean, pixels.std, pixels.channels)
    call = {"upernet": call_upernet, "mask2former": call_mask2former}.get(config.model_type, call_transformers)
    taps, lent = _transformers_places(module, config.model_type)
    return Built(module, pixels, call=call, class_names=seen.class_names), taps, lent


def _backbone_config(given: Mapping[str, Any]) -> Any:
    """Return the configuration of a backbone written as a mapping with `model_type`."""
    from transformers import AutoConfig

    options = dict(given)
    if "model_type" not in options:
        raise UserError("backbone_config needs model_type, such as swin")
    try:
        return AutoConfig.for_model(options.pop("model_type"), **options)
    except (ValueError, TypeError) as error:
        raise UserError(f"backbone_config: {str(error).splitlines()[0]}") from error


def _transformers_places(module: Any, kind: str) -> tuple[dict[str, Tap], dict[str, str]]:
    taps: dict[str, Tap] = {}
    if kind == "segformer":
        blocks = 0
        for number, stage in enumerate(module.segformer.stages):
            path = f"segformer.stages.{number}"
            taps[f"stages[{number}]"] = Tap(path)
            taps[f"patch_embed[{number}]"] = Tap(f"{path}.patch_embeddings", key=0, layout="tokens")
            taps[f"patch_embed[{number}].pre"] = Tap(f"{path}.patch_embeddings", "input")
            for inner in range(len(stage.blocks)):
                taps[f"blocks[{blocks}]"] = Tap(f"{path}.blocks.{inner}", layout="tokens")
                blocks += 1
        return {**taps, "map": Tap("decode_head.activation")}, {"classifier": "decode_head.classifier"}
    if kind == "upernet":
        for number in range(len(module.decode_head.lateral_convs)):
            taps[f"stages[{number}]"] = Tap(f"decode_head.lateral_convs.{number}", "input")
        taps[f"stages[{len(taps)}]"] = Tap("decode_head.psp_modules", "input")
        return {**taps, "map": Tap("decode_head.fpn_bottleneck")}, {"classifier": "decode_head.classifier"}
    if kind == "mask2former":
        home = "model.pixel_level_module.decoder"
        decoder = module.get_submodule(home)
        # laterals take the finest maps, projections the others from the coarsest on
        levels = [f"{home}.{path}" for path, _ in decoder.named_modules() if path in _laterals(decoder)]
        levels += [f"{home}.input_projections.{number}" for number in range(len(decoder.input_projections))][::-1]
        taps = {f"stages[{number}]": Tap(path, "input") for number, path in enumerate(levels)}
        return {**taps, "map": Tap(f"{home}.mask_projection")}, {"classifier": "class_predictor"}
    return taps, {}


def _laterals(decoder: nn.Module) -> list[str]:
    return [path for path, _ in decoder.named_children() if path.startswith("adapter_")]
