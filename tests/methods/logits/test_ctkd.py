# SPDX-License-Identifier: Apache-2.0
import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from method_case import MethodCase, Tensors, gaussian, gradient, labelled_batch
from oracles import ctkd as oracle
from tutelage.core import Batch, Distiller, Draw, Facts, Objective, Term
from tutelage.core.error import UserError
from tutelage.methods.features.mgd import MGD
from tutelage.methods.logits.ctkd import CTKD, Ramp, ctkd, kd_at, kd_each, strength
from tutelage.methods.logits.dkd import DKD, dkd
from tutelage.methods.logits.kd import KD, kd
from tutelage.methods.logits.logit_std import LogitStd, logit_std
from tutelage.run.objective import build
from tutelage.tasks.classification import Classification

Arrays = dict[str, NDArray[Any]]
SHAPE = {"logits": (6, 5)}


def case(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: CTKD(**options),
        student=lambda seed: gaussian(seed, SHAPE),
        teacher=lambda seed: gaussian(seed + 1000, SHAPE, 2.0),
    )


def pair(seed: int = 0, rows: int = 6, classes: int = 5, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    drawn = gaussian(seed, {"student": (rows, classes), "teacher": (rows, classes)}, scale)
    return drawn["student"].double().requires_grad_(), drawn["teacher"].double()


def built(term: CTKD, sides: tuple[Tensors, Tensors], raw: float = 1.0) -> CTKD:
    """A term with this learned number, in float64."""
    here = case()
    term.build(here.signals(sides[0]).detach(), here.signals(sides[1]), Facts())
    term.double()
    with torch.no_grad():
        term.raw.fill_(raw)
    return term


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    student = torch.tensor(arrays["s_logits"], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(arrays["t_logits"], dtype=torch.float64)
    sides: tuple[Tensors, Tensors] = {"logits": student}, {"logits": teacher}
    batch = labelled_batch(torch.tensor(arrays["target"]), index=torch.arange(len(student)))
    draws = torch.tensor(-meta["lambda_"], dtype=torch.float64), None  # the code carries the sign
    options = {"start": meta["t_start"], "span": meta["t_end"]}
    raw = float(arrays["w_global_T"][0])
    plain = built(CTKD(**options), sides, raw)
    around = built(CTKD(inner=DKD(alpha=meta["dkd_alpha"], beta=meta["dkd_beta"]), **options), sides, raw)
    loss = case().loss(plain, *sides, batch, draws)
    decoupled = case().loss(around, *sides, batch, draws)
    each = kd_each(student, teacher, torch.tensor(arrays["t_instance"]))
    # not the linear ramp: the released one stops one step short of full strength
    grown = np.array([strength(epoch, ramp_epochs=meta["decay_loops"]) for epoch in range(13)])
    return {
        "loss": loss,
        "grad_s_logits": gradient(loss, student),
        "grad_w_global_T": gradient(loss, plain.raw),
        "loss_dkd": decoupled,
        "grad_s_logits__loss_dkd": gradient(decoupled, student),
        "loss_instance": each,
        "grad_s_logits__loss_instance": gradient(each, student),
        "out_temperature": ctkd(plain.raw, **options),
        "out_lambda_cosine_epoch0to12": meta["decay_max"] + (meta["decay_min"] - meta["decay_max"]) * grown,
    }


# the equation, worked out by loops


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    classes=st.integers(1, 10),
    raw=st.floats(-5, 5),
    factor=st.floats(0, 1),
    scale=st.floats(0, 30),
)
def test_equals_the_loops(seed: int, rows: int, classes: int, raw: float, factor: float, scale: float) -> None:
    student, teacher = pair(seed, rows, classes, scale)
    sides: tuple[Tensors, Tensors] = {"logits": student}, {"logits": teacher}
    term = built(CTKD(start=0.5, span=9.0), sides, raw)
    draws = torch.tensor(factor, dtype=torch.float64), None
    loss = case().loss(term, *sides, case().batch(), draws)
    plain = student.detach().numpy(), teacher.numpy()
    expected = oracle.ctkd(*plain, raw, 0.5, 9.0)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-10)
    slope = oracle.reversed_gradient(*plain, raw, factor, 0.5, 9.0)
    assert gradient(loss, term.raw).item() == pytest.approx(slope, rel=1e-7, abs=1e-8)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 6), classes=st.integers(1, 10), scale=st.floats(0, 30))
