# SPDX-License-Identifier: Apache-2.0
import copy
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from golden_answer import with_gradients
from method_case import MethodCase, Tensors, gaussian
from oracles import simkd as oracle
from tutelage.core import Batch, Distiller, Facts, Model, Objective, Rebuild, Signals, Tap
from tutelage.core.error import UserError
from tutelage.core.rebuild import repeated
from tutelage.methods.features.simkd import Composed, SimKD, TeacherHead, make_projector, simkd
from tutelage.models.load import load
from tutelage.run.folder import RunFolder
from tutelage.tasks.classification import Classification

Arrays = dict[str, NDArray[Any]]
TASK = Classification(5)


def case(rows: int = 6) -> MethodCase:
    return MethodCase(
        term=SimKD,
        student=lambda seed: gaussian(seed, {"map": (rows, 4, 3, 3)}),
        teacher=lambda seed: gaussian(seed + 1000, {"map": (rows, 4, 3, 3)}),
    )


def composed(student: Tensor, teacher: Tensor, weights: Tensors, factor: int) -> Composed:
    """The rebuilt student whose network gives its input as its map, with these weights."""
    classes, width = weights["fc.weight"].shape
    classifier = nn.Linear(width, classes, bias="fc.bias" in weights)
    larger = student.shape[2] > teacher.shape[2]
    network = Composed(
        nn.Sequential(nn.Identity()),
        Tap("0"),
        make_projector(student.shape[1], width, factor),
        classifier,
        (teacher.shape[2], teacher.shape[3]) if larger else None,
    ).to(student.dtype)
    network.projector.load_state_dict(
        {name.removeprefix("transfer."): w for name, w in weights.items() if name.startswith("transfer.")},
        strict=False,
    )
    classifier.load_state_dict({name.removeprefix("fc."): w for name, w in weights.items() if "fc." in name})
    return network


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    held = {name: torch.tensor(array, dtype=torch.float64) for name, array in arrays.items()}
    student, teacher = held["s_feat"].requires_grad_(), held["t_feat"]
    rename = {"w_projector.": "", "w_teacher_": ""}
    weights = {
        name.replace(prefix, short): value
        for name, value in held.items()
        for prefix, short in rename.items()
        if name.startswith(prefix)
    }
    network = composed(student, teacher, weights, meta["factor"])
    maps: list[Tensor] = []
    network.projector.register_forward_hook(lambda module, args, output: maps.append(output))
    logits = network(student)
    free = {"s_feat": student}
    free |= {f"w_projector.transfer.{name}": w for name, w in network.projector.named_parameters()}
    answer: dict[str, Any] = {**with_gradients({"loss": simkd(maps[0], teacher)}, free, arrays)}
    answer |= {"out_pred_logits": logits, "out_projected": maps[0]}
    return answer | {
        f"out_projector.transfer.{name}": value
        for name, value in network.projector.named_buffers()
        if "running" in name
    }


