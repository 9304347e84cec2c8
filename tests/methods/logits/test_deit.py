# SPDX-License-Identifier: Apache-2.0
import copy
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from method_case import MethodCase, Tensors, gaussian, gradient, labelled_batch
from oracles import deit as oracle
from tutelage.core import Batch, Distiller, Facts, Model, Objective, Rebuild, Signals, Tap
from tutelage.core.error import UserError
from tutelage.core.reader import Reader
from tutelage.core.rebuild import repeated
from tutelage.methods.logits.deit import DeiT, DistillationToken, Distilled, Form, deit, fused
from tutelage.methods.logits.kd import kd
from tutelage.models.load import load
from tutelage.tasks.classification import Classification

Arrays = dict[str, NDArray[Any]]
FORMS: tuple[Form, ...] = ("hard", "soft", "soft_mean")


def case(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: DeiT(**options),
        student=lambda seed: gaussian(seed, {"head_dist": (6, 5)}),
        teacher=lambda seed: gaussian(seed + 1000, {"logits": (6, 5)}, 2.0),
    )


def drawn(seed: int = 0, rows: int = 6, classes: int = 5, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Free logits of both heads, and the teacher's."""
    found = gaussian(seed, dict.fromkeys(("class", "distillation", "teacher"), (rows, classes)), scale)
    head, other = (found[name].double().requires_grad_() for name in ("class", "distillation"))
    return head, other, found["teacher"].double()


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    head = torch.tensor(arrays["s_logits"], dtype=torch.float64, requires_grad=True)
    other = torch.tensor(arrays["s_logits_dist"], dtype=torch.float64, requires_grad=True)
    teacher, target = torch.tensor(arrays["t_logits"], dtype=torch.float64), torch.tensor(arrays["target"])
    answer: dict[str, Any] = {}
    for name, form in (("loss", "hard"), ("loss_soft", "soft_mean")):
        loss = step(head, other, teacher, target, meta["alpha"], temperature=meta["tau"], form=form)
        suffix = "" if name == "loss" else f"__{name}"
        answer |= {name: loss, f"grad_s_logits{suffix}": gradient(loss, head)}
        answer[f"grad_s_logits_dist{suffix}"] = gradient(loss, other)
    return answer


def step(head: Tensor, other: Tensor, teacher: Tensor, target: Tensor, alpha: float, **options: Any) -> Tensor:
    """The weighted sum with the class head's own loss, through the Objective."""
    objective = Objective(task=1 - alpha, deit=alpha * DeiT(**options))
    sources = {
        "student": Signals((head, other), {"logits": head, "head_dist": other}),
        "teacher": Signals(teacher, {"logits": teacher}),
    }
    batch = labelled_batch(target, index=torch.arange(len(target)))
    total: Tensor = objective(sources, ["student"], batch, Classification(head.shape[1]), 0).total
    return total


# the equation, worked out by loops


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    classes=st.integers(1, 9),
    alpha=st.floats(0.01, 1),
    tau=st.floats(0.25, 20),
    scale=st.floats(0, 30),
)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(
    form: Form, seed: int, rows: int, classes: int, alpha: float, tau: float, scale: float
) -> None:
    head, other, teacher = drawn(seed, rows, classes, scale)
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    plain = head.detach().numpy(), other.detach().numpy(), teacher.numpy(), target.numpy()
    if form == "hard":
        expected = oracle.hard(*plain, alpha)
    else:
        expected = oracle.soft(*plain, alpha, tau, "paper" if form == "soft" else "code")
    found = step(head, other, teacher, target, alpha, temperature=tau, form=form)
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize(("fusion", "theirs"), [("probabilities", "paper"), ("logits", "code")])
def test_both_heads_together_equal_the_loops(fusion: Any, theirs: str) -> None:
    head, other, _ = drawn(1)
    found = fused(head, other, fusion).detach()
    expected = oracle.predict(head.detach().numpy(), other.detach().numpy(), theirs)
    np.testing.assert_allclose((found.exp() if theirs == "paper" else found).numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Form) -> None:
    _, other, teacher = drawn(2, rows=3, classes=4)
    assert torch.autograd.gradcheck(lambda d: deit(d, teacher, temperature=2.0, form=form), other)


# limits and identities


