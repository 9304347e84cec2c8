# SPDX-License-Identifier: Apache-2.0
"""One model as the library sees it: what it takes, where its tensors lie, how large it is."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tutelage.core import Model
from tutelage.core.tap import ROLES, Recorder
from tutelage.data.augment import pair
from tutelage.models.load import load
from tutelage.report.measure import evaluating, multiply_accumulates, weight_bytes
from tutelage.report.number import TIMES, count, size
from tutelage.report.table import Table
from tutelage.run.check import pixels


@dataclass(frozen=True)
class Role:
    """One tensor of a model that methods can name.

    Args:
        place: module path and side.
        shape: of the tensor for one image.
    """

    place: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Inspected:
    """What a model is.

    Args:
        name: as it was asked for.
        kind: its class.
        takes: the pixels or tokens it wants.
        seen: (height, width) of the image, or (1, tokens) of the text, that the shapes and the
            multiply-accumulates belong to.
        gives: shape of its answer to one image.
        roles: tensors by role.
        lends: paths of modules by role.
        parameters: their number.
        size: of the weights in bytes.
        macs: multiply-accumulates of one image.
        class_names: of its outputs, where known.
    """

    name: str
    kind: str
    takes: str
    seen: tuple[int, int]
    gives: tuple[int, ...]
    roles: Mapping[str, Role]
    lends: Mapping[str, str]
    parameters: int
    size: int
    macs: int
    class_names: tuple[str, ...]

    @property
    def tables(self) -> tuple[Table, Table]:
        """What is printed: the facts, then the roles."""
        facts = [
            ("class", self.kind),
            ("takes", self.takes),
            ("shown", f"{self.seen[0]} {TIMES} {self.seen[1]}"),
            ("gives", _words(self.gives)),
            ("parameters", count(self.parameters)),
            ("weights", size(self.size)),
            ("MACs of one image", count(self.macs)),
            *((f"lends {role}", path) for role, path in self.lends.items()),
        ]
        if self.class_names:
            more = ", ..." if len(self.class_names) > 6 else ""
            facts.append(("classes", ", ".join(self.class_names[:6]) + more))
        rows = [(role, found.place, _words(found.shape)) for role, found in self.roles.items()]
        return (
            Table(("", self.name), facts, "ll"),
            Table(("role", "place", "shape"), rows, "lll", title="Roles", note="Shapes of one image."),
        )

    def plain(self) -> dict[str, Any]:
        """Return the findings as plain data."""
        return asdict(self)


def inspect(
    name: str, *, image_size: int | None = None, num_classes: int | None = None, weights: str | None = None
) -> Inspected:
    """Return what a model is, from one forward.

    Args:
        name: `kind:name`, or the folder of a run.
        image_size: pixels of a side; the model's own by default.
        num_classes: of its outputs; its own default where None.
        weights: `pretrained` or a file.

    Raises:
        UserError: on an unknown model, or one that does not run on such an image.
    """
    model = load(spec(name, weights), num_classes=num_classes)
    seen = shown(model, image_size) if model.text is None else (1, model.text.length)
    places = {role: model.roles[role] for role in sorted(model.roles, key=_depth) if role != "logits"}
    recorder = Recorder(model.module, places)
    wants = model.input
    image: Any = torch.zeros(1, wants.channels if wants else int(model.source.get("in_channels") or 3), *seen)
    if model.text is not None:
        image = model.text.blank()
    try:
        with evaluating(model.module), torch.no_grad():
            with recorder:
                output = model(image)
            found = recorder.release()
            macs = multiply_accumulates(model, image)
    finally:
        recorder.close()
    return Inspected(
        name,
        type(model.module).__name__,
        str(model.text or pixels(wants)),
        seen,
        tuple(getattr(output, "logits", output).shape),
        {role: Role(_place(tap), tuple(found[role].shape)) for role, tap in places.items()},
        dict(model.modules),
        sum(p.numel() for p in model.module.parameters()),
        weight_bytes(model.module),
        macs,
        tuple(model.class_names),
    )


def spec(name: str, weights: str | None = None) -> dict[str, Any]:
    """Return the mapping that a model's name stands for; the folder of a run is its student."""
    if (Path(name) / "student.json").is_file():
        name = f"run:{name}"
    return {"model": name, **({"weights": weights} if weights else {})}


def shown(model: Model, image_size: int | None = None) -> tuple[int, int]:
    """Return (height, width) of the images to show a model: asked for, fixed, of its run, or of its training."""
    fixed = model.input.size if model.input else None
    known = model.source.get("image_size") or model.source.get("native_size") or 224
    return fixed or pair(image_size or known)


def _depth(role: str) -> tuple[int, int, str]:
    """Return where a role comes in a table: by the order of the vocabulary, then by its index."""
    name, _, rest = role.partition("[")
    number = rest.partition("]")[0]
    return ROLES.index(name) if name in ROLES else len(ROLES), int(number) if number else 0, role


def _place(tap: Any) -> str:
    side = "" if tap.side == "output" else f" ({tap.side})"
    call = "" if tap.call is None else f", call {tap.call}"
    return f"{tap.where or 'the model'}{side}{call}"


def _words(shape: tuple[int, ...]) -> str:
    return f" {TIMES} ".join(map(str, shape))
