# SPDX-License-Identifier: Apache-2.0
"""Detectors by name: those of `detectors/`, torchvision's with their published weights, transformers', anyone's."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.core import InputSpec, Model, Tap
from tutelage.core.error import UserError, nearest
from tutelage.core.model import Outputs
from tutelage.models import weights
from tutelage.models.detectors import published as mmdetection
from tutelage.models.detectors.dense import settled
from tutelage.models.source import Wanted, listed

#: Words of a mapping that are not the constructor's.
WORDS = ("model", "weights", "roles", "input", "num_classes", "in_channels", "class_names", "head")
#: Of ImageNet, with which backbones of torchvision and timm were trained.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BACKGROUND = "__background__"
NOTHING = ("N/A", BACKGROUND)  # names of outputs that stand for no class


def load(kind: str, place: str, given: Mapping[str, Any], facts: Mapping[str, Any], seed: int | None) -> Model:
    """Return a detector with its roles.

    - `stages[i]`: the backbone's maps; `fpn[i]`: the pyramid's
    - `head.cls[i]`, `head.box[i]`: what is said of classes and boxes at each level

    Args:
        kind: `tutelage`, `torchvision`, `hf` or `python`.
        place: a name; a file and its function.
        given: the mapping of a recipe: `weights` (null, `pretrained` or a file), `roles`, `input`, `head: fresh`
            (weights for other classes: what answers for classes starts anew) and options of the constructor.
        facts: of the data: `num_classes`, `class_names`.
        seed: of the initial weights; None draws them from torch's generator.

    Raises:
        UserError: on an unknown name or option, or weights that do not fit.
    """
    options = {word: value for word, value in given.items() if word not in WORDS}
    count, names = facts.get("num_classes"), tuple(facts.get("class_names", ()))
    pretrained = given.get("weights") == "pretrained"
    published = _published(place, pretrained) if kind == "torchvision" else None
    if published is not None:
        options = {**published.options, **options}
        if not names and count is None:
            names = tuple(name for name in published.categories if name not in NOTHING)
        count = count or len(names)
    fresh = given.get("head") == "fresh"
    file = given.get("weights")
    state = weights.read(file) if file is not None and not pretrained else {}
    theirs = _conventions(kind, place, state)
    options = {**theirs, **options}
    module = _seeded(lambda: _built(kind, place, options, count, pretrained, fresh), seed)
    pixels: InputSpec = getattr(module, "pixels", InputSpec(mean=MEAN, std=STD))
    if published is not None and pretrained:
        state = published.state()
        fit(module, state, f"torchvision:{place}", names, published.categories, fresh=fresh)
    elif state:
        rows = tuple(published.categories) if published is not None else ()
        fit(module, state, str(file), names, rows, fresh=fresh)
    found: dict[str, Tap] = _of(module, "roles")
    named = {role: Tap.parse(tap) for role, tap in (given.get("roles") or {}).items()}
    return Model(
        module,
        {**found, **named},
        _of(module, "lends"),
        input=_input(pixels, given.get("input")),
        class_names=names,
        source={"num_classes": count, **({"model": _again(given, theirs)} if theirs else {})},
        outputs=Outputs(
            ("boxes", "scores", "labels", *(["masks"] if _masks(module) else [])), exported, batched=False, ranked=True
        ),
    )


def _conventions(kind: str, place: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the options that weights want because of where they come from."""
    if kind != "tutelage" or not mmdetection.is_mmdetection(state):
        return {}
    return dict(listed("detectors", "MMDETECTION").get(place, {}))


