# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from core.networks import CLASSES, Small, images, small_batch
from tutelage.core import Distiller, Live, Model, Objective, Shared, Signals, Tap, Teacher
from tutelage.core.error import UserError
from tutelage.methods.features.fitnet import FitNet
from tutelage.methods.logits.kd import KD
from tutelage.tasks.classification import Classification

TASK = Classification(CLASSES)


def live(mode: Any = "eval", **model: Any) -> tuple[Live, Small]:
    network = Small()
    with torch.no_grad():
        network.bn.running_mean.add_(0.3)  # type: ignore[union-attr]
    teacher = Live(Model(network, roles={"map": Tap("mix")}, modules={"classifier": "head"}, **model), mode)
    return teacher, network


def answer(teacher: Live, *taps: str) -> Signals:
    if teacher.reader is None:
        teacher.plan([Tap(role) for role in taps], [], TASK, small_batch())
    return teacher.observe(small_batch())


def statistics(network: Small) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in network.bn.buffers()]


def test_a_teacher_is_frozen_and_answers_without_gradient() -> None:
    teacher, network = live()
    signals = answer(teacher, "map", "logits")
    assert not any(p.requires_grad for p in network.parameters())
    assert set(signals.taps) == {"map", "logits"}
    assert not any(tap.requires_grad for tap in signals.taps.values())
    torch.testing.assert_close(signals["map"], network.body(images()))
    (signals.logits * torch.ones((), requires_grad=True)).sum().backward()  # may be saved for backward
    network.requires_grad_(True)
    assert not answer(teacher).logits.requires_grad


@pytest.mark.parametrize("disturb", [None, nn.Module.train, nn.Module.eval])
@pytest.mark.parametrize("mode", ["eval", "batch_statistics", "train"])
def test_modes_hold_whatever_is_called(mode: Any, disturb: Any) -> None:
    teacher, network = live(mode)
    answer(teacher)
    if disturb is not None:
        disturb(network)
    before = statistics(network)
    signals = teacher.observe(small_batch())
    moved = not all(map(torch.equal, before, statistics(network)))
    assert moved == (mode == "train")
    assert network.drop.training == (mode == "train")
    pixels = network.conv(images())
    normed = nn.functional.batch_norm(pixels, None, None, network.bn.weight, network.bn.bias, training=True)
    if mode == "batch_statistics":
        expected = network.head(network.mix(normed.relu()).mean((2, 3)))
        torch.testing.assert_close(signals.logits, expected)
    elif mode == "eval":
        torch.testing.assert_close(signals.logits, network.eval()(images()))


def test_a_network_changes_its_mode_with_its_teacher() -> None:
    first, network = live("batch_statistics")
    answer(first)
    before = statistics(network)
    answer(Live(network, "train"))
    assert not all(map(torch.equal, before, statistics(network)))
    torch.testing.assert_close(answer(Live(network, "eval")).logits, network(images()))


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(UserError, match="teacher mode 'evel' is not known; valid: batch_statistics, eval, train"):
        live("evel")


def test_a_lent_module_is_a_frozen_copy_that_lets_gradients_pass() -> None:
    teacher, network = live("train")
    signals = teacher.plan([Tap("map")], ["classifier"], TASK, small_batch())
    lent = signals.borrowed["classifier"]
    assert lent is not network.head
    assert not lent.training
    torch.testing.assert_close(lent.state_dict(), network.head.state_dict())
    features = torch.rand(2, 4, requires_grad=True)
    lent(features).sum().backward()
    assert features.grad is not None
    assert all(p.grad is None for p in lent.parameters())
    with torch.no_grad():
        network.head.weight.add_(1)
    assert not torch.equal(lent.weight, network.head.weight)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="Small lends no 'neck'; it lends: classifier"):
        teacher.plan([], ["neck"], TASK, small_batch())


def test_a_teacher_plans_anew_without_old_hooks() -> None:
    teacher, network = live()
    for roles in (("map",), ("logits",)):
        teacher.plan([Tap(role) for role in roles], [], TASK, small_batch())
    assert not network.mix._forward_hooks
    assert set(teacher.observe(small_batch()).taps) == {"logits"}
    teacher.close()
    with pytest.raises(RuntimeError, match="a teacher answers once a Distiller was built with it"):
        teacher.observe(small_batch())


