# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from method_case import MethodCase, gaussian
from oracles import srrl as oracle
from tutelage.core import Batch, Distiller, Facts, Objective, Signals
from tutelage.core.error import UserError
from tutelage.methods.features.srrl import SRRL, pool, srrl
from tutelage.tasks.classification import Classification

Arrays = dict[str, NDArray[Any]]
Weights = dict[str, Tensor]


def classifier(width: int = 6, classes: int = 5) -> nn.Linear:
    layer = nn.Linear(width, classes)
    drawn = gaussian(7, {"weight": (classes, width), "bias": (classes,)})
    layer.load_state_dict(drawn)
    return layer


def case(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: SRRL(**options),
        student=lambda seed: gaussian(seed, {"map": (6, 4, 3, 3)}),
        teacher=lambda seed: gaussian(seed + 1000, {"map": (6, 6, 2, 2)}),
        borrowed=lambda: {"classifier": classifier()},
    )


def sides(student: Tensor, teacher: Tensor, weights: Weights) -> tuple[Signals, Signals]:
    """Signals of two maps, with a classifier of these weights (`teacher_fc.*`) lent by the teacher."""
    classes, width = weights["teacher_fc.weight"].shape
    layer = nn.Linear(width, classes, dtype=student.dtype).requires_grad_(False)
    layer.load_state_dict({name: weights[f"teacher_fc.{name}"] for name in ("weight", "bias")})
    return Signals(None, {"map": student}), Signals(None, {"map": teacher}, {"classifier": layer})


def loaded(signals: tuple[Signals, Signals], weights: Weights, **options: Any) -> SRRL:
    """A built term with these weights of the connector (`connector.*`)."""
    term = SRRL(**options)
    term.build(signals[0].detach(), signals[1], Facts())
    own = {name: weight for name, weight in weights.items() if name.startswith("connector.")}
    term.to(signals[0]["map"].dtype).load_state_dict(own, strict=False)
    return term


# the authors' numbers

CORE = {"student": "student_features", "teacher": "teacher_features"}
CLASSIC = {
    "student": "s_feat",
    "teacher": "t_feat",
    "connector.conv.": "w_connector.Connectors.0.",
    "connector.bn.": "w_connector.Connectors.1.",
    "teacher_fc.": "w_teacher_fc.",
}


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        given = {
            name: torch.tensor(array, dtype=dtype)
            for name, array in arrays.items()
            if array.dtype.kind == "f" and not name.startswith(("loss", "grad", "alt", "out"))
        }
        found = core(given, meta) if claim == "core/srrl" else classic(given, "alt_simkd_repo_pooled" in arrays)
        answer |= {f"{name}{suffix}": value for name, value in found.items() if f"{name}{suffix}" in arrays}
    return answer


def core(given: Weights, meta: dict[str, Any]) -> dict[str, Any]:
    student = given["student_features"].requires_grad_()
    signals = sides(student, given["teacher_features"], given)
    term = loaded(signals, given, alpha=meta["alpha"], beta=meta["beta"])
    connected = loaded(signals, given).connector(student)
    parts = term(*signals, case().batch())
    loss = parts["feature"] + parts["regression"]
    unit = loaded(signals, given)(*signals, case().batch())
    loss.backward()
    statistics = {f"{name}_after": buffer for name, buffer in term.named_buffers()}
    scores = signals[1].borrowed["classifier"]
    return {
        "loss": loss,
        "loss_feature": unit["feature"],
        "loss_regression": unit["regression"],
        "grad_student_features": student.grad,
        **{f"grad_{name}": weight.grad for name, weight in term.named_parameters()},
        **{name: value for name, value in statistics.items() if "num_batches" not in name},
        "connected_features": connected,
        "student_logits_via_teacher_fc": scores(pool(connected)),
        "teacher_logits": scores(pool(given["teacher_features"])),
    }


