# SPDX-License-Identifier: Apache-2.0
import copy
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, distributed, nn

from gloo_pool import GlooPool
from method_case import MethodCase, gaussian, labelled_batch
from oracles import crd as oracle
from peak import peak
from tutelage.core import Batch, Distiller, Draw, Facts, Objective, Signals, ranks
from tutelage.core.error import UserError
from tutelage.core.term import Outcome
from tutelage.functional import block
from tutelage.methods.relations import crd as home
from tutelage.methods.relations.crd import CRD, crd, normalizer, scores
from tutelage.tasks.classification import Classification

Arrays = dict[str, NDArray[Any]]
TARGETS = torch.arange(100) % 5


def case(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: CRD(**{"negatives": 20, "width": 4, **options}),
        student=lambda seed: gaussian(seed, {"pooled": (6, 3)}),
        teacher=lambda seed: gaussian(seed + 1000, {"pooled": (6, 5)}),
        facts=Facts(num_classes=5, num_samples=100, targets=TARGETS),
    )


def total(outcome: Outcome) -> Tensor:
    return outcome.parts["student_anchor"] + outcome.parts["teacher_anchor"]


def unit_rows(seed: int, rows: int, width: int) -> Tensor:
    return nn.functional.normalize(gaussian(seed, {"v": (rows, width)})["v"].double(), dim=1)


# the authors' numbers

LAYERS = {"embed_s.linear": "embed_student", "embed_t.linear": "embed_teacher"}
MEMORIES = {"memory_v1": "memory_student", "memory_v2": "memory_teacher"}


def loaded(arrays: Arrays, meta: dict[str, Any], dtype: torch.dtype) -> CRD:
    """A term with the case's weights and memories."""
    term = CRD(negatives=meta["nce_k"], temperature=meta["nce_t"], momentum=meta["nce_m"], width=meta["feat_dim"])
    term.build(*features(arrays, "", dtype), Facts(num_samples=meta["n_data"]))
    weights = {
        f"{ours}.{part}": torch.tensor(arrays[f"w_{theirs}.{part}"])
        for theirs, ours in LAYERS.items()
        for part in ("weight", "bias")
    }
    memories = {ours: torch.tensor(arrays[f"w_contrast.{theirs}"]) for theirs, ours in MEMORIES.items()}
    term.to(dtype).load_state_dict({**weights, **memories}, strict=False)
    return term


def features(arrays: Arrays, suffix: str, dtype: torch.dtype) -> tuple[Signals, Signals]:
    student, teacher = (torch.tensor(arrays[f"{side}_feat{suffix}"], dtype=dtype) for side in "st")
    return Signals(None, {"pooled": student.requires_grad_()}), Signals(None, {"pooled": teacher})


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        term = loaded(arrays, meta, dtype)
        index, contrast = torch.tensor(arrays["rand_index"]), torch.tensor(arrays["rand_contrast_index"])
        batch = Batch.of(torch.zeros(len(index), 1), index=index)
        sides = [features(arrays, step, dtype) for step in ("", "_step2")]
        first = term(*sides[0], batch, contrast)
        embeddings = {side: first.kept[f"{name}"] for side, name in (("s", "student"), ("t", "teacher"))}
        free = {"s_feat": sides[0][0]["pooled"], "s_feat_step2": sides[1][0]["pooled"]} | {
            "w_" + own.replace("embed_student", "embed_s.linear").replace("embed_teacher", "embed_t.linear"): weight
            for own, weight in term.named_parameters()
        }
        answer |= explained("loss", total(first), free, suffix)
        answer |= explained("loss_student_anchor", first.parts["student_anchor"], free, suffix)
        answer |= explained("loss_teacher_anchor", first.parts["teacher_anchor"], free, suffix)
        term.commit(first.kept)
        after: dict[str, Any] = {f"out_{name}_after": getattr(term, ours).clone() for name, ours in MEMORIES.items()}
        constants = term.log_z.exp()
        second = term(*sides[1], batch, contrast)
        answer |= explained("loss_step2", total(second), free, suffix)
        term.commit(second.kept)
        after |= {f"out_{name}_after2": getattr(term, ours) for name, ours in MEMORIES.items()}
        after |= {"out_Z_v1": constants[0], "out_Z_v2": constants[1]}
        after |= {f"out_embed_{side}": rows for side, rows in embeddings.items()}
        answer |= {f"{name}{suffix}": value for name, value in after.items()}
    return {name: value for name, value in answer.items() if name in arrays}


