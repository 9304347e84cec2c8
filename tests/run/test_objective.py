# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping
from typing import Any, Literal

import pytest
from torch import Tensor

from tutelage import methods
from tutelage.core import Batch, Signals, Term
from tutelage.core.error import UserError
from tutelage.methods.features.mgd import MGD
from tutelage.methods.logits.kd import KD
from tutelage.run.objective import build, of_methods


class Own(Term):
    """A term of a user's own, which may hold another."""

    def __init__(
        self,
        *,
        size: int = 3,
        kind: Literal["soft", "hard"] = "soft",
        inner: Term | None = None,
        parts: tuple[float, float] = (1.0, 2.0),
    ) -> None:
        super().__init__()
        self.size, self.kind, self.inner, self.parts = size, kind, inner, parts

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch, *draws: Any) -> Tensor:
        return student.logits.sum() * self.size


OWN = f"{__name__}:Own"


def wrong(section: Mapping[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        build(section)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_label_is_the_method_unless_it_is_named() -> None:
    found = build({"task": 0.1, "kd": {"weight": 0.9, "temperature": 2}, "hot": {"method": "kd", "weight": 0.2}})
    assert found.labels == ("task", "kd", "hot")
    assert [found.weight(label, 0) for label in found.labels] == [0.1, 0.9, 0.2]
    first, second = (found.entries[label].term for label in ("kd", "hot"))
    assert isinstance(first, KD)
    assert isinstance(second, KD)
    assert (first.temperature, second.temperature) == (2, 4)


def test_a_number_is_a_weight_and_the_task_weighs_nothing_unless_said() -> None:
    found = build({"mgd": 7e-5})
    assert found.weight("mgd", 0) == 7e-5
    assert found.weight("task", 0) == 0
    assert isinstance(found.entries["mgd"].term, MGD)


def test_sources_and_schedules_are_read() -> None:
    found = build({"kd": {"weight": {"linear": [0, 2], "until": "4 steps"}, "teacher": "student@strong", "live": True}})
    entry = found.entries["kd"]
    assert (entry.student, entry.teacher, entry.live) == ("student", "student@strong", True)
    assert found.weight("kd", 2) == 1.0


def test_a_term_of_ones_own_is_a_dotted_path_and_may_hold_another() -> None:
    block = {"method": OWN, "size": 5, "kind": "hard", "parts": [3, 4], "inner": {"method": "kd", "temperature": 2}}
    term = build({"task": 1.0, "mine": block}).entries["mine"].term
    assert isinstance(term, Own)
    assert (term.size, term.kind, term.parts) == (5, "hard", (3.0, 4.0))
    assert isinstance(term.inner, KD)
    assert term.inner.temperature == 2


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"kdd": 1}, "objective.kdd: unknown method 'kdd'; did you mean kd?"),
        ({"x": {"method": "kdd"}}, "objective.x: unknown method 'kdd'; did you mean kd?"),
        ({"kd": {"tempreature": 2}}, "objective.kd.tempreature: unknown option of kd; did you mean temperature?"),
        ({"kd": {"weigth": 2}}, "objective.kd.weigth: unknown option of kd; did you mean weight?"),
        ({"kd": {"temperature": "hot"}}, "objective.kd.temperature: should be a valid number, not 'hot'"),
        ({"kd": {"form": "none"}}, "objective.kd.form: 'none' is not known; valid: cross_entropy, kl"),
        ({"kd": {"temperature": 0}}, "objective.kd: temperature must be > 0, not 0.0"),
        ({"kd": "strong"}, "objective.kd.weight: a weight is a number or a schedule, not 'strong'"),
        ({"kd": None}, "objective.kd.weight: a weight is a number or a schedule, not None"),
        ({"kd": {"weight": {"linear": [0]}}}, "objective.kd.weight: linear takes two numbers, [start, end]"),
        ({"task": "x"}, "objective.task: a weight is a number or a schedule, not 'x'"),
        ({"kd": {"live": "yes"}}, "objective.kd.live: should be true or false, not 'yes'"),
        ({"kd": {"teacher": 3}}, "objective.kd.teacher: should be the name of a source, not 3"),
        ({"a.b": {"method": "kd"}}, "objective.a.b: this label is taken or not a plain word; choose another"),
        ({"m": {"method": "nowhere:Own"}}, "objective.m: method 'nowhere:Own': cannot import 'nowhere'"),
        (
            {"m": {"method": f"{__name__}:Owm"}},
            f"objective.m: method '{__name__}:Owm': {__name__} has no 'Owm'; did you",
        ),
        ({"m": {"method": f"{__name__}:wrong"}}, f"objective.m: method '{__name__}:wrong' is not a Term"),
        ({"m": {"method": OWN, "size": 1.5}}, "objective.m.size: should be a valid integer, not 1.5"),
        ({"m": {"method": OWN, "parts": [1]}}, "objective.m.parts.1: missing"),
        ({"m": {"method": OWN, "inner": 3}}, "objective.m.inner: should be an instance of Term, not 3"),
        ({"m": {"method": OWN, "inner": {"method": "kd", "tmp": 1}}}, "objective.m.inner.tmp: unknown option of kd"),
    ],
)
def test_a_fault_is_named_with_its_place(section: Mapping[str, Any], said: str) -> None:
    assert wrong(section).startswith(said)


@pytest.mark.parametrize("stem", methods.catalogue())
def test_every_objective_that_a_method_states_can_be_built(stem: str) -> None:
    entry = methods.entry(stem)
    found = build(entry.objective)
    assert set(found.labels) >= set(entry.objective)
    assert any(found.final_weight(label) for label in found.labels)


def test_methods_are_joined_with_their_own_weights() -> None:
    found = of_methods("kd+mgd")
    assert found == {
        "task": 0.1,
        "kd": {"weight": 0.9},
        "mgd": {"weight": 7e-5, "mask": "channel", "mask_ratio": 0.15},
    }
    assert of_methods(" mgd + kd ") == {**found}
    assert of_methods("") == {"task": 1.0}
    with pytest.raises(UserError, match=r"unknown method 'kdd'; did you mean kd\?"):
        of_methods("kdd+mgd")