def classic(given: Weights, pooled: bool) -> dict[str, Any]:
    weights = {
        name.replace(theirs, ours): array
        for ours, theirs in CLASSIC.items()
        for name, array in given.items()
        if name.startswith(theirs)
    }
    student = weights["student"].requires_grad_()
    signals = sides(student, weights["teacher"], weights)
    answer: dict[str, Any] = {}
    for name, part in (("loss", None), ("loss_fm", "feature"), ("loss_sr", "regression")):
        term = loaded(signals, weights)
        parts = term(*signals, case().batch())
        loss = sum(parts.values()) if part is None else parts[part]
        marker = "" if part is None else f"__{name}"
        answer[name] = loss
        free = {"s_feat": student}
        free |= {f"w_{theirs(own)}": weight for own, weight in term.named_parameters()}
        gradients = torch.autograd.grad(loss, list(free.values()))
        answer |= {f"grad_{own}{marker}": grad for own, grad in zip(free, gradients, strict=True)}
        answer |= {f"out_{theirs(own)}": buffer for own, buffer in term.named_buffers()}
    if pooled:
        other = loaded(signals, weights, form="pooled")(*signals, case().batch())
        loss = other["feature"] + other["regression"]
        answer["alt_simkd_repo_pooled"] = loss
        answer["grad_s_feat__alt_simkd_repo_pooled"] = torch.autograd.grad(loss, student)[0]
    return answer


def theirs(name: str) -> str:
    return name.replace("connector.conv", "connector.Connectors.0").replace("connector.bn", "connector.Connectors.1")


# the equation, worked out by loops


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(2, 4),
    widths=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    grids=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    classes=st.integers(1, 5),
    beta=st.sampled_from([1.0, 5.0]),
)
@pytest.mark.parametrize("form", ["map", "pooled"])
def test_equals_the_loops(
    form: str,
    seed: int,
    rows: int,
    widths: tuple[int, int],
    grids: tuple[int, int, int],
    classes: int,
    beta: float,
) -> None:
    height, width, teachers = grids
    shapes = {
        "student": (rows, widths[0], height, width),
        "teacher": (rows, widths[1], teachers, teachers),
        "connector.conv.weight": (widths[1], widths[0], 1, 1),
        "connector.bn.weight": (widths[1],),
        "connector.bn.bias": (widths[1],),
        "teacher_fc.weight": (classes, widths[1]),
        "teacher_fc.bias": (classes,),
    }
    weights = {name: value.double() for name, value in gaussian(seed, shapes).items()}
    signals = sides(weights["student"], weights["teacher"], weights)
    parts = loaded(signals, weights, alpha=0.5, beta=beta, form=form)(*signals, case().batch())
    arrays = {name: value.numpy() for name, value in weights.items()}
    expected = oracle.srrl(arrays["student"], arrays["teacher"], arrays, 0.5, beta, form)
    assert parts["feature"].item() == pytest.approx(0.5 * expected["feature"], rel=1e-9)
    assert parts["regression"].item() == pytest.approx(beta * expected["regression"], rel=1e-9)
    assert sum(parts.values()).item() == pytest.approx(expected["loss"], rel=1e-9)


@pytest.mark.parametrize("form", ["map", "pooled"])
def test_gradcheck(form: str) -> None:
    here = case(form=form, beta=5.0)
    term = here.built(dtype=torch.float64)
    student, teacher = here.tensors(dtype=torch.float64)
    names = [name for name, _ in term.named_parameters()]

    def loss(free: Tensor, *weights: Tensor) -> Tensor:
        given = (here.signals({"map": free}), here.teach(teacher), here.batch())
        parts = torch.func.functional_call(term, dict(zip(names, weights, strict=True)), given)
        return parts["feature"] + parts["regression"]  # type: ignore[no-any-return]

    free = (student["map"], *(weight.detach().requires_grad_() for weight in term.parameters()))
    assert torch.autograd.gradcheck(loss, free, fast_mode=True)


