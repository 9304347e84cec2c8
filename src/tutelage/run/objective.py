# SPDX-License-Identifier: Apache-2.0
"""From the objective section of a recipe to terms: a method's constructor is its schema."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from tutelage import methods
from tutelage.core import Entry, Feeder, Objective, Rebuild, Term
from tutelage.core.error import UserError
from tutelage.core.schedule import Schedule
from tutelage.run.recipe import explain

BINDING = ("method", "weight", "student", "teacher", "live")

T = TypeVar("T")
ROLE_OPTIONS = ("feeder", "rebuild")


def schema(kind: type[Any]) -> type[BaseModel]:
    """Return a validation model made from a constructor's signature: strict about names and types."""
    hints = get_type_hints(kind.__init__)
    fields: dict[str, Any] = {
        name: (hints.get(name, Any), ... if parameter.default is parameter.empty else parameter.default)
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)  # of a class without __init__
    }
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    return create_model(kind.__name__, __config__=config, **fields)


def checked(kind: type[T], options: Mapping[str, Any], where: str, also: Sequence[str] = ()) -> T:
    """Return an instance made from the options of a recipe.

    Args:
        kind: a class whose constructor is the schema.
        options: of the constructor.
        where: their place in the recipe.
        also: further words that are valid there.

    Raises:
        UserError: naming the place and the nearest valid option.
    """
    model = schema(kind)
    try:
        found = model.model_validate(dict(options))
    except ValidationError as error:
        stem = kind.__module__.rpartition(".")[2]
        said = explain(error, model, also).replace("unknown key", f"unknown option of {stem}")
        raise UserError(f"{where}.{said}") from error
    try:
        return kind(**{key: getattr(found, key) for key in options})
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def term(name: str, options: Mapping[str, Any], where: str, also: Sequence[str] = ()) -> Term:
    """Return a term by method name and options; an option may be a term itself, as `{method: STEM, ...}`.

    Args:
        name: of the method.
        options: of its constructor.
        where: their place in the recipe.
        also: further words that are valid there.

    Raises:
        UserError: naming the place and the nearest valid option.
    """
    made = {
        key: term(str(value["method"]), {k: v for k, v in value.items() if k != "method"}, f"{where}.{key}")
        if isinstance(value, Mapping) and "method" in value
        else value
        for key, value in options.items()
    }
    try:
        kind = methods.find(name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return checked(kind, made, where, also)


def build(section: Mapping[str, Any]) -> Objective:
    """Return the objective of a recipe.

    `task` is a weight; every other label is a weight and options, `kd: {weight: 0.9, temperature: 4}`, where
    the method is the label unless `method:` names it. A bare number is a weight with the method's defaults. A
    weight `{share: 0.5}` is 1 until it was measured, see `tutelage.run.share`.

    Raises:
        UserError: naming the place and the nearest valid word.
    """
    entries: dict[str, Entry] = {}
    for label, given in section.items():
        if label == "task":
            continue
        block = dict(given) if isinstance(given, Mapping) else {"weight": given}
        where = f"objective.{label}"
        binding = {key: block.pop(key) for key in BINDING if key in block}
        for word in ROLE_OPTIONS:
            block.pop(word, None)
        made = term(str(binding.pop("method", label)), block, where, (*BINDING, *ROLE_OPTIONS))
        try:
            binding["weight"] = _weight(binding.get("weight", 1.0))
        except UserError as error:
            raise UserError(f"{where}.weight: {error}") from error
        for word, kind in (("student", str), ("teacher", str), ("live", bool)):
            if not isinstance(binding.get(word, kind()), kind):
                what = "true or false" if kind is bool else "the name of a source"
                raise UserError(f"{where}.{word}: should be {what}, not {binding[word]!r}")
        entries[label] = Entry(made, **binding)
    try:
        task = _weight(section.get("task", 0.0))
    except UserError as error:
        raise UserError(f"objective.task: {error}") from error
    return Objective(entries, task=task)


def _weight(given: Any) -> Schedule:
    """Return a weight's schedule.

    Raises:
        UserError: if it is none, or a share that is none.
    """
    if not (isinstance(given, Mapping) and "share" in given):
        return Schedule.parse(given)
    share = given["share"]
    if len(given) > 1 or isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise UserError(f"a share stands alone and lies between 0 and 1, as in {{share: 0.5}}, not {dict(given)}")
    return Schedule.parse(1.0)


def feeders_of(section: Mapping[str, Any]) -> list[Feeder]:
    """Return the feeders that stand beside the terms of an objective: see `_roles`."""
    return _roles(section, Feeder, "feeder")


def rebuilds_of(section: Mapping[str, Any]) -> list[Rebuild]:
    """Return the changes of the student that stand beside the terms of an objective: see `_roles`."""
    return _roles(section, Rebuild, "rebuild")


def _roles(section: Mapping[str, Any], role: Any, word: str) -> list[Any]:
    """Return what stands in another role beside the terms of an objective, in its order.

    Their options are a block of their own in the term's: `simkd: {weight: 1, rebuild: {factor: 4}}`.

    Raises:
        UserError: naming the place and the nearest valid option.
    """
    found = []
    for label, given in section.items():
        if label == "task":
            continue
        block = given if isinstance(given, Mapping) else {}
        try:
            kind = methods.role(str(block.get("method", label)), role)
        except UserError as error:
            raise UserError(f"objective.{label}: {error}") from error
        if kind is not None:
            found.append(checked(kind, block.get(word, {}), f"objective.{label}.{word}"))
        elif word in block:
            raise UserError(f"objective.{label}.{word}: {label} takes no {word}")
    return found


def peers_of(section: Mapping[str, Any]) -> list[str]:
    """Return the students that an objective names beside the first one.

    Example:
        >>> peers_of({"task": 1.0, "dml": {"student": "student", "teacher": "peer"}})
        ['peer']
    """
    blocks = [block for label, block in section.items() if label != "task" and isinstance(block, Mapping)]
    named = [str(block[word]).partition("@")[0] for block in blocks for word in ("student", "teacher") if word in block]
    return [name for name in dict.fromkeys(named) if name not in ("student", "teacher")]


def of_methods(text: str) -> dict[str, Any]:
    """Return the objective of methods joined with `+`: each keeps its own weight, the task the smallest.

    Example:
        >>> of_methods("kd")
        {'task': 0.1, 'kd': {'weight': 0.9}}
    """
    joined: dict[str, Any] = {}
    task_weights = []
    for stem in filter(None, (part.strip() for part in text.split("+"))):
        section = dict(methods.entry(stem).objective)
        task_weights.append(section.pop("task", 1.0))
        joined.update(section)
    if not joined:
        return {"task": 1.0}
    numbers = [w for w in task_weights if isinstance(w, (int, float))]
    return {"task": min(numbers) if len(numbers) == len(task_weights) else task_weights[0], **joined}