# the equation, worked out by loops


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(2, 3),
    width=st.integers(1, 3),
    factor=st.sampled_from([1, 2, 4]),
    sizes=st.sampled_from([(3, 3), (4, 2), (2, 4)]),
)
def test_equals_the_loops(seed: int, rows: int, width: int, factor: int, sizes: tuple[int, int]) -> None:
    narrow = max(1, 4 // factor)
    shapes: dict[str, tuple[int, ...]] = {
        "s": (rows, width, sizes[0], sizes[0]),
        "t": (rows, 4, sizes[1], sizes[1]),
        "transfer.0.weight": (narrow, width, 1, 1),
        "transfer.3.weight": (narrow, narrow, 3, 3),
        "transfer.6.weight": (4, narrow, 1, 1),
        **{f"transfer.{n}.{part}": (narrow,) for n in (1, 4) for part in ("weight", "bias")},
        **{f"transfer.7.{part}": (4,) for part in ("weight", "bias")},
        **{"fc.weight": (5, 4), "fc.bias": (5,)},
    }
    drawn = {name: value.double() for name, value in gaussian(seed, shapes).items()}
    student, teacher = drawn.pop("s"), drawn.pop("t")
    network = composed(student, teacher, drawn, factor)
    maps: list[Tensor] = []
    network.projector.register_forward_hook(lambda module, args, output: maps.append(output))
    logits = network(student)
    arrays = {name: value.numpy() for name, value in drawn.items()}
    projected = oracle.project(student.numpy(), teacher.numpy(), arrays)
    scores = oracle.predict(projected, arrays["fc.weight"], arrays["fc.bias"])
    expected = oracle.simkd(student.numpy(), teacher.numpy(), arrays)
    assert simkd(maps[0], teacher).item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(logits, torch.tensor(scores))


@pytest.mark.parametrize("size", [2, 4])
def test_gradcheck(size: int) -> None:
    drawn = gaussian(0, {"s": (2, 3, 2, 2), "t": (2, 3, size, size)})
    teacher = drawn["t"].double()
    assert torch.autograd.gradcheck(lambda s: simkd(s, teacher), drawn["s"].double().requires_grad_())


# the rebuilt student


def models(**options: Any) -> tuple[Model, Model, Batch]:
    student = load({"model": "tutelage:resnet8", "width": 0.25, **options}, num_classes=5, in_channels=1, seed=0)
    teacher = load("tutelage:resnet14", num_classes=5, in_channels=1, seed=1)
    return student, teacher, Batch.of(torch.rand(6, 1, 8, 8), torch.arange(6) % 5)


def rebuilt(factor: int = 2) -> tuple[Model, Model, Batch, TeacherHead]:
    student, teacher, batch = models()
    head = TeacherHead(factor=factor)
    return head.begin(student, teacher, TASK, Facts(), batch), teacher, batch, head


def test_the_prediction_is_the_teachers_classifier_on_the_projected_map() -> None:
    model, teacher, batch, _ = rebuilt()
    machine = Distiller(model, Objective({"simkd": SimKD()}, task=0.0), task=TASK, teacher=teacher, sample=batch)
    assert machine.report.shapes["student"]["map"] == (6, 64, 2, 2)
    signals = machine._read(batch, machine.observe(batch))["student"]
    linear = teacher.module.get_submodule("linear")
    torch.testing.assert_close(signals.logits, linear(signals["map"].mean((2, 3))))
    machine.close()


def test_only_body_and_projector_learn() -> None:
    model, teacher, batch, _ = rebuilt()
    machine = Distiller(model, Objective({"simkd": SimKD()}, task=0.0), task=TASK, teacher=teacher, sample=batch)
    before = {name: weight.clone() for name, weight in teacher.module.state_dict().items()}
    losses = machine(batch, machine.observe(batch))
    losses.total.backward()
    torch.optim.SGD(machine.param_groups(), lr=0.1).step()
    missing = [name for name, p in model.module.named_parameters() if p.grad is None]
    assert missing == ["classifier.weight", "classifier.bias"]
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.module.state_dict().items())
    assert not machine.report.frozen
    machine.close()


def test_the_students_own_classifier_is_gone_and_its_roles_remain() -> None:
    model, _, batch, _ = rebuilt()
    names = dict(model.module.named_parameters())
    assert not any("linear" in name for name in names)
    assert names["projector.0.weight"].shape == (32, 16, 1, 1)
    assert model.modules["classifier"] == "classifier"
    assert model.roles["stages[2]"].where == "student.layer3"
    assert model.roles["pooled"] == Tap("classifier", "input")
    assert model.source == models()[0].source
    assert model(batch.inputs).shape == (6, 5)


@pytest.mark.parametrize(("factor", "narrow"), [(1, 64), (2, 32), (8, 8), (1000, 1)])
def test_the_projectors_width(factor: int, narrow: int) -> None:
    model, *_ = rebuilt(factor)
    assert model.module.get_parameter("projector.3.weight").shape == (narrow, narrow, 3, 3)


def test_it_is_built_again_from_its_record() -> None:
    model, _, batch, head = rebuilt()
    record = json.loads(json.dumps(head.record()))
    assert issubclass(Rebuild.named(record["rebuild"]), TeacherHead)
    fresh = repeated(models()[0], [record])
    fresh.module.load_state_dict(model.module.state_dict())
    model.module.eval()
    fresh.module.eval()
    torch.testing.assert_close(fresh(batch.inputs), model(batch.inputs))


def test_a_runs_student_knows_how_it_was_rebuilt(tmp_path: Path) -> None:
    model, _, batch, head = rebuilt()
    model.module.eval()
    RunFolder(tmp_path).save_student(model.module, {**model.source, "rebuilds": [head.record()]})
    again = load(f"run:{tmp_path}")
    torch.testing.assert_close(again.module.eval()(batch.inputs), model.module(batch.inputs))
    assert again.source["rebuilds"] == [head.record()]  # a run that goes on with it must say so too


def test_it_is_copied_and_pickled() -> None:
    model, _, batch, _ = rebuilt()
    network = model.module.eval()
    expected = network(batch.inputs)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        torch.testing.assert_close(other(batch.inputs), expected)
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert not torch.allclose(other(batch.inputs), expected)
    torch.testing.assert_close(network(batch.inputs), expected)


def test_rebuilding_leaves_teacher_and_flags_alone() -> None:
    student, teacher, batch = models()
    teacher.module.eval()
    before = copy.deepcopy(teacher.module.state_dict())
    own = copy.deepcopy(student.module.state_dict())
    model = TeacherHead().begin(student, teacher, TASK, Facts(), batch)
    assert model.module.training
    assert model.module.get_submodule("student").training
    assert not teacher.module.training
    assert teacher.module.get_submodule("linear").weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in teacher.module.state_dict().items())
    kept = {name.removeprefix("student."): value for name, value in model.module.state_dict().items()}
    assert all(torch.equal(value, kept[name]) for name, value in own.items() if not name.startswith("linear"))


