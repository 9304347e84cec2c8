# SPDX-License-Identifier: Apache-2.0
"""Every recipe that comes with the package: it reads, resolves and builds; what it compares takes two steps."""

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tutelage import methods
from tutelage.core import Batch, Distiller, Facts, Live, Model
from tutelage.core.task import DENSE
from tutelage.data.load import EMBEDDED
from tutelage.models.inherit import module_at
from tutelage.models.load import load as load_model
from tutelage.run.assemble import task_of
from tutelage.run.compare import arms_of
from tutelage.run.distill import teacher_recipe
from tutelage.run.objective import build, feeders_of, rebuilds_of
from tutelage.run.recipe import SHIPPED, Recipe, StudentSection, load, parse, read_yaml, shipped
from tutelage.run.stages import assembled, recipes_of
from tutelage.train.log import Log

NAMES = tuple(shipped())
DEMOS = tuple(name for name in NAMES if load(name).compare is not None)
#: What a model of a dense task must know besides.
GEOMETRY: dict[str, dict[str, Any]] = {"detection": {}, "segmentation": {}, "pose": {"num_keypoints": 133}}
#: Classes, channels and side of the images, by kind of data.
IMAGES = {"cifar10": (10, 3, 32), "cifar100": (100, 3, 32), "folder": (1000, 3, 224)}


def test_all_of_them_are_found() -> None:
    files = {path.relative_to(SHIPPED).with_suffix("").as_posix() for path in SHIPPED.rglob("*") if path.is_file()}
    assert set(NAMES) == files
    assert "kd/demo" in DEMOS
    assert "tour" in DEMOS


def test_every_method_that_has_a_folder_has_a_demo_of_itself() -> None:
    folders = {path.name for path in SHIPPED.iterdir() if path.is_dir()} & set(methods.catalogue())
    for stem in folders:
        found = load(f"{stem}/demo").compare
        assert found is not None
        arms = [
            set(objective) | {str(v.get("method")) for v in objective.values() if isinstance(v, dict)}
            for arm in found.arms.values()
            for objective in ([stage.get("objective", {}) for stage in arm["stages"]] if "stages" in arm else [arm])
        ]
        assert next(iter(found.arms)) == "alone"
        assert any(stem in labels for labels in arms), stem
        assert len(found.seeds) >= 5


@pytest.mark.parametrize("name", NAMES)
def test_it_reads_and_resolves(name: str) -> None:
    path = shipped()[name]
    assert path.read_text().startswith("# "), "the head of a recipe says what it is"
    assert "base" not in load(name).plain()
    before = load(name)
    again = parse(read_yaml(before.text(), name))
    assert again.plain() == before.plain()
    yaml.safe_load(before.text())
    if before.teacher is not None and before.teacher.fit is not None:
        fitted = teacher_recipe(before)
        assert fitted.student.model == before.teacher.model
        assert fitted.objective == {"task": 1.0}
    for value in before.expected.values():
        assert "ours" in value, "a published number stands beside ours"


@cache
def built(spec: tuple[tuple[str, Any], ...], classes: int, channels: int, side: int, place: str) -> Model:
    """Return a model without weights, kept for the next recipe that has it in the same place."""
    options: dict[str, Any] = {"num_classes": classes, "in_channels": channels, "image_size": (side, side)}
    try:
        with torch.device("meta"):
            return load_model(dict(spec), **options)
    except NotImplementedError:  # its constructor computes with tensors
        return load_model(dict(spec), **options)


def unfitted(recipe: Recipe) -> Recipe:
    """Return a recipe whose teacher is taken as it is."""
    teacher = recipe.teacher.model_copy(update={"fit": None}) if recipe.teacher else None
    return recipe.model_copy(update={"teacher": teacher})


def untrained(section: StudentSection) -> dict[str, Any]:
    """Return a model's words without those that fetch weights."""
    return {"model": section.model, **{word: v for word, v in section.options.items() if word != "pretrained"}}


def embedded(recipe: Recipe) -> bool:
    """Whether the data itself is at hand."""
    kind, task = recipe.data.source.partition(":")[0], recipe.task.name
    return kind in (import_module(f"tutelage.data.{task}").EMBEDDED if task in DENSE else EMBEDDED)