# limits and identities


def test_the_forms_agree_on_maps_of_one_position() -> None:
    student, teacher = gaussian(0, {"map": (6, 4, 1, 1)})["map"], gaussian(1, {"map": (6, 6, 2, 2)})["map"]
    losses = []
    for form in ("map", "pooled"):
        here = case(form=form)
        parts = here.outcome(here.built(), {"map": student}, {"map": teacher}, here.batch()).parts
        losses.append(torch.stack(list(parts.values())))
    torch.testing.assert_close(*losses)


def test_the_forms_differ_on_larger_maps() -> None:
    student, teacher = case().tensors()
    map_, pooled = (
        case(form=form).loss(case(form=form).built(), student, teacher, case().batch()) for form in ("map", "pooled")
    )
    assert not torch.allclose(map_, pooled)


def test_every_sample_is_classified_for_itself() -> None:
    # the defect of one published code: the last sample's logits against the whole batch
    student = gaussian(0, {"a": (4, 3)})["a"]
    head = classifier(3)
    right = srrl(student, student, head(student), head(student))
    broadcast = head(student)[-1:].expand(4, -1)
    wrong = srrl(student, student, broadcast, head(student))
    assert right["regression"] == 0
    assert wrong["regression"] > 0


def test_zero_where_the_vectors_agree() -> None:
    vector = gaussian(0, {"v": (4, 3)})["v"].requires_grad_()
    head = classifier(3).requires_grad_(False)
    parts = srrl(vector, vector.detach(), head(vector), head(vector.detach()), beta=5.0)
    assert parts["feature"] == parts["regression"] == 0
    assert not torch.autograd.grad(parts["feature"] + parts["regression"], vector)[0].any()


def test_the_regression_sees_the_difference_through_the_classifier() -> None:
    drawn = gaussian(0, {"s": (4, 3), "t": (4, 3)})
    head = classifier(3)
    found = srrl(drawn["s"], drawn["t"], head(drawn["s"]), head(drawn["t"]))["regression"]
    expected = ((drawn["s"] - drawn["t"]) @ head.weight.T).square().mean()  # the bias cancels
    torch.testing.assert_close(found, expected)


def test_alpha_and_beta_weigh_the_two_parts() -> None:
    student, teacher = case().tensors()
    unit = case().outcome(case().built(), student, teacher, case().batch()).parts
    here = case(alpha=0.5, beta=5.0)
    parts = here.outcome(here.built(), student, teacher, here.batch()).parts
    torch.testing.assert_close(parts["feature"], 0.5 * unit["feature"])
    torch.testing.assert_close(parts["regression"], 5 * unit["regression"])


def test_the_connector_is_there_between_equal_widths_too_and_starts_as_published() -> None:
    here = MethodCase(
        term=SRRL,
        student=lambda seed: gaussian(seed, {"map": (2, 64, 2, 2)}),
        teacher=lambda seed: gaussian(seed, {"map": (2, 64, 2, 2)}),
        borrowed=lambda: {"classifier": classifier(64)},
    )
    weights = here.built().state_dict()
    assert weights["connector.conv.weight"].shape == (64, 64, 1, 1)
    assert "connector.conv.bias" not in weights
    assert weights["connector.conv.weight"].std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert weights["connector.conv.weight"].mean().item() == pytest.approx(0, abs=0.01)
    assert (weights["connector.bn.weight"] == 1).all()
    assert (weights["connector.bn.bias"] == 0).all()


# the borrowed classifier


class Net(nn.Module):
    def __init__(self, width: int, classes: int = 5) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, width, 3, padding=1)
        self.fc = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.features(images).mean((2, 3)))
        return scores


