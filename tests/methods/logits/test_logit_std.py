# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from method_case import MethodCase, gaussian, gradient, labelled_batch
from oracles import logit_std as oracle
from tutelage.core import Batch, Distiller, Entry, Facts, Objective, Outcome, Reads, Signals, Tap, Term
from tutelage.core.error import UserError
from tutelage.methods.features.mgd import MGD
from tutelage.methods.logits.dkd import DKD, dkd
from tutelage.methods.logits.kd import KD, kd
from tutelage.methods.logits.logit_std import Form, LogitStd, logit_std
from tutelage.methods.online.tf_nkd import TfNKD
from tutelage.run.objective import build
from tutelage.tasks.classification import Classification

Arrays = dict[str, NDArray[Any]]
SHAPE = {"logits": (6, 5)}
FORMS: dict[Form, str] = {"population": "paper", "sample": "code"}  # ours, the oracle's


def case() -> MethodCase:
    return MethodCase(
        term=lambda: LogitStd(inner=KD(temperature=2.0)),
        student=lambda seed: gaussian(seed, SHAPE),
        teacher=lambda seed: gaussian(seed + 1000, SHAPE, 2.0),
    )


def pair(seed: int = 0, rows: int = 6, classes: int = 5, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    drawn = gaussian(seed, {"student": (rows, classes), "teacher": (rows, classes)}, scale)
    return drawn["student"].double().requires_grad_(), drawn["teacher"].double()


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    form: Form = "sample" if meta["std_correction"] == 1 else "population"
    student = torch.tensor(arrays["s_logits"], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(arrays["t_logits"], dtype=torch.float64)
    batch = labelled_batch(torch.tensor(arrays["target"]), index=torch.arange(len(student)))
    sides = {"logits": student}, {"logits": teacher}
    inner = KD(temperature=meta["temperature"])
    decoupled = DKD(alpha=meta["dkd_alpha"], beta=meta["dkd_beta"], temperature=meta["temperature"])
    entry = meta["torchdistill_beta"] * LogitStd(inner=KD(temperature=meta["temperature"]), form=form)
    losses = {
        "loss": case().loss(LogitStd(inner=inner, form=form), *sides, batch),
        "loss_dkd": case().loss(LogitStd(inner=decoupled, form=form), *sides, batch),
    }
    for name in arrays:  # with the task's own loss; the settings are in the array's name
        if name.startswith("alt_torchdistill") and not name.endswith("_f32"):
            losses[name] = step(student, teacher, batch, meta["torchdistill_alpha"], entry)
    grads = {f"grad_s_logits__{name}": gradient(loss, student) for name, loss in losses.items()}
    grads["grad_s_logits"] = grads.pop("grad_s_logits__loss")
    scores = {
        f"out_z_{side}": logit_std(logits, form=form, eps=meta["eps"])
        for side, logits in (("student", student), ("teacher", teacher))
    }
    return {**losses, **grads, **scores}


def step(student: Tensor, teacher: Tensor, batch: Batch, task: float, entry: Entry) -> Tensor:
    """The weighted sum with the task's own loss, through the Objective."""
    sources = {
        "student": Signals(student, {"logits": student}),
        "teacher": Signals(teacher, {"logits": teacher}),
    }
    objective = Objective(task=task, logit_std=entry)
    total: Tensor = objective(sources, ["student"], batch, Classification(student.shape[1]), 0).total
    return total


# the equation, worked out by loops


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    classes=st.integers(2, 10),
    temperature=st.floats(0.25, 20),
    scale=st.floats(0.01, 30),
)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(form: Form, seed: int, rows: int, classes: int, temperature: float, scale: float) -> None:
    student, teacher = pair(seed, rows, classes, scale)
    plain = student.detach().numpy(), teacher.numpy()
    np.testing.assert_allclose(
        logit_std(teacher, form=form).numpy(), oracle.standardise(plain[1], FORMS[form]), rtol=1e-9, atol=1e-12
    )
    term = LogitStd(inner=KD(temperature=temperature), form=form)
    found = case().loss(term, {"logits": student}, {"logits": teacher}, case().batch())
    expected = oracle.logit_std(*plain, temperature, FORMS[form])
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Form) -> None:
    student, teacher = pair(1, rows=3, classes=4)
    standard = logit_std(teacher, form=form)
    assert torch.autograd.gradcheck(lambda s: kd(logit_std(s, form=form), standard, temperature=2.0), student)