def test_a_larger_map_is_averaged_before_the_projector() -> None:
    student, teacher, batch = models()
    student = replace(student, roles={**student.roles, "map": student.roles["stages[1]"]})
    model = TeacherHead().begin(student, teacher, TASK, Facts(), batch)
    assert isinstance(model.module.get_submodule("pool"), nn.AdaptiveAvgPool2d)
    machine = Distiller(model, Objective({"simkd": SimKD()}, task=0.0), task=TASK, teacher=teacher, sample=batch)
    assert machine.report.shapes["student"]["map"] == (6, 64, 2, 2)
    machine.close()


def test_a_convolution_may_classify() -> None:
    student, teacher, batch = models()
    linear = teacher.module.get_submodule("linear")
    assert isinstance(linear, nn.Linear)
    conv = nn.Conv2d(64, 5, 1)
    conv.load_state_dict({"weight": linear.weight.detach()[:, :, None, None], "bias": linear.bias.detach()})
    torch.manual_seed(3)
    one = TeacherHead().begin(student, teacher, TASK, Facts(), batch)
    network = nn.Sequential()
    network.add_module("body", teacher.module)
    network.add_module("head", conv)
    other_teacher = Model(teacher.module, teacher.roles, {"classifier": "convolution"}, input=teacher.input)
    teacher.module.add_module("convolution", conv)
    torch.manual_seed(3)
    other = TeacherHead().begin(models()[0], other_teacher, TASK, Facts(), batch)
    other.module.load_state_dict(
        {n: w.view_as(other.module.state_dict()[n]) for n, w in one.module.state_dict().items()}
    )
    torch.testing.assert_close(other.module.eval()(batch.inputs), one.module.eval()(batch.inputs))
    assert "pooled" not in other.roles


def test_what_is_said_of_it() -> None:
    *_, head = rebuilt()
    assert head.report() == (
        "simkd: a projector from 16 to 64 channels and the teacher's classifier follow the student's last map; "
        "they belong to the exported student"
    )


# limits, odd cases


def test_nothing_to_learn_from_oneself() -> None:
    student = gaussian(0, {"s": (4, 3, 2, 2)})["s"].requires_grad_()
    loss = simkd(student, student.detach())
    assert loss == 0
    assert not torch.autograd.grad(loss, student)[0].any()


def test_no_rows_give_a_connected_zero() -> None:
    student = torch.zeros(0, 3, 2, 2, requires_grad=True)
    loss = simkd(student, torch.zeros(0, 3, 4, 4))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, student)[0].shape == (0, 3, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    student = torch.full((2, 3, 2, 2), 1e4, dtype=dtype, requires_grad=True)
    teacher = torch.full((2, 3, 4, 4), -1e4, dtype=dtype)
    loss = simkd(student, teacher)
    apart = (2 * student.double().detach()).square().mean().item()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(apart, rel=1e-5)
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


# errors


def test_a_student_that_was_not_rebuilt() -> None:
    said = (
        "simkd compares maps of one width: the student's has 4 channels, the teacher's 6; rebuild the student for "
        "this teacher (TeacherHead)"
    )
    sides = [Signals(None, {"map": torch.zeros(2, width, 3, 3)}) for width in (4, 6)]
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        SimKD().build(sides[0], sides[1], Facts())


def test_a_tap_that_is_no_map() -> None:
    sides = [Signals(None, {"map": torch.zeros(shape)}) for shape in ((2, 4), (2, 4, 3, 3))]
    with pytest.raises(UserError, match=re.escape("simkd compares maps [B, C, H, W], not [2, 4] and [2, 4, 3, 3]")):
        SimKD().build(sides[0], sides[1], Facts())


def test_an_impossible_factor() -> None:
    with pytest.raises(UserError, match=r"^factor is a whole number of at least 1, not 0$"):
        TeacherHead(factor=0)


def test_no_teacher() -> None:
    student, _, batch = models()
    said = "simkd needs a teacher whose classifier can be copied, and none was given"
    with pytest.raises(UserError, match=f"^{said}$"):
        TeacherHead().begin(student, None, TASK, Facts(), batch)


@pytest.mark.parametrize(
    ("classifier", "said"),
    [
        pytest.param(
            nn.Linear(128, 5),
            "simkd: the teacher's classifier reads 128 numbers, its last map has 64 channels: something lies "
            "between them that the student would lack",
            id="width",
        ),
        pytest.param(
            nn.Bilinear(64, 64, 5),
            "simkd reuses a linear layer or a 1x1 convolution; the teacher's classifier is a Bilinear",
            id="kind",
        ),
    ],
)
def test_a_classifier_that_cannot_be_reused(classifier: nn.Module, said: str) -> None:
    student, teacher, batch = models()
    teacher.module.add_module("other", classifier)
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        TeacherHead().begin(student, replace(teacher, modules={"classifier": "other"}), TASK, Facts(), batch)
