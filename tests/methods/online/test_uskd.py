# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from method_case import MethodCase, gaussian
from oracles import uskd as oracle
from tutelage.core import Batch, Distiller, Facts, Objective, Signals, ranks
from tutelage.core.error import UserError
from tutelage.methods.online.uskd import USKD, Form, class_order, uskd
from tutelage.tasks.classification import Classification

Arrays = dict[str, NDArray[Any]]
FORMS: dict[Form, str] = {"probability": "paper", "log_probability": "code"}  # ours, the oracle's
UNIT: dict[str, Any] = {"alpha": 1.0, "beta": 1.0, "mu": 1.0}


def case(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: USKD(**options),
        student=lambda seed: gaussian(seed, {"logits": (6, 5), "stages[-2]": (6, 4, 3, 3)}),
        teacher=None,
    )


def drawn(seed: int, rows: int, classes: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Student logits, free, and weak logits."""
    found = gaussian(seed, {"student": (rows, classes), "weak": (rows, classes)}, scale)
    return found["student"].double().requires_grad_(), found["weak"].double().requires_grad_()


def labels_for(seed: int, rows: int, classes: int, soft: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if not soft:
        return torch.randint(classes, (rows,), generator=generator)
    return torch.rand(rows, classes, generator=generator, dtype=torch.float64).softmax(1)


def total(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    form: Form = "probability" if claim == "core/uskd_probrank" else "log_probability"
    answer: dict[str, Any] = {}
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        found = step(arrays, meta, form, dtype)
        answer |= {f"{name}{suffix}": value for name, value in found.items() if f"{name}{suffix}" in arrays}
    return answer


def step(arrays: Arrays, meta: dict[str, Any], form: Form, dtype: torch.dtype) -> dict[str, Any]:
    logits, feature = (
        torch.tensor(arrays[name], dtype=dtype, requires_grad=True) for name in ("student_logits", "mid_features")
    )
    signals = Signals(logits, {"logits": logits, "stages[-2]": feature})
    coefficients: dict[str, Any] = {name: meta[name] for name in ("alpha", "beta", "mu")}
    term = USKD(form=form, **coefficients)
    term.build(signals.detach(), None, Facts())
    term.to(dtype).weak_head.load_state_dict(
        {name: torch.tensor(arrays[f"weak_fc.{name}"], dtype=dtype) for name in ("weight", "bias")}
    )
    weak = term.weak_head(feature)
    if "soft_labels" in arrays:  # the case says which classes its sort took where labels are equal
        soft = torch.tensor(arrays["soft_labels"], dtype=dtype)
        top = torch.tensor(arrays["top2_index"]), torch.tensor(arrays["top2_value"], dtype=dtype)
        parts = uskd(logits, weak, soft, form=form, top=top, **coefficients)
        unit = uskd(logits, weak, soft, form=form, top=top, **UNIT)
    else:
        hard = torch.tensor(arrays["labels"])
        top = hard[:, None], torch.ones(len(hard), 1, dtype=dtype)
        parts = term(signals, None, Batch.of(torch.zeros(len(hard), 1), hard))
        unit = uskd(logits, weak, hard, form=form, **UNIT)
    total(parts).backward()
    return {
        "loss": total(parts),
        "loss_target": unit["target"],
        "loss_nontarget": unit["nontarget"],
        "loss_weak": parts["weak"],
        "grad_student_logits": logits.grad,
        "grad_mid_features": feature.grad,
        "grad_weak_fc.weight": term.weak_head.weight.grad,
        "grad_weak_fc.bias": term.weak_head.bias.grad,
        "class_order": class_order(logits, weak, top[0], form),
    }


# the equation, worked out by loops


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 5), classes=st.integers(2, 9), scale=st.floats(0.1, 20))
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(form: Form, soft: bool, seed: int, rows: int, classes: int, scale: float) -> None:
    student, _ = drawn(seed, rows, classes, scale)
    layer = gaussian(seed + 1, {"feature": (rows, 3), "weight": (classes, 3), "bias": (classes,)})
    feature, weight, bias = (part.double() for part in layer.values())
    target = labels_for(seed, rows, classes, soft)
    if soft:
        labels = target
        index, value = oracle.top_two(target.numpy())
    else:
        labels = torch.eye(classes, dtype=torch.float64)[target]
        index, value = target[:, None].numpy(), np.ones((rows, 1))
    given = (student.detach().numpy(), feature.numpy(), weight.numpy(), bias.numpy(), labels.numpy())
    coefficients: dict[str, Any] = {"alpha": 0.7, "beta": 0.3, "mu": 0.1}
    expected = oracle.uskd(*given, index, value, **coefficients, form=FORMS[form])
    parts = uskd(student, feature @ weight.T + bias, target, form=form, **coefficients)
    assert parts["target"].item() == pytest.approx(0.7 * expected["target"], rel=1e-9, abs=1e-12)
    assert parts["nontarget"].item() == pytest.approx(0.3 * expected["nontarget"], rel=1e-9, abs=1e-12)
    assert parts["weak"].item() == pytest.approx(expected["weak"], rel=1e-9)
    assert total(parts).item() == pytest.approx(expected["loss"], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_the_order_equals_the_loops(form: Form) -> None:
    student, weak = drawn(5, 40, 12)
    index = labels_for(5, 40, 12, soft=False)[:, None]
    expected = oracle.rank_classes(student.detach().numpy(), weak.detach().numpy(), index.numpy(), form=FORMS[form])
    np.testing.assert_array_equal(class_order(student, weak, index, form).numpy(), expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_sure_head_is_held_by_the_small_constant(form: Form) -> None:
    # 1 - w_J is about 1e-6 here: another constant gives another order
    student, weak = drawn(5, 60, 12, scale=0.5)
    index = labels_for(5, 60, 12, soft=False)[:, None]
    weak = weak.detach().scatter(1, index, 15.0)
    expected = oracle.rank_classes(student.detach().numpy(), weak.numpy(), index.numpy(), form=FORMS[form])
    np.testing.assert_array_equal(class_order(student, weak, index, form).numpy(), expected)


def test_the_two_forms_rank_differently() -> None:
    student, weak = drawn(5, 40, 12)
    target = labels_for(5, 40, 12, soft=False)
    orders = [class_order(student, weak, target[:, None], form) for form in FORMS]
    assert not torch.equal(*orders)
    losses = [uskd(student, weak, target, form=form)["nontarget"] for form in FORMS]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("part", ["nontarget", "weak"])
def test_gradcheck(part: str, soft: bool) -> None:
    student, weak = drawn(6, 3, 5)
    target = labels_for(6, 3, 5, soft)
    assert torch.autograd.gradcheck(lambda s, w: uskd(s, w, target, **UNIT)[part], (student, weak))


def test_the_gradient_of_the_target_part_holds_its_labels_constant() -> None:
    student, weak = drawn(7, 4, 5)
    target = labels_for(7, 4, 5, soft=False)
    found = torch.autograd.grad(uskd(student, weak, target, **UNIT)["target"], student)[0]
    probs = student.detach().softmax(1).numpy()
    truth = target.numpy()
    squares = np.array([probs[n, truth[n]] ** 2 for n in range(4)])
    expected = np.zeros((4, 5))
    for n in range(4):
        smooth = squares[n] + 1 - squares.mean()
        for i in range(5):
            expected[n, i] = -smooth * (float(i == truth[n]) - probs[n, i]) / 4
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


def test_the_head_learns_from_its_own_part_alone() -> None:
    student, weak = drawn(8, 4, 5)
    parts = uskd(student, weak, labels_for(8, 4, 5, soft=False), **UNIT)
    both = parts["target"] + parts["nontarget"]
    assert torch.autograd.grad(both, weak, retain_graph=True, allow_unused=True)[0] is None
    assert torch.autograd.grad(parts["weak"], student, allow_unused=True)[0] is None


# limits and identities


def test_one_row_is_cross_entropy_with_its_own_label() -> None:
    student, weak = drawn(9, 1, 5)
    found = uskd(student, weak, torch.tensor([3]), **UNIT)["target"]
    torch.testing.assert_close(found, -student.log_softmax(1)[0, 3])


def test_of_two_classes_none_is_left_to_rank() -> None:
    student, weak = drawn(10, 4, 2)
    hard = uskd(student, weak, torch.tensor([0, 1, 1, 0]), **UNIT)["nontarget"]
    soft = uskd(student, weak, labels_for(10, 4, 2, soft=True), **UNIT)["nontarget"]
    assert hard.item() == pytest.approx(0, abs=1e-15)
    assert soft.item() == 0
    for part in (hard, soft):
        assert torch.autograd.grad(part, student)[0].abs().max() < 1e-15


def test_zipf_by_hand() -> None:
    # the target ranks first, so the others begin at 1/2: 1/2, 1/3, 1/4, normalised 6/13, 4/13, 3/13
    student = torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    flat = torch.zeros(1, 4, dtype=torch.float64)
    found = uskd(student, flat, torch.tensor([0]), **UNIT)["nontarget"]
    rest = student[:, 1:].log_softmax(1)[0]
    expected = -(6 * rest[0] + 4 * rest[1] + 3 * rest[2]) / 13
    torch.testing.assert_close(found, expected)
    # the last target: 1, 1/2, 1/3, normalised 6/11, 3/11, 2/11
    found = uskd(student, flat, torch.tensor([3]), **UNIT)["nontarget"]
    rest = student[:, :3].log_softmax(1)[0]
    torch.testing.assert_close(found, -(6 * rest[0] + 3 * rest[1] + 2 * rest[2]) / 11)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), shift=st.floats(-100, 100), soft=st.booleans())
def test_order_of_classes_and_rows_and_a_constant_change_nothing(seed: int, shift: float, soft: bool) -> None:
    student, weak = drawn(seed, 6, 7)
    target = labels_for(seed, 6, 7, soft)
    expected = uskd(student, weak, target, **UNIT)
    generator = torch.Generator().manual_seed(seed)
    rows, classes = torch.randperm(6, generator=generator), torch.randperm(7, generator=generator)
    moved = target[rows][:, classes] if soft else classes.argsort()[target[rows]]
    found = uskd(student[rows][:, classes] + shift, weak[rows][:, classes] - shift, moved, **UNIT)
    for name, part in expected.items():
        torch.testing.assert_close(found[name], part, rtol=1e-8, atol=1e-10)


def test_alpha_beta_and_mu_weigh_the_parts() -> None:
    student, weak = drawn(11, 4, 5)
    target = labels_for(11, 4, 5, soft=False)
    unit = uskd(student, weak, target, **UNIT)
    found = uskd(student, weak, target, alpha=0.1, beta=0.2, mu=0.3)
    torch.testing.assert_close(list(found.values()), [w * unit[n] for n, w in zip(unit, (0.1, 0.2, 0.3), strict=True)])


def test_a_class_as_a_soft_label_loses_a_second_class() -> None:
    # the second target has label 0: it adds nothing to the target part, but is removed from the ranking
    student, weak = drawn(12, 4, 5)
    hard = torch.tensor([0, 1, 2, 3])
    one_hot = torch.eye(5, dtype=torch.float64)[hard]
    found, expected = uskd(student, weak, one_hot, **UNIT), uskd(student, weak, hard, **UNIT)
    torch.testing.assert_close(found["target"], expected["target"])
    torch.testing.assert_close(found["weak"], expected["weak"])
    assert found["nontarget"] != expected["nontarget"]


def test_ties_take_the_lower_class_unless_told() -> None:
    student, weak = drawn(13, 3, 5)
    soft = torch.eye(5, dtype=torch.float64)[[1, 1, 1]]
    lower = torch.tensor([[1, 0]] * 3), torch.tensor([[1.0, 0.0]] * 3)
    other = torch.tensor([[1, 4]] * 3), torch.tensor([[1.0, 0.0]] * 3)
    found = uskd(student, weak, soft)
    torch.testing.assert_close(found, uskd(student, weak, soft, top=lower))
    assert found["nontarget"] != uskd(student, weak, soft, top=other)["nontarget"]


# unlabelled rows


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), kept=st.lists(st.booleans(), min_size=6, max_size=6), soft=st.booleans())
def test_unlabelled_rows_are_as_if_absent(seed: int, kept: list[bool], soft: bool) -> None:
    student, weak = drawn(seed, 6, 5)
    target, labelled = labels_for(seed, 6, 5, soft), torch.tensor(kept)
    marked = target.where(labelled[:, None], 0) if soft else target.where(labelled, -1)
    found = uskd(student, weak, marked, labelled, **UNIT)
    some = torch.nonzero(labelled)[:, 0]
    expected = uskd(student[some], weak[some], target[some], **UNIT)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(total(found), (student, weak))
    others = torch.autograd.grad(total(expected), (student, weak))
    torch.testing.assert_close(gradients, others)
    assert not gradients[0][~labelled].any()


@pytest.mark.parametrize("soft", [False, True])
def test_all_unlabelled_give_a_connected_zero(soft: bool) -> None:
    here = case()
    term = here.built()
    student, _ = here.tensors()
    target = torch.zeros(6, 5) if soft else torch.full((6,), -1)
    batch = Batch.of(torch.zeros(6, 1), target)
    loss = here.loss(term, student, None, batch)
    assert loss.item() == 0
    loss.backward()
    for tensor in (*student.values(), *term.parameters()):
        assert tensor.grad is not None
        assert not tensor.grad.any()


@pytest.mark.parametrize("soft", [False, True])
def test_no_rows_give_a_connected_zero(soft: bool) -> None:
    student, weak = drawn(0, 0, 5)
    target = torch.zeros(0, 5) if soft else torch.zeros(0, dtype=torch.long)
    parts = uskd(student, weak, target)
    assert [part.item() for part in parts.values()] == [0, 0, 0]
    gradients = torch.autograd.grad(total(parts), (student, weak))
    assert [grad.shape for grad in gradients] == [(0, 5), (0, 5)]


# over ranks


@pytest.mark.parametrize("soft", [False, True])
def test_with_gather_the_parts_of_two_ranks_make_the_whole(soft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    student, weak = drawn(14, 6, 5)
    target = labels_for(14, 6, 5, soft)
    labelled = torch.tensor([True, True, True, False, True, True])
    spans = [slice(0, 2), slice(2, 6)]
    counts = [labelled[span].sum() for span in spans]

    def joined(**options: Any) -> Tensor:
        parts = [total(uskd(student[s], weak[s], target[s], labelled[s], **UNIT, **options)) for s in spans]
        return sum(part * count for part, count in zip(parts, counts, strict=True)) / sum(counts)  # type: ignore[return-value]

    whole = total(uskd(student, weak, target, labelled, **UNIT))
    seen: list[Tensor] = []

    def alone(value: Tensor) -> Tensor:
        seen.append(value)
        return value

    monkeypatch.setattr(ranks, "mean", alone)
    assert not torch.allclose(joined(gather=True), whole)  # each rank knows only its own
    average = torch.stack(seen).mean(0)
    monkeypatch.setattr(ranks, "mean", lambda value: average)
    torch.testing.assert_close(joined(gather=True), whole)
    assert not torch.allclose(joined(), whole)


# signals


def test_a_map_is_pooled_and_a_vector_taken_as_it_is() -> None:
    here = case()
    student, _ = here.tensors()
    vector = {"logits": student["logits"], "stages[-2]": student["stages[-2]"].mean((2, 3))}
    term = here.built()
    losses = [here.loss(term, tensors, None, here.batch()) for tensors in (student, vector)]
    torch.testing.assert_close(*losses)
    assert term.state_dict()["weak_head.weight"].shape == (5, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.late(self.early(images).relu()).mean((2, 3)))
        return scores


@pytest.mark.parametrize("soft", [False, True])
def test_a_step_without_a_teacher(soft: bool) -> None:
    torch.manual_seed(0)
    target = labels_for(0, 4, 5, soft).float() if soft else torch.tensor([0, 2, -1, 4])
    batch = Batch.of(torch.rand(4, 1, 6, 6), target)
    objective = Objective(uskd=USKD(student_tap="early"))
    machine = Distiller(Net(), objective, task=Classification(5), sample=batch)
    losses = machine(batch)
    assert list(losses.parts) == ["task", "uskd.target", "uskd.nontarget", "uskd.weak"]
    losses.total.backward()
    assert all(p.grad is not None and p.grad.any() for p in machine.parameters())
    machine.close()


# precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_extremes(form: Form, soft: bool, dtype: torch.dtype) -> None:
    rows = [[1e4, -1e4, 0.0, 1e4], [-1e4, -1e4, 1e4, 0.0], [0.0, 0.0, 0.0, 0.0]]
    student = torch.tensor(rows, dtype=dtype, requires_grad=True)
    weak = torch.tensor(rows[::-1], dtype=dtype, requires_grad=True)
    target = torch.tensor([1, 2, 0])
    if soft:
        target = torch.tensor([[0.0, 0.7, 0.3, 0.0]] * 3, dtype=dtype)
    parts = uskd(student, weak, target, form=form)
    assert all(part.dtype == torch.float32 and part.isfinite() for part in parts.values())
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(total(parts), (student, weak)))


def test_its_head_runs_under_autocast_and_the_comparison_does_not() -> None:
    here = case()
    student, _ = here.tensors()
    term = here.built()
    exact = here.loss(term, student, None, here.batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = here.loss(term, {name: part.bfloat16() for name, part in student.items()}, None, here.batch())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=3e-2)


# errors


def test_an_unknown_form() -> None:
    with pytest.raises(UserError, match=r"^form 'rank' is not known; valid: log_probability, probability$"):
        USKD(form="rank")  # type: ignore[arg-type]


TOKENS = (
    "uskd reads a map [B, C, H, W] or a vector [B, D], and 'stages[-2]' is [2, 7, 4]; "
    "of a transformer tap the class token after its middle block (cls[5])"
)
DENSE = "uskd ranks classes, and needs logits [B, K], not [2, 5, 8, 8]"


@pytest.mark.parametrize(
    ("logits", "feature", "said"),
    [
        pytest.param((2, 5), (2, 7, 4), TOKENS, id="tokens"),
        pytest.param((2, 5, 8, 8), (2, 7), DENSE, id="dense logits"),
    ],
)
def test_signals_that_do_not_fit(logits: tuple[int, ...], feature: tuple[int, ...], said: str) -> None:
    signals = Signals(None, gaussian(0, {"logits": logits, "stages[-2]": feature}))
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        USKD().build(signals, None, Facts())


def test_data_without_classes() -> None:
    here = case()
    student, _ = here.tensors()
    batch = replace(here.batch(), target=None)
    said = "uskd needs class labels, and this data has NoneType for a target"
    with pytest.raises(UserError, match=f"^{said}$"):
        here.loss(here.built(), student, None, batch)


@pytest.mark.parametrize(
    ("weak", "target", "said"),
    [
        (
            (2, 4),
            (2,),
            "uskd takes two [B, K] tensors of logits: the student's are [2, 5], the auxiliary head's [2, 4]",
        ),
        (
            (2, 5),
            (2, 4),
            "uskd takes [B] classes or [B, K] soft labels for logits [2, 5], not a target of shape [2, 4]",
        ),
    ],
)
def test_shapes_that_do_not_fit(weak: tuple[int, ...], target: tuple[int, ...], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        uskd(torch.zeros(2, 5), torch.zeros(weak), torch.zeros(target))