# limits and identities


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), factor=st.floats(0.1, 50), shift=st.floats(-100, 100))
def test_size_and_shift_of_either_model_change_nothing(seed: int, factor: float, shift: float) -> None:
    student, _ = pair(seed)
    moved = logit_std(student * factor + shift)
    torch.testing.assert_close(moved, logit_std(student), rtol=1e-5, atol=1e-6)
    assert (moved.mean(1).abs() < 1e-9).all()
    torch.testing.assert_close(moved.std(1), torch.ones(6, dtype=torch.float64), rtol=1e-5, atol=0)


def test_the_forms_differ_by_a_factor() -> None:
    _, teacher = pair(2)
    torch.testing.assert_close(
        logit_std(teacher, form="population"), logit_std(teacher) * (5 / 4) ** 0.5, rtol=1e-6, atol=0
    )


def test_a_sample_has_a_temperature_of_its_own() -> None:
    _, teacher = pair(3)
    deviation = teacher.std(1, keepdim=True)
    torch.testing.assert_close(
        (logit_std(teacher) / 2).softmax(1), (teacher / (2 * deviation)).softmax(1), rtol=1e-6, atol=1e-9
    )


# what it wraps


def test_the_term_within_sees_standardised_logits_of_every_view_and_all_else_as_it_is() -> None:
    seen: list[Any] = []

    class Spy(Term):
        @property
        def reads(self) -> Reads:
            taps = Tap("logits"), Tap.parse("logits@strong"), Tap("map")
            return Reads(taps, taps)

        def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
            seen.append(student)

        def forward(self, *given: Any) -> Outcome:
            seen.extend(given[:2])
            return Outcome({"one": given[0].logits.sum(), "draw": given[3]}, {"kept": given[1]["map"]})

        def draw(self, *given: Any) -> Tensor:
            return torch.tensor(7.0)

        def commit(self, kept: Any) -> None:
            seen.append(kept["kept"])

        def param_groups(self) -> list[dict[str, Any]]:
            return [{"params": [], "lr": 3.0}]

        def caveats(self, facts: Facts) -> tuple[str, ...]:
            return (f"{facts.num_classes} classes",)

    tensors = gaussian(0, {"logits": (6, 5), "logits@strong": (6, 5), "map": (6, 2, 3, 3)})
    term = LogitStd(inner=Spy())
    here = case()
    term.build(here.signals(tensors), here.signals(tensors), here.facts)
    outcome = here.outcome(term, tensors, tensors, here.batch())
    term.commit(outcome.kept)
    for signals in seen[:3]:
        for name in ("logits", "logits@strong"):
            torch.testing.assert_close(signals[name], logit_std(tensors[name]), rtol=0, atol=0)
        assert signals["map"] is tensors["map"]
    assert seen[3] is tensors["map"]
    assert outcome.parts["draw"] == 7
    assert term.param_groups() == [{"params": [], "lr": 3.0}]
    assert term.caveats(here.facts) == ("5 classes",)
    assert term.card is not None
    assert term.card.labels == ("none",)
    assert term.reads.teacher[1].view == "strong"


def test_dkd_keeps_its_labels_and_its_parts() -> None:
    here = case()
    student, teacher = here.tensors()
    assert teacher is not None
    batch = here.batch()
    term = LogitStd(inner=DKD(temperature=2.0))
    assert term.card is not None
    assert term.card.labels == ("hard",)
    assert term.card.name == "Logit Standardization"
    parts = here.outcome(term, student, teacher, batch).parts
    standard = logit_std(student["logits"]), logit_std(teacher["logits"])
    expected = dkd(*standard, batch.target, batch.labelled, temperature=2.0)
    torch.testing.assert_close(dict(parts), expected)


