# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.utils.data import TensorDataset

from photos import photos
from tutelage.core.error import UserError
from tutelage.data.objects import sets_of
from tutelage.models.load import load
from tutelage.run.given import Given
from tutelage.run.recipe import Recipe, parse
from tutelage.run.resolve import AUGMENT, resolve


def asked(source: Path | str = "digits", **sections: Any) -> Recipe:
    given: dict[str, Any] = {"student": "tutelage:resnet8", "data": {"source": str(source)}, "train": {"epochs": 6}}
    return parse({**given, **sections})


def resolved(recipe: Recipe, given: Given | None = None) -> tuple[Recipe, list[str]]:
    said: list[str] = []
    return resolve(recipe, said.append, given or Given()), said


# --- sizes and augmentation ----------------------------------------------------------------------------------


def test_photographs_are_brought_to_what_the_student_wants(tmp_path: Path) -> None:
    recipe, said = resolved(asked(photos(tmp_path)))
    assert recipe.data.image_size == 32  # the CIFAR networks were made for
    assert recipe.data.augment == AUGMENT
    assert said == [
        "3 classes (cat, dog, owl): 21 images to learn from, 3 to validate on (10 % of each class, held out)",
        "images are brought to 32 x 32 pixels, as tutelage:resnet8 wants them (data.image_size)",
        "training images: random resized crop, flip (data.augment)",
    ]


@pytest.mark.parametrize(
    ("student", "sides", "size", "why"),
    [
        ("timm:test_vit", (20, 40), 160, "as timm:test_vit wants them"),  # takes one size only
        ("timm:test_resnet", (20, 21), 64, "since half of them have 20 a side or less"),  # not less than 64
        ("timm:test_resnet", (90, 91), 96, "since half of them have 90 a side or less"),
        ("timm:test_resnet", (300, 301), 160, "as timm:test_resnet wants them"),  # not more than it was made for
    ],
)
def test_the_size_follows_student_and_images(
    tmp_path: Path, student: str, sides: tuple[int, int], size: int, why: str
) -> None:
    recipe, said = resolved(asked(photos(tmp_path, 4, sides=sides), student=student))
    assert recipe.data.image_size == size
    assert why in said[1]


def test_a_trained_teacher_that_will_see_smaller_images_is_told_of(tmp_path: Path) -> None:
    place = photos(tmp_path / "photos", 4)
    teacher = {"model": "timm:test_resnet", "weights": str(weights(tmp_path / "w.safetensors", 3))}
    _, said = resolved(taught(place, teacher))
    assert said[1:] == [
        "images are brought to 32 x 32 pixels, as tutelage:resnet8 wants them (data.image_size)",
        "training images: random resized crop, flip (data.augment)",
        "timm:test_resnet was made for 160 x 160 pixels; teacher.input={size: 160} shows it images of that size",
    ]
    _, said = resolved(taught(place, {**teacher, "input": {"size": 160}}))
    assert len(said) == 3


def test_what_the_recipe_says_holds(tmp_path: Path) -> None:
    place = str(photos(tmp_path))
    recipe, said = resolved(asked(data={"source": place, "image_size": 24, "augment": "none"}))
    assert (recipe.data.image_size, recipe.data.augment) == (24, "none")
    assert said == []  # nothing was open, so the folder was not even looked at
    recipe, _ = resolved(asked(data={"source": place, "augment": ["flip"]}))
    assert (recipe.data.image_size, recipe.data.augment) == (32, ["flip"])


def test_images_in_memory_stay_as_they_are() -> None:
    recipe, said = resolved(asked())
    assert recipe == asked()
    assert said == []


def test_a_validation_folder_is_no_share(tmp_path: Path) -> None:
    photos(tmp_path / "train")
    photos(tmp_path / "val", 2, skip=20)
    assert resolved(asked(tmp_path))[1][0].endswith("24 images to learn from, 6 to validate on")


