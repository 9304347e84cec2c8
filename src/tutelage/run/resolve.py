# SPDX-License-Identifier: Apache-2.0
"""What a recipe leaves open, decided from its data and models: sizes, augmentation, the fit of a teacher."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from tutelage.core import Model
from tutelage.core.error import UserError
from tutelage.core.task import DENSE
from tutelage.data.augment import pair
from tutelage.data.load import Splits
from tutelage.data.load import load as load_data
from tutelage.data.loader import UNREADABLE
from tutelage.data.samples import Composed, Dense, Held
from tutelage.models.known import UNCOUNTED, offered, trained_classes, untrained
from tutelage.models.load import load as load_model
from tutelage.run.given import NOTHING, Given
from tutelage.run.recipe import FitSection, Recipe, TeacherSection

#: What is done to training images that are read from files, where a recipe does not say.
AUGMENT = ["random_resized_crop", "flip"]
#: A model of any size is not given images below so many pixels a side, unless it was made for fewer.
SMALLEST, MULTIPLE = 64, 32
LOOKED_AT = 32  # images whose size is looked at
#: A fit that starts from trained weights takes so much of the run's length, and of its rate.
LENGTH, RATE = 1 / 3, 0.3

Say = Callable[[str], None]


def resolve(recipe: Recipe, say: Say = lambda text: None, given: Given = NOTHING) -> Recipe:
    """Return a recipe in which nothing is left open, a function of the recipe, its data and its models.

    - `data.image_size`, where images are read from files: what the student wants; for a student of any size the
      size it was made for, or less where the images are smaller
    - `data.augment`, where images are read from files: a random resized crop and a flip
    - `teacher.fit: auto` becomes how the teacher is fitted to the data, or nothing where it knows the data's
      classes already; `never` refuses a teacher that would have to be fitted

    Args:
        recipe: validated.
        say: told what was decided, line by line.
        given: objects in the place of what the recipe names; sets of theirs are augmented by themselves.

    Raises:
        UserError: for whatever is wrong with the data or the models; if the teacher needs a fit and must not
            have one.
    """
    section = recipe.data
    teacher = recipe.teacher
    open_fit = teacher is not None and teacher.fit is not None and (teacher.fit.when != "always" or teacher.weights)
    if section.image_size is not None and section.augment is not None and not open_fit:
        return recipe
    data = load_data(section.model_dump(), task=recipe.task.name, seed=recipe.train.seed, sets=given.sets)
    changes: dict[str, Any] = {}
    if not isinstance(data.train.samples, (Held, Composed, Dense)):
        say(_counts(recipe, data))
        if section.image_size is None and not (given.data is not None and len(set(_shapes(data))) == 1):
            changes["image_size"] = _image_size(recipe, data, say, given)
        if section.augment is None and given.data is None:
            changes["augment"] = list(AUGMENT)
            say("training images: random resized crop, flip (data.augment)")
    if teacher is not None and open_fit:
        teacher = _teacher(recipe, teacher, 0 if recipe.task.name in UNCOUNTED else data.num_classes, say)
    if teacher is not None and teacher.fit is None and given.teacher is None and "image_size" in changes:
        _compare_sizes(teacher, data, pair(changes["image_size"]), say)
    return recipe.model_copy(update={"data": section.model_copy(update=changes), "teacher": teacher})


def _counts(recipe: Recipe, data: Splits) -> str:
    names = data.class_names
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    apart = f" ({100 * recipe.data.validation_share:g} % of each class, held out)" if data.held_out else ""
    return (
        f"{len(names)} classes ({shown}): {len(data.train.samples)} images to learn from, "
        f"{len(data.validation.samples)} to validate on{apart}"
    )


def _image_size(recipe: Recipe, data: Splits, say: Say, given: Given) -> int | tuple[int, int]:
    """Return the size to which images are brought: a number for a square."""
    shapes = _shapes(data)
    student = recipe.student
    if given.student is not None:
        model = Model.of(given.student)
    else:
        model = load_model(
            {"model": student.model, **student.options},
            num_classes=data.num_classes,
            in_channels=shapes[0][0],
            class_names=data.class_names,
        )
    fixed = model.input.size if model.input else None
    native = fixed or pair(model.source.get("native_size") or 224)
    side = median(min(shape[1:]) for shape in shapes)
    wanted = max(SMALLEST, MULTIPLE * -(-int(side) // MULTIPLE))
    smaller = fixed is None and native[0] == native[1] and wanted < native[0]
    size = (wanted, wanted) if smaller else native
    why = f"as {student.model} wants them"
    if smaller:
        why = f"since half of them have {side:.0f} a side or less, and {student.model} takes any size"
    say(f"images are brought to {size[0]} x {size[1]} pixels, {why} (data.image_size)")
    return size[0] if size[0] == size[1] else size


def _compare_sizes(teacher: TeacherSection, data: Splits, size: tuple[int, int], say: Say) -> None:
    """Tell if a trained teacher of any size will see smaller images than it was trained on."""
    model = load_model(
        {"model": teacher.model, **teacher.options}, num_classes=data.num_classes, in_channels=_shapes(data)[0][0]
    )
    fixed = model.input is not None and model.input.size is not None
    made_for = model.source.get("image_size") or model.source.get("native_size")
    if made_for and not fixed and min(made_for) > min(size):
        say(
            f"{teacher.model} was made for {made_for[0]} x {made_for[1]} pixels; "
            f"teacher.input={{size: {min(made_for)}}} shows it images of that size"
        )


def _shapes(data: Splits) -> list[tuple[int, int, int]]:
    """Return channels, height and width of some images, spread over the set.

    Raises:
        UserError: if none of them can be read.
    """
    seen = data.train.samples
    places = torch.linspace(0, len(seen) - 1, min(LOOKED_AT, len(seen))).long().tolist()
    found = []
    for place in places:
        try:
            channels, height, width = seen.read(place).shape
        except UNREADABLE:
            continue  # named when its batch is read
        found.append((channels, height, width))
    if not found:
        raise UserError(f"none of {len(places)} images could be read, such as {seen.name(places[0])}")
    return found


def _teacher(recipe: Recipe, teacher: TeacherSection, num_classes: int, say: Say) -> TeacherSection:
    """Return the teacher's section with its fit decided."""
    fit = teacher.fit
    assert fit is not None
    spec = {"model": teacher.model, "weights": teacher.weights, **teacher.options}
    dense = recipe.task.name in DENSE
    if num_classes and "outputs" in teacher.options:  # of more classes than the data has, these count
        num_classes = int(teacher.options.get("num_classes", num_classes))
    task = recipe.task.name if dense else None
    known = trained_classes(spec, num_classes, task) if num_classes and not untrained(spec) else None
    lacks = ""
    if untrained(spec):
        lacks = f"{teacher.model} has no weights"
    elif known not in (None, num_classes):
        lacks = f"{teacher.model} tells {known} classes apart, the data has {num_classes}"
    if fit.when == "never" and lacks:
        raise UserError(
            f"teacher: {lacks}, and --no-fit-teacher (teacher.fit: never) forbids to fit it to the data; "
            "give other teacher.weights"
        )
    if not lacks:
        return teacher.model_copy(update={"fit": fit if fit.when == "always" else None})
    if teacher.model.startswith("run:"):
        raise UserError(f"teacher: {lacks}; the student of a run cannot be fitted to other classes")
    head = {"head": "fresh"} if known is not None and (dense or teacher.weights != "pretrained") else {}
    if fit.when == "auto":
        fit = _fit(recipe, fit, trained=known is not None)
        words = {**recipe.train.model_dump(), **fit.train}
        unit = "epoch" if "epochs" in fit.train else "step"
        length = f"{words[f'{unit}s']:g} {unit}{'' if words[f'{unit}s'] == 1 else 's'}"
        keeps = " from its weights, with a new last layer" if known is not None else ""
        say(f"{lacks}: it is fitted to the data first{keeps}, {length} (teacher.fit)")
        if known is None and offered(spec):
            library = teacher.model.partition(":")[0]
            say(f"{library} has weights for it: teacher.weights=pretrained would fetch them and start there")
    return TeacherSection.model_validate({**teacher.model_dump(), **teacher.options, **head, "fit": fit.model_dump()})


def _fit(recipe: Recipe, given: FitSection, *, trained: bool) -> FitSection:
    """Return how a teacher is fitted: as the student is, or shorter and slower from trained weights.

    What the recipe says of the fit itself holds.
    """
    settings = recipe.train
    length: dict[str, Any] = {"epochs": settings.epochs} if settings.epochs else {"steps": settings.steps}
    lr = recipe.optimizer.lr
    if trained:
        length = {word: max(1, round(LENGTH * value)) for word, value in length.items()}
        lr = float(f"{RATE * lr:.3g}")
    if {"epochs", "steps"} & given.train.keys():
        length = {}
    same = given.optimizer.get("name", recipe.optimizer.name) == recipe.optimizer.name
    labelled = {"unlabelled": None, "labelled_per_batch": None} if recipe.data.unlabelled else {}
    return FitSection(
        data={**labelled, **given.data},
        optimizer={**({"lr": lr} if same else {}), **given.optimizer},
        train={**length, "seed": 0, **given.train},
    )