def test_hard_is_cross_entropy_with_the_teachers_class_and_soft_is_kd() -> None:
    _, other, teacher = drawn(3)
    torch.testing.assert_close(deit(other, teacher), F.cross_entropy(other, teacher.argmax(1)))
    soft = deit(other, teacher, form="soft")
    torch.testing.assert_close(soft, kd(other, teacher, temperature=3.0))
    torch.testing.assert_close(deit(other, teacher, form="soft_mean"), soft / 5)


def test_a_sharp_teacher_makes_soft_hard() -> None:
    _, other, teacher = drawn(4)
    soft = deit(other, 1e4 * teacher, temperature=1.0, form="soft")
    torch.testing.assert_close(soft, deit(other, teacher))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(shift=st.floats(-1e3, 1e3), seed=st.integers(0, 1000))
@pytest.mark.parametrize("form", FORMS)
def test_a_constant_and_the_order_of_classes_change_nothing(form: Form, shift: float, seed: int) -> None:
    _, other, teacher = drawn(seed)
    classes = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    found = deit(other[:, classes] + shift, teacher[:, classes] - shift, form=form)
    torch.testing.assert_close(found, deit(other, teacher, form=form), rtol=1e-8, atol=1e-9)


# the student's own token


ROLES = ("blocks[0]", "blocks[1]", "tokens", "cls[1]", "pooled")
SMALL = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}


def transformer(name: str = "vit_tiny_patch16_224", **options: Any) -> Model:
    return load({"model": f"timm:{name}", **SMALL, **options}, num_classes=5, in_channels=1, seed=0)


def images(rows: int = 3) -> Batch:
    inputs = torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Batch.of(inputs, torch.tensor([0, 4, -1])[:rows])