def test_sizes_are_read_past_a_broken_image(tmp_path: Path) -> None:
    place = photos(tmp_path, 4)
    for name in ("0.jpg", "1.png"):
        (place / "cat" / name).write_text(f"no image: {name}")
    assert resolved(asked(place))[0].data.image_size == 32
    for path in place.glob("*/*"):
        path.write_text(f"no image either: {path}")
    with pytest.raises(UserError, match=r"^none of 9 images could be read, such as .*jpg|png$"):
        resolve(asked(place))


def test_sets_in_hand_augment_for_themselves() -> None:
    pairs = TensorDataset(torch.zeros(12, 3, 20, 20), torch.arange(12) % 3)
    recipe, _ = resolved(asked(), Given(data=sets_of(pairs)))
    assert (recipe.data.image_size, recipe.data.augment) == (None, None)


# --- the fit of a teacher --------------------------------------------------------------------------------------


def taught(source: Path | str, teacher: dict[str, Any], **sections: Any) -> Recipe:
    return asked(source, teacher=teacher, objective={"task": 0.5, "kd": 0.5}, **sections)


def weights(path: Path, classes: int) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=classes)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return path


def test_a_teacher_without_weights_is_fitted() -> None:
    recipe, said = resolved(taught("digits", {"model": "tutelage:resnet14", "fit": "auto"}))
    assert recipe.teacher is not None
    assert recipe.teacher.fit is not None
    assert recipe.teacher.fit.model_dump() == {
        "when": "always",
        "data": {},
        "optimizer": {"lr": 0.1},
        "train": {"epochs": 6.0, "seed": 0},
    }
    assert said[0] == "tutelage:resnet14 has no weights: it is fitted to the data first, 6 epochs (teacher.fit)"
    assert resolve(recipe) == recipe  # nothing is left open


def test_what_is_said_of_the_fit_holds() -> None:
    fit = {"when": "auto", "optimizer": {"name": "adamw", "lr": 0.01}, "train": {"steps": 4, "seed": 3}}
    recipe, said = resolved(taught("digits", {"model": "tutelage:resnet14", "fit": fit}))
    assert recipe.teacher is not None
    assert recipe.teacher.fit is not None
    assert recipe.teacher.fit.train == {"steps": 4, "seed": 3}
    assert recipe.teacher.fit.optimizer == {"name": "adamw", "lr": 0.01}
    assert "4 steps" in said[0]


def test_weights_for_other_classes_keep_their_body(tmp_path: Path) -> None:
    place = photos(tmp_path / "photos", 4)
    teacher = {"model": "timm:test_resnet", "weights": str(weights(tmp_path / "w.safetensors", 7)), "fit": "auto"}
    recipe, said = resolved(taught(place, teacher))
    assert recipe.teacher is not None
    assert recipe.teacher.fit is not None
    assert recipe.teacher.options == {"head": "fresh"}
    assert recipe.teacher.fit.train == {"epochs": 2, "seed": 0}  # a third of the run
    assert recipe.teacher.fit.optimizer == {"lr": 0.03}
    assert said[-1] == (
        "timm:test_resnet tells 7 classes apart, the data has 3: it is fitted to the data first from its weights, "
        "with a new last layer, 2 epochs (teacher.fit)"
    )


@pytest.mark.parametrize("classes", [7, 11])
def test_a_segmenter_for_other_classes_is_fitted(tmp_path: Path, classes: int) -> None:
    own = {"model": "tutelage:pspnet", "backbone": "tiny8", "width": 16}
    torch.save(load(own, num_classes=classes, task="segmentation").module.state_dict(), tmp_path / "w.pth")
    sections = {"task": "segmentation", "student": own, "objective": {"cwd": 1}}
    teacher = {**own, "weights": str(tmp_path / "w.pth"), "fit": "auto"}
    recipe, said = resolved(asked("scenes", **sections, teacher=teacher))
    assert recipe.teacher is not None
    assert (recipe.teacher.fit is None) == (classes == 11)  # ten digits, and the ground
    assert recipe.teacher.options.get("head") == (None if classes == 11 else "fresh")
    assert ("tutelage:pspnet tells 7 classes apart, the data has 11" in "".join(said)) == (classes == 7)