def _again(given: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the same detector is built without those weights."""
    from tutelage.models.load import FIRST

    return {word: value for word, value in {**options, **given}.items() if word not in FIRST}


def _masks(module: nn.Module) -> bool:
    heads = getattr(module, "roi_heads", None)
    return bool(getattr(module, "tells_masks", heads is not None and heads.has_mask()))


def exported(answers: Any) -> tuple[Tensor, ...]:
    """Return what an exported copy answers for one image: tensors of one size.

    - `boxes` [most, 4], in the pixels of the image; `scores` [most], descending; `labels` [most]
    - `masks` of detectors that tell any: [most, 28, 28], shares of each box; of SOLO [most, H, W], of the image

    Rows with score 0 stand for nothing. The detections are those of `detections()`.
    """
    own = getattr(answers, "exported", None)
    if callable(own):
        found: tuple[Tensor, ...] = own()
        return found
    boxes, scores, labels = (rows[0] for rows in answers.candidates_of())
    return settled(boxes, scores, labels, iou=getattr(answers, "iou", None), most=answers.most)


def _of(module: nn.Module, word: str) -> dict[str, Any]:
    method = getattr(module, word, None)
    return dict(method()) if callable(method) else {}


def _seeded(build: Callable[[], nn.Module], seed: int | None) -> nn.Module:
    if seed is None:
        return build()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()


def _built(
    kind: str, place: str, options: Mapping[str, Any], count: int | None, pretrained: bool, fresh: bool
) -> nn.Module:
    if kind == "python":
        from tutelage.models.python import build

        return build(Wanted(place, num_classes=count, options=options)).module
    if kind == "hf":
        from tutelage.models.detectors.detr import build as transformer

        made: nn.Module = transformer(place, options, count, pretrained, fresh=fresh)
        return made
    known = listed("detectors")
    name = str({**options}.pop("detector", place)) if kind == "torchvision" else place
    if kind not in ("tutelage", "torchvision"):
        raise UserError(f"model '{kind}:{place}' is no detector: write tutelage:NAME, torchvision:NAME, hf: or python:")
    if name not in known:
        raise UserError(f"unknown detector 'tutelage:{name}'{nearest(name, known)}")
    if kind == "tutelage" and pretrained:
        raise UserError(
            f"tutelage:{name} comes without weights: give a file as `weights`, or `pretrained: true` for a backbone"
        )
    make: Callable[..., nn.Module] = known[name]
    try:
        return make(count or 1, **{word: value for word, value in options.items() if word != "detector"})
    except TypeError as error:
        raise UserError(f"{kind}:{place}: {str(error).replace('__init__() ', '')}") from error


def _input(found: InputSpec, given: Mapping[str, Any] | None) -> InputSpec:
    words = [part.name for part in fields(InputSpec)]
    for word in given or {}:
        if word not in words:
            raise UserError(f"input.{word} is not known{nearest(word, words)}")
    said = {word: tuple(v) if isinstance(v, list) else v for word, v in (given or {}).items()}
    return InputSpec(**{**{word: getattr(found, word) for word in words}, **said})


# --- torchvision -----------------------------------------------------------------------------------------


class _Published:
    """A detector of torchvision: which of ours it is, and where its weights are."""

    def __init__(self, place: str, options: Mapping[str, Any], pretrained: bool) -> None:
        import torchvision

        self.enum = torchvision.models.get_model_weights(place).DEFAULT
        self.place, self.options, self.pretrained = place, dict(options), pretrained
        self.categories: tuple[str, ...] = tuple(self.enum.meta["categories"])

    def state(self) -> dict[str, Tensor]:
        """Return the published weights.

        Raises:
            UserError: if they cannot be had.
        """
        try:
            found: dict[str, Tensor] = self.enum.get_state_dict(progress=False, check_hash=True)
        except OSError as error:
            raise UserError(
                f"torchvision:{self.place}: its weights cannot be had ({error}); give a file as `weights`"
            ) from error
        return found


def _published(place: str, pretrained: bool) -> _Published:
    import torchvision

    known = listed("detectors", "PUBLISHED")
    names = torchvision.models.list_models(module=torchvision.models.detection)
    if place not in names:
        raise UserError(f"unknown detector 'torchvision:{place}'{nearest(place, known)}")
    if place not in known:
        raise UserError(f"torchvision:{place} is not among the detectors that are here: {', '.join(sorted(known))}")
    return _Published(place, known[place], pretrained)


def fit(
    module: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    names: Sequence[str],
    categories: Sequence[str],
    *,
    fresh: bool = False,
) -> None:
    """Load weights; what answers for classes is picked by name where the weights know more of them.

    A detector says in `by_class()` which of its parameters have a row a class: for each the number of groups that
    stand before the class, and the numbers of one class; `background` is true where the first row of all is for
    nothing.

    Args:
        module: takes the weights.
        state: by key.
        source: the file, for the error.
        names: classes of the data, by index.
        categories: classes of the weights, by index; empty if they are not known.
        fresh: keep the initial weights of what answers for classes.

    Raises:
        UserError: if weights do not fit, or know no class of some name.
    """
    rows = _of(module, "by_class")
    own = module.state_dict()
    state = mmdetection.renamed(state, own) if mmdetection.is_mmdetection(state) else _renamed(state, own)
    known = dict(state)
    other = [key for key in rows if key in state and state[key].shape != own[key].shape]
    whole = [
        key for key, (groups, numbers) in rows.items() if _length(state, key) == groups * len(categories) * numbers
    ]
    if fresh:
        known |= {key: own[key] for key in rows}
    elif whole and names and tuple(names) != tuple(categories):
        missing = [name for name in names if name not in categories]
        if missing:
            raise UserError(
                f"weights: {source} know no class {missing[0]!r} (`head: fresh` keeps the rest and starts what "
                f"answers for classes anew){nearest(missing[0], categories)}"
            )
        picked = [categories.index(name) for name in names]
        if getattr(module, "background", False):
            picked = [categories.index(BACKGROUND) if BACKGROUND in categories else 0, *picked]
        for key in whole:
            groups, numbers = rows[key]
            known[key] = state[key].unflatten(0, (groups, len(categories), numbers))[:, picked].flatten(0, 2)
    elif other:
        raise weights.OtherClassesError(
            f"weights: {source} are for other classes than the data's {len(names)}; "
            "`head: fresh` keeps the rest and starts what answers for classes anew"
        )
    weights.fit(module, known, source)


#: Names of torchvision's first versions, and what they are called since.
OLD = {
    r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)": r"\1.0.\2",
    r"rpn\.head\.conv\.(weight|bias)": r"rpn.head.conv.0.0.\1",
}


def _renamed(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under today's names, where a file has the names of an earlier version."""
    found = {}
    for key, value in state.items():
        if key not in own and key.endswith("num_batches_tracked"):
            continue  # of batch norms that are frozen here
        name = key
        if key not in own:
            for old, new in OLD.items():
                name = re.sub(old, new, name)
            name = re.sub(r"mask_fcn(\d)\.", lambda m: f"{int(m[1]) - 1}.0.", name)
        found[name] = value
    tower = re.compile(r"(head\.(?:classification|regression)_head\.conv)\.(\d+)\.(weight|bias)")
    if any(key not in own and tower.fullmatch(key) for key in found):  # every other layer was an activation
        found = {tower.sub(lambda m: f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}", key): value for key, value in found.items()}
    return found


def _length(state: Mapping[str, Tensor], key: str) -> int:
    return len(state[key]) if key in state else 0