def test_a_task_without_logits_is_named() -> None:
    class Silent(Classification):  # type: ignore[misc]
        name = "silent"

        def logits(self, output: Any) -> Any:
            return None

    teacher, _ = live()
    with pytest.raises(UserError, match="a term reads logits, and the task 'silent' has none"):
        teacher.plan([Tap("logits")], [], Silent(CLASSES), small_batch())
    assert set(teacher.plan([Tap("map")], [], Silent(CLASSES), small_batch()).taps) == {"map"}


def test_a_teacher_of_one_s_own_needs_two_methods() -> None:
    class Constant(Teacher):
        def plan(self, *given: Any) -> Signals:
            return self.observe(given[3])

        def observe(self, batch: Any) -> Signals:
            return Signals(None, {"logits": torch.zeros(len(batch), CLASSES)})

    distiller = Distiller(Small(), Objective(kd=KD()), task=TASK, teacher=Constant(), sample=small_batch())
    losses = distiller(small_batch(), distiller.observe(small_batch()))
    losses.total.backward()
    distiller.after_step(losses)
    distiller.close()


# --- one teacher of several Distillers ---------------------------------------------------------------------


def both(teacher: Live) -> tuple[Distiller, Distiller, Shared]:
    """Two Distillers that read different things of one teacher."""
    shared = Shared(teacher)
    terms = (KD(), FitNet(student_tap="mix", teacher_tap="map"))
    one, other = (
        Distiller(Small(), Objective(term=term), task=TASK, teacher=Shared(shared), sample=small_batch())
        for term in terms
    )
    return one, other, shared


def test_a_shared_teacher_answers_a_batch_once_and_each_with_what_it_reads() -> None:
    teacher, network = live()
    one, other, shared = both(teacher)
    calls: list[int] = []
    network.register_forward_hook(lambda *_: calls.append(1))
    batch = small_batch()
    for _ in range(2):
        assert set(one.observe(batch)["teacher"].taps) == {"logits"}
        assert set(other.observe(batch)["teacher"].taps) == {"logits", "map"}
    assert len(calls) == 1
    assert one.observe(batch.to("cpu"))["teacher"].output is other.observe(batch)["teacher"].output
    again = small_batch()
    torch.testing.assert_close(one.observe(again)["teacher"].logits, one.observe(batch)["teacher"].logits)
    assert len(calls) == 2  # equal pixels in another tensor: nothing is compared
    del batch, again
    one.observe(last := small_batch())
    assert len(shared.common.answers) == 1  # what nobody can ask for again is forgotten
    assert len(last)
    assert shared.model is teacher.model
    assert shared.networks() == (network,)


def test_one_that_is_done_leaves_the_shared_teacher_to_the_others() -> None:
    teacher, network = live()
    one, other, _ = both(teacher)
    one.close()
    batch = small_batch()
    torch.testing.assert_close(other.observe(batch)["teacher"]["map"], network.body(batch.inputs))
    losses = other(batch, other.observe(batch))
    losses.total.backward()
    other.close()
    teacher.close()
    assert not network.mix._forward_hooks


def test_views_of_a_batch_are_answered_apart() -> None:
    teacher, network = live()
    one, _, _ = both(teacher)
    batch = replace(small_batch(), views={"strong": images() + 1})
    calls: list[int] = []
    network.register_forward_hook(lambda *_: calls.append(1))
    reader = next(iter(one.teachers.values()))
    for _ in range(3):
        plain, strong = reader.observe(batch), reader.observe(batch.seen_as("strong"))
    assert len(calls) == 2
    assert not torch.equal(plain.logits, strong.logits)


@pytest.mark.parametrize("mode", ["batch_statistics", "train"])
def test_a_teacher_that_changes_as_it_answers_is_not_shared(mode: Any) -> None:
    with pytest.raises(UserError, match=f"a teacher in mode {mode} changes as it answers; one in mode eval"):
        Shared(live(mode)[0])