def distiller(teacher: nn.Module, rows: int = 4) -> tuple[Distiller, Batch]:
    torch.manual_seed(0)
    term = SRRL(student_tap="features", teacher_tap="features", classifier="fc")
    batch = Batch.of(torch.rand(rows, 1, 5, 5), torch.arange(rows) % 5)
    objective = Objective(task=1.0, srrl=term)
    return Distiller(Net(3), objective, task=Classification(5), teacher=teacher, sample=batch), batch


def test_in_a_step_the_classifier_is_frozen_and_nobodys_child() -> None:
    teacher = Net(6)
    machine, batch = distiller(teacher)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    losses = machine(batch, machine.observe(batch))
    losses.total.backward()
    assert list(losses.parts) == ["task", "srrl.feature", "srrl.regression"]
    optimizer = torch.optim.SGD(machine.param_groups(), lr=0.1)
    optimizer.step()
    machine.after_step(losses)
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
    assert [name for name in machine.state_dict() if "fc" in name] == [
        "students.student.fc.weight",
        "students.student.fc.bias",
    ]
    assert all(p.grad is not None for p in machine.parameters())
    machine.close()


def test_the_scores_are_the_teachers_own() -> None:
    teacher = Net(6)
    machine, batch = distiller(teacher)
    signals = machine.observe(batch)["teacher"]
    torch.testing.assert_close(signals.borrowed["fc"](pool(signals["features"])), teacher(batch.inputs))
    machine.close()


def test_a_convolution_may_classify() -> None:
    linear, conv = classifier(), nn.Conv2d(6, 5, 1)
    conv.load_state_dict({"weight": linear.weight.detach()[:, :, None, None], "bias": linear.bias.detach()})
    student, teacher = case().tensors()
    here = replace(case(), borrowed=lambda: {"classifier": conv})
    for batch in (slice(0, 6), slice(0, 1)):
        maps = [{"map": side["map"][batch]} for side in (student, teacher or {})]
        losses = [one.loss(one.built(), maps[0], maps[1], one.batch()) for one in (case(), here)]
        torch.testing.assert_close(*losses)


# odd cases


def test_no_rows_give_a_connected_zero() -> None:
    term = case().built()
    student = torch.zeros(0, 4, 3, 3, requires_grad=True)
    loss = case().loss(term, {"map": student}, {"map": torch.zeros(0, 6, 2, 2)}, case().batch())
    assert loss.item() == 0
    loss.backward()
    assert student.grad is not None
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in term.parameters())
    assert all(buffer.isfinite().all() for buffer in term.buffers())


def test_one_sample_with_several_positions_trains() -> None:
    student, teacher = case().tensors()
    assert teacher is not None
    first = {"map": student["map"][:1]}, {"map": teacher["map"][:1]}
    assert case().loss(case().built(), *first, case().batch()).isfinite()


@pytest.mark.parametrize(("form", "shape"), [("map", (1, 4, 1, 1)), ("pooled", (1, 4, 3, 3)), ("pooled", (1, 4, 1, 1))])
def test_one_value_a_channel_cannot_train(form: str, shape: tuple[int, ...]) -> None:
    here = case(form=form)
    term = here.built()
    maps = {"map": torch.zeros(shape)}, {"map": torch.zeros(1, 6, 2, 2)}
    said = (
        "srrl: batch norm cannot train on one value a channel (one sample with a 1x1 map); "
        "use a batch size of at least 2, or drop the last incomplete batch"
    )
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        here.loss(term, *maps, here.batch())
    term.eval()
    assert here.loss(term, *maps, here.batch()).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    student = torch.full((2, 3), 1e4, dtype=dtype, requires_grad=True)
    teacher = torch.full((2, 3), -1e4, dtype=dtype)
    parts = srrl(student, teacher, student, teacher)
    apart = (student.double() - teacher.double()).detach().square().mean().item()
    for part in parts.values():
        assert part.dtype == torch.float32
        assert part.item() == pytest.approx(apart, rel=1e-5)
    assert torch.autograd.grad(parts["feature"], student)[0].isfinite().all()
    # neither the sum over 2500 positions nor a mean between two neighbours fits into half precision
    assert pool(torch.full((1, 1, 50, 50), 1e4, dtype=dtype)).item() == pytest.approx(1e4, rel=4e-3)
    step = torch.finfo(dtype).eps
    assert pool(torch.tensor([1.0, 1.0 + step], dtype=dtype).view(1, 1, 1, 2)).item() == 1.0 + step / 2


