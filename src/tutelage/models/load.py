# SPDX-License-Identifier: Apache-2.0
"""Models by name: `kind:place`, or a mapping with options."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tutelage.core import InputSpec, Model, TextSpec
from tutelage.core.error import UserError, nearest
from tutelage.core.rebuild import repeated
from tutelage.core.task import DENSE
from tutelage.models import language, run, weights
from tutelage.models.adapt import adapt, blank
from tutelage.models.source import Built, Wanted

#: Kinds of models.
KINDS = ("hf", "python", "run", "timm", "torchvision", "tutelage")
#: Words of a mapping that are not the constructor's.
WORDS = ("model", "weights", "roles", "input", "num_classes", "in_channels", "class_names", "head")
#: Words about first weights alone: a model whose own weights are loaded is built without them.
FIRST = ("weights", "pretrained", "head")


def load(
    spec: str | Mapping[str, Any],
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: tuple[int, int] | None = None,
    class_names: Sequence[str] = (),
    text: TextSpec | None = None,
    task: str | None = None,
    geometry: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> Model:
    """Return a model with its roles.

    Args:
        spec: `tutelage:NAME`, `timm:NAME`, `torchvision:NAME`, `hf:NAME_OR_PATH`, `python:FILE.py:FUNCTION`
            or `run:FOLDER`; or a mapping with `model`, `weights` (null, `pretrained` or a file), `roles`
            (places by role), `input` (size, mean, std, channels, bgr), `head: fresh` (weights of a file for
            another number of classes: the last layer starts anew) and options of the constructor.
        num_classes: K, where the mapping does not say; None is the constructor's default.
        in_channels: of the images, where the mapping does not say.
        image_size: (height, width) of the images.
        class_names: of the outputs, in order.
        text: what a language model is to read, instead of classes and images.
        task: what a dense model is for, `detection`, `segmentation` or `pose`; such models are made by the file of
            that name.
        geometry: what a dense model must know besides, such as the number of keypoints.
        seed: of the initial weights; None draws them from torch's generator.

    Raises:
        UserError: on an unknown name, word or file (the nearest name is given), or weights that do not fit.

    Example:
        >>> model = load("tutelage:resnet8", num_classes=10, in_channels=1, seed=0)
        >>> model.roles["stages[2]"].where, model(torch.zeros(2, 1, 8, 8)).shape
        ('layer3', torch.Size([2, 10]))
    """
    given: dict[str, Any] = {"model": spec} if isinstance(spec, str) else dict(spec)
    if "model" not in given:
        raise UserError(f"a model needs the word `model`: {', '.join(f'{kind}:...' for kind in KINDS)}")
    if given.get("head", "fresh") != "fresh":
        raise UserError(f"model {given['model']!r}: head {given['head']!r} is not known; valid: fresh")
    kind, _, place = str(given["model"]).partition(":")
    if kind == "object":
        raise UserError(f"model {given['model']!r} was an object in Python: build it there, and load its weights")
    if kind not in KINDS or not place:
        raise UserError(f"model {given['model']!r} is not known: write KIND:NAME{nearest(kind, KINDS)}")
    if kind == "run":
        return _student(place, given, num_classes, image_size, text, task)
    if text is not None:
        return language.load(kind, place, given, text, seed)
    if task is not None:
        facts = {
            "num_classes": given.get("num_classes", num_classes),
            "in_channels": given.get("in_channels", in_channels),
            "image_size": image_size,
            "class_names": tuple(given.get("class_names", class_names)),
            **(geometry or {}),
        }
        made: Model = import_module(f"tutelage.models.{task}").load(kind, place, given, facts, seed)
        made.class_names = made.class_names or facts["class_names"]
        first = {word: value for word, value in given.items() if word not in FIRST}
        made.source = {
            "model": {**first, **(_configured(made.module) if kind == "hf" and _fetched(given, place) else {})},
            "task": task,
            **{word: facts[word] for word in ("num_classes", "in_channels", "image_size")},
            "class_names": list(made.class_names),
            "geometry": dict(geometry or {}),
            "input": asdict(made.input) if made.input is not None else None,
            **made.source,
        }
        return made
    wanted = Wanted(
        place,
        given.get("num_classes", num_classes),
        given.get("in_channels", in_channels),
        tuple(given.get("class_names", class_names)),
        given.get("weights") == "pretrained",
        {word: value for word, value in given.items() if word not in WORDS},
    )
    built = _build(kind, wanted, seed)
    file = given.get("weights")
    if file is not None and not wanted.pretrained:
        weights.fit(
            built.module,
            weights.read(file),
            file,
            num_classes=wanted.num_classes,
            fresh_head=given.get("head") == "fresh",
        )
    built = replace(built, input=_pixels(built.input, given.get("input")))
    names = wanted.class_names or built.class_names
    model = _adapted(built, given, wanted, image_size)
    model.class_names = names
    asked = {word: value for word, value in given.items() if word in ("model", "roles", *wanted.options)}
    model.source = {
        "model": {**asked, **built.again},
        "num_classes": wanted.num_classes,
        "in_channels": built.input.channels if built.again and built.input else wanted.in_channels,
        "image_size": image_size,
        "native_size": list(built.size),
        "class_names": list(names),
        "input": asdict(built.input) if built.input is not None else None,
    }
    return model


def _fetched(given: Mapping[str, Any], place: str) -> bool:
    """Whether how a model of transformers is built lies on the hub, or in a folder that may go."""
    return given.get("weights") == "pretrained" or Path(place).is_dir()


def _configured(module: nn.Module) -> dict[str, Any]:
    """Return how to build a dense model of transformers from its configuration alone."""
    from tutelage.models.transformers import again

    inner = next(one for one in module.modules() if hasattr(getattr(one, "config", None), "to_diff_dict"))
    return again(inner)


def rebuild(record: Mapping[str, Any], seed: int | None = None) -> Model:
    """Return the model of a record, with initial weights.

    Args:
        record: what `Model.source` holds, and a run's `student.json`.
        seed: of the initial weights.
    """
    spec = {"model": record["model"]} if isinstance(record["model"], str) else dict(record["model"])
    if record.get("input") is not None:
        spec["input"] = record["input"]
    size, text = record.get("image_size"), record.get("text")
    return load(
        spec,
        num_classes=record.get("num_classes"),
        in_channels=record.get("in_channels"),
        image_size=(size[0], size[1]) if size else None,
        class_names=record.get("class_names", ()),
        text=TextSpec(**text) if text else None,
        task=record["task"] if record.get("task") in DENSE else None,
        geometry=record.get("geometry"),
        seed=seed,
    )


def _student(
    place: str,
    given: Mapping[str, Any],
    num_classes: int | None,
    size: tuple[int, int] | None,
    text: TextSpec | None,
    task: str | None,
) -> Model:
    """Return a run's student; the mapping may only say more of roles and input."""
    for word in given:
        if word not in ("model", "roles", "input", "weights"):
            raise UserError(f"model 'run:{place}': {word!r} is fixed by the run")
    if given.get("weights") not in (None, "pretrained"):
        raise UserError(f"model 'run:{place}' has its own weights")
    record, file = run.read(place)
    if num_classes is not None and record.get("num_classes") not in (None, num_classes):
        raise UserError(f"model 'run:{place}' has {record['num_classes']} classes, the data {num_classes}")
    if num_classes is not None and record.get("text"):
        raise UserError(f"model 'run:{place}' reads text, and the data is images")
    if task is not None and record.get("task") != task:
        raise UserError(f"model 'run:{place}' was trained for {record.get('task')}, and the data is for {task}")
    if text is not None:
        language.require_same(record.get("text"), text, f"run:{place}")
    if size is not None:
        record["image_size"] = size
    if "input" in given:
        record["input"] = {**(record.get("input") or {}), **given["input"]}
    if "roles" in given:
        spec = record["model"] if isinstance(record["model"], Mapping) else {"model": record["model"]}
        record["model"] = {**spec, "roles": {**spec.get("roles", {}), **given["roles"]}}
    model = repeated(rebuild(record), record.get("rebuilds", ()))
    model.source = {**model.source, **({"rebuilds": record["rebuilds"]} if record.get("rebuilds") else {})}
    weights.fit(model.module, weights.read(file), file)
    return model