def explained(name: str, loss: Tensor, free: dict[str, Tensor], suffix: str) -> dict[str, Any]:
    """A loss and its gradients; zeros for what it does not depend on."""
    marker = "" if name == "loss" else f"__{name}"
    found = torch.autograd.grad(loss, list(free.values()), allow_unused=True, retain_graph=True)
    gradients = zip(free.items(), found, strict=True)
    return {f"{name}{suffix}": loss} | {
        f"grad_{own}{marker}{suffix}": torch.zeros_like(tensor) if slope is None else slope
        for (own, tensor), slope in gradients
    }


# the equation, worked out by loops


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 4),
    width=st.integers(1, 4),
    negatives=st.integers(1, 6),
    temperature=st.floats(0.05, 2),
    momentum=st.floats(0, 0.9),
    steps=st.integers(1, 2),
)
def test_equals_the_loops(
    seed: int, rows: int, width: int, negatives: int, temperature: float, momentum: float, steps: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    term = CRD(negatives=negatives, temperature=temperature, momentum=momentum, width=width)
    one, other = (Signals(None, {"pooled": unit_rows(seed + n, rows, width)}) for n in (0, 1))
    term.build(one, other, Facts(num_samples=9))
    term.double()
    with torch.no_grad():
        for layer in (term.embed_student, term.embed_teacher):
            layer.weight.copy_(torch.eye(width))
            layer.bias.zero_()
    student, teacher = term.memory_student.numpy().copy(), term.memory_teacher.numpy().copy()
    constants: tuple[float | None, float | None] = (None, None)
    index = torch.randperm(9, generator=generator)[:rows]
    for _ in range(steps):
        others = torch.stack([torch.randperm(9, generator=generator)[:negatives] for _ in range(rows)])
        contrast = torch.cat([index[:, None], others], dim=1)
        expected = oracle.crd(
            one["pooled"].numpy(),
            other["pooled"].numpy(),
            student,
            teacher,
            contrast.numpy(),
            temperature,
            momentum,
            *constants,
        )
        outcome = term(one, other, Batch.of(torch.zeros(rows, 1), index=index), contrast)
        term.commit(outcome.kept)
        assert outcome.parts["student_anchor"].item() == pytest.approx(expected.student_anchor, rel=1e-9)
        assert outcome.parts["teacher_anchor"].item() == pytest.approx(expected.teacher_anchor, rel=1e-9)
        assert total(outcome).item() == pytest.approx(expected.loss, rel=1e-9)
        assert term.log_z.exp().tolist() == pytest.approx([expected.student_z, expected.teacher_z], rel=1e-9)
        student, teacher = expected.student_memory, expected.teacher_memory
        constants = expected.student_z, expected.teacher_z
        np.testing.assert_allclose(term.memory_student.numpy(), student, rtol=1e-9)
        np.testing.assert_allclose(term.memory_teacher.numpy(), teacher, rtol=1e-9)


def test_gradcheck() -> None:
    anchors, memory = unit_rows(0, 3, 4).requires_grad_(), unit_rows(1, 8, 4)
    index = torch.tensor([[0, 3, 4], [1, 6, 7], [2, 0, 5]])
    log_z = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def loss(e: Tensor) -> Tensor:
        o = scores(e, memory, index, 0.3)
        return torch.stack(list(crd(o, 0.5 * o, log_z, num_samples=8).values())).sum()

    assert torch.autograd.gradcheck(loss, anchors)


# which samples are contrasted


def drawn(term: CRD, index: Tensor, step: int = 0, seed: int = 0) -> Tensor:
    batch = Batch.of(torch.zeros(len(index), 1), index=index)
    empty = Signals(None, {})
    return term.draw(empty, empty, batch, Draw(seed, step, "crd"))


def built(negatives: int, targets: Tensor | None, count: int = 100, **options: Any) -> CRD:
    term = CRD(negatives=negatives, width=4, **options)
    given = Signals(None, {"pooled": torch.zeros(2, 3)})
    term.build(given, given, Facts(num_samples=count, targets=targets))
    return term


def test_negatives_are_distinct_samples_of_other_classes() -> None:
    targets = torch.tensor([0] * 10 + [1] * 30 + [2] * 60)[torch.randperm(100)]
    found = drawn(built(40, targets), torch.arange(100))
    assert found.shape == (100, 41)
    assert torch.equal(found[:, 0], torch.arange(100))
    assert (targets[found[:, 1:]] != targets[:, None]).all()
    assert all(len(row.unique()) == 41 for row in found)


def test_all_samples_of_other_classes_come_in_turn() -> None:
    found = drawn(built(80, TARGETS), torch.arange(100))
    for row in range(100):
        assert set(found[row, 1:].tolist()) == set((TARGETS[row] != TARGETS).nonzero().flatten().tolist())


def test_more_negatives_than_there_are_repeat() -> None:
    targets = torch.tensor([0] * 90 + [1] * 10)
    found = drawn(built(50, targets), torch.arange(100))
    assert (targets[found[:, 1:]] != targets[:, None]).all()
    assert all(len(row[1:].unique()) == 50 for row in found[90:])  # the small class has 90 others
    assert all(len(row[1:].unique()) <= 10 for row in found[:90])


def test_a_sample_without_a_label_has_all_others_for_negatives() -> None:
    targets = TARGETS.clone()
    targets[::2] = -1
    found = drawn(built(99, targets), torch.tensor([0, 4]))
    assert all(set(row.tolist()) == set(range(100)) for row in found)
    labelled = drawn(built(90, targets), torch.tensor([1]))[0, 1:]
    assert (targets[labelled] != targets[1]).all()
    assert (targets[labelled] == -1).any()
    assert drawn(built(99, None), torch.arange(100)).sort(dim=1).values.equal(torch.arange(100).expand(100, -1))


def test_the_positive_may_be_any_of_the_class() -> None:
    term = built(20, TARGETS, positive="class")
    positives = torch.stack([drawn(term, torch.arange(100), step)[:, 0] for step in range(40)])
    assert (TARGETS[positives] == TARGETS).all()
    assert all(len(column.unique()) > 10 for column in positives.T)


def test_the_draw_is_a_function_of_seed_step_and_sample() -> None:
    term = built(20, TARGETS)
    whole = drawn(term, torch.arange(100))
    assert torch.equal(drawn(term, torch.tensor([7, 3])), whole[[7, 3]])
    assert not torch.equal(drawn(term, torch.arange(100), step=1), whole)
    assert not torch.equal(drawn(term, torch.arange(100), seed=1), whole)


# the memory


def step(term: CRD, index: Tensor, seed: int = 0) -> Outcome:
    drawn_ = gaussian(seed, {"student": (len(index), 3), "teacher": (len(index), 5)})
    student, teacher = (Signals(None, {"pooled": drawn_[side].double()}) for side in ("student", "teacher"))
    batch = Batch.of(torch.zeros(len(index), 1), index=index)
    outcome: Outcome = term(student, teacher, batch, term.draw(student, teacher, batch, Draw(0, seed, "crd")))
    return outcome


def test_a_memory_starts_uniform_and_its_rows_become_unit_vectors() -> None:
    term = CRD(negatives=5, width=128)
    student, teacher = (Signals(None, {"pooled": torch.zeros(2, width)}) for width in (3, 5))
    term.build(student, teacher, Facts(num_samples=500))
    for memory in (term.memory_student, term.memory_teacher):
        assert memory.shape == (500, 128)
        assert memory.abs().max() <= (3 / 128) ** 0.5
        assert memory.std().item() == pytest.approx((1 / 128) ** 0.5, rel=0.02)
    term.double().commit(step(term, torch.tensor([4, 2])).kept)
    assert term.memory_teacher[[4, 2]].norm(dim=1).tolist() == pytest.approx([1, 1])


def test_a_sample_met_twice_counts_once_the_last_time() -> None:
    term, other = case().built(dtype=torch.float64), case().built(dtype=torch.float64)
    assert isinstance(term, CRD)
    assert isinstance(other, CRD)
    kept = step(term, torch.tensor([7, 3, 7])).kept
    term.commit(kept)
    other.commit({name: rows[1:] for name, rows in kept.items()})
    torch.testing.assert_close(term.memory_student, other.memory_student)
    torch.testing.assert_close(term.memory_teacher, other.memory_teacher)


def test_the_normalisers_come_from_the_first_step_and_stay() -> None:
    term = case().built(dtype=torch.float64)
    assert isinstance(term, CRD)
    first = step(term, torch.tensor([7, 3, 1]))
    assert not term.started  # forward changes nothing
    term.commit(first.kept)
    log_z = term.log_z.clone()
    assert term.started
    term.commit(step(term, torch.tensor([9, 2]), seed=5).kept)
    assert torch.equal(term.log_z, log_z)


def test_after_the_first_step_samples_are_independent() -> None:
    term = case().built(dtype=torch.float64)
    assert isinstance(term, CRD)
    term.commit(step(term, torch.tensor([7, 3, 1])).kept)
    student, teacher = case().tensors(dtype=torch.float64)
    batch = case().batch()
    whole = case().loss(term, student, teacher, batch, case().draws(term, student, teacher, batch))
    halves = []
    for rows in ([0, 1, 2], [3, 4, 5]):
        part, (one, other) = case().rows(torch.tensor(rows), student, teacher)
        assert one is not None
        halves.append(case().loss(term, one, other, part))
    torch.testing.assert_close(torch.stack(halves).mean(), whole)


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Linear(4, width)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.features(x).relu())
        return scores


