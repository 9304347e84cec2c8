# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from golden_answer import with_gradients
from method_case import MethodCase, Tensors, gaussian
from oracles import ft as oracle
from tutelage.core import Batch, Distiller, Entry, Facts, Objective, Signals
from tutelage.core.error import UserError
from tutelage.methods.features.ft import FORMS, FT, OBJECTIVE, ft, reconstruction
from tutelage.models.load import load
from tutelage.tasks.classification import Classification

Arrays = dict[str, NDArray[Any]]


def case(rows: int = 6, **options: Any) -> MethodCase:
    options = {"pretraining": 0.0, **options}
    return MethodCase(
        term=lambda: FT(**options),
        # large, that the factors come from the maps and not from the layers' biases
        student=lambda seed: gaussian(seed, {"map": (rows, 4, 3, 3)}, 5.0),
        teacher=lambda seed: gaussian(seed + 1000, {"map": (rows, 6, 3, 3)}, 5.0),
    )


def ours(name: str) -> str:
    """Our name of a weight in the golden files."""
    return (
        name.removeprefix("w_")
        .replace("paraphraser.conv", "encoder.conv")
        .replace("paraphraser.deconv", "decoder.deconv")
    )


def loaded(student: Tensor, teacher: Tensor, weights: Tensors, **options: Any) -> FT:
    """The term with these weights, in the tensors' type."""
    term = FT(**options)
    term.build(Signals(None, {"map": student.detach()}), Signals(None, {"map": teacher}), Facts())
    term.to(student.dtype)
    term.load_state_dict(weights, strict=bool(weights))
    return term


def parts(term: FT, student: Tensor, teacher: Tensor, taught: bool) -> dict[str, Tensor]:
    sides = Signals(None, {"map": student}), Signals(None, {"map": teacher})
    return term(*sides, case().batch(), torch.tensor(float(taught)))  # type: ignore[no-any-return]


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    held = {name: torch.tensor(array, dtype=torch.float64) for name, array in arrays.items()}
    student, teacher = held["s_feat"].requires_grad_(), held["t_feat"]
    weights = {ours(name): value for name, value in held.items() if name.startswith("w_")}
    answer: dict[str, Any] = {}
    names: dict[str, Any] = {
        **{"loss": "paper", "alt_zoo": "paper", "alt_torchdistill_p1": "paper"},
        **{"alt_torchdistill_p2": "l2", "alt_repdistiller": "attention"},
    }
    losses = {}
    term = loaded(student, teacher, weights, rate=meta["k"])
    for name, form in names.items():
        term.form = form
        losses[name] = parts(term, student, teacher, True)["factor"]
    losses["loss_paraphraser_reconstruction"] = parts(term, student, teacher, False)["reconstruction"]
    named = dict(term.named_parameters())
    free = {name: named[ours(name)] for name in held if name.startswith("w_")}
    answer |= with_gradients(losses, {"s_feat": student, **free}, arrays)
    return answer | {"out_factor_s": term.translator(student), "out_factor_t": term.encoder(teacher)}


# the equation, worked out by loops


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 2),
    widths=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    rate=st.sampled_from([0.1, 0.5, 1.0, 1.5]),
)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(
    form: Any, seed: int, rows: int, widths: tuple[int, int], grid: tuple[int, int], rate: float
) -> None:
    drawn = gaussian(seed, {"s": (rows, widths[0], *grid), "t": (rows, widths[1], *grid)})
    student, teacher = drawn["s"].double(), drawn["t"].double()
    torch.manual_seed(seed)
    term = loaded(student, teacher, {}, form=form, rate=rate)
    for weight in term.parameters():
        nn.init.normal_(weight)
    weights = {
        name.replace("encoder.", "paraphraser.").replace("decoder.", "paraphraser."): w.detach().numpy()
        for name, w in term.named_parameters()
    }
    factor = oracle.ft(student.numpy(), teacher.numpy(), weights, form)
    rebuilt = oracle.reconstruction(teacher.numpy(), weights)
    after, before = parts(term, student, teacher, True), parts(term, student, teacher, False)
    assert after["factor"].item() == pytest.approx(factor, rel=1e-9, abs=1e-14)
    assert before["reconstruction"].item() == pytest.approx(rebuilt, rel=1e-9)
    assert after["reconstruction"] == before["factor"] == 0


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Any) -> None:
    drawn = gaussian(0, {"s": (2, 3, 2, 2), "t": (2, 3, 2, 2)})
    student, teacher = drawn["s"].double().requires_grad_(), drawn["t"].double()
    assert torch.autograd.gradcheck(lambda s: ft(s, teacher, form=form), student)


# limits and identities


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_learn_from_oneself(form: Any) -> None:
    factor = gaussian(1, {"f": (4, 3, 2, 2)})["f"].requires_grad_()
    loss = ft(factor, factor.detach(), form=form)
    assert loss == 0
    assert torch.autograd.grad(loss, factor)[0].abs().max() == 0


@pytest.mark.parametrize("form", FORMS)
def test_the_size_of_a_factor_does_not_matter(form: Any) -> None:
    drawn = gaussian(2, {"s": (4, 3, 2, 2), "t": (4, 3, 2, 2)})
    torch.testing.assert_close(ft(7 * drawn["s"], drawn["t"] / 3, form=form), ft(drawn["s"], drawn["t"], form=form))


def test_opposite_factors_are_farthest() -> None:
    factor = gaussian(3, {"f": (4, 3, 2, 2)})["f"]
    assert ft(-factor, factor, form="l2").item() == pytest.approx(2)
    assert ft(-factor, factor, form="attention").item() == 0