def test_a_temperature_for_each_sample_equals_the_loops(seed: int, rows: int, classes: int, scale: float) -> None:
    student, teacher = pair(seed, rows, classes, scale)
    temperature = 1 + 20 * torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = oracle.instance(student.detach().numpy(), teacher.numpy(), temperature.numpy())
    assert kd_each(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("ramp", ["cosine", "linear"])
@pytest.mark.parametrize("epochs", [1, 10, 7])
def test_the_strength_equals_the_loops(ramp: Ramp, epochs: int) -> None:
    found = [strength(epoch, ramp_epochs=epochs, ramp=ramp) for epoch in range(15)]
    assert found == pytest.approx([oracle.strength(epoch, epochs, ramp) for epoch in range(15)])


def test_no_ramp_is_full_strength() -> None:
    assert strength(1, ramp_epochs=0) == 1


def test_gradcheck_of_both_losses_also_in_the_temperature() -> None:
    student, teacher = pair(1, rows=3, classes=4)
    one = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    each = torch.tensor([1.5, 3.0, 9.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, t: kd_at(s, teacher, t), (student, one))
    assert torch.autograd.gradcheck(lambda s, t: kd_each(s, teacher, t), (student, each))


# the temperature


@pytest.mark.parametrize("raw", [-2.0, 0.0, 1.0])
def test_the_value_does_not_know_the_strength_and_the_gradient_is_turned_round(raw: float) -> None:
    number = torch.tensor(raw, dtype=torch.float64, requires_grad=True)
    plain = 2 + 5 * torch.sigmoid(number)
    for factor in (0.0, 0.3, 1.0):
        found = ctkd(number, factor, start=2.0, span=5.0)
        assert found == plain
        torch.testing.assert_close(gradient(found, number), -factor * gradient(plain, number))


def test_it_begins_at_15_6() -> None:
    term = case().built()
    assert isinstance(term, CTKD)
    assert ctkd(term.raw).item() == pytest.approx(15.6212, abs=1e-4)


def test_the_strength_grows_by_epochs() -> None:
    here = case()
    term, batch = CTKD(ramp="linear", ramp_epochs=4), here.batch()
    student, teacher = here.tensors()
    sides = here.signals(student), here.teach(teacher)
    term.build(*sides, Facts(steps_per_epoch=3))
    found = [term.draw(*sides, batch, Draw(0, step, "ctkd"))[0].item() for step in range(15)]
    assert found == [0.25] * 3 + [0.5] * 3 + [0.75] * 3 + [1.0] * 6


def test_the_student_descends_and_the_temperature_climbs() -> None:
    student, teacher = pair(2)
    sides: tuple[Tensors, Tensors] = {"logits": student}, {"logits": teacher}
    term = built(CTKD(), sides, -1.0)
    draws = torch.tensor(1.0, dtype=torch.float64), None
    loss = case().loss(term, *sides, case().batch(), draws)
    by_student, by_number = gradient(loss, student), gradient(loss, term.raw)

    def after(tensor: Tensor, change: Tensor) -> float:
        with torch.no_grad():
            tensor -= 1e-3 * change
            moved = case().loss(term, *sides, case().batch(), draws).item()
            tensor += 1e-3 * change
        return moved

    assert after(student, by_student) < loss.item() < after(term.raw, by_number)


# what it wraps


def test_around_kd_it_is_itself() -> None:
    here = case()
    student, teacher = pair(3)
    sides: tuple[Tensors, Tensors] = {"logits": student}, {"logits": teacher}
    draws = torch.tensor(0.7, dtype=torch.float64), None
    one, other = built(CTKD(), sides), built(CTKD(inner=KD(temperature=3.0)), sides)
    losses = [here.loss(term, *sides, here.batch(), draws) for term in (one, other)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(gradient(losses[0], one.raw), gradient(losses[1], other.raw))
    fixed = kd(student, teacher, temperature=ctkd(one.raw).item())
    torch.testing.assert_close(losses[0], fixed)


def test_around_dkd_the_temperature_has_a_finite_gradient() -> None:
    here = case()
    student, teacher = pair(4)
    sides: tuple[Tensors, Tensors] = {"logits": student}, {"logits": 40 * teacher}
    term = built(CTKD(inner=DKD(beta=2.0)), sides, -3.0)
    draws = torch.tensor(1.0, dtype=torch.float64), None
    parts = here.outcome(term, *sides, here.batch(), draws).parts
    batch = here.batch()
    expected = dkd(student, 40 * teacher, batch.target, batch.labelled, beta=2.0, temperature=ctkd(term.raw).item())
    torch.testing.assert_close(dict(parts), expected)
    slope = gradient(parts["target"] + parts["nontarget"], term.raw)
    assert slope.isfinite().all()
    assert slope.any()
    assert term.card.labels == ("hard",)
    assert term.card.adversarial


def test_inside_standardised_logits() -> None:
    here = MethodCase(term=lambda: LogitStd(inner=CTKD()), student=case().student, teacher=case().teacher)
    student, teacher = here.tensors()
    assert teacher is not None
    loss = here.loss(here.built(), student, teacher, here.batch())
    temperature = ctkd(torch.ones(())).item()
    expected = kd(logit_std(student["logits"]), logit_std(teacher["logits"]), temperature=temperature)
    torch.testing.assert_close(loss, expected)


def test_the_term_within_keeps_its_layers_its_noise_and_its_groups() -> None:
    class Inner(Term):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = 2.0

        def build(self, *given: Any) -> None:
            self.layer = nn.Linear(1, 1)

        def draw(self, *given: Any) -> Tensor:
            return torch.tensor(5.0)

        def forward(self, *given: Any) -> Tensor:
            found: Tensor = given[3] * self.temperature
            return found

        def param_groups(self) -> list[dict[str, Any]]:
            return [{"params": [*self.layer.parameters()], "lr": 3.0}]

    here = case(inner=Inner())
    student, teacher = here.tensors()
    term = here.built()
    loss = here.loss(term, student, teacher, here.batch())
    assert loss.item() == pytest.approx(5 * 15.6212, abs=1e-3)
    assert isinstance(term, CTKD)
    own, inner = term.param_groups()
    assert own["params"] == [term.raw]
    assert (len(inner["params"]), inner["lr"]) == (2, 3.0)
    assert sorted(term.state_dict()) == ["inner.layer.bias", "inner.layer.weight", "raw"]


def test_compiled_around_another_term() -> None:
    here = case(inner=DKD())
    student, teacher = here.tensors()
    term, batch = here.built(), here.batch()
    draws = here.draws(term, student, teacher, batch)
    loss = here.loss(copy.deepcopy(term), student, teacher, batch, draws)
    torch._dynamo.reset()
    fast: Any = torch.compile(term, fullgraph=True, backend="aot_eager")
    again = here.loss(fast, student, teacher, batch, draws)
    torch.testing.assert_close(again, loss)
    assert isinstance(term, CTKD)
    assert gradient(again, term.raw).isfinite().all()


def test_a_recipe_nests_it() -> None:
    block = {"weight": 0.9, "ramp": "linear", "inner": {"method": "dkd", "beta": 2.0}}
    term = build({"task": 0.1, "ctkd": block}).entries["ctkd"].term
    assert isinstance(term, CTKD)
    assert isinstance(term.inner, DKD)
    assert (term.ramp, term.inner.beta) == ("linear", 2.0)
    assert build({"ctkd": 0.9}).entries["ctkd"].term.inner is None


def test_a_step_moves_the_temperature() -> None:
    torch.manual_seed(0)
    batch = Batch.of(torch.rand(8, 3), torch.tensor([0, 2, -1, 4] * 2))
    objective = Objective(task=0.1, ctkd=0.9 * CTKD(ramp_epochs=1))
    machine = Distiller(nn.Linear(3, 5), objective, task=Classification(5), teacher=nn.Linear(3, 5), sample=batch)
    optimizer = torch.optim.SGD(machine.param_groups(weight_decay=0.1), lr=100.0)
    term = objective.entries["ctkd"].term
    assert isinstance(term, CTKD)
    before = term.raw.item()
    losses = machine(batch, machine.observe(batch))
    losses.total.backward()
    optimizer.step()
    assert term.raw.item() != before
    machine.close()


# one temperature a sample


def test_the_network_gives_each_sample_its_own_and_teaches_the_student_nothing() -> None:
    here = case(form="instance")
    student, teacher = here.tensors(dtype=torch.float64)
    assert teacher is not None
    term = here.built(dtype=torch.float64)
    assert isinstance(term, CTKD)
    draws = torch.tensor(1.0, dtype=torch.float64), None
    loss = here.loss(term, student, teacher, here.batch(), draws)
    with torch.no_grad():
        raw = term.network(torch.cat([student["logits"], teacher["logits"]], dim=1))[:, 0]
    assert raw.std() > 0.01
    expected = kd_each(student["logits"], teacher["logits"], ctkd(raw))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, student["logits"]), gradient(expected, student["logits"]))
    assert all(gradient(loss, p).isfinite().all() for p in term.parameters())
    assert not term.card.zero_at_teacher
    assert [*term.param_groups()[0]["params"]] == [*term.parameters()]


# odd cases


@pytest.mark.parametrize("form", ["global", "instance"])
def test_no_rows_give_a_connected_zero(form: Any) -> None:
    here, student = case(form=form), torch.zeros(0, 5, requires_grad=True)
    term = here.built()
    loss = here.loss(term, {"logits": student}, {"logits": torch.zeros(0, 5)}, Batch.of(torch.zeros(0, 1)))
    assert loss.item() == 0
    assert gradient(loss, student).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"form": "instance"}, {"inner": True}])