IMAGES = gaussian(3, {"x": (100, 4)})["x"]


def distiller() -> Distiller:
    torch.manual_seed(0)
    term = CRD(negatives=30, width=4, student_tap="features", teacher_tap="features")
    objective = Objective(task=1.0, crd=0.8 * term)
    batch = batches([0, 1])
    teacher = Net(6)
    return Distiller(Net(3), objective, task=Classification(5), teacher=teacher, sample=batch, facts=case().facts)


def batches(rows: list[int]) -> Batch:
    index = torch.tensor(rows)
    return Batch.of(IMAGES[index], TARGETS[index], index=index)


def train(machine: Distiller, steps: range, micro: int = 1) -> list[float]:
    optimizer = torch.optim.SGD(machine.param_groups(), lr=0.1)
    values = []
    for number in steps:
        rows = [(17 * number + 7 * n) % 100 for n in range(8)]
        parts = machine.share(batches(rows).split(micro))
        losses = [machine(batch, machine.observe(batch)) for batch in parts]
        torch.stack([loss.total for loss in losses]).mean().backward()
        values.append(torch.stack([loss.total for loss in losses]).mean().item())
        optimizer.step()
        optimizer.zero_grad()
        machine.after_step(*losses)
    return values


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped() -> None:
    whole = distiller()
    expected = train(whole, range(6))
    stopped = distiller()
    assert train(stopped, range(3)) == expected[:3]
    resumed = distiller()
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    assert train(resumed, range(3, 6)) == expected[3:]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_micro_batches_change_nothing_once_the_normalisers_stand() -> None:
    whole, parts = distiller(), distiller()
    train(whole, range(1))
    parts.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert train(whole, range(1, 4)) == pytest.approx(train(parts, range(1, 4), micro=2), rel=1e-5)
    torch.testing.assert_close(whole.objective.terms["crd"].memory_student, parts.objective.terms["crd"].memory_student)