def test_the_paraphraser_learns_from_the_reconstruction_alone() -> None:
    here = case()
    term = here.built()
    assert isinstance(term, FT)
    student, teacher = here.tensors()
    assert teacher is not None
    paraphraser = [*term.encoder.parameters(), *term.decoder.parameters()]
    for taught in (False, True):
        loss = sum(parts(term, student["map"], teacher["map"], taught).values())
        assert isinstance(loss, Tensor)
        moved = torch.autograd.grad(loss, [*paraphraser, *term.translator.parameters(), student["map"]])
        own, others = moved[: len(paraphraser)], moved[len(paraphraser) :]
        assert all(bool(grad.any()) != taught for grad in own)
        assert all(bool(grad.any()) == taught for grad in others)


def test_a_perfect_reconstruction() -> None:
    drawn = gaussian(4, {"t": (4, 3, 2, 2)})
    assert reconstruction(drawn["t"], drawn["t"]) == 0
    torch.testing.assert_close(reconstruction(drawn["t"] + 2, drawn["t"]), torch.tensor(4.0))


@pytest.mark.parametrize(("rate", "width"), [(0.5, 3), (0.75, 4), (1.0, 6), (0.01, 1)])
def test_the_factors_width(rate: float, width: int) -> None:
    term = case(rate=rate).built()
    assert isinstance(term, FT)
    student, teacher = case().tensors()
    assert teacher is not None
    assert term.translator(student["map"]).shape == term.encoder(teacher["map"]).shape == (6, width, 3, 3)
    assert term.decoder(term.encoder(teacher["map"])).shape == teacher["map"].shape


def test_phases_follow_the_step() -> None:
    here = MethodCase(
        term=lambda: FT(pretraining=0.1),
        student=lambda seed: gaussian(seed, {"map": (6, 4, 3, 3)}),
        teacher=lambda seed: gaussian(seed, {"map": (6, 6, 3, 3)}),
        facts=Facts(total_steps=50),
    )
    term = here.built()
    student, teacher = here.tensors()
    found = [here.draws(term, student, teacher, here.batch(), step=n).item() for n in (0, 4, 5, 49)]
    assert found == [0, 0, 1, 1]


def test_the_paraphraser_stands_still_once_it_has_learned() -> None:
    torch.manual_seed(0)
    student = load({"model": "tutelage:resnet8", "width": 0.25}, num_classes=5, in_channels=1, seed=0)
    teacher = load("tutelage:resnet8", num_classes=5, in_channels=1, seed=1)
    batch = Batch.of(torch.rand(8, 1, 8, 8), torch.arange(8) % 5)
    section: dict[str, Any] = OBJECTIVE
    term = FT(pretraining=0.5)
    weight = {"step": [1.0, 500.0], "until": 0.5}
    machine = Distiller(
        student,
        Objective({"ft": Entry(term, weight)}, task={**section["task"], "until": 0.5}),
        task=Classification(5),
        teacher=teacher,
        sample=batch,
        facts=Facts(total_steps=6),
    )
    optimizer = torch.optim.SGD(machine.param_groups(), lr=0.01, weight_decay=0.1)
    seen = []
    for _ in range(6):
        before = [weight.clone() for weight in term.encoder.parameters()]
        head = machine.student.get_parameter("linear.weight").clone()
        losses = machine(batch, machine.observe(batch))
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        machine.after_step(losses)
        moved = any(not torch.equal(a, b) for a, b in zip(before, term.encoder.parameters(), strict=True))
        learned = not torch.allclose(head * (1 - 0.001), machine.student.get_parameter("linear.weight"))
        seen.append((moved, learned))
    machine.close()
    assert seen == [(True, False)] * 3 + [(False, True)] * 3


def test_the_paraphrasers_own_rate() -> None:
    groups = case(lr=0.01).built().param_groups()
    assert [(group.get("lr"), group.get("weight_decay")) for group in groups] == [(0.01, 0.0), (None, None)]
    assert "lr" not in case().built().param_groups()[0]


# odd cases


def test_no_rows_give_connected_zeros() -> None:
    here = case(rows=0)
    term = case().built()
    student, teacher = here.tensors()
    loss = here.loss(term, student, teacher, here.batch())
    assert loss.item() == 0
    loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in term.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_dead_factors_are_finite(form: Any) -> None:
    dead = torch.zeros(2, 3, 2, 2, requires_grad=True)
    for teacher in (torch.ones(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)):
        loss = ft(dead, teacher, form=form)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, dead)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_extremes(form: Any, dtype: torch.dtype) -> None:
    student = torch.tensor([[[[1e4, -1e4], [0.0, 1e4]]]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[[[-1e4, 0.0], [1e4, 1e4]]]], dtype=dtype)
    loss = ft(student, teacher, form=form)
    exact = ft(student.detach().double(), teacher.double(), form=form)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


# errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rate": 0}, "rate must be > 0, not 0"),
        ({"form": "l1"}, "form 'l1' is not known; valid: attention, l2, paper"),
        ({"lr": 0.0}, "lr must be > 0, not 0.0"),
        ({"pretraining": 1.0}, "pretraining is a share of the run in [0, 1), not 1.0"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        FT(**options)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        pytest.param((2, 4), "ft compares maps [B, C, H, W], not [2, 4] and [2, 6, 3, 3]", id="vector"),
        pytest.param((2, 4, 6, 6), "ft compares maps of one grid: the student's is (6, 6)", id="grid"),
    ],
)
def test_maps_that_do_not_fit(shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        loaded(torch.zeros(shape), torch.zeros(2, 6, 3, 3), {})


def test_factors_of_two_shapes() -> None:
    said = "ft compares factors of one shape: the student's is [2, 1, 2, 2], the teacher's [2, 3, 2, 2]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        ft(torch.zeros(2, 1, 2, 2), torch.zeros(2, 3, 2, 2))