@pytest.mark.parametrize("form", ["map", "pooled"])
def test_its_layers_run_under_autocast_and_the_comparison_does_not(form: str) -> None:
    here = case(form=form)
    student, teacher = here.tensors()
    exact = here.loss(here.built(), student, teacher, here.batch())
    assert teacher is not None
    half = {"map": student["map"].bfloat16()}, {"map": teacher["map"].bfloat16()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = here.loss(here.built(), *half, here.batch())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=3e-2)


def test_a_classifier_in_half_precision_reads_full_precision_vectors() -> None:
    student, teacher = case().tensors()
    assert teacher is not None
    lent = classifier().bfloat16().requires_grad_(False)
    signals = case().signals(student), Signals(None, {"map": teacher["map"].bfloat16()}, {"classifier": lent})
    term = case().built()
    parts = term(*signals, case().batch())
    exact = case().loss(case().built(), student, teacher, case().batch())
    assert sum(parts.values()).item() == pytest.approx(exact.item(), rel=3e-2)


# errors


def test_an_unknown_form() -> None:
    with pytest.raises(UserError, match=r"^form 'vector' is not known; valid: map, pooled$"):
        SRRL(form="vector")  # type: ignore[arg-type]


def build(student: tuple[int, ...], teacher: tuple[int, ...], lent: nn.Module) -> None:
    signals = Signals(None, {"map": torch.zeros(student)}), Signals(None, {"map": torch.zeros(teacher)})
    SRRL().build(signals[0], Signals(None, signals[1].taps, {"classifier": lent.requires_grad_(False)}), Facts())


def test_a_tap_that_is_no_map() -> None:
    with pytest.raises(UserError, match=re.escape("srrl pools maps [B, C, H, W], not [2, 4] and [2, 6, 2, 2]")):
        build((2, 4), (2, 6, 2, 2), classifier())


ADVICE = "; tap the map it reads (teacher_tap), or name the part that follows the pooling (classifier)"


@pytest.mark.parametrize(
    ("lent", "said"),
    [
        pytest.param(
            nn.Linear(12, 5),
            "srrl: the teacher's 'classifier' does not take the 6 channels of 'map' (it takes 12)" + ADVICE,
            id="width",
        ),
        pytest.param(
            nn.Conv2d(12, 5, 1),
            "srrl: the teacher's 'classifier' does not take the 6 channels of 'map' (it takes 12)" + ADVICE,
            id="width of a convolution",
        ),
        pytest.param(
            nn.Sequential(nn.Flatten(), nn.Linear(24, 5)),
            "srrl: the teacher's 'classifier' does not take the 6 channels of 'map' "
            "(mat1 and mat2 shapes cannot be multiplied (2x6 and 24x5))" + ADVICE,
            id="flattened map",
        ),
        pytest.param(
            nn.Unflatten(1, (6, 1, 1)),
            "srrl: the teacher's 'classifier' gave [2, 6, 1, 1], not [B, K]" + ADVICE,
            id="no rows of scores",
        ),
    ],
)
def test_a_classifier_that_does_not_fit(lent: nn.Module, said: str) -> None:
    with pytest.raises(UserError) as error:
        build((2, 4, 3, 3), (2, 6, 2, 2), lent)
    assert str(error.value).replace("addmm: ", "") == said  # newer torch names the operation


def test_pairs_of_two_shapes() -> None:
    said = "srrl compares tensors of one shape: the student's regression is [4, 3], the teacher's [1, 3]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        srrl(torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4, 3), torch.zeros(1, 3))
