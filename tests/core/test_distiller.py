# SPDX-License-Identifier: Apache-2.0
import copy
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from core.networks import BLANK, CLASSES, Bridged, Distance, Small, Twice, images, small_batch
from gloo_pool import GlooPool
from queue_term import Queue
from tutelage.core import (
    Batch,
    Card,
    Distiller,
    Entry,
    Facts,
    Feeder,
    Live,
    Losses,
    Model,
    Objective,
    Reads,
    Signals,
    Tap,
    Term,
    ranks,
)
from tutelage.core.error import UserError
from tutelage.methods.logits.kd import KD
from tutelage.tasks.classification import Classification

TASK = Classification(CLASSES)


def seeded(seed: int = 0, width: int = 4) -> Small:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Small(width)


def distill(objective: Objective, student: Any = None, teacher: Any = None, **more: Any) -> Distiller:
    more = {"sample": small_batch(), **more}
    student = seeded() if student is None else student
    return Distiller(student, objective, task=TASK, teacher=seeded(1) if teacher is None else teacher, **more)


def one_step(distiller: Distiller, batch: Batch, optimizer: Any = None) -> Losses:
    losses: Losses = distiller(batch, distiller.observe(batch))
    losses.total.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    distiller.after_step(losses)
    return losses


def grads(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in module.named_parameters()}


# the dry run


def test_the_dry_run_says_what_it_found() -> None:
    distiller = distill(Objective(kd=KD(), far=Distance("bn")))
    shape = {"bn": (4, 4, 6, 6), "logits": (4, CLASSES)}
    assert distiller.report.shapes == {"student": shape, "teacher": shape}
    assert distiller.report.overwritten == ("student.bn",)
    assert distiller.report.frozen == ()


class Replacing(nn.Module):
    """A network that puts a new tensor in the place of its buffer."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = Small()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Any:
        self.seen = self.seen + 1
        return self.inner(inputs)


@pytest.mark.parametrize("mode", ["eval", "batch_statistics", "train"])
@pytest.mark.parametrize("training", [True, False])
def test_the_dry_run_leaves_everything_as_it_was(mode: Any, training: bool) -> None:
    student, teacher = Replacing().train(training), seeded(1)
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    student.inner.head.eval()
    live = Live(teacher, mode)
    flags = [part.training for part in student.modules()]
    before = copy.deepcopy((student.state_dict(), teacher.state_dict(), grads(student)))
    state = torch.get_rng_state()
    distill(Objective(kd=KD(), far=Queue()), student, live, sample=small_batch(views={"strong": images()}))
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in student.modules()] == flags
    torch.testing.assert_close((student.state_dict(), teacher.state_dict(), grads(student)), before, rtol=0, atol=0)


def test_an_overwritten_tap_is_reported_with_several_views() -> None:
    batch = small_batch(views={"strong": images(seed=1)})
    objective = Objective(far=Distance("bn"), near=Entry(Distance("bn"), student="student@strong"))
    distiller = distill(objective, sample=batch)
    assert distiller.report.overwritten == ("student.bn",)


def test_a_build_that_fails_leaves_no_hook() -> None:
    student, teacher = seeded(), seeded(1)
    with pytest.raises(UserError, match="no module or role 'mxi' in Small; did you mean mix"):
        distill(Objective(far=Distance("conv", "mxi")), student, teacher)
    assert not any(part._forward_hooks for root in (student, teacher) for part in root.modules())


def test_a_batch_of_one_is_explained() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, CLASSES)

        def forward(self, inputs: Tensor) -> Any:
            return self.head(self.norm(inputs.mean((2, 3))))

    said = "batch norm cannot train on a batch of 1 here .*: use a batch size of at least 2, or drop the last"
    with pytest.raises(UserError, match=said):
        distill(Objective(kd=KD()), Flat(), sample=small_batch(1))
    distiller = distill(Objective(kd=KD()), Flat())
    with pytest.raises(UserError, match=said):
        distiller(small_batch(1), distiller.observe(small_batch(1)))


# what no loss reaches


def test_a_loss_on_features_freezes_the_head_and_says_so() -> None:
    distiller = distill(Objective(task=0.0, far=Distance("bn")))
    names = [f"student.{name}" for name in ("head.bias", "head.weight", "mix.bias", "mix.weight")]
    assert distiller.report.frozen == tuple(names)
    assert not any(p.requires_grad for p in distiller.student.head.parameters())  # type: ignore[union-attr]
    frozen = {id(p) for p in distiller.student.mix.parameters()}  # type: ignore[union-attr]
    assert not frozen & {id(p) for group in distiller.param_groups() for p in group["params"]}
    distiller.train()
    assert not distiller.student.head.training  # type: ignore[union-attr]
    assert distiller.student.bn.training  # type: ignore[union-attr]
    distiller.close()
    assert all(p.requires_grad for p in distiller.student.parameters())


class Auxiliary(Small):
    """A network with a second head that runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Any:
        features = self.body(inputs).mean((2, 3))
        if self.training:
            self.aux(features)
        return self.head(features)


