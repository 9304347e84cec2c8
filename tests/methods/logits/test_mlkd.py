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
from torch.nn import functional as F

from gloo_pool import GlooPool
from method_case import MethodCase, gaussian, labelled_batch
from oracles import mlkd as oracle
from tutelage.core import Batch, Distiller, Objective, Signals, ranks
from tutelage.core.error import UserError
from tutelage.methods.logits.mlkd import MLKD, Form, batch_level, class_level, instance_level, mlkd, unsure
from tutelage.tasks.classification import Classification

Arrays = dict[str, NDArray[Any]]
SHAPE = {"logits": (6, 5), "logits@strong": (6, 5)}
FORMS: dict[Form, str] = {"released": "code", "paper": "selected"}  # ours, the oracle's
PARTS = {"instance": "kd", "class": "class", "batch": "batch"}
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def case() -> MethodCase:
    return MethodCase(
        term=MLKD,
        student=lambda seed: gaussian(seed, SHAPE),
        teacher=lambda seed: gaussian(seed + 1000, SHAPE, 2.0),
        batch=lambda: replace(labelled_batch(), views={"strong": torch.arange(6)}),
    )


def drawn(seed: int = 0, rows: int = 6, classes: int = 5, scale: float = 2.0) -> tuple[Four, Tensor]:
    """Logits of student and teacher on the weak and the strong view, the student's free; classes."""
    found = gaussian(seed, dict.fromkeys(("sw", "ss", "tw", "ts"), (rows, classes)), scale)
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    sw, ss = found["sw"].double().requires_grad_(), found["ss"].double().requires_grad_()
    return (sw, ss, found["tw"].double(), found["ts"].double()), target


def total(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


def gradients(loss: Tensor, views: Four) -> list[Tensor]:
    found = torch.autograd.grad(loss, views[:2], retain_graph=True, allow_unused=True)
    return [torch.zeros_like(views[0]) if grad is None else grad for grad in found]


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    names = ("s_logits_weak", "s_logits_strong", "t_logits_weak", "t_logits_strong")
    sw, ss, tw, ts = (torch.tensor(arrays[name], dtype=torch.float64) for name in names)
    views: Four = (sw.requires_grad_(), ss.requires_grad_(), tw, ts)
    target = torch.tensor(arrays["target"])
    first, extra = float(meta["temperature"]), meta["extra_temperatures"]
    whole = step(views, target, meta["ce_weight"], meta["kd_weight"], (first, *extra))
    variant = meta["logit_std_variant"]
    other = step(
        views,
        target,
        variant["ce_weight"],
        variant["kd_weight"],
        (variant["temperature"], *extra),
        standardize=True,
    )
    p, q = ((logits / first).softmax(1) for logits in (sw, tw))
    losses = {
        "loss": total(whole),
        "loss_ce": whole["task"] + whole["mlkd.label"],
        "loss_kd": whole["mlkd.instance"],
        "loss_cc": whole["mlkd.class"],
        "loss_bc": whole["mlkd.batch"],
        "alt_logitstd_total": total(other),
        f"loss_item_kl_T{first:g}_weak": instance_level(sw, tw, first).mean(),
        f"loss_item_cc_T{first:g}_weak": class_level(p, q).mean(),
        f"loss_item_bc_T{first:g}_weak": batch_level(p, q, p, q).mean(),
    }
    answer: dict[str, Any] = dict(losses)
    for name, loss in losses.items():
        suffix = "" if name == "loss" else f"__{name}"
        for view, grad in zip(("weak", "strong"), gradients(loss, views), strict=True):
            answer[f"grad_s_logits_{view}{suffix}"] = grad
    sure = tw.softmax(1)
    answer["out_mask_sample"] = unsure(sure.amax(1)).bool()
    answer["out_mask_class"] = unsure(sure.sum(0)).bool()
    return answer


def step(
    views: Four, target: Tensor, task: float, alpha: float, temperatures: tuple[float, ...], **options: Any
) -> dict[str, Tensor]:
    """The parts of the term, and the task's own loss on the weak view with its weight."""
    sw, ss, tw, ts = views
    sides = [Signals(weak, {"logits": weak, "logits@strong": strong}) for weak, strong in ((sw, ss), (tw, ts))]
    batch = Batch.of(torch.zeros(len(target), 1), target)
    term = MLKD(alpha=alpha, beta=task, temperatures=temperatures, **options)
    parts = {f"mlkd.{name}": part for name, part in term(*sides, batch).items()}
    return {"task": task * Classification(sw.shape[1]).loss(sw, batch), **parts}


# the equation, worked out by loops


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 6), classes=st.integers(2, 7), scale=st.floats(0.1, 20))
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(form: Form, standardize: bool, seed: int, rows: int, classes: int, scale: float) -> None:
    views, target = drawn(seed, rows, classes, scale)
    temperatures = (4.0, 1.5, 5.0, 2.0)
    sw, ss, tw, ts = (view.detach().numpy() for view in views)
    expected = oracle.mlkd(sw, ss, tw, ts, target.numpy(), temperatures, 0.3, 0.7, FORMS[form], standardize)
    parts = mlkd(
        *views,
        target,
        alpha=0.7,
        beta=0.3,
        temperatures=temperatures,
        form=form,
        standardize=standardize,
    )
    for ours, theirs in PARTS.items():
        assert parts[ours].item() == pytest.approx(expected[theirs], rel=1e-8, abs=1e-10)
    task = 0.3 * F.cross_entropy(views[0], target).item()
    assert parts["label"].item() + task == pytest.approx(expected["ce"], rel=1e-9)