def _source(kind: str) -> Callable[[Wanted], Built]:
    # each kind loads a library of its own
    if kind == "timm":
        from tutelage.models.timm import build
    elif kind == "torchvision":
        from tutelage.models.torchvision import build
    elif kind == "hf":
        from tutelage.models.transformers import build
    elif kind == "python":
        from tutelage.models.python import build
    else:
        from tutelage.models.own import build
    return build


def _build(kind: str, wanted: Wanted, seed: int | None) -> Built:
    if seed is None:
        return _source(kind)(wanted)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _source(kind)(wanted)


def _adapted(built: Built, given: Mapping[str, Any], wanted: Wanted, image_size: tuple[int, int] | None) -> Model:
    """Look for roles on images of the model's own size, else on the data's."""
    pixels = built.input or InputSpec(channels=wanted.in_channels or 3)
    sizes = dict.fromkeys([built.size, *([image_size] if image_size else []), (32, 32)])
    first: Exception | None = None
    for size in sizes:
        try:
            return adapt(
                built.module,
                blank(built.module, pixels, size),
                roles=given.get("roles"),
                input=built.input,
                call=built.call,
                prefix=built.prefix,
                classifier=built.classifier,
                stages=built.stages,
                channels_last=built.channels_last,
            )
        except UserError:
            raise
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            first = first or error
    tried = ", ".join(f"{height}x{width}" for height, width in sizes)
    what = str(first).splitlines()[0].rstrip(".")
    raise UserError(
        f"model {given['model']!r} does not run on images of {tried} pixels with {pixels.channels} channels "
        f"({what}); say what it takes with `input: {{size: [H, W], channels: C}}`"
    ) from first


def _pixels(found: InputSpec | None, given: Mapping[str, Any] | None) -> InputSpec | None:
    """Return the input spec with what the user says of it."""
    if given is None:
        return found
    words = [part.name for part in fields(InputSpec)]
    for word in given:
        if word not in words:
            raise UserError(f"input.{word} is not known{nearest(str(word), words)}")
    said: dict[str, Any] = {word: tuple(v) if isinstance(v, list) else v for word, v in given.items()}
    if isinstance(said.get("size"), int):
        said["size"] = (said["size"], said["size"])
    return replace(found or InputSpec(), **said)