def rebuilt(student: Model, **options: Any) -> tuple[Model, DistillationToken]:
    change = DistillationToken(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return change.begin(student, None, Classification(5), Facts(num_classes=5), images()), change


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg", "class_token": False}, {"reg_tokens": 2}])
def test_a_token_is_added_to_a_transformer_and_taken_out_behind_its_blocks(options: dict[str, Any]) -> None:
    plain = transformer(**options)
    student, change = rebuilt(transformer(**options))
    model = student.module.train()
    assert isinstance(model, Distilled)
    batch = images()
    scores, distilled = student(batch.inputs)
    assert scores.shape == distilled.shape == (3, 5)
    own = plain.module.state_dict()
    assert model.state_dict().keys() == {
        *(f"student.{name}" for name in own),
        *("dist_token", "head_dist.weight", "head_dist.bias"),
    }
    torch.testing.assert_close(model.student.state_dict(), own)
    assert not torch.allclose(scores, plain(batch.inputs), atol=1e-7)  # the other tokens look at the new one
    assert "distillation token" in change.report()


def test_the_class_token_and_the_patches_keep_their_places_for_other_taps() -> None:
    shapes = []
    for model in (transformer(), rebuilt(transformer())[0]):
        reader = Reader(model, [Tap(role) for role in ROLES], Classification(5))
        found = reader(images())
        shapes.append({role: tuple(found[role].shape) for role in ROLES})
        reader.close()
    assert shapes[0] == shapes[1]


def test_out_of_training_it_answers_with_both_heads() -> None:
    for fusion in ("probabilities", "logits"):
        student, _ = rebuilt(transformer(), fusion=fusion)
        head, other = student(images().inputs)
        student.module.eval()
        torch.testing.assert_close(student(images().inputs), fused(head, other, fusion))


def test_a_step_with_a_teacher() -> None:
    student, _ = rebuilt(transformer())
    batch = images()
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    machine = Distiller(
        student, Objective(task=0.5, deit=0.5 * DeiT()), task=Classification(5), teacher=teacher, sample=batch
    )
    losses = machine(batch, machine.observe(batch))
    head, other = student(batch.inputs)
    torch.testing.assert_close(losses.parts["deit"], deit(other, teacher(batch.inputs)).detach())
    torch.testing.assert_close(losses.parts["task"], F.cross_entropy(head[:2], batch.target[:2]).detach())
    losses.total.backward()
    assert not machine.report.frozen
    for name in ("dist_token", "head_dist.weight", "student.head.weight", "student.blocks.0.attn.qkv.weight"):
        grad = student.module.get_parameter(name).grad
        assert grad is not None
        assert grad.any(), name
    machine.eval()
    assert machine.answer(batch).shape == (3, 5)
    machine.close()


def test_it_is_repeated_when_the_student_is_loaded() -> None:
    student, change = rebuilt(transformer())
    again = repeated(transformer(), [change.record()])
    again.module.load_state_dict(student.module.state_dict())
    for model in (student, again):
        model.module.eval()
    torch.testing.assert_close(again(images().inputs), student(images().inputs))
    assert isinstance(change, Rebuild)


def test_copied_and_pickled_it_is_itself() -> None:
    student, _ = rebuilt(transformer())
    model = student.module.eval()
    expected = model(images().inputs)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for other in copies:
        torch.testing.assert_close(other(images().inputs), expected)


def test_timms_distilled_transformers_have_both_already() -> None:
    given = transformer("deit_tiny_distilled_patch16_224")
    student, change = rebuilt(given)
    assert student is given
    head, other = student(images().inputs)
    assert head.shape == other.shape == (3, 5)
    student.module.eval()
    torch.testing.assert_close(student(images().inputs), (head + other) / 2)
    assert change.shape() == {}
    assert repeated(given, [change.record()]) is given
    assert "already" in change.report()


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.second = nn.Linear(64, 4), nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(inputs.flatten(1))
        return self.head(hidden), self.second(hidden)


def test_a_network_with_a_second_head_of_its_own() -> None:
    given = Model.of(TwoHeads())
    student, _ = rebuilt(given, head="second")
    assert student is given
    batch = images()
    objective = Objective(task=0.5, deit=0.5 * DeiT(student_tap="second"))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    machine = Distiller(student, objective, task=Classification(5), teacher=teacher, sample=batch)
    losses = machine(batch, machine.observe(batch))
    expected = deit(student.module(batch.inputs)[1], teacher(batch.inputs))
    torch.testing.assert_close(losses.parts["deit"], expected.detach())
    machine.close()


def test_a_network_without_tokens() -> None:
    said = (
        "deit adds a distillation token to a transformer, and Linear has no roles blocks[0] and tokens; "
        "name the head your network has (student_tap, rebuild.head)"
    )
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        rebuilt(Model.of(nn.Linear(3, 5)))


# odd cases


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_give_a_connected_zero(form: Form) -> None:
    other = torch.zeros(0, 5, requires_grad=True)
    loss = deit(other, torch.zeros(0, 5), form=form)
    assert loss.item() == 0
    assert gradient(loss, other).shape == (0, 5)


@pytest.mark.parametrize("form", FORMS)
def test_one_row_is_its_own_mean(form: Form) -> None:
    _, other, teacher = drawn(5)
    each = [deit(other[n : n + 1], teacher[n : n + 1], form=form) for n in range(6)]
    torch.testing.assert_close(torch.stack(each).mean(), deit(other, teacher, form=form))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_extremes(form: Form, dtype: torch.dtype) -> None:
    other = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0, 0, 0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4], [0, 0, 0]], dtype=dtype)
    loss = deit(other, teacher, form=form)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert gradient(loss, other).isfinite().all()


def test_labels_and_their_absence_do_not_matter() -> None:
    here: MethodCase = case()
    student, teacher = here.tensors()
    bare = Batch.of(torch.zeros(6, 1))
    sides: tuple[Tensors, Tensors | None] = student, teacher
    assert here.loss(DeiT(), *sides, here.batch()) == here.loss(DeiT(), *sides, bare)


# errors


def test_logits_of_two_shapes() -> None:
    said = (
        "deit takes two [B, K] tensors of logits: those of the student's distillation head are [2, 3], "
        "the teacher's [2, 4]"
    )
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        deit(torch.zeros(2, 3), torch.zeros(2, 4))


def test_options_that_are_none() -> None:
    with pytest.raises(UserError, match=r"^temperature must be > 0, not 0$"):
        DeiT(temperature=0)
    with pytest.raises(UserError, match=r"^form 'code' is not known; valid: hard, soft, soft_mean$"):
        DeiT(form="code")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^fusion 'mean' is not known; valid: logits, probabilities$"):
        DistillationToken(fusion="mean")  # type: ignore[arg-type]