@pytest.mark.parametrize("part", ["instance", "batch", "class", "label"])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Form, part: str) -> None:
    (sw, ss, tw, ts), target = drawn(1, rows=3, classes=4)
    assert torch.autograd.gradcheck(
        lambda weak, strong: mlkd(weak, strong, tw, ts, target, form=form)[part] + 0 * (weak + strong).sum(), (sw, ss)
    )


# limits and identities


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_the_median_is_numpys(count: int) -> None:
    values = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    values[: count // 3] = values[0].item()
    expected = values.numpy() <= np.percentile(values.numpy(), 50)
    np.testing.assert_array_equal(unsure(values).bool().numpy(), expected)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_learn_from_oneself_but_the_label(form: Form) -> None:
    (sw, ss, _, _), target = drawn(2)
    parts = mlkd(sw, ss, sw.detach(), ss.detach(), target, form=form)
    for name in PARTS:
        assert parts[name].item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(parts["label"], 0.1 * F.cross_entropy(ss, target))


def test_the_paper_takes_sure_samples_out_and_the_code_counts_them_less() -> None:
    views, target = drawn(3, rows=4)
    sure = views[2].softmax(1).amax(1).argmax()
    changed = views[0].detach().clone()
    changed[sure] += torch.arange(5)
    moved = changed, *views[1:]
    paper = [mlkd(*given, target, form="paper", temperatures=(4.0,))["instance"] for given in (views, moved)]
    torch.testing.assert_close(*paper)  # the sample teaches on the strong view alone
    code = [mlkd(*given, target, temperatures=(4.0,))["instance"] for given in (views, moved)]
    assert not torch.isclose(code[0], code[1])


def test_the_released_code_forgets_the_strong_view_from_the_fourth_temperature_on() -> None:
    views, target = drawn(4)
    alone = [gradients(mlkd(*views, target, beta=0, form=form)["instance"], views)[1] for form in FORMS]
    assert all(grad.any() for grad in alone)
    first = mlkd(*views, target, temperatures=(4.0, 3.0, 5.0))["instance"]
    torch.testing.assert_close(gradients(first, views)[1], alone[0])
    assert not torch.allclose(alone[0], alone[1])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
@pytest.mark.parametrize("form", FORMS)
def test_order_and_a_constant_change_nothing(form: Form, seed: int) -> None:
    views, target = drawn(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, classes = torch.randperm(6, generator=generator), torch.randperm(5, generator=generator)
    moved = [view[rows][:, classes] + 3 for view in views]
    found = mlkd(moved[0], moved[1], moved[2], moved[3], classes.argsort()[target[rows]], form=form)
    torch.testing.assert_close(found, mlkd(*views, target, form=form), rtol=1e-8, atol=1e-10)


# labels


def test_soft_labels_and_rows_without_any() -> None:
    views, target = drawn(5)
    labelled = torch.tensor([True, False, True, True, False, True])
    found = mlkd(*views, target.where(labelled, -1), labelled)
    bare = mlkd(*views, target)
    for name in PARTS:
        assert found[name] == bare[name]
    torch.testing.assert_close(found["label"], 0.1 * F.cross_entropy(views[1][labelled], target[labelled]))
    soft = torch.eye(5, dtype=torch.float64)[target] * labelled[:, None]
    torch.testing.assert_close(mlkd(*views, soft, labelled), found)


# signals


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        scores: Tensor = self.fc(inputs)
        return scores


def test_a_step_on_two_views() -> None:
    torch.manual_seed(0)
    batch = Batch.of(torch.rand(4, 3), torch.tensor([0, 2, -1, 4]), views={"hard": torch.rand(4, 3)})
    student, teacher = Net(), Net()
    objective = Objective(task=0.1, mlkd=MLKD(view="hard"))
    machine = Distiller(student, objective, task=Classification(5), teacher=teacher, sample=batch)
    losses = machine(batch, machine.observe(batch))
    expected = mlkd(
        student(batch.inputs),
        student(batch.views["hard"]),
        teacher(batch.inputs),
        teacher(batch.views["hard"]),
        batch.target,
        batch.labelled,
    )
    assert list(losses.parts) == ["task", *(f"mlkd.{name}" for name in expected)]
    for name, part in expected.items():
        torch.testing.assert_close(losses.parts[f"mlkd.{name}"], part.detach())
    losses.total.backward()
    assert all(p.grad is not None and p.grad.any() for p in machine.parameters())
    machine.close()


def test_data_without_a_second_view() -> None:
    batch = Batch.of(torch.rand(4, 3), torch.tensor([0, 2, -1, 4]))
    with pytest.raises(UserError, match=r"^the batch has no view 'strong'; the data makes none$"):
        Distiller(Net(), Objective(mlkd=MLKD()), task=Classification(5), teacher=Net(), sample=batch)


# over ranks


def share(form: Form, gather: bool) -> tuple[Tensor, list[Tensor]]:
    """This rank's part of the loss, and the gradients of its rows under a mean over ranks."""
    views, target = drawn(8)
    rows = slice(0, 3) if ranks.rank() == 0 else slice(3, 6)
    sw, ss, tw, ts = (view[rows].detach() for view in views)
    mine: Four = (sw.requires_grad_(), ss.requires_grad_(), tw, ts)
    loss = total(mlkd(*mine, target[rows], form=form, gather=gather))
    return loss.detach(), [grad / ranks.world_size() for grad in gradients(loss, mine)]


@pytest.mark.parametrize("form", FORMS)
def test_with_gather_the_parts_of_two_ranks_make_the_whole(form: Form, gloo: GlooPool) -> None:
    views, target = drawn(8)
    whole = total(mlkd(*views, target, form=form))
    losses, grads = zip(*gloo.run(share, form, True), strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), whole.detach())
    for view, grad in enumerate(gradients(whole, views)):
        torch.testing.assert_close(torch.cat([one[view] for one in grads]), grad)
    apart, _ = zip(*gloo.run(share, form, False), strict=True)
    assert not torch.allclose(torch.stack(apart).mean(), whole)


# odd cases


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_no_rows_give_a_connected_zero(form: Form, standardize: bool) -> None:
    views, target = drawn(0, rows=0)
    loss = total(mlkd(*views, target, form=form, standardize=standardize))
    assert loss.item() == 0
    assert [grad.shape for grad in gradients(loss, views)] == [(0, 5), (0, 5)]


@pytest.mark.parametrize("form", FORMS)
def test_one_row_and_constant_logits_are_finite(form: Form) -> None:
    views, target = drawn(9, rows=1)
    flat: Four = (torch.zeros(1, 5, requires_grad=True), torch.zeros(1, 5, requires_grad=True), *views[2:])
    for four in (views, flat):
        loss = total(mlkd(*four, target, form=form))
        assert loss.isfinite()
        assert all(grad.isfinite().all() for grad in gradients(loss, four))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_extremes(form: Form, standardize: bool, dtype: torch.dtype) -> None:
    one = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0, 0, 0]], dtype=dtype)
    other = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4], [0, 1, 0]], dtype=dtype)
    views: Four = (one.clone().requires_grad_(), one.flip(0).requires_grad_(), other, other)
    parts = mlkd(*views, torch.tensor([0, 1, 2]), form=form, standardize=standardize)
    assert all(part.dtype == torch.float32 and part.isfinite() for part in parts.values())
    assert all(grad.isfinite().all() for grad in gradients(total(parts), views))


# errors


def test_logits_that_do_not_fit() -> None:
    said = "mlkd takes four [B, K] tensors of logits, not [2, 3], [2, 3], [2, 4], [2, 4]"
    narrow, wide = torch.zeros(2, 3), torch.zeros(2, 4)
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        mlkd(narrow, narrow, wide, wide, torch.zeros(2, dtype=torch.long))


def test_a_target_that_does_not_fit() -> None:
    said = "mlkd takes [B] classes or [B, K] soft labels for logits [2, 3], not a target of shape [2, 4]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        mlkd(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 4))


def test_targets_that_are_no_classes() -> None:
    here = case()
    student, teacher = here.tensors()
    said = "mlkd needs class labels, and this data has list for a target"
    with pytest.raises(UserError, match=f"^{said}$"):
        here.loss(MLKD(), student, teacher, replace(here.batch(), target=[{}] * 6))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "code"}, "form 'code' is not known; valid: paper, released"),
        ({"temperatures": ()}, "temperatures must be > 0 and at least one, not []"),
        ({"temperatures": (2.0, 0.0)}, "temperatures must be > 0 and at least one, not [2.0, 0.0]"),
        ({"view": ""}, "view names the strong view of the batch; it cannot be empty"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        MLKD(**options)