def test_a_tap_may_exist_in_training_only() -> None:
    objective = Objective(task=0.0, far=Distance("aux", "head"))
    distiller = distill(objective, Auxiliary().eval()).train()
    assert distiller.report.frozen == ("student.head.bias", "student.head.weight")
    distiller(small_batch(), distiller.observe(small_batch())).total.backward()
    assert all(p.grad is not None for p in distiller.parameters() if p.requires_grad)


class Skipping(Small):
    """A network that skips a layer at random in training."""

    def body(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.act(self.bn(self.conv(inputs)))
        return found if self.training and torch.rand(()) < 0.99 else self.mix(found)


def test_a_layer_that_is_skipped_at_random_is_not_frozen() -> None:
    assert distill(Objective(kd=KD()), Skipping()).report.frozen == ()


def test_what_a_schedule_reaches_later_is_not_frozen() -> None:
    for weight in ({"linear": [0, 1]}, {"cosine": [1, 0]}):
        assert distill(Objective(task=weight, far=Distance("bn"))).report.frozen == ()


def test_a_loss_that_trains_nothing_is_an_error() -> None:
    said = "nothing learns: no loss with a weight reaches a parameter that is trained"
    with pytest.raises(UserError, match=said):
        distill(Objective(task=0.0, kd=0.0 * KD()))
    with pytest.raises(UserError, match=said):
        distill(Objective(kd=KD()), seeded().requires_grad_(False))


def test_frozen_parts_stay_in_eval() -> None:
    student = seeded()
    student.bn.requires_grad_(False)
    distiller = distill(Objective(kd=KD()), student).train()
    assert [student.bn.training, student.drop.training, student.training] == [False, True, True]
    distiller.eval()
    assert not student.drop.training


def step_on_features(rows: Sequence[Sequence[int]]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Two steps of a loss that does not reach the head, across a bridge, under DDP if there are ranks."""
    torch.manual_seed(ranks.rank())  # DDP must broadcast the bridge's first weights
    distiller = distill(Objective(task=0.0, far=Bridged("mix")), seeded(), seeded(1, width=6)).train()
    parallel = DistributedDataParallel(distiller) if ranks.world_size() > 1 else distiller
    optimizer = torch.optim.SGD(distiller.param_groups(), lr=0.1)
    whole = small_batch(8)
    mine = torch.tensor(rows[ranks.rank()])
    batch = Batch.of(whole.inputs[mine], whole.target[mine], index=mine)
    for _ in range(2):
        losses = parallel(batch, distiller.observe(batch))
        losses.total.backward()
        optimizer.step()
        distiller.after_step(losses)
    found = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
    return found, distiller.report.frozen


def test_ddp_survives_a_loss_on_features_and_averages_bridges(gloo: GlooPool) -> None:
    (one, frozen), (two, _) = gloo.run(step_on_features, [[0, 1, 2, 3], [4, 5, 6, 7]])
    assert frozen == ("student.head.bias", "student.head.weight")
    assert "objective.terms.far.bridge.weight" in one
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert all(grad.any() for name, grad in one.items() if "bridge" in name)


# copies and the end


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_works_by_itself(copied: Any) -> None:
    distiller = distill(Objective(kd=KD(), far=Bridged("bn")), teacher=seeded(1, width=6)).eval()
    other: Distiller = copied(distiller)
    batch = small_batch()
    expected = distiller(batch, distiller.observe(batch)).total
    torch.testing.assert_close(other(batch, other.observe(batch)).total, expected)
    with torch.no_grad():
        for parameter in distiller.parameters():
            parameter.zero_()
    torch.testing.assert_close(other(batch, other.observe(batch)).total, expected)
    distiller.close()
    torch.testing.assert_close(other(batch, other.observe(batch)).total, expected)


def test_closing_removes_every_hook() -> None:
    student, teacher = seeded(), seeded(1)
    distiller = distill(Objective(kd=KD(), far=Distance("bn")), student, teacher)
    hooked = [part for root in (student, teacher) for part in root.modules() if part._forward_hooks]
    assert len(hooked) == 2
    distiller.close()
    assert not any(part._forward_hooks for part in hooked)
    with pytest.raises(RuntimeError, match="a teacher answers once a Distiller was built with it"):
        distiller.observe(small_batch())


# the teacher stands beside


def test_the_teacher_is_no_part_of_the_distiller() -> None:
    teacher = seeded(1)
    distiller = distill(Objective(kd=KD()), teacher=teacher)
    distiller.train()
    assert not any(part.training for part in teacher.modules())
    assert all(name.startswith("students.student.") for name, _ in distiller.named_parameters())
    assert {name.partition(".")[0] for name in distiller.state_dict()} == {"students", "_extra_state"}
    mine = {id(p) for p in (*distiller.parameters(), *distiller.buffers())}
    assert not mine & {id(p) for p in (*teacher.parameters(), *teacher.buffers())}
    assert set(distiller.student.state_dict()) == set(seeded().state_dict())


def test_a_student_in_the_teacher_s_place_is_not_frozen() -> None:
    student = seeded()
    with pytest.raises(UserError, match=r"teacher 'teacher' shares weights with a student, .*: pass a copy, or"):
        distill(Objective(kd=KD()), student, student)


# named sources


def mutual(live: bool) -> Distiller:
    objective = Objective(
        {
            "one": Entry(KD(), student="a", teacher="b", live=live),
            "two": Entry(KD(temperature=2.0), 0.5, student="b", teacher="a", live=live),
        },
        task=0.0,
    )
    students = {"a": seeded(), "b": seeded(1)}
    return Distiller(students, objective, task=TASK, sample=small_batch()).eval()


def test_two_students_teach_each_other_without_crossing_gradients() -> None:
    distiller, batch = mutual(live=False), small_batch()
    a, b = distiller.students.values()
    losses = distiller(batch)
    assert set(losses.parts) == {"task.a", "task.b", "one", "two"}
    losses.total.backward()
    given = copy.deepcopy((grads(a), grads(b)))
    distiller.zero_grad()
    for student, other, term, weight in ((a, b, KD(), 1.0), (b, a, KD(temperature=2.0), 0.5)):
        answer, taught = (Signals(None, {"logits": one(batch.inputs)}) for one in (student, other))
        (weight * term(answer, taught.detach(), batch)).backward()
    torch.testing.assert_close((grads(a), grads(b)), given)


def test_live_sources_do_cross() -> None:
    batch = small_batch()
    found = []
    for live in (False, True):
        distiller = mutual(live)
        distiller(batch).total.backward()
        found.append(grads(distiller.students["a"])["head.weight"])
    assert not torch.allclose(found[0], found[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("live", [False, True])
def test_the_student_s_own_view_teaches_it(live: bool) -> None:
    batch = small_batch(views={"weak": images(seed=1)})
    objective = Objective(task=0.0, own=Entry(KD(), teacher="student@weak", live=live))
    distiller = Distiller(seeded(), objective, task=TASK, sample=batch).eval()
    assert set(distiller.report.shapes) == {"student", "student@weak"}
    distiller(batch).total.backward()
    twin = seeded().eval()
    answer, weak = (Signals(None, {"logits": twin(inputs)}) for inputs in (batch.inputs, batch.views["weak"]))
    KD()(answer, weak if live else weak.detach(), batch).backward()
    torch.testing.assert_close(grads(distiller.student), grads(twin))


def test_sources_name_views_of_both_models() -> None:
    batch = small_batch(views={"strong": images(seed=1), "weak": images(seed=2)})
    entry = Entry(KD(), student="student@strong", teacher="big@weak")
    student, teacher = seeded(), seeded(1)
    distiller = distill(Objective(kd=entry), student, {"big": teacher}, sample=batch).eval()
    losses = distiller(batch, distiller.observe(batch))
    with torch.no_grad():
        answer = Signals(None, {"logits": student(batch.views["strong"])})
        taught = Signals(None, {"logits": teacher(batch.views["weak"])})
    torch.testing.assert_close(losses.parts["kd"], KD()(answer, taught, batch))
    with pytest.raises(ValueError, match=r"no signals of teacher 'big@weak': pass what distiller\.observe"):
        distiller(batch, distiller.teachers["big"].observe(batch))


def test_signals_of_the_one_teacher_need_no_name() -> None:
    distiller, batch = distill(Objective(kd=Entry(KD(), teacher="big")), teacher={"big": seeded(1)}), small_batch()
    by_name = distiller.eval()(batch, distiller.observe(batch)).total
    torch.testing.assert_close(distiller(batch, distiller.teachers["big"].observe(batch)).total, by_name)
    with pytest.raises(ValueError, match="no signals of teacher 'big'"):
        distiller(batch)


SAMPLE = small_batch(views={"strong": images()})
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no such student": (
        {"objective": Objective(kd=Entry(KD(), student="studen"))},
        "objective.kd.student: no student 'studen'; did you mean student?",
    ),
    "no such teacher": (
        {"objective": Objective(kd=Entry(KD(), teacher="techer"))},
        "objective.kd.teacher: no source 'techer'; did you mean teacher?",
    ),
    "no teacher": ({"teacher": {}}, "objective.kd: KD needs a teacher, and none was given"),
    "no such view": (
        {"objective": Objective(kd=Entry(KD(), student="student@stron")), "sample": SAMPLE},
        "the batch has no view 'stron'; did you mean strong?",
    ),
    "no views": (
        {"objective": Objective(kd=Entry(KD(), student="student@strong"))},
        "the batch has no view 'strong'; the data makes none",
    ),
    "one name twice": (
        {"teacher": {"student": seeded(1)}},
        "source 'student' is the name of a student and of a teacher; rename one",
    ),
    "a name with @": ({"teacher": {"a@b": seeded(1)}}, "source 'a@b': a name has neither '@' nor '.'"),
    "a path that leads nowhere": (
        {"objective": Objective(far=Distance("bm"))},
        "student (objective: far): no module or role 'bm' in Small; valid: act, bn, conv, drop, head, mix",
    ),
    "a module that runs twice": (
        {"objective": Objective(far=Distance("layer")), "student": Twice(), "teacher": Twice()},
        "teacher (objective: far): tap 'layer' (layer) ran 2 times in a forward: say which with `call`",
    ),
    "a role of a model without roles": (
        {"objective": Objective(far=Distance("map"))},
        (
            "student (objective: far): Small has no role 'map'; its roles: none (build it with tutelage.models.load "
            "or adapt, or name a module path)"
        ),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str) -> None:
    given, said = MISTAKES[name]
    with pytest.raises(UserError) as error:
        distill(**{"objective": Objective(kd=KD()), **given})
    assert str(error.value) == said


def test_a_term_for_hard_labels_refuses_mixing() -> None:
    class Hard(Distance):
        @property
        def card(self) -> Card:
            return replace(BLANK, labels=("hard",))

    distill(Objective(far=Hard()))
    with pytest.raises(UserError, match=r"objective\.far: Blank reads class indices only, and cutmix makes soft"):
        distill(Objective(far=Hard()), facts=Facts(mixes=("cutmix",)))


def test_a_student_lends_nothing() -> None:
    class Borrower(Distance):
        @property
        def reads(self) -> Reads:
            return Reads((Tap("logits"),), (Tap("logits"),), ("head",))

    with pytest.raises(UserError, match=r"objective\.far: modules are lent by a teacher, not by the student 'student'"):
        distill(Objective(far=Entry(Borrower(), teacher="student")))


class Caller(Term):
    """Runs a map of the student through a module of whoever stands in the teacher's place."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    @property
    def card(self) -> Card:
        return BLANK

    @property
    def reads(self) -> Reads:
        return Reads((Tap("mix"),), (Tap(self.path),), calls=(self.path,))

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        assert teacher is not None
        found: Tensor = teacher.borrowed[self.path](student["mix"])
        return found.square().mean()


def test_a_student_lends_what_is_only_called_as_it_stands() -> None:
    pair = {"student": seeded(0), "peer": seeded(1)}
    objective = Objective(far=Entry(Caller("bn"), teacher="peer"))
    distiller = Distiller(pair, objective, task=TASK, sample=small_batch())
    before = {name: value.clone() for name, value in pair["peer"].bn.state_dict().items()}
    distiller.train()
    with torch.no_grad():
        pair["peer"].bn.weight.fill_(3.0)
    sources = distiller._read(small_batch(), None)
    state = {name: value.clone() for name, value in pair["peer"].bn.state_dict().items()}  # moved by its own forward
    loss = torch.stack(
        list(objective.compare("far", *objective.pair("far", sources, pair), small_batch(), 0)[0].values())
    )
    loss.sum().backward()
    plain = nn.functional.batch_norm(
        sources["student"]["mix"], None, None, pair["peer"].bn.weight, before["bias"], True
    )
    torch.testing.assert_close(loss.sum(), plain.square().mean())
    assert all(torch.equal(value, state[name]) for name, value in pair["peer"].bn.state_dict().items())
    assert all(parameter.grad is None for parameter in pair["peer"].parameters())
    assert any(parameter.grad is not None for parameter in pair["student"].parameters())
    assert not any("lent" in name for name in distiller.state_dict())


def test_a_term_may_call_and_read_nothing_else_of_the_teacher() -> None:
    class Alone(Caller):
        @property
        def reads(self) -> Reads:
            return replace(super().reads, teacher=())

    for place in ("peer", "teacher"):
        students = {"student": seeded(0), "peer": seeded(1)}
        distiller = distill(Objective(far=Entry(Alone("bn"), teacher=place)), students)
        assert distiller(small_batch(), distiller.observe(small_batch())).parts["far"] > 0
    with pytest.raises(UserError, match="far: Alone needs a teacher, and none was given"):
        Distiller(seeded(0), Objective(far=Alone("bn")), task=TASK, sample=small_batch())


# the clock


def test_the_clock_is_saved_and_schedules_go_on() -> None:
    facts = Facts(steps_per_epoch=2, total_steps=4)
    ramp = {"linear": [0, 1], "until": "4 steps"}
    distiller = distill(Objective(kd=Entry(KD(), ramp)), facts=facts).eval()
    batch, totals = small_batch(), []
    for _ in range(4):
        losses = one_step(distiller, batch)
        totals.append((losses.total - losses.parts["task"]).item())
        saved = copy.deepcopy(distiller.state_dict())
        other = distill(Objective(kd=Entry(KD(), ramp)), student=seeded(2), facts=facts).eval()
        other.load_state_dict(saved)
        assert other.step == distiller.step
        expected = distiller(batch, distiller.observe(batch)).total
        torch.testing.assert_close(other(batch, other.observe(batch)).total, expected)
    assert totals == pytest.approx([share * losses.parts["kd"].item() for share in (0, 0.25, 0.5, 0.75)], rel=1e-5)


def test_teachers_follow_the_student_after_the_step() -> None:
    class Following(Live):  # type: ignore[misc]
        def follow(self, student: nn.Module) -> None:
            followed.append(student)

    followed: list[nn.Module] = []

    live = Following(seeded(1))
    distiller = distill(Objective(kd=KD()), teacher=live)
    losses = distiller(small_batch(), distiller.observe(small_batch()))
    assert followed == []
    distiller.after_step(losses)
    assert followed == [distiller.student]
    assert distiller.step == 1


# labels


def test_soft_labels_equal_to_hard_ones_give_the_same_loss() -> None:
    distiller = distill(Objective(kd=KD())).eval()
    hard = small_batch()
    target = torch.zeros(4, CLASSES)
    target[torch.tensor([0, 1, 3]), torch.tensor([0, 1, 2])] = 1
    soft = Batch.of(hard.inputs, target)
    assert soft.labelled.tolist() == hard.labelled.tolist() == [True, True, False, True]
    signals = distiller.observe(hard)
    torch.testing.assert_close(distiller(soft, signals).total, distiller(hard, signals).total)


def test_a_batch_without_labels_trains_on_the_teacher_alone() -> None:
    distiller = distill(Objective(kd=KD()))
    batch = Batch.of(images())
    losses = distiller(batch, distiller.observe(batch))
    assert losses.parts["task"] == 0
    losses.total.backward()
    assert all(p.grad is not None for p in distiller.parameters())


# micro-batches


@pytest.mark.parametrize("cut", [[8], [4, 4], [1, 4, 3], [2, 1, 5]])
def test_accumulation_changes_nothing(cut: list[int]) -> None:
    """The task averages over labelled rows, KD over all; the cuts hold uneven numbers of both."""
    objective = Objective(task=0.3, kd=0.7 * KD(), queue=Queue())
    distiller = distill(objective, sample=small_batch()).double().eval()
    distiller.teachers["teacher"].networks()[0].double()
    whole = small_batch(8)
    wide = Batch.of(whole.inputs.double(), whole.target)
    micro = [Batch.of(wide.inputs[rows], wide.target[rows], index=rows) for rows in torch.arange(8).split(cut)]
    distiller(wide, distiller.observe(wide)).total.backward()
    expected = copy.deepcopy(grads(distiller))
    distiller.zero_grad()
    for batch in distiller.share(micro):
        (distiller(batch, distiller.observe(batch)).total / len(micro)).backward()
    torch.testing.assert_close(grads(distiller), expected, rtol=1e-10, atol=1e-12)


# the memory of a term


def queue_of(distiller: Distiller) -> Tensor:
    term = distiller.objective.entries["queue"].term
    assert isinstance(term, Queue)
    return term.bank


def test_a_queue_moves_only_when_the_step_is_finished() -> None:
    distiller = distill(Objective(queue=Queue())).eval()
    batch = small_batch()
    first, second = (distiller(batch, distiller.observe(batch)) for _ in range(2))
    torch.testing.assert_close(first.total, second.total)
    assert not queue_of(distiller).any()
    distiller.after_step(first)
    teacher = distiller.observe(batch)["teacher"].logits
    torch.testing.assert_close(queue_of(distiller)[:4], teacher.flip(0))
    assert not queue_of(distiller)[4:].any()
    assert distiller(batch, distiller.observe(batch)).total > first.total


def test_a_queue_joins_micro_batches_in_their_order() -> None:
    whole, parts = (distill(Objective(queue=Queue())).eval() for _ in range(2))
    batch = small_batch(6)
    for distiller, batches in ((whole, [batch]), (parts, batch.split(4))):
        losses = [distiller(one, distiller.observe(one)) for one in distiller.share(batches)]
        distiller.after_step(*losses)
    assert len(batch.split(4)) == 4
    torch.testing.assert_close(queue_of(parts), queue_of(whole))
    assert queue_of(whole)[:6].any(dim=1).all()


def fill_queue(rows: Sequence[Sequence[int]], micro: int) -> Tensor:
    distiller = distill(Objective(queue=Queue())).eval()
    whole = small_batch(8)
    for _ in range(2):
        mine = torch.tensor(rows[ranks.rank()])
        batch = Batch.of(whole.inputs[mine], whole.target[mine], index=mine)
        batches = distiller.share(batch.split(micro))
        distiller.after_step(*[distiller(one, distiller.observe(one)) for one in batches])
    return queue_of(distiller)


@pytest.mark.parametrize("micro", [1, 2])
def test_a_queue_is_the_same_on_two_ranks_and_in_one_process(gloo: GlooPool, micro: int) -> None:
    uneven = [[0, 1, 2, 3, 4], [5, 6]]
    one, two = gloo.run(fill_queue, uneven, micro)
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    torch.testing.assert_close(one, fill_queue([[*uneven[0], *uneven[1]]], 1))


# feeders


class Doubling(Feeder):
    """Yields each batch, and once more with other sample ids; notes who came by."""

    def __init__(self, step: int) -> None:
        self.step, self.labels = step, set[str]()

    def feed(self, batch: Batch, students: Any, teachers: Any, draw: Any) -> Iterator[Batch]:
        self.labels.add(draw.label)
        assert not torch.is_grad_enabled()
        yield batch
        yield Batch.of(batch.inputs, batch.target, index=batch.index + self.step)


def test_feeders_work_one_after_the_other_and_leave_gradients_on() -> None:
    feeders = Doubling(10), Doubling(100)
    distiller = distill(Objective(kd=KD()), feeders=feeders)
    firsts = []
    for batch in distiller.feed(small_batch()):
        distiller(batch, distiller.observe(batch)).total.backward()
        firsts.append(int(batch.index[0]))
    assert firsts == [0, 100, 10, 110]
    assert [feeder.labels for feeder in feeders] == [{"feeder 0"}, {"feeder 1"}]
    assert list(distill(Objective(kd=KD())).feed(batch)) == [batch]


# what an optimizer gets


def test_vectors_do_not_decay_unless_a_term_says_so() -> None:
    class Own(Bridged):
        def param_groups(self) -> list[dict[str, Any]]:
            return [{"params": list(self.parameters()), "lr": 0.5, "weight_decay": 0.2}]

    objective = Objective(far=Bridged("mix"), own=Own("mix"))
    distiller = distill(objective, teacher=seeded(1, width=6))
    names = {id(p): name for name, p in distiller.named_parameters()}
    decay = {
        names[id(p)]: (group["weight_decay"], group.get("lr"))
        for group in distiller.param_groups(0.1)
        for p in group["params"]
    }
    assert decay["students.student.conv.weight"] == (0.1, None)
    assert decay["students.student.bn.weight"] == decay["students.student.conv.bias"] == (0.0, None)
    assert decay["objective.terms.far.bridge.weight"] == (0.1, None)
    assert decay["objective.terms.far.bridge.bias"] == (0.0, None)
    assert decay["objective.terms.own.bridge.weight"] == decay["objective.terms.own.bridge.bias"] == (0.2, 0.5)
    assert len(decay) == len(names) == sum(len(group["params"]) for group in distiller.param_groups())


def test_each_loss_is_measured_before_its_weight() -> None:
    distiller, batch = distill(Objective(task=0.5, kd=0.25 * KD())).eval(), small_batch()
    found = distiller.measure(batch, distiller.observe(batch))
    losses = distiller(batch, distiller.observe(batch))
    assert {label: value for label, (value, _) in found.items()} == pytest.approx(
        {label: value.item() for label, value in losses.parts.items()}
    )
    losses.total.backward()
    assert grads(distiller.student)["head.bias"] is not None
    assert all(norm > 0 for _, norm in found.values())


def test_answers_come_without_gradient() -> None:
    distiller = distill(Objective(kd=KD())).eval()
    answer = distiller.answer(small_batch())
    assert not answer.requires_grad
    torch.testing.assert_close(answer, distiller.student(small_batch().inputs))


# compiled


def compiled(distiller: Distiller) -> Distiller:
    distiller.compile(fullgraph=True, backend="aot_eager")
    for teacher in distiller.teachers.values():
        assert isinstance(teacher, Live)
        assert teacher.reader is not None
        teacher.reader.compile(fullgraph=True, backend="aot_eager")
    return distiller


# the compiler looks at `.grad` of what a compiled student gives, and hides the warning in its own way
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_equals_eager_after_siblings_with_fewer_taps() -> None:
    torch._dynamo.reset()
    batch = small_batch()
    compiled_ones = [Objective(kd=KD()), Objective(kd=KD(), far=Bridged("bn"), near=Distance("head"))]
    for objective in compiled_ones:
        eager = distill(objective, teacher=seeded(1, width=6)).eval()
        expected = eager(batch, eager.observe(batch))
        expected.total.backward()
        fast = compiled(copy.deepcopy(eager))
        fast.zero_grad()
        losses = fast(batch, fast.observe(batch))
        losses.total.backward()
        torch.testing.assert_close(dict(losses.parts), expected.parts)
        torch.testing.assert_close(grads(fast), grads(eager))
    torch._dynamo.reset()


def test_a_model_that_was_called_compiled_is_refused() -> None:
    torch._dynamo.reset()
    network = torch.compile(seeded(), backend="eager")
    network(images())
    with pytest.raises(UserError, match=r"tap '_orig_mod.bn' .* was compiled before the Distiller was built"):
        distill(Objective(far=Distance("_orig_mod.bn", "bn")), network)
    torch._dynamo.reset()


# the whole


def test_a_user_s_own_loop_lowers_the_loss() -> None:
    torch.manual_seed(0)
    distiller = distill(Objective(task=0.1, kd=0.9 * KD(), far=Bridged("mix")), teacher=seeded(1, width=6)).train()
    optimizer = torch.optim.Adam(distiller.param_groups(weight_decay=0.01), lr=0.02)
    batch = small_batch(8)
    totals = [one_step(distiller, batch, optimizer).total.item() for _ in range(15)]
    assert totals[-1] < 0.8 * totals[0]
    assert distiller.step == 15


def test_a_model_with_roles_prepares_its_own_input() -> None:
    from tutelage.core import InputSpec

    student = Model(seeded(), roles={"map": Tap("mix")}, input=InputSpec(mean=(0.5,) * 3, std=(0.25,) * 3))
    teacher = Model(seeded(1), roles={"map": Tap("mix")})
    distiller = distill(Objective(far=Distance("map")), student, teacher).eval()
    batch = small_batch()
    losses: Mapping[str, Tensor] = distiller(batch, distiller.observe(batch)).parts
    with torch.no_grad():
        one, two = student.module.body((batch.inputs - 0.5) / 0.25), teacher.module.body(batch.inputs)  # type: ignore[operator]
    torch.testing.assert_close(losses["far"], (one - two).square().mean())


class Parts(Term):
    """Parts by name, without a teacher."""

    @property
    def reads(self) -> Reads:
        return Reads((Tap("logits"),))

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch, *draws: Any) -> Any:
        assert teacher is None
        return {"size": student.logits.square().mean(), "shift": student.logits.mean()}


def test_a_term_without_a_teacher_gets_none_and_names_its_parts() -> None:
    distiller = distill(Objective(own=2.0 * Parts()), teacher=seeded(1)).eval()
    losses = distiller(small_batch(), distiller.observe(small_batch()))
    assert set(losses.parts) == {"task", "own.size", "own.shift"}
    sums = losses.parts["task"] + 2 * (losses.parts["own.size"] + losses.parts["own.shift"])
    torch.testing.assert_close(losses.total, sums)