@pytest.mark.parametrize("fit", ["auto", "never", {"train": {"steps": 2}}])
def test_weights_that_fit_are_left_alone(tmp_path: Path, fit: Any) -> None:
    place = photos(tmp_path / "photos", 4)
    file = weights(tmp_path / "w.safetensors", 3)
    recipe, _ = resolved(taught(place, {"model": "timm:test_resnet", "weights": str(file), "fit": fit}))
    assert recipe.teacher is not None
    assert (recipe.teacher.fit is None) == (fit in ("auto", "never"))  # a fit that was written down is done


@pytest.mark.parametrize(
    ("more", "lacks"),
    [
        ({}, "timm:test_resnet has no weights"),
        ({"weights": "w"}, "timm:test_resnet tells 7 classes apart, the data has 3"),
    ],
)
def test_never_refuses_a_teacher_that_needs_it(tmp_path: Path, more: dict[str, str], lacks: str) -> None:
    place = photos(tmp_path / "photos", 4)
    more = {"weights": str(weights(tmp_path / "w.safetensors", 7))} if more else {}
    with pytest.raises(UserError) as error:
        resolve(taught(place, {"model": "timm:test_resnet", "fit": "never", **more}))
    assert str(error.value) == (
        f"teacher: {lacks}, and --no-fit-teacher (teacher.fit: never) forbids to fit it to the data; "
        "give other teacher.weights"
    )


@pytest.mark.parametrize(
    ("kind", "known"),
    [("timm:resnet18", 1000), ("torchvision:resnet18", 1000), ("timm:mobilenetv3_large_100.miil_in21k", 11221)],
)
def test_the_libraries_own_weights_are_known_by_their_classes(kind: str, known: int) -> None:
    """Nothing is fetched to find out."""
    recipe = taught("digits", {"model": kind, "weights": "pretrained", "fit": "auto"})
    fitted, said = resolved(recipe)
    assert fitted.teacher is not None
    assert fitted.teacher.options == {}  # the library makes a new last layer by itself
    assert said[0].startswith(f"{kind} tells {known} classes apart, the data has 10: it is fitted to the data first")


@pytest.mark.parametrize(
    ("model", "library"),
    [("timm:test_resnet", "timm"), ("torchvision:resnet18", "torchvision"), ("tutelage:resnet14", None)],
)
def test_weights_that_a_library_has_are_told_of(model: str, library: str | None) -> None:
    _, said = resolved(taught("digits", {"model": model, "fit": "auto"}))
    assert said[0].startswith(f"{model} has no weights: it is fitted to the data first")
    told = f"{library} has weights for it: teacher.weights=pretrained would fetch them and start there"
    assert said[1:2] == ([told] if library else [])


def test_only_what_carries_labels_fits_a_teacher(tmp_path: Path) -> None:
    more = photos(tmp_path / "more", 2)
    data = {"source": "digits", "unlabelled": str(more), "labelled_per_batch": 8, "image_size": 8}
    recipe = resolve(taught("digits", {"model": "tutelage:resnet14", "fit": "auto"}, data=data))
    assert recipe.teacher is not None
    assert recipe.teacher.fit is not None
    assert recipe.teacher.fit.data == {"unlabelled": None, "labelled_per_batch": None}


def test_the_fit_is_one_word_or_a_section() -> None:
    with pytest.raises(UserError, match=r"^recipe: teacher.fit.when: 'soon' is not known; valid: always, auto, never$"):
        taught("digits", {"model": "tutelage:resnet14", "fit": "soon"})
    with pytest.raises(UserError, match=r"teacher.fit.trian: unknown key; did you mean train\?$"):
        taught("digits", {"model": "tutelage:resnet14", "fit": {"trian": {}}})
    sets: Sequence[str] = ["teacher.fit=auto", "teacher.fit.train.steps=3"]
    recipe = parse(taught("digits", {"model": "tutelage:resnet14"}).plain(), sets)
    assert recipe.teacher is not None
    assert recipe.teacher.fit is not None
    assert (recipe.teacher.fit.when, recipe.teacher.fit.train) == ("auto", {"steps": 3})