def test_a_term_without_a_teacher() -> None:
    here = case()
    student, _ = here.tensors()
    term = LogitStd(inner=TfNKD())
    assert term.card is not None
    assert term.card.averages == "labelled"
    expected = TfNKD()(Signals(None, {"logits": logit_std(student["logits"])}), None, here.batch())
    torch.testing.assert_close(dict(here.outcome(term, student, None, here.batch()).parts), expected)


def test_a_recipe_nests_it() -> None:
    block = {"weight": 9, "form": "population", "inner": {"method": "dkd", "beta": 2.0}}
    term = build({"task": 0.1, "logit_std": block}).entries["logit_std"].term
    assert isinstance(term, LogitStd)
    assert isinstance(term.inner, DKD)
    assert (term.form, term.inner.beta) == ("population", 2.0)
    block["inner"] = {"method": "dkd", "bta": 2.0}
    with pytest.raises(
        UserError, match=r"^objective\.logit_std\.inner\.bta: unknown option of dkd; did you mean beta\?$"
    ):
        build({"logit_std": block})


def test_a_step() -> None:
    torch.manual_seed(0)
    batch = Batch.of(torch.rand(4, 3), torch.tensor([0, 2, -1, 4]))
    objective = Objective(task=0.1, logit_std=9 * LogitStd(inner=KD(temperature=2.0)))
    machine = Distiller(
        torch.nn.Linear(3, 5), objective, task=Classification(5), teacher=torch.nn.Linear(3, 5), sample=batch
    )
    losses = machine(batch, machine.observe(batch))
    losses.total.backward()
    assert all(p.grad is not None and p.grad.any() for p in machine.parameters())
    machine.close()


# odd cases


def test_no_rows_give_a_connected_zero() -> None:
    here, student = case(), torch.zeros(0, 5, requires_grad=True)
    loss = here.loss(here.term(), {"logits": student}, {"logits": torch.zeros(0, 5)}, Batch.of(torch.zeros(0, 1)))
    assert loss.item() == 0
    assert gradient(loss, student).shape == (0, 5)


@pytest.mark.parametrize("value", [0.0, 0.3])
@pytest.mark.parametrize("form", FORMS)
def test_constant_logits_have_no_slope(form: Form, value: float) -> None:
    student = torch.full((2, 10), value, requires_grad=True)
    teacher = gaussian(4, {"logits": (2, 10)})["logits"]
    loss = case().loss(LogitStd(inner=KD(), form=form), {"logits": student}, {"logits": teacher}, case().batch())
    assert loss > 0
    assert not gradient(loss, student).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_extremes(form: Form, dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0, 0, 0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4], [0, 1, 0]], dtype=dtype)
    term = LogitStd(inner=KD(temperature=2.0), form=form)
    loss = case().loss(term, {"logits": student}, {"logits": teacher}, case().batch())
    expected = oracle.logit_std(student.detach().double().numpy(), teacher.double().numpy(), 2.0, FORMS[form])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert gradient(loss, student).isfinite().all()


# errors


@pytest.mark.parametrize("shape", [(2, 1), (2, 5, 8, 8)])
def test_logits_that_do_not_fit(shape: tuple[int, ...]) -> None:
    said = f"logit_std takes logits [B, K] of two classes or more, not {[*shape]}"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        logit_std(torch.zeros(shape))


def test_a_term_that_reads_no_logits() -> None:
    with pytest.raises(UserError, match=r"^logit_std standardises logits, and MGD reads none$"):
        LogitStd(inner=MGD())


def test_an_unknown_form() -> None:
    with pytest.raises(UserError, match=r"^form 'paper' is not known; valid: population, sample$"):
        LogitStd(inner=KD(), form="paper")  # type: ignore[arg-type]