def test_half_precision_extremes(options: dict[str, Any], dtype: torch.dtype) -> None:
    here = case(**{**options, **({"inner": DKD()} if "inner" in options else {})})
    term = here.built(dtype=dtype)
    student = {"logits": torch.tensor([[1e4, -1e4, 0, 0, 0], [-1e4, 1e4, 1e4, 0, 0]], dtype=dtype, requires_grad=True)}
    teacher = {"logits": torch.tensor([[-1e4, 1e4, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=dtype)}
    batch = Batch.of(torch.zeros(2, 1), torch.tensor([0, -1]))
    loss = here.loss(term, student, teacher, batch)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    for tensor in (student["logits"], *term.parameters()):
        assert gradient(loss, tensor).isfinite().all()


# errors


@pytest.mark.parametrize("inner", [MGD(), LogitStd(inner=KD())])
def test_a_term_without_a_temperature(inner: Term) -> None:
    said = f"ctkd learns a temperature, and {type(inner).__name__} has none; wrap kd, dkd, ..."
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        CTKD(inner=inner)


def test_logits_of_two_shapes() -> None:
    here = case()
    said = "ctkd compares logits of one shape: the student's are [2, 3], the teacher's [2, 4]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        CTKD().build(here.signals({"logits": torch.zeros(2, 3)}), here.signals({"logits": torch.zeros(2, 4)}), Facts())


def test_options_that_are_none() -> None:
    with pytest.raises(UserError, match=r"^form 'sample' is not known; valid: global, instance$"):
        CTKD(form="sample")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^ramp 'step' is not known; valid: cosine, linear$"):
        CTKD(ramp="step")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^start must be > 0 and span >= 0, not 0 and 20.0$"):
        CTKD(start=0)
    with pytest.raises(UserError, match=r"leave inner out$"):
        CTKD(inner=KD(), form="instance")