def on_a_rank() -> dict[str, Tensor]:
    """Two steps, with two rows on the first rank and three on the other; the kept rows are gathered."""
    term = case().built(dtype=torch.float64)
    assert isinstance(term, CRD)
    index = torch.tensor([7, 3, 1, 9, 4])
    for number in range(2):
        outcome = step(term, index, number)
        start, stop = ((0, 2), (2, 5))[distributed.get_rank()]
        term.commit({name: ranks.gather(rows[start:stop]) for name, rows in outcome.kept.items()})
    return dict(term.state_dict())


def test_memories_of_ranks_are_those_of_one_process(gloo: GlooPool) -> None:
    alone = case().built(dtype=torch.float64)
    assert isinstance(alone, CRD)
    for number in range(2):
        alone.commit(step(alone, torch.tensor([7, 3, 1, 9, 4]), number).kept)
    for state in gloo.run(on_a_rank):
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(state[name], value)


# scores of a large memory


def test_picking_first_and_scoring_first_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    anchors, memory = unit_rows(0, 5, 4).requires_grad_(), unit_rows(1, 40, 4)
    index = torch.randint(40, (5, 3))
    found = []
    for dense, size in ((16, 2**22), (0, 2**22), (0, 30)):
        monkeypatch.setattr(home, "DENSE", dense)
        monkeypatch.setattr(block, "SIZE", size)
        given = scores(anchors, memory, index)
        found.append((given, torch.autograd.grad(given.square().sum(), anchors)[0]))
    for value, gradient in found[1:]:
        torch.testing.assert_close(value, found[0][0])
        torch.testing.assert_close(gradient, found[0][1])


