# SPDX-License-Identifier: Apache-2.0
"""Which tasks a method works with."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
import yaml

from tutelage import methods
from tutelage.core.card import Listing
from tutelage.core.error import UserError
from tutelage.core.tap import is_role
from tutelage.run.recipe import SHIPPED, load
from tutelage.run.suits import base, provided, suited

DEMOS = sorted(stem for stem in methods.catalogue() if (SHIPPED / stem / "demo.yaml").exists())


def reading(entry: Listing, **sides: tuple[str, ...]) -> Listing:
    return replace(entry, card=replace(entry.card, reads=sides))


@pytest.mark.parametrize("stem", DEMOS)
def test_the_task_of_a_demo_is_among_those_its_method_works_with(stem: str) -> None:
    demo = load(str(SHIPPED / stem / "demo.yaml"))
    assert demo.compare is not None
    own_taps = "_taps:" in yaml.safe_dump(demo.compare.arms)
    assert own_taps or demo.task.name in suited(methods.entry(stem))


@pytest.mark.parametrize("name", provided())
def test_roles_are_those_of_the_task(name: str) -> None:
    home = import_module(f"tutelage.tasks.{name}")
    task = next(value for value in vars(home).values() if getattr(value, "name", None) == name)
    assert provided()[name] == set(task.provides)


def test_every_task_is_found() -> None:
    assert {"classification", "language"} <= set(provided())
    assert all(provided().values())


def test_every_role_of_a_card_is_a_role_by_its_base() -> None:
    for stem, card in methods.cards().items():
        for role in (role for side in card.reads.values() for role in side):
            assert is_role(base(role)) or is_role(f"{base(role)}[0]"), (stem, role)


def test_a_family_of_a_task_is_for_this_task_alone() -> None:
    kd, gkd = methods.entry("kd"), methods.entry("gkd")
    assert suited(kd) == ("classification",)  # an answer a token is another family's
    assert suited(gkd) == ("language",)
    assert suited(reading(gkd, student=("map",))) == ()  # a task that does not offer what is read


def test_a_role_that_only_one_side_reads_counts_too() -> None:
    at = methods.entry("at")
    assert "classification" in suited(at)
    assert suited(reading(at, student=("stages[*]",), teacher=("hidden[0]", "stages[*]"))) != suited(at)
    assert "language" not in suited(at)
    assert suited(reading(at, student=("hidden[*]",)))[-1:] == ("language",)


@pytest.mark.parametrize("stem", ["kd", "dkd", "dist", "nkd"])
def test_what_is_said_not_to_work_is_refused(stem: str) -> None:
    assert "language" not in suited(methods.entry(stem))
    compare = getattr(methods.module(stem), stem)
    more = () if methods.cards()[stem].labels == ("none",) else (torch.zeros(2, dtype=torch.int64),)
    with pytest.raises(UserError):
        compare(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5), *more)
