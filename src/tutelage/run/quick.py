# SPDX-License-Identifier: Apache-2.0
"""The quick flags of `tutelage distill` and `train`: they only build a recipe."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tutelage import methods
from tutelage.core.error import UserError
from tutelage.run.objective import of_methods, peers_of
from tutelage.run.recipe import Recipe, load, parse

#: What a run uses when nothing else is said; everything is written into the run's recipe.
DEFAULTS: dict[str, Any] = {
    "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05},
    "train": {"epochs": 30, "decay": "cosine", "warmup": "1 epochs", "clip": 5.0, "evaluate_every": "1 epochs"},
}

NO_SECTIONS: Mapping[str, Any] = MappingProxyType({})


def recipe(
    *,
    student: str | Mapping[str, Any] | None,
    data: str | Mapping[str, Any] | None,
    teacher: str | Mapping[str, Any] | None = None,
    method: str | None = None,
    sets: Sequence[str] = (),
    fit_teacher: bool = True,
    sections: Mapping[str, Any] = NO_SECTIONS,
) -> Recipe:
    """Return the recipe that a few flags stand for.

    A teacher without weights, or with another number of classes than the data, is fitted to the data first, or
    refused without `fit_teacher`. Students that learn from each other are of one kind.

    Args:
        student: a model, or its section.
        data: a source, or its section.
        teacher: a model, or its section.
        method: methods joined with `+`; `kd` with a teacher, none without.
        sets: changes of single values, as `--set` takes them.
        fit_teacher: whether a teacher that needs it is fitted.
        sections: further sections; those of optimizer and loop lie over `DEFAULTS`.

    Raises:
        UserError: naming the flag that is missing or does not fit the others.
    """
    if student is None or data is None:
        raise UserError("give a recipe, or --student and --data (and --teacher): see tutelage distill --help")
    objective = sections.get("objective")
    if objective is None:
        objective = _objective(method, teacher is not None)
    elif method is not None:
        raise UserError("give a method or an objective, not both")
    given: dict[str, Any] = {"student": student, "data": data, "objective": objective, **_over_defaults(sections)}
    if peers := peers_of(objective):
        given.setdefault("peers", dict.fromkeys(peers, student))
    if teacher is not None:
        section = {"model": teacher} if isinstance(teacher, str) else dict(teacher)
        given["teacher"] = {"fit": "auto" if fit_teacher else "never", **section}
    if any(change.startswith("train.steps=") for change in sets):
        given["train"].pop("epochs", None)
    return parse(given, sets, where="command line" if not sections else "recipe")


def _objective(method: str | None, taught: bool) -> dict[str, Any]:
    """Return the objective of methods, which must fit to whether there is a teacher."""
    chosen = method or ("kd" if taught else None)
    stems = [stem.strip() for stem in (chosen or "").split("+") if stem.strip()]
    thirsty = [stem for stem in stems if methods.needs_teacher(stem)]
    if thirsty and not taught:
        raise UserError(f"--method {'+'.join(thirsty)} needs a --teacher")
    if taught and not thirsty:
        raise UserError(f"--method {chosen} reads no teacher; leave --teacher out, or add a method that reads one")
    return of_methods(chosen or "")


def _over_defaults(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections laid over the defaults; another optimizer or length takes the default's place."""
    found = {key: value for key, value in sections.items() if key != "objective"}
    for key, default in DEFAULTS.items():
        section = found.get(key, {})
        section = {"name": section} if isinstance(section, str) else dict(section)
        other = section.get("name", default.get("name")) != default.get("name")
        kept = {} if other else {k: v for k, v in default.items() if not (k == "epochs" and "steps" in section)}
        found[key] = {**kept, **section}
    return found


def overrides(
    before: Recipe, *, student: str | None, data: str | None, teacher: str | None, method: str | None
) -> list[str]:
    """Return the flags as changes to a recipe that was given too.

    Another model takes none of the options and weights of the recipe's; another teacher is fitted if it needs it.
    """
    if method is not None:
        raise UserError("--method belongs to the quick form; a recipe has its objective: change it with --set")
    changes = [f"data.source={json.dumps(data)}"] if data is not None else []
    if student is not None and student != before.student.model:
        changes.append(f"student={json.dumps({'model': student})}")
    if teacher is not None and (before.teacher is None or teacher != before.teacher.model):
        changes.append(f"teacher={json.dumps({'model': teacher, 'fit': 'auto'})}")
    return changes


def asked(
    name: str | None,
    *,
    student: str | None,
    data: str | None,
    teacher: str | None = None,
    method: str | None = None,
    sets: Sequence[str] = (),
    fit_teacher: bool | None = None,
) -> tuple[Recipe, str]:
    """Return the recipe a command asks for, by name or by flags, and a name for its run.

    Args:
        name: of a recipe.
        student: of the quick form, or in the place of the recipe's.
        data: the same.
        teacher: the same.
        method: of the quick form.
        sets: changes of single values.
        fit_teacher: whether a teacher that needs it is fitted first; None leaves it to the recipe.

    Raises:
        UserError: as `recipe` and `tutelage.run.recipe.load` do.
    """
    if name is not None:
        flags = overrides(load(name), student=student, data=data, teacher=teacher, method=method)
        if fit_teacher is not None:
            flags.append(f"teacher.fit={'auto' if fit_teacher else 'never'}")
        return load(name, [*flags, *sets]), Path(name).stem
    fits = fit_teacher is not False
    made = recipe(student=student, data=data, teacher=teacher, method=method, sets=sets, fit_teacher=fits)
    return made, name_of(made, method)


def name_of(made: Recipe, method: str | None) -> str:
    """Return what a run of a few flags is called: its method and its student."""
    alone = method is None and made.teacher is None
    return f"{'alone' if alone else method or 'kd'}-{made.student.model.rpartition(':')[2].rpartition('/')[2]}"