def meets_densely(recipe: Recipe) -> None:
    """Require of a recipe of a dense task that its models have what its methods read, take over and freeze."""
    task = recipe.task.name
    facts: dict[str, Any] = {"num_classes": 19, "in_channels": 3, "task": task, "geometry": GEOMETRY[task]}
    size = recipe.data.image_size
    facts["image_size"] = (size, size) if isinstance(size, int) else size
    before: Model | None = None
    for one in recipes_of(recipe).values():
        with torch.device("meta"):
            student = load_model(untrained(one.student), **facts)
            teacher = before
            if one.teacher is not None and one.teacher.model != "previous":
                teacher = load_model(untrained(one.teacher), **facts)
            sides = {"student": student, "teacher": teacher}
            sides |= {name: load_model(untrained(peer), **facts) for name, peer in one.peers.items()}
        for entry in build(one.objective).entries.values():
            wanted = entry.term.reads
            for name, taps, called in (
                (entry.student, wanted.student, ()),
                (entry.teacher, wanted.teacher, wanted.calls),
            ):
                model = sides[name.partition("@")[0]]
                for tap in taps:
                    assert model is not None
                    assert tap.where == "logits" or all(model.resolve(found) for found in model.expand(tap))
                for path in called:
                    assert model is not None
                    assert model.lend(path)
        sources = {"teacher": teacher, "previous": before}
        for place, where in one.inherit.items():
            source, _, path = where.partition(".")
            lender = sources[source]
            assert lender is not None
            module_at(student.module, place, name := f"{source}.{path}")
            module_at(lender.module, path, name)
        for place in one.freeze:
            module_at(student.module, place, place)
        before = student


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DEMOS])
def test_its_models_meet_its_objective(name: str) -> None:
    recipe = load(name)
    if embedded(recipe):
        for _, made in assembled(unfitted(recipe)):
            assert made.distiller.param_groups()
        return
    if recipe.task.name in DENSE:
        meets_densely(recipe)
        return
    kind = recipe.data.source.partition(":")[0]
    classes, channels, side = IMAGES[kind]
    if isinstance(recipe.data.image_size, int):
        side = recipe.data.image_size
    models = {}
    for place in ("student", "teacher"):
        section = getattr(recipe, place)
        if section is not None:
            spec = tuple({"model": section.model, **section.options}.items())
            models[place] = built(spec, classes, channels, side, place)
    student, lender = models["student"], models.get("teacher")
    device = next(student.module.parameters()).device
    task = task_of(recipe.task, num_classes=classes, class_names=())
    facts = Facts(classes, num_samples=50, steps_per_epoch=10, total_steps=100)
    with torch.device(device):
        sample = Batch.of(torch.zeros(2, channels, side, side), torch.tensor([0, 1]))
        for rebuild in rebuilds_of(recipe.objective):
            student = rebuild.begin(student, lender, task, facts, sample)
        distiller = Distiller(
            student,
            build(recipe.objective),
            task=task,
            teacher=Live(lender) if lender is not None else None,
            sample=sample,
            facts=facts,
            feeders=feeders_of(recipe.objective),
        )
    assert distiller.param_groups()
    distiller.close()


@pytest.mark.parametrize("name", DEMOS)
def test_its_arms_take_two_steps(name: str) -> None:
    recipe = load(name)
    parts: list[set[str]] = []
    for arm, one in arms_of(recipe).items():
        if one.objective == {"task": 1.0} and name != "tour":  # the same in all of them
            parts.append({"task"})
            continue
        for stage, (_, made) in enumerate(assembled(unfitted(one))):
            loop = made.loop(Log(None, quiet=True))
            loop.begin()
            steps = loop._steps()
            losses = [loss for _ in range(2) for loss in loop.step(next(steps))]
            assert all(bool(loss.total.isfinite()) for loss in losses), arm
            if not stage:
                parts.append(set(losses[0].parts))
    assert parts[0] == {"task"}
    assert all(one != parts[0] for one in parts[1:])


def test_the_folder_of_recipes_holds_recipes_alone() -> None:
    assert not [path for path in Path(SHIPPED).rglob("*") if path.is_file() and path.suffix != ".yaml"]