def test_memory_of_the_scores_grows_with_the_batch_only_as_the_scores_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "DENSE", 0)
    monkeypatch.setattr(block, "SIZE", 2**12)
    bank = torch.randn(1000, 32)

    def held(rows: int) -> int:
        anchors = torch.randn(rows, 32, requires_grad=True)
        index = torch.randint(1000, (rows, 32))
        return peak(lambda: scores(anchors, bank, index).sum().backward())

    assert held(256) < 256 * 32 * 32 * 4 / 2  # half of what the picked vectors alone would hold
    assert held(256) < 8 * held(32)


# limits and identities


def test_equal_scores_give_what_the_noise_says() -> None:
    even = torch.zeros(2, 4, dtype=torch.float64)
    log_z = normalizer(even, 12).expand(2)  # x = 1/12
    noise = 3 / 12
    expected = -math.log((1 / 12) / (1 / 12 + noise)) - 3 * math.log(noise / (1 / 12 + noise))
    for part in crd(even, even, log_z, num_samples=12).values():
        assert part.item() == pytest.approx(expected, rel=1e-6)


def test_a_nearer_positive_and_farther_negatives_score_better() -> None:
    log_z = torch.zeros(2)
    middle = torch.zeros(1, 3, requires_grad=True)
    loss = crd(middle, middle.detach(), log_z, num_samples=5)["student_anchor"]
    gradient = torch.autograd.grad(loss, middle)[0]
    assert gradient[0, 0] < 0
    assert (gradient[0, 1:] > 0).all()


# odd cases


def test_a_small_temperature_does_not_overflow() -> None:
    anchors, memory = unit_rows(0, 3, 4).float().requires_grad_(), unit_rows(1, 8, 4).float()
    index = torch.tensor([[0, 3, 4], [1, 6, 7], [2, 0, 5]])
    found = scores(anchors, memory, index, 1e-3)
    log_z = normalizer(found, 8).expand(2)
    parts = crd(found, found, log_z, num_samples=8)
    assert found.exp().isinf().any()  # the scores themselves would
    assert parts["student_anchor"].isfinite()
    assert torch.autograd.grad(parts["student_anchor"], anchors)[0].isfinite().all()


def test_no_rows_give_connected_zeros() -> None:
    term = case().built()
    student = torch.zeros(0, 3, requires_grad=True)
    batch = labelled_batch(torch.zeros(0, dtype=torch.int64))
    outcome = case().outcome(term, {"pooled": student}, {"pooled": torch.zeros(0, 5)}, batch)
    assert total(outcome).item() == 0
    total(outcome).backward()
    assert student.grad is not None
    before = copy.deepcopy(term.state_dict())
    term.commit(outcome.kept)
    torch.testing.assert_close(dict(term.state_dict()), dict(before))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [1e4, -1e4, 0.0])
def test_half_precision_extremes_and_constants(dtype: torch.dtype, value: float) -> None:
    here = case()
    term = here.built(dtype=dtype)
    student = {"pooled": torch.full((6, 3), value, dtype=dtype, requires_grad=True)}
    teacher = {"pooled": torch.full((6, 5), -value, dtype=dtype)}
    outcome = here.outcome(term, student, teacher, here.batch())
    assert total(outcome).dtype == torch.float32
    assert total(outcome).isfinite()
    total(outcome).backward()
    assert student["pooled"].grad is not None
    assert student["pooled"].grad.isfinite().all()
    term.commit(outcome.kept)
    assert all(buffer.isfinite().all() for buffer in term.buffers())


# errors


def test_a_set_of_unknown_size() -> None:
    said = "crd remembers every training sample, and needs a data set of known size"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        built(4, None, count=0)


def test_a_single_class() -> None:
    said = "crd contrasts samples of different classes, and all samples are of one class"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        built(4, torch.zeros(100, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"positive": "relax"}, "positive 'relax' is not known; valid: class, self"),
        ({"temperature": 0}, "temperature must be > 0, not 0"),
        ({"momentum": 1}, "momentum is a share in [0, 1), not 1"),
        ({"negatives": 0}, "negatives and width must be at least 1, not 0 and 128"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        CRD(**options)
