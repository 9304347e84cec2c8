# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from golden_answer import with_gradients
from method_case import MethodCase, gaussian
from oracles import byot as oracle
from tutelage import methods
from tutelage.core import Batch, Distiller, Facts, Objective, Signals
from tutelage.core.error import UserError
from tutelage.core.objective import Entry
from tutelage.methods.online.byot import BYOT, Form, byot
from tutelage.models.load import load
from tutelage.run.quick import recipe as quick_recipe
from tutelage.tasks.classification import Classification

Arrays = dict[str, NDArray[Any]]
FORMS: dict[Form, str] = {"frobenius": "code", "squared": "paper", "masked": "masked"}  # ours, the oracle's
TAPS = ("stages[0]", "stages[1]")


def case(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: BYOT(student_taps=TAPS, **options),
        student=lambda seed: gaussian(seed, {TAPS[0]: (6, 3, 8, 8), TAPS[1]: (6, 4, 4, 4)}),
        teacher=lambda seed: gaussian(seed + 1000, {"stages[-1]": (6, 5, 2, 2), "logits": (6, 5)}),
    )


def branches(seed: int, count: int, rows: int, classes: int, width: int) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and features, index 0 the deepest."""
    shapes = {f"z{n}": (rows, classes) for n in range(count + 1)}
    shapes |= {f"f{n}": (rows, width) for n in range(count + 1)}
    drawn = {name: value.double().requires_grad_() for name, value in gaussian(seed, shapes).items()}
    return [drawn[f"z{n}"] for n in range(count + 1)], [drawn[f"f{n}"] for n in range(count + 1)]


def compared(logits: list[Tensor], features: list[Tensor], target: Tensor, **options: Any) -> dict[str, Tensor]:
    """The function on lists that start with the deepest."""
    return byot(logits[:0:-1], features[:0:-1], logits[0], features[0], target, **options)


def total(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    free = {
        name: torch.tensor(arrays[name]).requires_grad_()
        for name in arrays
        if name.startswith(("logits", "feat", "samesize", "w_adaptation"))
    }
    target = torch.tensor(arrays["target"])
    logits = [free[f"logits{n}"] for n in range(4)]
    deepest = free["feat0"]
    adapted = [
        F.linear(free[f"feat{n}"], *(free[f"w_adaptation.{n - 1}.{part}"] for part in ("weight", "bias")))
        for n in (1, 2, 3)
    ]
    same = [free[f"samesize_feat{n}"] for n in (1, 2, 3)]
    options = {"alpha": meta["alpha"], "beta": meta["beta"], "temperature": meta["temperature"]}
    task = F.cross_entropy(logits[0], target)
    losses = {
        "loss": task + total(compared(logits, [deepest, *adapted], target, **options)),
        "alt_luanyunteng": (1 - meta["alpha"]) * task
        + total(compared(logits, [deepest, *same], target, form="masked", **options)),
    }
    return with_gradients({name: loss for name, loss in losses.items() if name in arrays}, free, arrays)


# the equation, worked out by loops


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 3),
    rows=st.integers(1, 5),
    classes=st.integers(2, 6),
    width=st.integers(1, 4),
    temperature=st.floats(0.5, 9),
    alpha=st.floats(0, 1),
)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(
    form: Form, seed: int, count: int, rows: int, classes: int, width: int, temperature: float, alpha: float
) -> None:
    logits, features = branches(seed, count, rows, classes, width)
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    answers, vectors = ([one.detach().numpy() for one in side] for side in (logits, features))
    expected = oracle.byot(answers, vectors, target.numpy(), {}, temperature, alpha, 0.5, FORMS[form])
    parts = compared(logits, features, target, alpha=alpha, beta=0.5, temperature=temperature, form=form)
    share = 1 - alpha if form == "masked" else 1.0
    label = parts["label"] + share * F.cross_entropy(logits[0], target)
    assert label.item() == pytest.approx(expected["ce"], rel=1e-9)
    assert parts["soft"].item() == pytest.approx(expected["soft"], rel=1e-9, abs=1e-12)
    assert parts["feature"].item() == pytest.approx(expected["feature"], rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Form) -> None:
    logits, features = branches(2, 2, 3, 4, 3)
    target = torch.tensor([0, 3, 1])

    def loss(*free: Tensor) -> Tensor:
        return total(compared([logits[0], *free[:2]], [features[0], *free[2:]], target, form=form))

    assert torch.autograd.gradcheck(loss, (*logits[1:], *features[1:]))


# limits and identities


def test_the_deepest_gets_no_gradient() -> None:
    logits, features = branches(3, 2, 4, 5, 3)
    loss = total(compared(logits, features, torch.tensor([0, 1, 2, 3])))
    found = torch.autograd.grad(loss, [logits[0], features[0]], allow_unused=True)
    assert all(slope is None for slope in found)


def test_soft_parts_differ_by_the_entropy_and_by_the_temperature() -> None:
    logits, features = branches(4, 2, 4, 5, 3)
    target = torch.tensor([0, 1, 2, 3])
    squared, frobenius, masked = (
        compared(logits, features, target, alpha=1.0, temperature=2.0, form=form)["soft"]
        for form in ("squared", "frobenius", "masked")
    )
    entropy = torch.distributions.Categorical(logits=logits[0] / 2).entropy().mean()
    torch.testing.assert_close(frobenius - squared, 2 * entropy)
    torch.testing.assert_close(masked, 4 * frobenius)


def test_the_released_code_leaves_out_the_feature_of_the_deepest_branch() -> None:
    logits, features = branches(5, 2, 4, 5, 3)
    parts = compared(logits, features, torch.tensor([0, 1, 2, 3]), beta=1.0)
    shallow = (features[2] - features[0]).square().sum().sqrt()
    torch.testing.assert_close(parts["feature"], shallow)
    gradient = torch.autograd.grad(parts["feature"], [features[1], features[2]])
    assert not gradient[0].any()
    assert gradient[1].any()


@pytest.mark.parametrize("form", FORMS)
def test_equal_features_have_no_slope(form: Form) -> None:
    logits, features = branches(6, 2, 4, 5, 3)
    same = [features[0].detach().requires_grad_() for _ in features]
    part = compared(logits, same, torch.tensor([0, 1, 2, 3]), form=form)["feature"]
    assert part == 0
    assert not torch.autograd.grad(part, same[2])[0].any()


@pytest.mark.parametrize("form", FORMS)
def test_unlabelled_rows_are_skipped(form: Form) -> None:
    logits, features = branches(7, 2, 6, 5, 3)
    target = torch.tensor([0, 1, -1, 3, -1, 2])
    labelled = target >= 0
    parts = compared(logits, features, target, labelled=labelled, form=form)
    kept = [[one[labelled] for one in side] for side in (logits, features)]
    expected = compared(kept[0], kept[1], target[labelled], form=form)
    for name, part in parts.items():
        torch.testing.assert_close(part, expected[name])


# branches in a network


def distiller(**options: Any) -> Distiller:
    torch.manual_seed(0)
    student = load("tutelage:resnet8", num_classes=4)
    batch = Batch.of(torch.rand(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, -1, 0]))
    objective = Objective({"byot": Entry(BYOT(**options), teacher="student")}, task=1.0)
    return Distiller(student, objective, task=Classification(4), sample=batch)


def test_every_stage_but_the_last_gets_a_branch_as_wide_as_the_deepest() -> None:
    machine = distiller()
    term = machine.objective.terms["byot"]
    assert isinstance(term, BYOT)
    assert term.names == ("stages[0]", "stages[1]")
    assert [len(branch.bottleneck) for branch in term.branches] == [2, 1]  # type: ignore[arg-type]
    maps = torch.rand(2, 16, 16, 16), torch.rand(2, 32, 8, 8)
    for branch, one in zip(term.branches, maps, strict=True):
        assert branch.bottleneck(one).shape == (2, 64, 4, 4)  # type: ignore[operator]
        logits, feature = branch(one)
        assert logits.shape == (2, 4)
        assert feature.shape == (2, 64)
    machine.close()


@pytest.mark.parametrize("form", FORMS)
def test_it_trains_the_student_and_its_branches_without_a_teacher(form: Form) -> None:
    machine = distiller(form=form)
    batch = Batch.of(torch.rand(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, -1, 0]))
    optimizer = torch.optim.SGD(machine.param_groups(), lr=0.05)
    values = []
    for _ in range(8):
        losses = machine(batch)
        losses.total.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in machine.parameters())
        optimizer.step()
        optimizer.zero_grad()
        machine.after_step(losses)
        values.append(losses.total.item())
    assert list(losses.parts) == ["task", "byot.label", "byot.soft", "byot.feature"]
    assert values[-1] < values[0]
    assert not any("branch" in name for name, _ in machine.student.named_modules())
    machine.close()


def test_the_deepest_layer_learns_from_its_own_loss_alone() -> None:
    machine = distiller()
    batch = Batch.of(torch.rand(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, -1, 0]))
    losses = machine(batch)
    losses.total.backward()
    last = machine.student.linear.weight  # type: ignore[union-attr]
    assert isinstance(last, Tensor)
    alone = Distiller(load("tutelage:resnet8", num_classes=4), Objective(), task=Classification(4), sample=batch)
    alone.student.load_state_dict(machine.student.state_dict())
    alone.train()
    alone(batch).total.backward()
    expected = alone.student.linear.weight  # type: ignore[union-attr]
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(last.grad, expected.grad)
    machine.close()


def test_the_catalogue_says_that_no_teacher_is_needed() -> None:
    assert not methods.needs_teacher("byot")
    made = quick_recipe(student="tutelage:resnet8", data="digits", method="byot")
    assert made.teacher is None
    assert not made.peers


# odd cases


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_give_connected_zeros(form: Form) -> None:
    logits, features = branches(8, 2, 0, 5, 3)
    loss = total(compared(logits, features, torch.zeros(0, dtype=torch.int64), form=form))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, logits[1])[0].shape == (0, 5)


def test_one_value_a_channel_cannot_train() -> None:
    here = case()
    term = here.built()
    student = {TAPS[0]: torch.zeros(1, 3, 4, 4), TAPS[1]: torch.zeros(1, 4, 2, 2)}
    teacher = {"stages[-1]": torch.zeros(1, 5, 1, 1), "logits": torch.zeros(1, 5)}
    batch = Batch.of(torch.zeros(1, 1), torch.tensor([0]))
    said = "byot: batch norm cannot train on one value a channel (one sample with a 1x1 map)"
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        here.loss(term, student, teacher, batch)
    term.eval()
    assert here.loss(term, student, teacher, batch).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_extremes(form: Form, dtype: torch.dtype) -> None:
    logits = [torch.full((2, 3), value, dtype=dtype).requires_grad_() for value in (1e4, -1e4, 0.0)]
    features = [torch.full((2, 3), value, dtype=dtype).requires_grad_() for value in (1e4, -1e4, 0.0)]
    loss = total(compared(logits, features, torch.tensor([0, 2]), form=form))
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(loss, logits[1:]))


# errors


def test_branches_of_another_shape() -> None:
    logits, features = branches(9, 1, 2, 5, 3)
    said = "byot compares features of one shape: a branch's are [2, 2], the deepest [2, 3]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        byot([logits[1]], [features[1][:, :2]], logits[0], features[0], torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        (
            {TAPS[0]: (2, 3), TAPS[1]: (2, 4, 4, 4)},
            {"stages[-1]": (2, 5, 2, 2), "logits": (2, 5)},
            "byot reads maps [B, C, H, W], and 'stages[0]' is [2, 3]",
        ),
        (
            {TAPS[0]: (2, 3, 8, 8), TAPS[1]: (2, 4, 4, 4)},
            {"stages[-1]": (2, 5, 2, 2), "logits": (2, 5, 2, 2)},
            "byot classifies, and needs logits [B, K], not [2, 5, 2, 2]",
        ),
    ],
)
def test_signals_that_do_not_fit(student: dict[str, Any], teacher: dict[str, Any], said: str) -> None:
    sides = [Signals(None, gaussian(0, shapes)) for shapes in (student, teacher)]
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        BYOT(student_taps=TAPS).build(sides[0], sides[1], Facts())


def test_a_student_of_one_stage() -> None:
    student = Signals(None, {"stages[0]": torch.zeros(2, 3, 4, 4)})
    teacher = Signals(None, {"stages[-1]": torch.zeros(2, 3, 4, 4), "logits": torch.zeros(2, 5)})
    said = "byot gives branches to all stages but the last, and the student has only one"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        BYOT().build(student, teacher, Facts())


def test_data_without_class_labels() -> None:
    here = case()
    student, teacher = here.tensors()
    batch = Batch.of(torch.zeros(6, 1), {"boxes": []})
    said = "byot needs class labels, and this data has dict for a target"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        here.loss(here.built(), student, teacher, batch)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "code"}, "form 'code' is not known; valid: frobenius, masked, squared"),
        ({"temperature": 0}, "temperature must be > 0, not 0"),
        ({"alpha": 2}, "alpha is a share in [0, 1], not 2"),
        ({"student_taps": "map"}, "student_taps: expected a list of roles or module paths, not 'map'"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        BYOT(**options)
